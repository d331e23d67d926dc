"""`surtitle ask` and `surtitle summarise`: start everything, ask once, print what is answered."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import typer
from pydantic import ValidationError

from actors.cli.console import note, progress, set_up_logging
from actors.cli.interrupts import Interrupts
from actors.cli.spec import check_path
from actors.questions import Answer, AskSpec, SummariseSpec
from actors.service import GatewayClient, open_runtime
from actors.settings import Settings
from pipeline.errors import ConfigError

_INTERRUPTED = 130
_MAX_TEXT_BYTES = 1 << 20

_Ask = Callable[[GatewayClient], Awaitable[Answer]]


def ask_question(
    settings: Settings, question: str, pictures: tuple[str, ...], sound: str | None, *, is_json: bool
) -> int:
    """Print the answer to one question, and return the exit status.

    Raises:
        SurtitleError: if a file, the service or the models cannot be used, or nothing was asked.
        typer.BadParameter: if there are too many pictures, too much or nothing is asked, or about nothing.
    """
    # Told here, before any model is loaded.
    if sound is None and not question.strip():
        raise typer.BadParameter("nothing is asked: give QUESTION, or --sound with a spoken one")
    if sound is None and not pictures:
        raise typer.BadParameter("the question is about nothing: give --picture or --sound")
    paths = {
        "pictures": tuple(map(check_path, pictures)),
        "sound": None if sound is None else check_path(sound),
    }
    try:
        spec = AskSpec.model_validate({"question": question, **paths})
    except ValidationError as exc:
        raise _bad_parameter(exc) from exc
    return _print_answer(settings, lambda gateway: gateway.answer(spec), is_json=is_json)


def summarise(settings: Settings, source: str | None, text: Path | None, *, is_json: bool) -> int:
    """Print the summary of the speech of `source`, or of the text file `text`, and return the exit status.

    Raises:
        SurtitleError: if the file, the service or the models cannot be used.
        typer.BadParameter: if the text is too long.
    """
    try:
        spec = SummariseSpec(
            source=None if source is None else check_path(source), text=None if text is None else _read(text)
        )
    except ValidationError as exc:
        raise _bad_parameter(exc) from exc
    return _print_answer(settings, lambda gateway: gateway.summarise(spec), is_json=is_json)


def _print_answer(settings: Settings, ask: _Ask, *, is_json: bool) -> int:
    set_up_logging("surtitle: %(message)s")
    answer = asyncio.run(_answer(settings, ask))
    if answer is None:
        note("surtitle: interrupted before there was an answer")
        return _INTERRUPTED
    sys.stdout.write(f"{answer.model_dump_json() if is_json else answer.text}\n")
    if answer.guard is not None and not is_json:
        note(f"surtitle: the answer was cut by a guard ({answer.guard})")
    return 0


async def _answer(settings: Settings, ask: _Ask) -> Answer | None:
    with Interrupts() as interrupts, progress("checking the weights") as report, interrupts.cancelling_this_task():
        try:
            async with open_runtime(settings, report) as gateway:
                interrupts.arm()
                report("waiting for the answer")
                return await ask(gateway)
        except asyncio.CancelledError:
            if not interrupts.take_cancellation():
                raise
            return None


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TEXT_BYTES + 1)
        if len(data) > _MAX_TEXT_BYTES:
            raise ConfigError(f"{path} has more than {_MAX_TEXT_BYTES >> 20} MiB: give a part of it")
        return data.decode()
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8 text (byte {exc.start}): convert it") from exc


def _bad_parameter(error: ValidationError) -> typer.BadParameter:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    return typer.BadParameter(f"{details[0]['loc'][0]}: {details[0]['msg']}")
