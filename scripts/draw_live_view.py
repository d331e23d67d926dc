"""Draws docs/images/caption.svg and demo-phi4.svg: the live view of both demonstrations, in the middle of a sentence.

What they show is what the models answer here and now; nothing in them is written by hand.
"""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from actors.cli.demo import DEMO_SETTINGS  # noqa: E402 - the checkout comes first
from actors.cli.live_view import ViewState  # noqa: E402
from actors.demo.media import make_demo_media  # noqa: E402
from pipeline.audio.encoder_window import EncoderParams  # noqa: E402
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings  # noqa: E402
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams  # noqa: E402
from pipeline.local import LocalModels, caption_samples  # noqa: E402
from pipeline.models.weights import ModelParams  # noqa: E402
from pipeline.records import RECORD_ADAPTER, BaseRecord, PartialRecord  # noqa: E402
from pipeline.stream_params import StreamParams  # noqa: E402
from pipeline.text.transcripts_to_summaries import SummaryParams  # noqa: E402
from tests.media import read_pcm  # noqa: E402

SURTITLE = (sys.executable, "-c", "from actors.cli import main; main()")
DEMO_SEED = 5
SHOWN_AT_SHARE = 0.8
"""How much of the speech has been heard in the picture."""


def main() -> None:
    """Caption media/demo.wav (made by scripts/make_media.py) and the video of `surtitle demo phi4`; draw both views."""
    draw(whisper_records(), 40_000, "surtitle caption media/demo.wav --summary 0.25", "caption.svg")
    draw(nano_records(), 50_000, "surtitle demo phi4", "demo-phi4.svg")


def whisper_records() -> Iterator[BaseRecord]:
    """Yield what the edge tier says of the demo speech."""
    samples = read_pcm(ROOT / "media" / "demo.wav")
    model = ModelParams()
    models = LocalModels(UtterancesToEmbeddings(model, EncoderParams()), DecodeEngine(model, DecoderParams()))
    params = StreamParams(summary=SummaryParams(every_minutes=0.25, num_sentences=2))
    yield from caption_samples(np.atleast_2d(samples), params, models, "demo")


def nano_records() -> Iterator[BaseRecord]:
    """Yield what phi4-nano says of its demonstration, as fast as it can."""
    with tempfile.TemporaryDirectory() as folder:
        media = make_demo_media(Path(folder), DEMO_SEED)
        options = (
            "--runtime",
            "local",
            "--fast",
            "--format",
            "jsonl",
            "--translate",
            "de",
            "--summary",
            "0.25",
            "--scenes",
        )
        command = [
            *SURTITLE,
            "caption",
            str(media.video),
            "--config",
            "phi4",
            "--model",
            "phi4-nano",
            "--language",
            "en",
        ]
        sets = [argument for setting in DEMO_SETTINGS for argument in ("--set", setting)]
        done = subprocess.run([*command, *options, *sets], capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        yield RECORD_ADAPTER.validate_json(line)


def draw(records: Iterator[BaseRecord], length_ms: int, title: str, name: str) -> None:
    """Draw the view as it stood at `SHOWN_AT_SHARE` of `length_ms`, in the middle of a sentence."""
    state = ViewState()
    for record in records:
        state.apply(record)
        is_open = isinstance(record, PartialRecord) and 0 < record.stable_chars < len(record.text)
        if is_open and record.end_ms > SHOWN_AT_SHARE * length_ms:
            break
    console = Console(record=True, width=104, file=io.StringIO(), force_terminal=True)
    console.print(state.render())
    svg = console.export_svg(title=title)
    # Rich names fonts on a host elsewhere; a picture in a README should load nothing.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (ROOT / "docs" / "images" / name).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
