"""Which source a stream's spec names."""

from __future__ import annotations

from actors.questions import video_params
from actors.spec import StreamSpec
from actors.stages import StagesInfo
from ingest.container import ContainerSource, Pace
from ingest.processes import DecoderProcesses
from ingest.source import AudioParams, ChannelMode, Source
from pipeline.stream_params import StreamParams


def open_source(
    spec: StreamSpec, params: StreamParams, audio: AudioParams, info: StagesInfo, processes: DecoderProcesses
) -> Source:
    """Return the source that `spec` names, not entered yet."""
    if spec.channels is not None:
        audio = audio.model_copy(update={"channels": ChannelMode(spec.channels)})
    video = None
    # Without eyes the session refuses scenes, before the source is opened.
    if params.scenes is not None and info.eyes is not None:
        video = video_params(info.eyes, params.scenes.sample_interval_ms)
    return ContainerSource(spec.source, audio, Pace(spec.pace), processes, video=video)
