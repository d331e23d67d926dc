import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.audio.tail import AudioTail
from pipeline.items import Chunk
from pipeline.timebase import CHUNK_SAMPLES


def make_tail(num_chunks: int, first: int = 0) -> tuple[AudioTail, np.ndarray]:
    samples = np.arange(num_chunks * CHUNK_SAMPLES, dtype=np.int64).astype(np.int16)
    tail = AudioTail()
    for i in range(num_chunks):
        tail.append(Chunk(0, first + i, samples[i * CHUNK_SAMPLES : (i + 1) * CHUNK_SAMPLES]))
    return tail, samples


@given(st.data())
def test_a_slice_is_the_samples_that_went_in(data):
    first = data.draw(st.integers(0, 3))
    tail, samples = make_tail(4, first)
    offset = first * CHUNK_SAMPLES
    start = data.draw(st.integers(offset, offset + 4 * CHUNK_SAMPLES))
    end = data.draw(st.integers(start, offset + 4 * CHUNK_SAMPLES))
    assert np.array_equal(tail.slice(start, end), samples[start - offset : end - offset])


def test_what_is_dropped_is_whole_chunks_before_the_sample():
    tail, _ = make_tail(4)
    tail.drop_before(2 * CHUNK_SAMPLES + 5)
    assert tail.start_sample == 2 * CHUNK_SAMPLES
    with pytest.raises(ValueError, match="are not within"):
        tail.slice(CHUNK_SAMPLES, 3 * CHUNK_SAMPLES)


def test_a_hole_is_refused():
    tail, _ = make_tail(2)
    with pytest.raises(ValueError, match="chunk 3 does not follow chunk 1"):
        tail.append(Chunk(0, 3, np.zeros(CHUNK_SAMPLES, np.int16)))
