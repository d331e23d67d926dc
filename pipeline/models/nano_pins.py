"""SHA-256 and size in bytes of the files of phi4-nano. Written by scripts/pin_nano.py."""

PINS: dict[str, tuple[str, int]] = {}
