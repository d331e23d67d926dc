"""Configuration files, one for each way to run the service."""
