"""Speculation changes nothing but the time: the same tokens, whatever is drafted for whom."""

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from golden.test_engine import expected, make_engine, make_requests, run

from kvarn.core.plan import Draft
from kvarn.core.request import Request, SamplingParams
from kvarn.core.seq import Seq
from kvarn.engine.engine import Engine
from kvarn.speculate.part import Ask, LengthControl, Round, Verified
from kvarn.speculate.speculation import Speculation


class AnyLength:
    """Drafts as much as there is room for, now and then less, or nothing."""

    looks = False

    def __init__(self, most: int) -> None:
        self.chance, self.most = random.Random(most), most

    def rests(self) -> bool:
        return self.chance.random() < 0.1

    def plan(self, round_: Round) -> list[int]:
        return [self.chance.randint(0, self.most) for _ in round_.seqs]

    def goes_on(self, confidence: Sequence[float]) -> bool:
        return True

    def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
        assert all(0 <= one.accepted <= one.drafted == len(one.confidence) for one in records)

    def forget(self, seq: int) -> None:
        pass


class Foresight:
    """Knows the answers, and errs with some probability a token."""

    def __init__(self, answers: dict[tuple[str, int], list[int]], errs: float) -> None:
        self.answers, self.errs, self.chance = answers, errs, random.Random(0)

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        return [self._draft(ask.seq, ask.most) for ask in asks]

    def _draft(self, seq: Seq, most: int) -> Draft:
        coming = self.answers[seq.request.id, seq.index][seq.n_output :][:most]
        wrong = [t if self.chance.random() > self.errs else (t + 1) % 97 for t in coming]
        return Draft(wrong, None, [0.5] * len(wrong))

    def behind(self, seq: Seq) -> int:
        return 0

    def observe(self, records: Sequence[Verified]) -> None:
        pass

    def forget(self, seq: Seq) -> None:
        pass


def speculating(engine: Engine, answers: Any, errs: float, most: int) -> Engine:
    engine.speculation = Speculation(Foresight(answers, errs), AnyLength(most), most, engine.clock)
    return engine


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    """Requests and the naive decoder's answers, by family."""
    found = {}
    for family in ("llama", "gemma2"):
        requests = make_requests(12)
        found[family] = requests, expected(make_engine(tiny_folder(family)), requests)
    return found


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("most", [1, 3, 8])
def test_tokens_equal_naive(
    tiny_folder: Any, wanted: Any, family: str, overlap: str, most: int
) -> None:
    requests, answers = wanted[family]
    for errs in (0.0, 0.4, 1.0):
        for options in ({}, {"budget": 7}, {"pages": 36}):
            engine = make_engine(tiny_folder(family), overlap=overlap, **options)
            speculating(engine, answers, errs, most)
            assert run(engine, requests, seed=most) == answers
            assert engine.control.check_integrity() == []
            stats = engine.stats()
            assert stats.kv_pages_used == 0
            assert stats.drafted_tokens > 0
            assert (stats.accepted_tokens > 0) == (errs < 1.0)
            if errs == 0.0:
                assert stats.accepted_tokens == stats.drafted_tokens
            engine.close()


@pytest.mark.parametrize("scheduler", ["continuous", "prefill-first", "orca", "static"])
@pytest.mark.parametrize("prefix", ["hash", "radix", "none"])
def test_schedulers_and_indexes(tiny_folder: Any, wanted: Any, scheduler: str, prefix: str) -> None:
    requests, answers = wanted["llama"]
    engine = make_engine(tiny_folder("llama"), scheduler=scheduler, prefix=prefix, pages=40)
    speculating(engine, answers, 0.3, 5)
    assert run(engine, requests, seed=2) == answers
    assert engine.control.check_integrity() == []


@pytest.mark.parametrize("options", [{}, {"budget": 7}, {"pages": 40}, {"overlap": "on"}])
@pytest.mark.parametrize("drafter", ["itself", "another"])
def test_a_drafting_model(
    tiny_folder: Any, wanted: Any, options: dict[str, Any], drafter: str
) -> None:
    requests, answers = wanted["llama"]
    engine = make_engine(
        tiny_folder("llama"), speculate="draft", draft_length="fixed", draft_tokens=4,
        draft_model=tiny_folder("llama" if drafter == "itself" else "mistral"), **options,
    )  # fmt: skip
    assert engine.speculation is not None
    engine.speculation.length = AnyLength(4)
    assert run(engine, requests, seed=5) == answers
    stats = engine.stats()
    assert stats.drafted_tokens > 0
    if drafter == "itself":  # greedy, the same weights: it cannot err
        assert stats.accepted_tokens == stats.drafted_tokens
    proposer: Any = engine.speculation.proposer
    assert proposer.kv.check_integrity([]) == []
    assert proposer.kv.held(0) == 0
    assert engine.control.check_integrity() == []


def test_what_a_drafting_model_has_to_read(tiny_folder: Any) -> None:
    """A whole sequence at first; then what came since its last draft."""
    engine = make_engine(
        tiny_folder("llama"), speculate="draft", draft_length="fixed", draft_tokens=4,
        draft_model=tiny_folder("mistral"),
    )  # fmt: skip
    assert engine.speculation is not None
    proposer = engine.speculation.proposer
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    request = Request("long", list(range(1, 41)), params)
    engine.add(request)
    (seq,) = engine.control.queues.waiting
    assert proposer.behind(seq) == len(request.prompt)
    engine.step()
    assert proposer.behind(seq) == len(request.prompt) + 1
    while engine.has_work:
        engine.step()
        assert proposer.behind(seq) <= 6 or seq not in engine.control.queues.running
    assert proposer.behind(seq) == len(seq.tokens)


def test_rounds_that_capture_say_nothing_of_others(tiny_folder: Any, wanted: Any) -> None:
    """A capture takes as long as dozens of steps, once: no cost is learnt from it."""

    told = set[float]()

    class Told(AnyLength):
        def observe(self, records: Sequence[Verified], step: float, draft: float) -> None:
            told.add(step)

    requests, answers = wanted["llama"]
    engine = speculating(make_engine(tiny_folder("llama")), answers, 0.3, 5)
    assert engine.speculation is not None
    engine.speculation.length = Told(5)
    engine.speculation.captures = itertools.count().__next__
    assert run(engine, requests, seed=2) == answers
    costs = engine.speculation.costs
    assert told == {0.0} and costs.draft(4, 2) == costs.verifying(8) == costs.reach() == 0
