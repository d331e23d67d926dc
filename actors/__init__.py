"""What runs the DAG: Ray actors and Serve deployments, sessions, Redis, the command line."""
