"""The pure stages of the DAG: what they compute, without Ray, Redis, sockets, clocks or event loops."""
