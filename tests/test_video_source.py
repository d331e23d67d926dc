"""Frames of a source: their times, their size, their order among the sound, and hostile video."""

from __future__ import annotations

import asyncio
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray

from ingest.container import ContainerSource, Pace
from ingest.processes import DecoderProcess, DecoderProcesses
from ingest.source import AudioBlock, AudioParams, SourceGap, SourceInfo, SourceItem, VideoFrame, VideoParams
from pipeline.errors import MediaError
from pipeline.timebase import CHUNK_SAMPLES, SAMPLE_RATE_HZ
from pipeline.vision.crop_layout import plan_live_crops

SMALL = VideoParams(crop_size=32, patch_size=2, max_crops=4)
Picture = NDArray[np.uint8]


@dataclass
class Seen:
    """What a source gave: its items, and where the media clock stood when each came."""

    info: SourceInfo
    items: list[SourceItem] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    position: int = 0

    def add(self, item: SourceItem) -> None:
        self.items.append(item)
        self.positions.append(self.position)
        self.position += num_samples_of(item)

    @property
    def frames(self) -> list[VideoFrame]:
        return [item for item in self.items if isinstance(item, VideoFrame)]

    @property
    def times_ms(self) -> list[int]:
        return [round(frame.start_sample / 16) for frame in self.frames]

    @property
    def samples(self) -> NDArray[np.int16]:
        return np.concatenate([item.samples for item in self.items if isinstance(item, AudioBlock)], axis=1)

    @property
    def worst_lateness(self) -> int:
        """How many samples a frame came behind its time at most."""
        pairs = zip(self.items, self.positions, strict=True)
        return max(position - item.start_sample for item, position in pairs if isinstance(item, VideoFrame))


def num_samples_of(item: SourceItem) -> int:
    match item:
        case AudioBlock(samples):
            return samples.shape[1]
        case SourceGap(num_samples):
            return num_samples
        case _:
            return 0


async def play(path: Path, video: VideoParams | None = SMALL, params: AudioParams | None = None) -> Seen:
    async with ContainerSource(path, params, Pace.FAST, video=video) as source:
        seen = Seen(source.info)
        async for item in source:
            seen.add(item)
    return seen


def grey(level: int, width_px: int = 64, height_px: int = 64) -> Picture:
    return np.full((height_px, width_px, 3), level, np.uint8)


def greys(num_frames: int, step: int = 5) -> list[Picture]:
    return [grey(20 + step * index) for index in range(num_frames)]


def noise(num_frames: int, size_px: int = 64) -> list[Picture]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (size_px, size_px, 3), np.uint8) for _ in range(num_frames)]


def tone(seconds: float) -> NDArray[np.int16]:
    return (8_000 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * 16_000)) / 16_000)).astype(np.int16)


def film(
    path: Path,
    pictures: Iterable[Picture],
    sounds: Sequence[tuple[float, NDArray[np.int16]]] = (),
    *,
    rate_hz: int = 10,
    codec: str = "mpeg4",
    sound_codec: str = "pcm_s16le",
    rotation: int | None = None,
    aspect: Fraction | None = None,
    times_s: Sequence[float] | None = None,
    order: str = "time",
    options: dict[str, str] | None = None,
) -> Path:
    """Write a film; `sounds` are (start in seconds, int16[n] at 16 kHz); `order` of the packets: time, video, sound."""
    pictures = list(pictures)
    with av.open(str(path), "w", container_options={"max_interleave_delta": "1"}) as container:
        track = container.add_stream(codec, rate=rate_hz, options=options or {})
        track.height, track.width = pictures[0].shape[:2]
        track.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        track.codec_context.thread_count = 1
        if aspect is not None:
            track.codec_context.sample_aspect_ratio = aspect
        if rotation is not None:
            track.set_display_rotation(rotation)
        track.codec_context.time_base = Fraction(1, 1_000)
        sound = container.add_stream(sound_codec, rate=16_000, layout="mono") if sounds else None
        seen: list[av.Packet] = []
        for index, pixels in enumerate(pictures):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            time_s = index / rate_hz if times_s is None else times_s[index]
            picture.pts, picture.time_base = round(time_s * 1_000), Fraction(1, 1_000)
            seen += track.encode(picture)
        seen += track.encode(None)
        heard: list[av.Packet] = []
        for start_s, samples in sounds:
            for first in range(0, len(samples), 320):
                block = av.AudioFrame.from_ndarray(samples[np.newaxis, first : first + 320], "s16", "mono")
                block.sample_rate, block.time_base = 16_000, Fraction(1, 16_000)
                block.pts = round(start_s * 16_000) + first
                assert sound is not None
                heard += sound.encode(block)
        heard += sound.encode(None) if sound is not None else []
        packets = seen + heard if order == "video" else heard + seen
        if order == "time":
            packets.sort(key=lambda packet: packet.dts * packet.time_base)
        for packet in packets:
            container.mux(packet)
    return path


