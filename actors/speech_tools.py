"""The tools that speak, flite and espeak-ng, run as processes for `pipeline.teach`, which starts none itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

from pipeline.errors import MediaError

TOOLS = ("flite", "espeak-ng")
_TIMEOUT_S = 30.0


def check_speech_tools() -> None:
    """Raise MediaError, naming the Debian packages to install, when a tool is not on PATH."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise MediaError(
            f"cannot make speech: {', '.join(missing)} not found on PATH; install with: "
            f"sudo apt-get install {' '.join(missing)}"
        )


def run_speech_tool(command: Sequence[str], text: str, timeout_s: float = _TIMEOUT_S) -> bytes:
    """Run `command` with `text` on its standard input and return its standard output.

    Raises:
        MediaError: the tool is not on PATH, fails, or takes longer than `timeout_s`; nothing of the text is in it.
    """
    name = command[0]
    try:
        done = subprocess.run(list(command), input=text.encode(), capture_output=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise MediaError(
            f"cannot make speech: {name} not found on PATH; install with: sudo apt-get install {name}"
        ) from None
    except subprocess.TimeoutExpired:  # its message has the command in it, and so the text
        raise MediaError(f"{name} was ended after {timeout_s:g} s without an answer: try it by hand") from None
    if done.returncode != 0:
        raise MediaError(f"{name} failed with exit status {done.returncode}: try it by hand")
    return done.stdout
