"""Make the project's own demo and test media with flite, espeak-ng and sox.

    python scripts/make_media.py [FOLDER]        # FOLDER defaults to media/

| file           | what it holds                                                                             |
|----------------|-------------------------------------------------------------------------------------------|
| demo.wav       | about 40 s of English, one voice, sentences with pauses between them; demo.txt has the words |
| two_voices.wav | two people on a call, one a channel, taking turns; two_voices.txt has the words             |
| german.wav     | one German sentence; german.txt has the words                                              |
| long.wav       | more than 20 s of speech without a pause of 200 ms; long.txt has the words                  |
| noise.wav      | a fan and hum without any speech                                                            |

All are 16 kHz, 16 bit. The same tool versions give the same bytes on every run. A folder that this version of the
script has filled is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = {"flite": "flite", "espeak-ng": "espeak-ng", "sox": "sox"}
STAMP_NAME = ".made-by"
TOOL_TIMEOUT_S = 60


@dataclass(frozen=True)
class Line:
    """One sentence and the pause behind it."""

    text: str
    pause_s: float
    voice: str = "slt"


DEMO = (
    Line("Good morning, and welcome to the factory.", 0.8),
    Line("Before we start, please put on your safety glasses.", 0.9),
    Line("This line builds water pumps, and it runs day and night.", 1.0),
    Line("The red light above the door means that a machine has stopped.", 0.7),
    Line("When that happens, a voice tells the whole team what went wrong.", 1.2),
    Line("Last week the cooling system failed, and nobody could hear the warning.", 0.9),
    Line("So we added live captions to every screen on the floor.", 1.1),
    Line("Now everyone can read what is said, even when the room is very loud.", 0.8),
    Line("It took us three days to set up, and it saved us hours of work.", 1.0),
    Line("Thank you for listening, and enjoy the tour.", 0.8),
)

TWO_VOICES = (
    Line("Hello, this is the control room.", 0.9, "slt"),
    Line("Hello, I am standing next to the second pump.", 1.0, "rms"),
    Line("Can you see what is wrong with it?", 0.8, "slt"),
    Line("Yes, the pressure is too low and the filter is full of sand.", 1.0, "rms"),
    Line("Please close the valve and clean the filter.", 0.9, "slt"),
    Line("I will call you back in ten minutes.", 0.8, "rms"),
)

GERMAN = "Guten Morgen und herzlich willkommen. Heute zeigen wir Ihnen die neue Maschine."

LONG = (
    "when the night shift came in they found that the water had been running over the floor for hours "
    "and that somebody had left the big door open so that the wind was blowing dust and leaves into the hall "
    "where the new machines were standing and because nobody knew who had the key to the office "
    "they called the manager at home and asked him to come back at once and bring the other engineer along "
    "with a lamp and a pump and as many dry towels as he could carry in the back of his old green car"
)


class MediaToolError(Exception):
    """A tool is missing or failed."""


def check_tools() -> None:
    """Raise MediaToolError, naming the Debian packages to install, when a tool is not on PATH."""
    missing = [package for tool, package in PACKAGES.items() if shutil.which(tool) is None]
    if missing:
        raise MediaToolError(
            f"cannot make media: {', '.join(missing)} not found on PATH; install with: "
            f"sudo apt-get install {' '.join(missing)}"
        )


def run_tool(*command: str | Path) -> None:
    """Run one tool; its error output becomes the message of the MediaToolError that a failure raises."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    if done.returncode != 0:
        raise MediaToolError(f"{arguments[0]} failed with exit status {done.returncode}: {done.stderr.strip()}")


def sox(*arguments: str | Path) -> None:
    """Run sox with repeatable random numbers and without dither, so that output bytes never change."""
    run_tool("sox", "-R", "-D", "-V1", *arguments)


def silence(path: Path, seconds: float) -> None:
    """Write `seconds` of digital silence as 16 kHz mono."""
    sox("-n", "-r", "16000", "-c", "1", "-b", "16", path, "trim", "0", f"{seconds:.3f}")


def say(path: Path, line: Line, work: Path) -> None:
    """Write `line` as spoken by flite, silence trimmed at both ends, with its pause behind it."""
    raw = work / f"{path.stem}.flite.wav"
    run_tool("flite", "-voice", line.voice, "-t", line.text, "-o", raw)
    sox(raw, "-r", "16000", "-b", "16", path, *TRIM, "gain", "-n", "-6", "pad", "0.05", f"{line.pause_s:.3f}")


TRIM = ("silence", "1", "0.02", "0.3%", "reverse", "silence", "1", "0.02", "0.3%", "reverse")


def duration_s(path: Path) -> float:
    """Return the length of a sound file as sox reports it."""
    done = subprocess.run(["soxi", "-D", str(path)], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True)
    return float(done.stdout)


