"""`surtitle serve`."""

from __future__ import annotations

import asyncio

from actors.cli.console import note, set_up_logging
from actors.service import run_service
from actors.settings import Settings


def serve_forever(settings: Settings) -> None:
    """Run the service until SIGINT or SIGTERM.

    Raises:
        SurtitleError: if it cannot be started.
    """
    set_up_logging("%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(run_service(settings, note))
