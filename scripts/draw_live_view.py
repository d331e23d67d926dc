"""Draws docs/images/caption.svg: the live view of the demo speech, in the middle of a sentence.

What it shows is what the models answer here and now; nothing in it is written by hand.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
from rich.console import Console

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from actors.cli.live_view import ViewState  # noqa: E402 - the checkout comes first
from pipeline.audio.encoder_window import EncoderParams  # noqa: E402
from pipeline.audio.utterances_to_embeddings import UtterancesToEmbeddings  # noqa: E402
from pipeline.decode.embeddings_to_hypotheses import DecodeEngine, DecoderParams  # noqa: E402
from pipeline.local import LocalModels, caption_samples  # noqa: E402
from pipeline.models.weights import ModelParams  # noqa: E402
from pipeline.records import PartialRecord  # noqa: E402
from pipeline.stream import StreamParams  # noqa: E402
from pipeline.text.transcripts_to_summaries import SummaryParams  # noqa: E402
from tests.media import read_pcm  # noqa: E402

SHOWN_AT_SHARE = 0.8
"""How much of the speech has been heard in the picture."""


def main() -> None:
    """Caption media/demo.wav (made by scripts/make_media.py) and draw the view as it stood at `SHOWN_AT_SHARE`."""
    samples = read_pcm(ROOT / "media" / "demo.wav")
    model = ModelParams()
    models = LocalModels(UtterancesToEmbeddings(model, EncoderParams()), DecodeEngine(model, DecoderParams()))
    params = StreamParams(summary=SummaryParams(every_minutes=0.25, num_sentences=2))
    records = caption_samples(np.atleast_2d(samples), params, models, "demo")
    state = ViewState()
    for record in records:
        state.apply(record)
        is_open = isinstance(record, PartialRecord) and 0 < record.stable_chars < len(record.text)
        if is_open and record.end_ms > SHOWN_AT_SHARE * len(samples) / 16:
            break
    console = Console(record=True, width=104, file=io.StringIO(), force_terminal=True)
    console.print(state.render())
    svg = console.export_svg(title="surtitle caption media/demo.wav --summary 0.25")
    # Rich names fonts on a host elsewhere; a picture in a README should load nothing.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    (ROOT / "docs" / "images" / "caption.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