def make_demo(folder: Path, work: Path) -> None:
    """Write demo.wav: the sentences of DEMO one behind the other."""
    parts = [work / f"demo{index}.wav" for index in range(len(DEMO))]
    for part, line in zip(parts, DEMO, strict=True):
        say(part, line, work)
    lead = work / "lead.wav"
    silence(lead, 0.5)
    sox(lead, *parts, folder / "demo.wav")
    (folder / "demo.txt").write_text(" ".join(line.text for line in DEMO) + "\n", encoding="utf-8")


def make_two_voices(folder: Path, work: Path) -> None:
    """Write two_voices.wav: slt on the left channel, rms on the right, in turns."""
    sides: dict[str, list[Path]] = {"slt": [], "rms": []}
    for index, line in enumerate(TWO_VOICES):
        part = work / f"turn{index}.wav"
        say(part, line, work)
        quiet = work / f"turn{index}.quiet.wav"
        silence(quiet, duration_s(part))
        for voice, parts in sides.items():
            parts.append(part if voice == line.voice else quiet)
    for voice, parts in sides.items():
        sox(*parts, work / f"{voice}.wav")
    sox("-M", work / "slt.wav", work / "rms.wav", folder / "two_voices.wav")
    text = "".join(f"{0 if line.voice == 'slt' else 1}\t{line.text}\n" for line in TWO_VOICES)
    (folder / "two_voices.txt").write_text(text, encoding="utf-8")


def make_german(folder: Path, work: Path) -> None:
    """Write german.wav with espeak-ng's German voice."""
    raw = work / "german.raw.wav"
    run_tool("espeak-ng", "-v", "de", "-s", "140", "-w", raw, GERMAN)
    sox(raw, "-r", "16000", "-b", "16", folder / "german.wav", "gain", "-n", "-6", "pad", "0.4", "0.8")
    (folder / "german.txt").write_text(GERMAN + "\n", encoding="utf-8")


def make_long(folder: Path, work: Path) -> None:
    """Write long.wav: one sentence without punctuation, its inner silences cut to less than 100 ms."""
    raw = work / "long.raw.wav"
    run_tool("flite", "-voice", "slt", "-t", LONG, "-o", raw)
    squeeze = ("silence", "1", "0.02", "0.3%", "-1", "0.08", "0.3%")
    sox(raw, "-r", "16000", "-b", "16", folder / "long.wav", *squeeze, *TRIM, "gain", "-n", "-6", "pad", "0.4", "0.8")
    (folder / "long.txt").write_text(LONG + "\n", encoding="utf-8")


def make_noise(folder: Path, work: Path) -> None:
    """Write noise.wav: 20 s of a fan (brown and pink noise) over mains hum."""
    fan, hum = work / "fan.wav", work / "hum.wav"
    form = ("-r", "16000", "-c", "1", "-b", "16")
    sox("-n", *form, fan, "synth", "20", "brownnoise", "mix", "pinknoise", "gain", "-20")
    sox("-n", *form, hum, "synth", "20", "sine", "100", "sine", "50", "remix", "-", "gain", "-30")
    sox("-m", fan, hum, folder / "noise.wav")


MAKERS = (make_demo, make_two_voices, make_german, make_long, make_noise)
NAMES = tuple(
    name
    for stem in ("demo", "two_voices", "german", "long", "noise")
    for name in ((f"{stem}.wav",) if stem == "noise" else (f"{stem}.wav", f"{stem}.txt"))
)


def recipe_hash() -> str:
    """Return what identifies this version of the recipe: the hash of this file."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def is_made(folder: Path) -> bool:
    """Return whether this version of the script has filled `folder`."""
    stamp = folder / STAMP_NAME
    return (
        all((folder / name).is_file() for name in NAMES)
        and stamp.is_file()
        and stamp.read_text(encoding="utf-8") == recipe_hash()
    )


def make_media(folder: Path) -> bool:
    """Fill `folder` with the media above unless that is done; return whether anything was made.

    Files appear whole or not at all: they are made beside the folder and moved in.

    Raises:
        MediaToolError: a tool is missing or failed.
    """
    if is_made(folder):
        return False
    check_tools()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as made_name, tempfile.TemporaryDirectory() as work:
        made = Path(made_name)
        for make in MAKERS:
            make(made, Path(work))
        (made / STAMP_NAME).write_text(recipe_hash(), encoding="utf-8")
        for name in (*NAMES, STAMP_NAME):
            (made / name).replace(folder / name)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the script; return its exit status."""
    parser = argparse.ArgumentParser(description="Make the demo and test media.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("media"))
    folder: Path = parser.parse_args(arguments).folder
    try:
        was_made = make_media(folder)
    except MediaToolError as error:
        print(f"make_media: {error}", file=sys.stderr)
        return 1
    print(f"{'made' if was_made else 'already there'}: {', '.join(NAMES)} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