def levels(frames: Sequence[VideoFrame]) -> list[int]:
    return [round(float(frame.pixels.mean())) for frame in frames]


@pytest.mark.parametrize("size", [(64, 64), (100, 40), (40, 100), (640, 360), (33, 17), (1920, 1080)])
@pytest.mark.parametrize("params", [SMALL, VideoParams(), VideoParams(max_crops=1)])
async def test_a_frame_has_exactly_the_size_of_its_crops(
    size: tuple[int, int], params: VideoParams, tmp_path: Path
) -> None:
    width_px, height_px = size
    path = tmp_path / "a.png"
    write_picture(path, grey(90, width_px, height_px))
    (frame,) = (await play(path, params)).frames
    layout = plan_live_crops(width_px, height_px, params.crop_size, params.patch_size, params.max_crops)
    assert frame.pixels.shape == (layout.height_px, layout.width_px, 3)
    assert frame.pixels.dtype == np.uint8
    assert frame.pixels.flags.writeable
    assert frame.pixels.flags.c_contiguous
    assert np.abs(frame.pixels.astype(int) - 90).max() <= 2


def write_picture(path: Path, pixels: Picture) -> Path:
    """Write one picture in the format that the name says."""
    codec, pix_fmt = {".png": ("png", "rgb24"), ".bmp": ("bmp", "bgr24"), ".webp": ("libwebp", "yuv420p")}.get(
        path.suffix, ("mjpeg", "yuvj420p")
    )
    height_px, width_px = pixels.shape[:2]
    context = av.CodecContext.create(codec, "w")
    assert isinstance(context, av.VideoCodecContext)
    context.width, context.height, context.pix_fmt, context.time_base = width_px, height_px, pix_fmt, Fraction(1, 25)
    picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=pix_fmt)
    packets = [*context.encode(picture), *context.encode(None)]
    path.write_bytes(b"".join(bytes(packet) for packet in packets))
    return path


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.jpeg", "a.webp", "a.bmp", "%03d.png", "no_suffix"])
async def test_a_picture_is_one_frame_and_one_chunk_of_silence(name: str, tmp_path: Path) -> None:
    path = write_picture(tmp_path / name, grey(120))
    seen = await play(path)
    assert [type(item) for item in seen.items] == [VideoFrame, AudioBlock]
    assert seen.times_ms == [0]
    assert not seen.samples.any()
    assert seen.samples.shape == (1, CHUNK_SAMPLES)
    assert (seen.info.codec, seen.info.has_video) == ("none", True)
    assert (seen.info.width_px, seen.info.height_px) == (64, 64)
    assert abs(levels(seen.frames)[0] - 120) <= 3
    with pytest.raises(MediaError, match="not a media file"):
        await play(path, video=None)


async def test_frames_are_upright_whatever_way_the_camera_was_held(tmp_path: Path) -> None:
    pixels = grey(30, 128, 64)
    pixels[:, :64] = 220  # the left half is bright
    turned = await play(film(tmp_path / "turned.mp4", [pixels], rotation=90))
    (frame,) = turned.frames
    layout = plan_live_crops(64, 128, 32, 2, 4)
    assert frame.pixels.shape == (layout.height_px, layout.width_px, 3)
    assert frame.pixels[-8:].mean() - frame.pixels[:8].mean() > 150, "counterclockwise, the left goes down"
    (frame,) = (await play(film(tmp_path / "over.mp4", [pixels], rotation=180))).frames
    assert frame.pixels[:, -8:].mean() - frame.pixels[:, :8].mean() > 150


@pytest.mark.parametrize(
    ("aspect", "shown"), [(Fraction(64, 45), (1024, 576)), (Fraction(1, 2), (720, 1152)), (Fraction(1), (720, 576))]
)
async def test_pixels_that_are_not_square_become_square(
    aspect: Fraction, shown: tuple[int, int], tmp_path: Path
) -> None:
    seen = await play(film(tmp_path / "wide.mkv", [grey(90, 720, 576)], aspect=aspect))
    layout = plan_live_crops(*shown, 32, 2, 4)
    assert seen.frames[0].pixels.shape[:2] == (layout.height_px, layout.width_px)
    assert (seen.info.width_px, seen.info.height_px) == (720, 576)


