"""Sessions over real in-process stages, a real Redis-protocol server and a source made of samples."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from types import TracebackType
from typing import Self, cast

import numpy as np
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from actors.dispatch import DispatchParams
from actors.follow import follow
from actors.local_stages import LocalStages
from actors.metrics import Metrics
from actors.publisher import Publisher
from actors.session import Scheduling, Session, SessionState
from actors.stages import Stages
from actors.store import RedisParams, Store
from ingest.source import AudioBlock, SourceGap, SourceInfo, VideoFrame
from pipeline.audio.encoder_window import EncoderParams
from pipeline.decode.embeddings_to_hypotheses import DecoderParams
from pipeline.errors import ConfigError, MediaError
from pipeline.items import Frame, Job, Outcome, Snapshot
from pipeline.local import LocalModels, caption_samples
from pipeline.models.phi4.tiny import make_tiny
from pipeline.models.weights import ModelParams
from pipeline.records import BaseRecord, FinalRecord, HealthRecord
from pipeline.stream_params import CaptionParams, StreamParams
from pipeline.text.transcripts_to_summaries import SummaryParams
from pipeline.timebase import SAMPLE_RATE_HZ
from pipeline.vision.params import SceneParams, VisionParams
from tests.media import read_pcm
from tests.models import base_encoder, base_engine
from tests.stores import comparable

# The stages live on the event loop on which they were opened.
pytestmark = pytest.mark.asyncio(loop_scope="module")

BLOCK_SAMPLES = 1_000


class SampleSource:
    """A source that has its sound in memory: blocks of an awkward length, then its end, or an error."""

    def __init__(self, samples: NDArray[np.int16], *, failure: str | None = None, waits_at_end: bool = False) -> None:
        self.samples = np.atleast_2d(samples)
        self.info = SourceInfo(
            num_channels=self.samples.shape[0],
            native_rate_hz=SAMPLE_RATE_HZ,
            native_channels=self.samples.shape[0],
            duration_s=None,
            container="memory",
            codec="pcm",
        )
        self.is_closed = False
        self.is_waited_for = False
        self.was_waited_for_when_closed = False
        self.has_delivered_all = asyncio.Event()
        self.num_blocks = 0
        self.on_block: Callable[[], None] = lambda: None
        self._failure = failure
        self._waits_at_end = waits_at_end

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.is_closed = True
        self.was_waited_for_when_closed = self.is_waited_for

    async def __aiter__(self) -> AsyncIterator[AudioBlock | SourceGap | VideoFrame]:
        for start in range(0, self.samples.shape[1], BLOCK_SAMPLES):
            self.num_blocks += 1
            self.on_block()
            yield AudioBlock(np.ascontiguousarray(self.samples[:, start : start + BLOCK_SAMPLES]))
        if self._failure is not None:
            raise MediaError(self._failure)
        self.is_waited_for = self._waits_at_end
        self.has_delivered_all.set()
        try:
            if self._waits_at_end:
                await asyncio.Event().wait()
        finally:
            self.is_waited_for = False


async def read_all(store: Store, stream_id: str) -> list[BaseRecord]:
    client = store.client()
    try:
        return [entry.record async for entry in follow(client, stream_id)]
    finally:
        await client.aclose()


@pytest.fixture(scope="module")
def sound(speech) -> NDArray[np.int16]:
    return read_pcm(speech)[: 12 * SAMPLE_RATE_HZ]


@pytest.fixture(scope="module")
def local_models() -> LocalModels:
    return LocalModels(base_encoder(), base_engine())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local_stages() -> AsyncIterator[Stages]:
    stages = await LocalStages.open(
        ModelParams(partial_dtype="float32"), EncoderParams(), DecoderParams(), DispatchParams(), Metrics()
    )
    yield stages
    await stages.aclose()


@pytest_asyncio.fixture(loop_scope="module")
async def store(redis_params: RedisParams) -> AsyncIterator[Store]:
    async with Store(redis_params) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def publisher(store: Store) -> AsyncIterator[Publisher]:
    async with Publisher(store) as opened:
        yield opened


@pytest.fixture(scope="module")
def oracle(sound, local_models: LocalModels) -> list[BaseRecord]:
    return caption_samples(np.atleast_2d(sound), StreamParams(), local_models, "oracle")


async def run_session(session: Session) -> None:
    await session.open()
    await session.run()


async def test_a_session_publishes_what_the_oracle_says(sound, oracle, local_stages: Stages, publisher, store):
    source = SampleSource(sound)
    session = Session("s", StreamParams(), source, local_stages, publisher, scheduling=Scheduling.BY_SAMPLE)
    await run_session(session)
    records = await read_all(store, "s")
    assert session.state is SessionState.ENDED
    assert source.is_closed
    for kind in ("final", "partial", "health"):
        assert comparable(records, kind) == comparable(oracle, kind)
    assert all(record.emitted_at and record.utc_start for record in records)


async def test_finals_by_time_equal_finals_by_sample(sound, oracle, local_stages: Stages, publisher, store):
    await run_session(Session("s", StreamParams(), SampleSource(sound), local_stages, publisher))
    records = await read_all(store, "s")
    without_revision = [
        [{key: value for key, value in record.items() if key != "revision"} for record in comparable(some, "final")]
        for some in (records, oracle)
    ]
    assert without_revision[0] == without_revision[1]


class WatchedStages:
    """Stages that count how often they are asked for their cadence."""

    def __init__(self, stages: Stages) -> None:
        self.info = stages.info
        self.submit = stages.submit
        self.withdraw = stages.withdraw
        self.aclose = stages.aclose
        self.num_asked = 0

    @property
    def cadence_ms(self) -> int:
        self.num_asked += 1
        return 2_000


@pytest.mark.parametrize("scheduling", Scheduling)
async def test_only_partials_by_time_come_as_often_as_the_stages_can_bear(
    sound, local_stages: Stages, publisher, scheduling: Scheduling
):
    stages = WatchedStages(local_stages)
    source = SampleSource(sound[: 3 * SAMPLE_RATE_HZ])
    await run_session(Session("s", StreamParams(), source, stages, publisher, scheduling=scheduling))
    assert (stages.num_asked > 0) == (scheduling is Scheduling.BY_TIME)


async def test_two_interleaved_sessions_equal_each_alone(  # noqa: PLR0917 - fixtures are arguments
    sound, oracle, local_models: LocalModels, local_stages: Stages, publisher, store
):
    other = np.ascontiguousarray(sound[5 * SAMPLE_RATE_HZ : 9 * SAMPLE_RATE_HZ])
    other_oracle = caption_samples(np.atleast_2d(other), StreamParams(), local_models, "oracle")
    sessions = [
        Session(name, StreamParams(), SampleSource(samples), local_stages, publisher, scheduling=Scheduling.BY_SAMPLE)
        for name, samples in (("a", sound), ("b", other))
    ]
    await asyncio.gather(*map(run_session, sessions))
    for name, expected in (("a", oracle), ("b", other_oracle)):
        records = await read_all(store, name)
        for kind in ("final", "partial"):
            assert comparable(records, kind) == comparable(expected, kind)


async def test_a_stop_turns_the_open_utterance_into_a_final(sound, local_stages: Stages, publisher, store):
    source = SampleSource(sound[: 2 * SAMPLE_RATE_HZ], waits_at_end=True)
    session = Session("s", StreamParams(), source, local_stages, publisher)
    await session.open()
    running = asyncio.create_task(session.run())
    await source.has_delivered_all.wait()
    session.request_stop()
    await running
    records = await read_all(store, "s")
    finals = [record for record in records if isinstance(record, FinalRecord)]
    assert [final.close_reason for final in finals] == ["end"]
    assert finals[0].text
    assert isinstance(records[-1], HealthRecord)
    assert records[-1].event == "ended"


async def test_a_stop_ends_the_hearing_of_a_source_that_always_has_more(sound, local_stages: Stages, publisher, store):
    source = SampleSource(sound)
    session = Session("s", StreamParams(), source, local_stages, publisher)

    def stop_at_block_30() -> None:
        if source.num_blocks == 30:
            session.request_stop()

    source.on_block = stop_at_block_30
    await run_session(session)
    assert source.num_blocks == 30
    last = (await read_all(store, "s"))[-1]
    assert isinstance(last, HealthRecord)
    assert (last.event, last.end_ms) == ("ended", 29 * BLOCK_SAMPLES * 1_000 // SAMPLE_RATE_HZ)


async def test_a_session_that_is_cancelled_waits_for_its_source_no_more_when_it_closes_it(
    sound, local_stages: Stages, publisher
):
    source = SampleSource(sound[: 2 * SAMPLE_RATE_HZ], waits_at_end=True)
    session = Session("s", StreamParams(), source, local_stages, publisher)
    await session.open()
    running = asyncio.create_task(session.run())
    await source.has_delivered_all.wait()
    assert source.is_waited_for
    running.cancel()
    await asyncio.wait({running})
    assert running.cancelled()
    assert source.is_closed
    assert not source.was_waited_for_when_closed


class FailingObserver:
    """Fails at the first outcome."""

    def on_record(self, record: BaseRecord) -> None: ...

    def on_snapshot(self, snapshot: Snapshot) -> None: ...

    def on_keyframes_dropped(self, num_keyframes: int) -> None: ...

    def on_outcome(self, snapshot: Snapshot, outcome: Outcome) -> None:
        raise ArithmeticError(f"cannot count {outcome.key} of {snapshot.key}")


async def test_a_session_that_breaks_leaves_no_snapshot_to_the_garbage_collector(
    sound, local_stages: Stages, publisher
):
    left: list[str] = []
    hooks = sys.get_asyncgen_hooks()

    def note(generator: AsyncGenerator[object, None]) -> None:
        left.append(generator.__qualname__)
        assert hooks.finalizer is not None
        hooks.finalizer(generator)

    session = Session("s", StreamParams(), SampleSource(sound), local_stages, publisher, observer=FailingObserver())
    await session.open()
    sys.set_asyncgen_hooks(finalizer=note)
    try:
        with pytest.raises(ArithmeticError):
            await session.run()
    finally:
        sys.set_asyncgen_hooks(finalizer=hooks.finalizer)
    assert session.state is SessionState.BROKEN
    assert "StageDriver.submit" not in left


async def test_a_source_that_fails_midway_gives_its_final_then_a_failed_record(
    sound, local_stages: Stages, publisher, store
):
    source = SampleSource(sound[: 2 * SAMPLE_RATE_HZ], failure="the file is damaged at 2.0 s")
    session = Session("s", StreamParams(), source, local_stages, publisher)
    await run_session(session)
    records = await read_all(store, "s")
    assert session.failure == "the file is damaged at 2.0 s"
    assert [record.kind for record in records if record.kind != "partial"] == ["health", "final", "health"]
    assert isinstance(records[-1], HealthRecord)
    assert (records[-1].event, records[-1].message) == ("failed", "the file is damaged at 2.0 s")


async def test_a_language_the_model_does_not_know_is_refused_before_anything_is_published(
    sound, local_stages: Stages, publisher: Publisher
):
    params = StreamParams(captions=CaptionParams(translate_to=("fr",)))
    session = Session("s", params, SampleSource(sound), local_stages, publisher)
    with pytest.raises(ConfigError, match="does not translate to 'fr'"):
        await session.open()
    assert publisher.counters.published == 0


async def test_a_second_run_of_a_stream_goes_on_where_the_first_ended(sound, local_stages: Stages, publisher, store):
    for _ in range(2):
        await run_session(Session("s", StreamParams(), SampleSource(sound), local_stages, publisher))
    records = await read_all(store, "s")
    finals = [record for record in records if isinstance(record, FinalRecord)]
    assert [final.sequence for final in finals] == list(range(1, len(finals) + 1))
    half = len(finals) // 2
    assert [final.text for final in finals[:half]] == [final.text for final in finals[half:]]
    assert finals[half].start_ms >= finals[half - 1].end_ms
    assert [record.event for record in records if isinstance(record, HealthRecord)][-2:] == ["resumed", "ended"]


class VideoSource(SampleSource):
    """Sound with `frames` among it, each when its time has come."""

    def __init__(self, samples: NDArray[np.int16], frames: list[Frame]) -> None:
        super().__init__(samples)
        self.frames = frames

    async def __aiter__(self) -> AsyncIterator[AudioBlock | SourceGap | VideoFrame]:
        position, unseen = 0, list(self.frames)
        async for block in super().__aiter__():
            yield block
            assert isinstance(block, AudioBlock)
            position += block.samples.shape[1]
            while unseen and unseen[0].start_sample < position:
                frame = unseen.pop(0)
                yield VideoFrame(frame.start_sample, frame.pixels)


SEEING = StreamParams(
    scenes=SceneParams(min_interval_ms=1_000),
    captions=CaptionParams(has_partials=False),
    summary=SummaryParams(every_minutes=0.1, method="generated"),
)


def frames_of(seed: int) -> list[Frame]:
    """Two pictures a second for five seconds; they change every second and a half."""
    pictures = np.random.default_rng(seed).integers(0, 40, (4, 56, 84, 3)).astype(np.uint8)
    for number, (row, column) in enumerate(((0, 0), (28, 42), (0, 42), (28, 0))):
        pictures[number, row : row + 28, column : column + 42] += 200
    return [Frame(number * SAMPLE_RATE_HZ // 2, pictures[number // 3]) for number in range(10)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def seeing_stages(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stages]:
    name = str(make_tiny(tmp_path_factory.mktemp("tiny-phi4")))
    stages = await LocalStages.open(
        ModelParams(name=name, encoder_threads=1, decoder_threads=1),
        EncoderParams(),
        DecoderParams(),
        DispatchParams(),
        Metrics(),
        vision=VisionParams(max_crops=2),
    )
    yield stages
    await stages.aclose()


def timeless(records: list[BaseRecord], kind: str) -> list[dict[str, object]]:
    """Like `comparable`, but for what depends on when an answer came."""
    return [{key: value for key, value in each.items() if key != "revision"} for each in comparable(records, kind)]


async def test_scenes_and_summaries_of_interleaved_sessions_equal_those_of_each_alone(
    sound, seeing_stages: Stages, publisher, store
):
    async def run(stream_id: str, seed: int) -> None:
        source = VideoSource(sound[seed * SAMPLE_RATE_HZ : (seed + 5) * SAMPLE_RATE_HZ], frames_of(seed))
        session = Session(stream_id, SEEING, source, seeing_stages, publisher, scheduling=Scheduling.BY_SAMPLE)
        await run_session(session)
        assert session.state is SessionState.ENDED
        assert session.last_frame is not None
        assert np.array_equal(session.last_frame.pixels, source.frames[-1].pixels)

    async with asyncio.timeout(150):
        await asyncio.gather(run("a", 0), run("b", 2))
        await run("a-alone", 0)
        await run("b-alone", 2)
    for name in ("a", "b"):
        together, alone = await read_all(store, name), await read_all(store, f"{name}-alone")
        for kind in ("scene", "summary", "final", "error"):
            assert timeless(together, kind) == timeless(alone, kind)
        scenes = [record for record in together if record.kind == "scene"]
        assert [scene.start_ms for scene in scenes] == [0, 1_500, 3_000, 4_500]
        assert not comparable(together, "error")
        assert isinstance(together[-1], HealthRecord)


class Held:
    """Stages that answer jobs when they are told to."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self.is_released = asyncio.Event()

    def __getattr__(self, name: str) -> object:
        return getattr(self._stages, name)

    async def submit_job(self, job: Job) -> Outcome:
        await self.is_released.wait()
        return await self._stages.submit_job(job)


