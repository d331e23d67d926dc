from __future__ import annotations

import av
import numpy as np
import pytest
from av.audio.resampler import AudioResampler
from numpy.typing import NDArray

from ingest.normalize import Normalizer, check_form
from ingest.source import AudioParams, ChannelMode
from pipeline.errors import MediaError

LAYOUTS = ["mono", "stereo", "2.1", "quad", "5.0", "5.1", "6.1", "7.1"]
FORMATS = ["u8", "u8p", "s16", "s16p", "s32", "s32p", "flt", "fltp", "dbl", "dblp", "s64"]
FLOATS = ["flt", "fltp", "dbl", "dblp"]
FREQUENCIES_HZ = [200 + 150 * channel for channel in range(8)]


def tones(num_channels: int, rate_hz: int, seconds: float = 0.5) -> NDArray[np.float32]:
    """Return float32[channels, n]: a tone of its own frequency on each channel, at half of full scale."""
    times = np.arange(round(rate_hz * seconds)) / rate_hz
    return np.stack([0.5 * np.sin(2 * np.pi * hz * times) for hz in FREQUENCIES_HZ[:num_channels]]).astype(np.float32)


def pieces_of(samples: NDArray[np.float32], rate_hz: int, layout: str, sample_format: str) -> list[av.AudioFrame]:
    """Return the samples in pieces of 20 ms in `sample_format`."""
    made = []
    convert = AudioResampler(format=sample_format, layout=layout, rate=rate_hz)
    for start in range(0, samples.shape[1], rate_hz // 50):
        part = samples[:, start : start + rate_hz // 50]
        piece = av.AudioFrame.from_ndarray(part.T.reshape(1, -1).copy(), format="flt", layout=layout)
        piece.sample_rate = rate_hz
        made += convert.resample(piece)
    return made


def normalized(parts: list[av.AudioFrame], params: AudioParams) -> NDArray[np.int16]:
    normalizer = Normalizer(params)
    ready = [normalizer.push(piece) for piece in parts] + [normalizer.flush()]
    assert all(part.dtype == np.int16 and part.flags.c_contiguous for part in ready)
    return np.concatenate(ready, axis=1)


def loudest_hz(samples: NDArray[np.int16]) -> float:
    spectrum = np.abs(np.fft.rfft(samples.astype(np.float64) * np.hanning(len(samples))))
    return float(np.argmax(spectrum)) * 16_000 / len(samples)


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_every_rate_becomes_16_khz_without_losing_or_adding_time(rate_hz: int) -> None:
    source = tones(1, rate_hz)
    out = normalized(pieces_of(source, rate_hz, "mono", "s16"), AudioParams())
    assert out.shape[0] == 1
    assert abs(out.shape[1] - source.shape[1] * 16_000 / rate_hz) <= 1
    times = np.arange(out.shape[1]) / 16_000
    expected = 0.5 * 32_768 * np.sin(2 * np.pi * FREQUENCIES_HZ[0] * times)
    inner = slice(400, -400)
    assert np.abs(out[0, inner] - expected[inner]).max() < 330, "not in phase with the source"


@pytest.mark.parametrize("sample_format", FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_split_keeps_every_channel_apart_in_any_form(layout: str, sample_format: str) -> None:
    num_channels = av.AudioLayout(layout).nb_channels
    parts = pieces_of(tones(num_channels, 44_100, 0.2), 44_100, layout, sample_format)
    out = normalized(parts, AudioParams(channels=ChannelMode.SPLIT))
    assert out.shape[0] == num_channels
    for channel in range(num_channels):
        assert abs(loudest_hz(out[channel]) - FREQUENCIES_HZ[channel]) < 6
        assert 10_000 < np.abs(out[channel, 200:-200]).max() < 17_000


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mix_hears_every_channel_but_the_subwoofer_and_never_clips(layout: str) -> None:
    full = np.sign(tones(av.AudioLayout(layout).nb_channels, 48_000)) * np.float32(0.99)
    out = normalized(pieces_of(full, 48_000, layout, "s16"), AudioParams(channels=ChannelMode.MIX))
    assert out.shape[0] == 1
    spectrum = np.abs(np.fft.rfft(out[0].astype(np.float64)))
    for channel, hz in zip(av.AudioLayout(layout).channels, FREQUENCIES_HZ, strict=False):
        index = round(hz * out.shape[1] / 16_000)
        is_heard = spectrum[index - 2 : index + 3].max() > 10 * np.median(spectrum)
        assert is_heard or channel.name == "LFE"


def test_sound_already_right_is_untouched() -> None:
    samples = np.random.default_rng(0).integers(-32_768, 32_767, (1, 5_000), np.int16)
    piece = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
    piece.sample_rate = 16_000
    assert np.array_equal(normalized([piece], AudioParams()), samples)


def test_how_sound_is_split_changes_nothing() -> None:
    source = tones(2, 44_100)
    whole = av.AudioFrame.from_ndarray(source.T.reshape(1, -1).copy(), format="flt", layout="stereo")
    whole.sample_rate = 44_100
    assert np.array_equal(
        normalized([whole], AudioParams()), normalized(pieces_of(source, 44_100, "stereo", "flt"), AudioParams())
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sample_format", FLOATS)
def test_a_few_broken_samples_become_silence_and_are_counted(sample_format: str, bad: float) -> None:
    source = tones(2, 48_000)
    broken = source.copy()
    broken[0, 1_000:1_010] = bad
    source[0, 1_000:1_010] = 0
    normalizer = Normalizer(AudioParams())
    out = [normalizer.push(piece) for piece in pieces_of(broken, 48_000, "stereo", sample_format)] + [
        normalizer.flush()
    ]
    assert normalizer.num_nonfinite == 10
    clean = normalized(pieces_of(source, 48_000, "stereo", sample_format), AudioParams())
    assert np.array_equal(np.concatenate(out, axis=1), clean)


def test_absurd_levels_do_not_spread() -> None:
    source = tones(1, 48_000)
    source[0, 12_000] = 3e38
    out = normalized(pieces_of(source, 48_000, "mono", "flt"), AudioParams())
    assert abs(loudest_hz(out[0, 6_000:]) - FREQUENCIES_HZ[0]) < 6


def test_mostly_broken_sound_is_refused_once_enough_was_heard() -> None:
    source = np.full((1, 96_000), np.nan, np.float32)
    parts = pieces_of(source, 48_000, "mono", "fltp")
    normalizer = Normalizer(AudioParams())
    for part in parts[:49]:
        normalizer.push(part)
    with pytest.raises(MediaError, match="100% of the samples so far are NaN or infinite, over the limit of 1%"):
        normalizer.push(parts[49])


def test_short_broken_sound_is_refused_at_its_end() -> None:
    source = tones(1, 48_000, 0.1)
    source[0, :200] = np.nan
    normalizer = Normalizer(AudioParams())
    for part in pieces_of(source, 48_000, "mono", "flt"):
        normalizer.push(part)
    with pytest.raises(MediaError, match="NaN"):
        normalizer.flush()


def test_the_limit_is_configurable() -> None:
    source = np.full((1, 96_000), np.nan, np.float32)
    out = normalized(pieces_of(source, 48_000, "mono", "fltp"), AudioParams(max_nan_share=1.0))
    assert out.shape == (1, 32_000)
    assert not out.any()


def test_a_change_of_rate_and_layout_is_followed_when_mixing() -> None:
    parts = pieces_of(tones(1, 8_000), 8_000, "mono", "s16") + pieces_of(tones(6, 48_000), 48_000, "5.1", "fltp")
    out = normalized(parts, AudioParams())
    assert abs(out.shape[1] - 16_000) <= 2


def test_a_change_of_channels_cannot_be_followed_when_splitting() -> None:
    parts = pieces_of(tones(1, 8_000), 8_000, "mono", "s16") + pieces_of(tones(2, 8_000), 8_000, "stereo", "s16")
    with pytest.raises(MediaError, match="changed from 1 to 2"):
        normalized(parts, AudioParams(channels=ChannelMode.SPLIT))


@pytest.mark.parametrize(
    ("rate_hz", "num_channels", "reason"),
    [
        (1, 1, "sample rate is 1 Hz"),
        (7_999, 1, "7999 Hz"),
        (192_001, 1, "192001 Hz"),
        (16_000, 64, "64 channels"),
        (16_000, 0, "0 channels"),
    ],
)
def test_sound_out_of_bounds_is_refused(rate_hz: int, num_channels: int, reason: str) -> None:
    with pytest.raises(MediaError, match=reason):
        check_form(rate_hz, num_channels)
