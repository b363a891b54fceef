"""Records of judged drafts: what they say of trees is what a walk through them says."""

from random import Random
from typing import Any

import pytest

from kvarn.core.part import find
from kvarn.core.plan import Draft, Span, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.costs import Measured
from kvarn.speculate.part import Round, Verified
from kvarn.speculate.records import Record, records
from kvarn.speculate.train.trainer import labels_of


def paths(draft: Draft) -> dict[tuple[int, ...], bool]:
    """Every path of a draft, the empty one too, and whether it goes on."""
    chain = list(range(-1, len(draft.tokens) - 1))
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(draft.tokens, draft.parents or chain):
        found.append((*found[parent + 1], token))
    return {path: any(other[:-1] == path for other in found if other) for path in found}


@pytest.mark.parametrize("chain", [True, False])
def test_depth_and_judged_are_those_of_a_walk(chain: bool) -> None:
    chance = Random(1)
    for _ in range(500):
        n = chance.randint(0, 7)
        parents = None if chain else [chance.randint(-1, i - 1) for i in range(n)]
        draft = Draft([chance.randint(0, 2) for _ in range(n)], parents, [0.5] * n)
        known = paths(draft)
        assert draft.depth == max(map(len, known))
        for path, goes_on in known.items():
            record = Record(1, 1, 5, draft, [*path, 9])
            assert record.accepted == len(path)
            assert record.judged == len(path) + goes_on
            assert record.verified().judged <= draft.depth


def test_a_step_is_read_once() -> None:
    """Sequences with and without drafts; a draft that was cut; a fault; one that reads a prompt."""
    tree = Draft([4, 5, 6], [-1, -1, 0], [0.6, 0.3, 0.9])
    spans = [
        Span(1, 9, 3, 2), Span(2, 7, 1), Span(3, 5, 2, 1), Span(4, 0, 8, wants_logits=False)
    ]  # fmt: skip
    top = [[[5], [7]], [[-0.1], [-0.2]]]
    result = StepResult(3, [[5, 7], [8], [], []], alternatives={0: top})
    first, second = records(StepPlan(3, spans=spans), result, {1: tree, 3: Draft([1])})
    assert first == Record(1, 3, 10, Draft([4, 5], [-1, -1], [0.6, 0.3]), [5, 7], top)
    assert first.verified() == Verified(1, 2, 1, [0.6, 0.3], depth=1, judged=1)
    assert second.verified() == Verified(2, 0, 0)


def test_what_a_trainer_learns_of_a_tree() -> None:
    """The target's word along the path, and behind it; a path that stood to its end is right."""
    tree = Draft([4, 5, 6], [-1, -1, 0], [0.6, 0.3, 0.9])
    for committed, refused in (([4, 6, 9], False), ([4, 8], True), ([5, 8], False), ([9], True)):
        top = [[[token, 0] for token in committed], [[-0.5, -1.5] for _ in committed]]
        record = Record(1, 3, 10, tree, committed, top)
        labels = labels_of(record, record.judged > record.accepted)
        assert [label.place for label in labels] == list(range(10, 10 + len(committed)))
        assert [label.top[0] for label in labels] == committed
        assert [label.wrong for label in labels] == [False] * record.accepted + [refused]


@pytest.mark.parametrize("name", ["gammatune", "hf-heuristic"])
def test_a_tree_that_stood_to_its_end_makes_the_next_longer(name: str) -> None:
    def next_length(record: Verified) -> int:
        control: Any = find("draft-length", name)()
        control.observe([record], 1.0, 0.0)
        seq = Seq(0, Request("0", [0]), 0, [0], 99, (0, 0))
        (length,) = control.plan(Round([seq], [99], 0, Measured()))
        return int(length)

    assert next_length(Verified(0, 5, 2, depth=2, judged=2)) == 7
    assert next_length(Verified(0, 5, 5)) == 7
    assert next_length(Verified(0, 5, 2, depth=3, judged=3)) < 7