@pytest.mark.parametrize(
    ("name", "codec", "rate_hz"),
    [("a.mp4", "mpeg4", 10), ("a.mp4", "libx264", 10), ("a.mkv", "libx264", 40), ("a.avi", "mjpeg", 10)],
)
@pytest.mark.parametrize("interval_ms", [40, 500, 730])
async def test_frames_come_at_most_as_often_as_asked_and_show_what_was_to_be_seen_then(
    name: str, codec: str, rate_hz: int, interval_ms: int, tmp_path: Path
) -> None:
    path = film(tmp_path / name, greys(32, 7), [(0, tone(32 / rate_hz))], rate_hz=rate_hz, codec=codec)
    video = SMALL.model_copy(update={"sample_interval_ms": interval_ms})
    seen = await play(path, video)
    assert seen.times_ms[0] == 0
    apart_ms = [after - before for before, after in pairwise(seen.times_ms)]
    assert min(apart_ms) >= interval_ms
    assert max(apart_ms) <= max(interval_ms, 100) + 5 * 1_000 / rate_hz
    for frame, time_ms in zip(seen.frames, seen.times_ms, strict=True):
        index = round(time_ms * rate_hz / 1_000)
        assert abs(levels([frame])[0] - (20 + 7 * index)) <= 6, f"another frame at {time_ms} ms"
    assert seen.worst_lateness <= CHUNK_SAMPLES


async def test_sound_is_the_same_with_and_without_video(media: Path) -> None:
    heard = await play(media / "demo.mp4", video=None)
    seen = await play(media / "demo.mp4")
    assert np.array_equal(heard.samples, seen.samples)
    assert not heard.info.has_video
    assert not heard.frames
    assert seen.times_ms == [500 * index for index in range(len(seen.frames))]
    assert seen.position - 8_000 <= seen.frames[-1].start_sample <= seen.position
    assert seen.info.duration_s == pytest.approx(seen.position / SAMPLE_RATE_HZ, abs=0.1)


async def test_the_demo_has_scenes_that_differ_and_a_stretch_where_little_moves(media: Path) -> None:
    frames = (await play(media / "demo.mp4")).frames
    changed = [
        float((np.abs(one.pixels.astype(int) - other.pixels).max(axis=2) > 30).mean())
        for one, other in pairwise(frames)
    ]
    assert sum(share > 0.25 for share in changed) == 4, "five scenes"
    assert sum(0 < share < 0.02 for share in changed) >= 4, "the cart"
    assert (media / "demo.mp4").stat().st_size < 400_000
    assert len((media / "demo-video.txt").read_text().split()) > 40


@pytest.mark.parametrize("order", ["time", "video", "sound"])
async def test_the_order_is_that_of_time_wherever_things_lie_in_the_file(order: str, tmp_path: Path) -> None:
    path = film(tmp_path / "a.mkv", greys(200, 1), [(0, tone(20))], order=order, codec="libx264")
    seen = await play(path)
    assert seen.times_ms == [500 * index for index in range(40)]
    assert seen.worst_lateness <= SAMPLE_RATE_HZ
    for item, position in zip(seen.items, seen.positions, strict=True):
        assert not isinstance(item, VideoFrame) or item.start_sample - position <= SAMPLE_RATE_HZ


