from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ingest.source import AudioBlock, SourceGap, SourceInfo, VideoFrame
from ingest.wire import (
    MAX_BLOCK_SAMPLES,
    MAX_PAYLOAD_BYTES,
    MAX_TEXT_BYTES,
    Ended,
    Failed,
    FailureKind,
    Message,
    Opened,
    WireError,
    WireParser,
    encode,
)

texts = st.text(max_size=40).map(lambda text: "".join(c for c in text if c.isprintable()))
infos = st.builds(
    SourceInfo,
    num_channels=st.integers(1, 8),
    native_rate_hz=st.integers(8_000, 192_000),
    native_channels=st.integers(1, 8),
    duration_s=st.none() | st.floats(0, 1e6),
    container=texts,
    codec=texts,
    has_video=st.booleans(),
    width_px=st.integers(0, 10_000),
    height_px=st.integers(0, 10_000),
)
MAX_FRAME_PIXELS = 20 * 20
frames = st.builds(
    VideoFrame,
    st.integers(0, (1 << 64) - 1),
    arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))),
)
blocks = st.builds(
    AudioBlock,
    arrays(np.int16, st.tuples(st.integers(1, 8), st.integers(1, 200)), elements=st.integers(-32_768, 32_767)),
)
messages = st.one_of(
    st.builds(Opened, infos),
    blocks,
    frames,
    st.builds(SourceGap, st.integers(1, 1 << 40), texts),
    st.builds(Failed, st.sampled_from(FailureKind), texts),
    st.builds(Ended, st.integers(0, (1 << 64) - 1)),
)


def described(**changes: object) -> bytes:
    fields = {
        "num_channels": 1,
        "native_rate_hz": 16_000,
        "native_channels": 1,
        "duration_s": None,
        "container": "wav",
        "codec": "pcm_s16le",
    }
    payload = json.dumps(fields | changes).encode()
    return b"I" + struct.pack("<I", len(payload)) + payload


def is_same(one: Message, other: Message) -> bool:
    if isinstance(one, AudioBlock) and isinstance(other, AudioBlock):
        return one.samples.dtype == other.samples.dtype == np.int16 and np.array_equal(one.samples, other.samples)
    if isinstance(one, VideoFrame) and isinstance(other, VideoFrame):
        return one.start_sample == other.start_sample and np.array_equal(one.pixels, other.pixels)
    return one == other


@settings(max_examples=80, deadline=None)
@given(st.lists(messages, max_size=6), st.lists(st.integers(0, 400), max_size=8))
def test_messages_survive_the_wire_however_the_bytes_are_split(sent: list[Message], cuts: list[int]) -> None:
    data = b"".join(encode(message) for message in sent)
    parser = WireParser(MAX_FRAME_PIXELS)
    received: list[Message] = []
    start = 0
    for cut in [*sorted(cuts), len(data)]:
        received += parser.feed(data[start:cut] if cut > start else b"")
        start = max(start, cut)
    assert len(received) == len(sent)
    assert all(is_same(one, other) for one, other in zip(received, sent, strict=True))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_messages_or_refused(data: bytes) -> None:
    parser = WireParser(MAX_FRAME_PIXELS)
    try:
        parser.feed(data)
    except WireError:
        return
    assert len(data) < 5 or data[:1] in b"IAGXEV"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"I", b"A", b"G", b"X", b"E", b"V"]), st.binary(max_size=60))