class DropCounter(Metrics):
    """Lets the stages go on when two keyframes were dropped."""

    def __init__(self, stages: Held) -> None:
        super().__init__()
        self._stages = stages

    def on_keyframes_dropped(self, num_keyframes: int) -> None:
        super().on_keyframes_dropped(num_keyframes)
        if self.registry.get_sample_value("surtitle_keyframes_dropped_total") == 2:
            self._stages.is_released.set()


async def test_keyframes_that_a_newer_one_replaced_are_counted(sound, seeing_stages: Stages, publisher, store):
    stages = Held(seeing_stages)
    metrics = DropCounter(stages)
    source = VideoSource(sound[: 5 * SAMPLE_RATE_HZ], frames_of(1))
    async with asyncio.timeout(60):
        await run_session(Session("slow-eyes", SEEING, source, cast(Stages, stages), publisher, observer=metrics))
    scenes = [record for record in await read_all(store, "slow-eyes") if record.kind == "scene"]
    assert [scene.start_ms for scene in scenes] == [0, 4_500]
    assert metrics.registry.get_sample_value("surtitle_keyframes_dropped_total") == 2


async def test_scenes_of_a_second_run_lie_where_its_sound_lies(sound, seeing_stages: Stages, publisher, store):
    async with asyncio.timeout(120):
        for _ in range(2):
            source = VideoSource(sound[: 5 * SAMPLE_RATE_HZ], frames_of(0))
            await run_session(Session("s", SEEING, source, seeing_stages, publisher, scheduling=Scheduling.BY_SAMPLE))
    records = await read_all(store, "s")
    resumed_ms = next(
        record.start_ms for record in records if isinstance(record, HealthRecord) and record.event == "resumed"
    )
    assert resumed_ms >= 5_000
    starts_ms = [record.start_ms for record in records if record.kind == "scene"]
    assert starts_ms == [at_ms + since_ms for since_ms in (0, resumed_ms) for at_ms in (0, 1_500, 3_000, 4_500)]


async def test_by_time_the_newest_picture_is_looked_at_and_the_end_waits_for_it(
    sound, seeing_stages: Stages, publisher, store
):
    source = VideoSource(sound[: 5 * SAMPLE_RATE_HZ], frames_of(1))
    async with asyncio.timeout(60):
        await run_session(Session("s", SEEING, source, seeing_stages, publisher))
    records = await read_all(store, "s")
    starts_ms = [record.start_ms for record in records if record.kind == "scene"]
    assert (starts_ms[0], starts_ms[-1]) == (0, 4_500)
    assert isinstance(records[-1], HealthRecord)
    assert records[-1].event == "ended"


async def test_scenes_without_eyes_are_refused_before_anything_is_published(
    sound, local_stages: Stages, publisher: Publisher
):
    session = Session("s", SEEING, SampleSource(sound), local_stages, publisher)
    with pytest.raises(ConfigError, match=r"tier edge .* has no eyes"):
        await session.open()
    assert publisher.counters.published == 0