async def test_slow_video_whose_decoder_holds_frames_back_keeps_its_place(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", greys(20), [(0, tone(20))], rate_hz=1, codec="libx264")
    seen = await play(path)
    assert seen.times_ms == [1_000 * index for index in range(20)]
    assert seen.worst_lateness <= SAMPLE_RATE_HZ


async def test_time_is_that_of_the_sound_and_what_is_before_it_is_at_its_beginning(tmp_path: Path) -> None:
    path = film(tmp_path / "late.mkv", greys(40), [(1.0, tone(2))])
    seen = await play(path)
    assert seen.times_ms[:4] == [0, 500, 1_000, 1_500]
    assert [abs(level - (20 + 5 * index)) <= 3 for level, index in zip(levels(seen.frames[1:3]), (15, 20), strict=True)]
    assert seen.samples.shape[1] >= 2 * SAMPLE_RATE_HZ


async def test_a_hole_in_the_sound_moves_no_frame(tmp_path: Path) -> None:
    path = film(tmp_path / "hole.mkv", greys(40), [(0, tone(1)), (2.5, tone(1.5))])
    seen = await play(path)
    assert [item.num_samples for item in seen.items if isinstance(item, SourceGap)] == [24_000]
    assert seen.times_ms == [500 * index for index in range(8)]
    assert all(abs(level - (20 + 25 * index)) <= 4 for index, level in enumerate(levels(seen.frames))), (
        "what was to be seen then"
    )


async def test_video_that_is_longer_than_the_sound_goes_on_in_silence(tmp_path: Path) -> None:
    seen = await play(film(tmp_path / "long.mp4", greys(40), [(0, tone(1))], sound_codec="aac"))
    assert seen.times_ms == [500 * index for index in range(8)]
    assert seen.worst_lateness <= CHUNK_SAMPLES
    assert 3.4 * SAMPLE_RATE_HZ < seen.position < 3.7 * SAMPLE_RATE_HZ
    assert not seen.samples[:, 20_000:].any()
    assert seen.samples[:, :15_000].any()


@pytest.mark.parametrize("name", ["silent.mp4", "silent.mkv", "silent.ts"])
async def test_a_film_without_sound_is_silence_that_lasts_as_long(name: str, tmp_path: Path) -> None:
    seen = await play(film(tmp_path / name, greys(35), codec="libx264"))
    assert (seen.info.codec, seen.info.num_channels, seen.info.native_rate_hz) == ("none", 1, 0)
    assert abs(seen.position - 3.5 * SAMPLE_RATE_HZ) <= 32
    assert not seen.samples.any()
    assert seen.times_ms == [500 * index for index in range(7)]
    assert seen.worst_lateness <= 0
    for item, position in zip(seen.items, seen.positions, strict=True):
        assert not isinstance(item, VideoFrame) or item.start_sample - position < CHUNK_SAMPLES
    assert all(num_samples_of(item) in {0, CHUNK_SAMPLES} for item in seen.items[:-1])


async def test_time_goes_on_between_the_frames_that_are_taken(tmp_path: Path) -> None:
    path = film(tmp_path / "rare.mkv", greys(3), times_s=[0, 3, 6])
    seen = await play(path, SMALL.model_copy(update={"sample_interval_ms": 60_000}))
    assert seen.times_ms == [0]
    assert seen.position >= 6 * SAMPLE_RATE_HZ
    path = film(tmp_path / "leap.mkv", greys(3), times_s=[0, 1, 900])
    with pytest.raises(MediaError, match=r"timestamps jump by 899 s, over the limit of 600 s"):
        await play(path)


@pytest.mark.parametrize("interval_ms", [500, 2_000])
async def test_a_cover_is_no_video(interval_ms: int, tmp_path: Path) -> None:
    path = tmp_path / "cover.m4a"
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(90), format="rgb24")))
        block = av.AudioFrame.from_ndarray(tone(1)[np.newaxis, :1_024], "s16", "mono")
        block.sample_rate = 16_000
        container.mux(sound.encode(block))
        container.mux(sound.encode(None))
    seen = await play(path, SMALL.model_copy(update={"sample_interval_ms": interval_ms}))
    assert not seen.info.has_video
    assert not seen.frames


def hurt(path: Path, start: float, end: float) -> Path:
    """Overwrite a stretch of the file with noise."""
    data = bytearray(path.read_bytes())
    first, last = int(len(data) * start), int(len(data) * end)
    data[first:last] = np.random.default_rng(3).bytes(last - first)
    path.write_bytes(data)
    return path


async def test_damaged_packets_of_video_are_passed_over(tmp_path: Path) -> None:
    path = film(tmp_path / "hurt.ts", noise(60), codec="libx264", options={"g": "5"})
    seen = await play(hurt(path, 0.4, 0.5))
    assert len(seen.frames) >= 6
    assert seen.position >= 5.5 * SAMPLE_RATE_HZ


def unusable(path: Path, sounds: Sequence[tuple[float, NDArray[np.int16]]]) -> Path:
    """Write a film whose pictures are noise where JPEGs should be."""
    film(path, noise(150), sounds, codec="mjpeg")
    data = bytearray(path.read_bytes())
    at = data.find(b"\xff\xd8\xff")
    while at >= 0:
        data[at : at + 600] = bytes(600)
        at = data.find(b"\xff\xd8\xff", at + 600)
    path.write_bytes(data)
    return path