def test_any_payload_is_a_message_within_bounds_or_refused(kind: bytes, payload: bytes) -> None:
    try:
        (message,) = WireParser(MAX_FRAME_PIXELS).feed(kind + struct.pack("<I", len(payload)) + payload)
    except WireError:
        return
    match message:
        case AudioBlock(samples):
            assert 1 <= samples.shape[0] <= 8
            assert 1 <= samples.shape[1] <= MAX_BLOCK_SAMPLES
        case SourceGap(num_samples):
            assert 1 <= num_samples <= 1 << 40
        case VideoFrame(_, pixels):
            assert 1 <= pixels.shape[0] * pixels.shape[1] <= MAX_FRAME_PIXELS
            assert pixels.shape[2] == 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"Z\0\0\0\0", "unknown kind"),
        (b"A\xff\xff\xff\xff", "over the limit"),
        (b"A" + struct.pack("<I", MAX_PAYLOAD_BYTES + 1), "over the limit"),
        (b"A\x01\0\0\0\x01", "no block"),
        (b"A\x04\0\0\0\x01\0\0\0", "no block"),
        (b"A\x13\0\0\0\x09" + bytes(18), "no block of 9 channels"),
        (b"A" + struct.pack("<I", 1 + 2 * 1_281) + b"\x01" + bytes(2 * 1_281), "1281 samples"),
        (b"G\x08\0\0\0" + bytes(8), "gap of 0 samples"),
        (b"G\x01\0\0\0a", "too short"),
        (b"X\x01\0\0\0\x09", "unknown kind"),
        (b"X\x02\0\0\0\x01\xff", "not UTF-8"),
        (b"X\x02\0\0\0\x01\x1b", "cannot be printed"),
        (described(duration_s=float("nan")), "nan s"),
        (described(duration_s=-1.0), "-1.0 s"),
        (described(codec="pcm\x1b[2J"), "cannot be printed"),
        (described(num_channels=9), "9 channels"),
        (described(width_px=-1), "-1 x 0 pixels"),
        (b"V\x0c\0\0\0" + bytes(12), "unknown kind"),
        (b"X" + struct.pack("<I", MAX_TEXT_BYTES + 2) + b"\x01" + b"a" * (MAX_TEXT_BYTES + 1), "over the limit"),
        (b"I\x02\0\0\0{}", "6 wrong fields"),
        (b"E\x01\0\0\0\x01", "expected 8"),
    ],
)
def test_what_is_not_the_protocol_is_refused_with_its_reason(data: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        WireParser().feed(data)


def test_a_length_over_the_limit_is_refused_before_its_bytes_are_waited_for() -> None:
    parser = WireParser()
    assert parser.feed(b"A\xff\xff\xff") == []
    with pytest.raises(WireError):
        parser.feed(b"\x7f")


def test_the_biggest_block_fits_and_a_bigger_one_is_not_sent() -> None:
    biggest = AudioBlock(np.full((8, MAX_BLOCK_SAMPLES), -3, np.int16))
    (received,) = WireParser().feed(encode(biggest))
    assert is_same(received, biggest)
    with pytest.raises(ValueError, match="does not fit"):
        encode(AudioBlock(np.zeros((1, MAX_BLOCK_SAMPLES + 1), np.int16)))
    with pytest.raises(ValueError, match="does not fit"):
        encode(AudioBlock(np.zeros((9, 10), np.int16)))


def test_a_message_is_always_one_line() -> None:
    (received,) = WireParser().feed(encode(Failed(FailureKind.MEDIA, "two\nlines\x1b[2J.wav")))
    assert received == Failed(FailureKind.MEDIA, "two?lines?[2J.wav")


def test_long_texts_are_cut_at_a_character() -> None:
    (received,) = WireParser().feed(encode(Failed(FailureKind.MEDIA, "ä" * 5_000)))
    assert received == Failed(FailureKind.MEDIA, "ä" * (MAX_TEXT_BYTES // 2))


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (bytes(11), "too short"),
        (struct.pack("<QHH", 0, 0, 0), "no frame of 0 x 0"),
        (struct.pack("<QHH", 0, 1, 0), "no frame of 1 x 0"),
        (struct.pack("<QHH", 0, 2, 1) + bytes(5), "no frame of 2 x 1"),
        (struct.pack("<QHH", 0, 2, 1) + bytes(7), "no frame of 2 x 1"),
        (struct.pack("<QHH", 0, 65_535, 65_535) + bytes(30), "no frame of 65535 x 65535"),
    ],
)
def test_a_frame_whose_sizes_do_not_agree_is_refused(payload: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        WireParser(MAX_FRAME_PIXELS).feed(b"V" + struct.pack("<I", len(payload)) + payload)


def test_a_frame_over_the_limit_is_refused_before_its_bytes_are_waited_for() -> None:
    largest = VideoFrame(7, np.zeros((20, 20, 3), np.uint8))
    (received,) = WireParser(MAX_FRAME_PIXELS).feed(encode(largest))
    assert is_same(received, largest)
    with pytest.raises(WireError, match="over the limit"):
        WireParser(MAX_FRAME_PIXELS).feed(encode(VideoFrame(7, np.zeros((20, 21, 3), np.uint8)))[:5])


def test_large_frames_arrive_in_small_pieces_and_may_be_written_to() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (896, 1_344, 3), np.uint8)
    data = b"".join(encode(VideoFrame(index, pixels)) for index in range(2))
    parser = WireParser(6 * 448 * 448)
    received = [message for start in range(0, len(data), 4_096) for message in parser.feed(data[start : start + 4_096])]
    assert all(is_same(message, VideoFrame(index, pixels)) for index, message in enumerate(received))
    assert len(received) == 2
    assert all(isinstance(message, VideoFrame) and message.pixels.flags.writeable for message in received)


@pytest.mark.parametrize("shape", [(0, 4, 3), (4, 4, 4), (1, 65_536, 3)])
def test_what_is_no_frame_is_not_sent(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"no picture|does not fit"):
        encode(VideoFrame(0, np.zeros(shape, np.uint8)))
    with pytest.raises(ValueError, match="64 bits"):
        encode(VideoFrame(-1, np.zeros((1, 1, 3), np.uint8)))
