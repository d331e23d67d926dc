"""`surtitle bench`: what the service reaches, measured the way docs/performance.md defines it."""