async def test_a_video_that_cannot_be_decoded_ends_only_a_stream_without_sound(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.avi: (its pictures are damaged|\d+ packets of video|no picture)"):
        await play(unusable(tmp_path / "a.avi", []))
    seen = await play(unusable(tmp_path / "b.avi", [(0, tone(15))]))
    assert not seen.frames
    assert seen.position == 15 * SAMPLE_RATE_HZ


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "mpeg4"), ("a.mkv", "libx264"), ("a.png", "png")])
async def test_pictures_over_the_limit_are_refused(name: str, codec: str, tmp_path: Path) -> None:
    video = SMALL.model_copy(update={"max_pixels": 10_000})
    path = tmp_path / name
    if codec == "png":
        write_picture(path, grey(90, 320, 240))
    else:
        film(path, [grey(90, 320, 240)] * 3, codec=codec)
    with pytest.raises(MediaError, match=r"the limit is 10000 pixels") as caught:
        await play(path, video)
    assert str(caught.value).startswith(f"{name}: ")
    if codec != "png":
        film(path, [grey(90, 320, 240)] * 3, [(0, tone(1))], codec=codec, sound_codec="aac")
        seen = await play(path, video)
        assert not seen.info.has_video
        assert seen.position >= SAMPLE_RATE_HZ


async def test_a_picture_that_claims_to_be_enormous_takes_no_memory(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "bomb.png", grey(90))
    data = bytearray(path.read_bytes())
    header = data.index(b"IHDR")
    data[header + 4 : header + 12] = (60_000).to_bytes(4, "big") * 2
    data[header + 17 : header + 21] = zlib.crc32(data[header : header + 17]).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"bomb\.png: its pictures are damaged or too large"):
        await play(path)


async def test_a_picture_too_thin_for_the_model_says_so(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "thin.png", grey(90, 4_000, 2))
    with pytest.raises(MediaError, match=r"thin\.png: a picture of 4000 x 2 pixels is too long and thin"):
        await play(path)


async def test_film_in_ultra_high_definition_fits_into_the_decoders_limits(tmp_path: Path) -> None:
    options = {"preset": "ultrafast", "bframes": "3", "refs": "4"}
    path = film(tmp_path / "big.mp4", [grey(40 * i, 3840, 2160) for i in range(6)], codec="libx264", options=options)
    video = VideoParams(sample_interval_ms=100)
    seen = await play(path, video)
    assert len(seen.frames) == 6
    assert seen.frames[0].pixels.shape == (756, 1344, 3)


class Unruly(DecoderProcesses):
    """Processes that were asked for other frames than the parent believes."""

    async def open(self, request: bytes) -> DecoderProcess:
        asked = json.loads(request)
        asked["video"] = VideoParams().model_dump(mode="json")
        return await super().open(json.dumps(asked).encode())


@pytest.mark.parametrize(("video", "reason"), [(None, "unknown kind of message"), (SMALL, "over the limit of 12300")])
async def test_frames_that_nobody_can_have_sent_end_the_stream(
    video: VideoParams | None, reason: str, tmp_path: Path
) -> None:
    path = film(tmp_path / "a.mp4", greys(5), [(0, tone(1))], sound_codec="aac")
    async with Unruly() as processes, ContainerSource(path, None, Pace.FAST, processes, video=video) as source:
        with pytest.raises(MediaError, match=f"nonsense: .*{reason}"):
            async for _ in source:
                pass


async def test_in_real_time_no_frame_comes_before_its_time(tmp_path: Path) -> None:
    path = film(tmp_path / "short.mkv", greys(12), [(0, tone(1.2))])
    loop = asyncio.get_running_loop()
    video = SMALL.model_copy(update={"sample_interval_ms": 100})
    late_s: list[float] = []
    async with ContainerSource(path, video=video) as source:
        started = loop.time()
        position = 0
        async for item in source:
            position += num_samples_of(item)
            due = item.start_sample if isinstance(item, VideoFrame) else position
            late_s.append(loop.time() - started - due / SAMPLE_RATE_HZ)
    assert len(late_s) >= 24
    assert min(late_s) > -0.005
    assert sorted(late_s)[len(late_s) // 2] < 0.2, "the schedule is not kept"


async def test_leaving_in_the_middle_of_frames_ends_the_decoder(media: Path) -> None:
    async with ContainerSource(media / "demo.mp4", pace=Pace.FAST, video=VideoParams(max_crops=36)) as source:
        pid = source.worker_pid
        assert isinstance(await anext(source), VideoFrame)
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_nothing_to_hear_or_see_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cover.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(grey(90), format="rgb24")))
    with pytest.raises(MediaError, match=r"cover\.mp4: no audio or video track: the file holds"):
        await play(path)
