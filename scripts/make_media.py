"""Make the project's own demo and test media with flite, espeak-ng, sox and PyAV.

    python scripts/make_media.py [FOLDER]        # FOLDER defaults to media/

| file           | what it holds                                                                             |
|----------------|-------------------------------------------------------------------------------------------|
| demo.wav       | about 40 s of English, one voice, sentences with pauses between them; demo.txt has the words |
| two_voices.wav | two people on a call, one a channel, taking turns; two_voices.txt has the words             |
| german.wav     | one German sentence; german.txt has the words                                              |
| long.wav       | more than 20 s of speech without a pause of 200 ms; long.txt has the words                  |
| noise.wav      | a fan and hum without any speech                                                            |
| demo.mp4       | about 20 s in a factory hall, drawn: five scenes, a sentence about each; demo-video.txt     |

All sound is 16 kHz, 16 bit, that of demo.mp4 in AAC; its video is 640 x 360 in H.264, 10 frames a second. The same
tool versions give the same bytes on every run. A folder that this version of the script has filled is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

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


WIDTH_PX, HEIGHT_PX, FRAMES_HZ = 640, 360, 10
Picture = NDArray[np.uint8]  # [HEIGHT_PX, WIDTH_PX, 3], RGB
Colour = tuple[int, int, int]


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


def bar(picture: Picture, box: tuple[int, int, int, int], colour: Colour) -> None:
    """Fill a rectangle (left, top, width, height); what lies outside the picture is left out."""
    left, top, width, height = box
    picture[max(top, 0) : max(top + height, 0), max(left, 0) : max(left + width, 0)] = colour


def disc(picture: Picture, x: int, y: int, radius: int, colour: Colour) -> None:
    """Fill a circle."""
    rows, columns = np.ogrid[:HEIGHT_PX, :WIDTH_PX]
    picture[(columns - x) ** 2 + (rows - y) ** 2 <= radius**2] = colour


def hall(wall: Colour, floor: Colour) -> Picture:
    """Return an empty hall: wall, floor, and three windows."""
    picture = np.empty((HEIGHT_PX, WIDTH_PX, 3), np.uint8)
    picture[:230], picture[230:] = wall, floor
    for left in (60, 260, 460):
        bar(picture, (left, 40, 120, 70), (190, 215, 235))
        bar(picture, (left + 57, 40, 6, 70), wall)
    return picture


def draw_line(share: float) -> Picture:
    """Blue pumps on a belt that moves."""
    picture = hall((205, 205, 195), (120, 115, 110))
    bar(picture, (0, 250, WIDTH_PX, 24), (45, 45, 50))
    for index in range(-2, 4):
        left = round(index * 180 + share * 300)
        bar(picture, (left, 190, 90, 60), (30, 80, 170))
        bar(picture, (left + 90, 205, 30, 18), (30, 80, 170))
        disc(picture, left + 45, 185, 30, (60, 120, 210))
    return picture


def draw_door(share: float) -> Picture:  # noqa: ARG001 - nothing moves here
    """A closed door with a red light above it."""
    picture = hall((150, 140, 130), (80, 75, 70))
    bar(picture, (200, 0, 240, 300), (100, 105, 115))
    bar(picture, (220, 90, 200, 210), (60, 65, 75))
    bar(picture, (317, 90, 6, 210), (25, 25, 30))
    disc(picture, 320, 45, 34, (255, 120, 110))
    disc(picture, 320, 45, 24, (225, 15, 15))
    return picture


def draw_screen(share: float) -> Picture:
    """A dark screen with bars that rise, one of them red."""
    picture = np.full((HEIGHT_PX, WIDTH_PX, 3), (20, 24, 30), np.uint8)
    bar(picture, (40, 30, 560, 300), (10, 60, 50))
    for index, full in enumerate((0.3, 0.5, 0.4, 0.95, 0.35)):
        height = round(240 * full * (0.6 + 0.4 * share))
        bar(picture, (90 + 100 * index, 310 - height, 60, height), (235, 50, 40) if full > 0.9 else (70, 200, 120))
    return picture


def draw_cart(share: float) -> Picture:
    """A small yellow cart that crosses an empty hall; nothing else moves."""
    picture = hall((190, 200, 190), (135, 135, 130))
    left = round(20 + share * 560)
    bar(picture, (left, 290, 34, 16), (240, 200, 20))
    disc(picture, left + 8, 308, 5, (20, 20, 20))
    disc(picture, left + 26, 308, 5, (20, 20, 20))
    return picture


def draw_team(share: float) -> Picture:  # noqa: ARG001 - nothing moves here
    """Four people in orange vests with white helmets, close."""
    picture = hall((225, 225, 215), (160, 150, 140))
    for index in range(4):
        x = 100 + 145 * index
        bar(picture, (x - 45, 170, 90, 190), (240, 120, 20))
        bar(picture, (x - 45, 240, 90, 14), (240, 240, 200))
        disc(picture, x, 130, 38, (215, 170, 140))
        disc(picture, x, 112, 34, (250, 250, 250))
    return picture


SHOWN: tuple[tuple[Line, Callable[[float], Picture]], ...] = (
    (Line("Good morning. In this hall we build blue water pumps.", 1.0), draw_line),
    (Line("The red light above the door means that a machine has stopped.", 1.0), draw_door),
    (Line("On the screen you can see that one of them is far too hot.", 1.0), draw_screen),
    (Line("A small yellow cart is already on its way with a new filter.", 1.2), draw_cart),
    (Line("Now the whole team can go back to work. Thank you.", 1.0), draw_team),
)


def make_video(folder: Path, work: Path) -> None:
    """Write demo.mp4: each scene as long as what is said about it and the pause behind that."""
    parts = [work / f"shown{index}.wav" for index in range(len(SHOWN))]
    pictures: list[Picture] = []
    end_s = 0.0
    for part, (line, draw) in zip(parts, SHOWN, strict=True):
        say(part, line, work)
        end_s += duration_s(part)
        num_frames = round(end_s * FRAMES_HZ) - len(pictures)
        pictures += [draw(index / num_frames) for index in range(num_frames)]
    sox(*parts, work / "shown.wav")
    with wave.open(str(work / "shown.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
    encode_video(folder / "demo.mp4", pictures, samples)
    (folder / "demo-video.txt").write_text(" ".join(line.text for line, _ in SHOWN) + "\n", encoding="utf-8")


def encode_video(path: Path, pictures: Sequence[Picture], samples: NDArray[np.int16]) -> None:
    """Write pictures as H.264 and int16[n] at 16 kHz as AAC, by one thread each, so that bytes never change."""
    with av.open(str(path), "w", container_options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("libx264", rate=FRAMES_HZ, options={"crf": "26", "preset": "medium"})
        video.width, video.height, video.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        video.codec_context.thread_count = 1
        sound = container.add_stream("aac", rate=16_000, layout="mono", bit_rate=48_000)
        packets: list[av.Packet] = []
        for picture in pictures:
            packets += video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        for start in range(0, len(samples), 1_024):
            block = av.AudioFrame.from_ndarray(samples[np.newaxis, start : start + 1_024], format="s16", layout="mono")
            block.sample_rate, block.pts, block.time_base = 16_000, start, Fraction(1, 16_000)
            packets += sound.encode(block)
        packets += [*video.encode(None), *sound.encode(None)]
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)


MAKERS = (make_demo, make_two_voices, make_german, make_long, make_noise, make_video)
NAMES = (
    *("demo.wav", "demo.txt", "two_voices.wav", "two_voices.txt", "german.wav", "german.txt"),
    *("long.wav", "long.txt", "noise.wav", "demo.mp4", "demo-video.txt"),
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
