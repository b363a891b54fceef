"""Every length control, whatever happens: within the room, and nothing kept of what has ended."""

from collections.abc import Sized

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.part import BUILT_IN, find
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.part import LengthControl, Round, Verified

NAMES = [name for kind, name in BUILT_IN if kind == "draft-length"]


class Times:
    """Any costs, none included."""

    def __init__(self, step: float, row: float, draft: float) -> None:
        self.fixed, self.row, self.token = step, row, draft

    def step(self, rows: int) -> float:
        return self.fixed + self.row * rows

    def verifying(self, rows: int) -> float:
        return self.step(rows)

    def reach(self) -> int:
        return 64

    def draft(self, seqs: int, most: int) -> float:
        return self.token * most

    def reading(self, tokens: int) -> float:
        return self.token * tokens

    def back(self) -> float:
        return self.token

    def look(self) -> float:
        return self.token

    def knows(self, rows: int) -> bool:
        return self.step(rows) > 0.0


seconds = st.sampled_from([0.0, 1e-4, 1e-2, 1.0])  # 0: not known yet
taken = st.sampled_from([1e-4, 1e-2, 1.0])
costs = st.builds(Times, seconds, seconds, seconds)
#: of a round: who takes part and how much room there is, costs, share accepted, seconds it took
rounds = st.tuples(
    st.dictionaries(st.integers(0, 11), st.integers(1, 40), min_size=1), costs,
    st.floats(0, 1), taken, st.integers(0, 300),
)  # fmt: skip


def kept(control: LengthControl, seq: int) -> bool:
    """Whether any container of the control has an entry for this sequence."""
    found = [value for value in vars(control).values() if isinstance(value, (dict, set))]
    return any(seq in value for value in found)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(st.lists(rounds, max_size=40), st.lists(st.floats(0.01, 1), max_size=20))
def test_lengths_fit_and_ends_are_forgotten(
    name: str, played: list[tuple[dict[int, int], Times, float, float, int]], sure: list[float]
) -> None:
    control: LengthControl = find("draft-length", name)()  # type: ignore[assignment]
    seen = set[int]()
    for room, times, share, took, others in played:
        if control.rests():
            continue
        seqs = [Seq(i, Request(str(i), [0]), 0, [0], 99, (0, i)) for i in room]
        behind = [seq.id * others for seq in seqs]
        lengths = control.plan(Round(seqs, list(room.values()), others, times, behind))
        assert len(lengths) == len(seqs)
        assert all(0 <= k <= most for k, most in zip(lengths, room.values(), strict=True))
        seen |= set(room)
        control.goes_on(sure)
        records = [
            Verified(seq.id, k, int(share * k), sure[:k])
            for seq, k in zip(seqs, lengths, strict=True)
        ]
        if any(lengths):
            control.observe(records, took, took)
    for seq in seen:
        control.forget(seq)
        assert not kept(control, seq)
    sized = [value for value in vars(control).values() if isinstance(value, Sized)]
    assert all(len(value) == 0 for value in sized)
