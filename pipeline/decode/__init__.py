"""The shared decoder: scheduler, key/value memory, engine, guards."""
