from itertools import count, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.text.in_order import InOrder


@given(st.permutations(range(5, 15)))
def test_results_leave_in_order_whatever_order_they_come_in(arrivals):
    ledger: InOrder[int] = InOrder(5)
    released: list[int] = []
    arrived: set[int] = set()
    for sequence in arrivals:
        released += ledger.put(sequence, sequence)
        arrived.add(sequence)
        assert released == list(takewhile(arrived.__contains__, count(5)))
    assert released == list(range(5, 15))


@pytest.mark.parametrize("again", [1, 3])
def test_a_sequence_cannot_be_given_twice(again):
    ledger: InOrder[str] = InOrder(1)
    ledger.put(1, "a")
    ledger.put(3, "c")
    with pytest.raises(ValueError, match=f"sequence {again} was already given"):
        ledger.put(again, "again")
