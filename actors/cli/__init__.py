"""The command line. `surtitle --help` must be quick: commands import what they need when they run."""

from __future__ import annotations

import os
import sys

from actors.cli.app import app
from actors.cli.console import fail
from actors.threads import COMPUTE_ENVIRONMENT
from pipeline.errors import SurtitleError


def main() -> None:
    """Run the command line: exit 0, 1 for a job that failed, 2 for a wrong usage."""
    for name, value in COMPUTE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        app()
    except SurtitleError as exc:
        sys.exit(fail(exc))
    except BaseExceptionGroup as group:
        expected, unexpected = group.split(SurtitleError)
        if expected is None or unexpected is not None:
            raise
        sys.exit(fail(expected))
