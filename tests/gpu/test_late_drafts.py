"""Drafts that nobody waits for, and drafts begun behind a step in flight: the naive tokens, always.

Under TRITON_INTERPRET=1 it runs on the CPU, too (see `test_captured_steps`).
"""

import random
from typing import Any

import numpy as np
import pytest
import torch
from golden.test_drafted_trees import heard
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation import AnyLength

pytest.importorskip("triton")

from gpu.test_captured_steps import DEVICE, INTERPRETED, capture_steps
from gpu.test_chains_cuda import Sure, blurred, chained, proposer_of

from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.kernels.attention import layout
from kvarn.kernels.triton.standing import stand
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.propose import begun
from kvarn.speculate.propose.begun import Begun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]
COUNT = 4 if INTERPRETED else 12


def ahead(folder: str, control: Any, **options: Any) -> Engine:
    """An engine whose drafter is its target, a little off, with everything captured."""
    engine = blurred(folder, **{"overlap": "on"} | options)
    chained(engine)
    capture_steps(engine)
    engine.overlap = True
    proposer: Any = proposer_of(engine)
    proposer.target = engine.executor
    assert engine.speculation is not None
    engine.speculation.begin = proposer.begin
    engine.speculation.length = control
    return engine


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Begun]:
    """Drafts that were begun and found to follow."""
    found, follows = list[Begun](), Begun.follows

    def watched(self: Begun, *arguments: Any) -> bool:
        if follows(self, *arguments):
            found.append(self)
            return True
        return False

    monkeypatch.setattr(begun.Begun, "follows", watched)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"budget": 16, "pages": 40}], ids=str)
@pytest.mark.parametrize(
    "control", [AnyLength(5), Sure(5), Fixed()], ids=lambda c: type(c).__name__
)
def test_tokens_are_those_of_plain_decoding(
    tiny_folder: Any, used: list[Begun], family: str, options: dict[str, Any], control: Any
) -> None:
    """Ragged lengths that change from round to round, prompts in chunks between, preemption."""
    requests = make_requests(COUNT)
    answers = expected(make_engine(tiny_folder(family), device=DEVICE.type), requests)
    engine = ahead(tiny_folder(family), control, **options)
    records = heard(engine)
    for seed in (3, 4):
        assert run(engine, requests, seed=seed) == answers
    assert engine.control.check_integrity() == []
    assert proposer_of(engine).kv.check_integrity([]) == []
    assert engine.stats().accepted_tokens > 0
    assert all(0 <= token < 97 for one in records for token in one.draft.tokens)
    if family == "gemma2":  # windows: a chain is not moved on
        assert not used
    elif not options and not INTERPRETED:  # few requests, and short ones
        assert len(used) > 5


def test_they_are_the_drafts_that_would_have_been(tiny_folder: Any, used: list[Begun]) -> None:
    """Whatever stood, the drafter goes on from there: at every place with what it always says."""
    plain = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    requests = [Request(f"r{i}", [3 + i, 4, 5 + i] * (1 + i), plain) for i in range(2)]
    drafts = []
    for begins in (False, True):
        engine = ahead(tiny_folder("llama"), Fixed())
        assert engine.speculation is not None
        if not begins:
            engine.speculation.begin = lambda step: None
            proposer_of(engine).target = None
        records = heard(engine)
        run(engine, requests, seed=3)
        drafts.append({(one.seq, one.place): one.draft.tokens for one in records})
        stood = {one.accepted for one in records}
    assert len(used) > 10 and len(stood) > 2
    same = drafts[0].keys() & drafts[1].keys()
    assert len(same) > 10
    for at in same:  # a begun draft is not longer than its sequence can still be
        short = min(len(drafts[0][at]), len(drafts[1][at]))
        assert drafts[0][at][:short] == drafts[1][at][:short]


def test_attention_that_is_split(
    tiny_folder: Any, used: list[Begun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last piece of a split span moves on; the others stay."""
    monkeypatch.setattr(layout, "DECODE_LEAST", 64)
    monkeypatch.setattr(layout, "DECODE_WAVES", 100 if INTERPRETED else 1)  # of one multiprocessor
    plain = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    chance = random.Random(0)
    requests = [
        Request(f"r{i}", [chance.randrange(97) for _ in range(n)], plain)
        for i, n in enumerate((250, 187, 40))
    ]
    options = {"max_len": 300, "pages": 300, "budget": 300}
    answers = expected(make_engine(tiny_folder("llama"), device=DEVICE.type, **options), requests)
    engine = ahead(tiny_folder("llama"), Fixed(), **options)
    chains: Any = proposer_of(engine).chains
    assert run(engine, requests, seed=1) == answers
    assert len(used) > 5
    assert any(plan.split for found in chains.found.values() for chain in found.values()
               for plans in chain.plans for plan in plans)  # fmt: skip


def test_whoever_looks_waits(tiny_folder: Any, used: list[Begun]) -> None:
    """Rules, logprobs, stops within a run, and requests that sample beside greedy ones."""
    kinds = [
        SamplingParams(temperature=0.0, max_tokens=14, repetition_penalty=3.0, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=14, logprobs=2, ignore_eos=True),
        SamplingParams(temperature=0.8, seed=5, max_tokens=14, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=14, stop_token_ids=(5, 6, 7, 8, 9)),
    ]
    requests = [Request(f"r{i}", [3 + i, 4, 5], kind) for i, kind in enumerate(kinds * 2)]
    answers = run(make_engine(tiny_folder("llama"), device=DEVICE.type), requests, seed=1)
    engine = ahead(tiny_folder("llama"), AnyLength(4))
    assert run(engine, requests, seed=1) == answers
    assert used and engine.control.check_integrity() == []


def test_requests_that_leave_and_weights_that_change(tiny_folder: Any, used: list[Begun]) -> None:
    """While drafts are under way for them, and by them."""
    requests = make_requests(2 * COUNT)
    answers = expected(make_engine(tiny_folder("llama"), device=DEVICE.type), requests)
    engine, chance = ahead(tiny_folder("llama"), AnyLength(5)), random.Random(2)
    proposer, todo, left = proposer_of(engine), list(requests), set[str]()
    tokens: dict[tuple[str, int], list[int]] = {}
    while todo or engine.has_work:
        if todo and chance.random() < 0.4:
            engine.add(todo.pop())
        for output in engine.step():
            assert output.error is None
            tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
        if chance.random() < 0.15 and engine.control.queues.running:
            name = chance.choice(engine.control.queues.running).request.id
            left.add(name)
            engine.abort(name)
        if chance.random() < 0.2:
            proposer.renew(proposer.runner.decoder, chance.random() < 0.5)
    assert left and used
    for (name, index), wanted in answers.items():
        found = tokens.get((name, index), [])
        assert found == (wanted[: len(found)] if name in left else wanted)
    assert engine.control.check_integrity() == [] and proposer.kv.check_integrity([]) == []


def test_what_stands() -> None:
    """Against a walk on the host: chains of every length and fate, from the host and the device."""
    chance = random.Random(1)
    for forced in (False, True):
        chosen, said, rows, first, counts, wanted = [], [], [], [], [], []
        last = torch.randint(0, 9, (8, 9), dtype=torch.int32)
        sure = []
        for span, row in enumerate((5, 2, 7, 0)):
            count = chance.randint(1, 8)
            drafts = [chance.randrange(3) for _ in range(count)]
            late = span % 2 == 1
            last[row, 1 : 1 + count] = torch.tensor(drafts, dtype=torch.int32)
            words = [d if chance.random() < 0.8 else 3 for d in [*drafts, 3]]
            chances = [chance.random() < 0.6 for _ in range(count + 1)]
            stood = 0
            while stood < count and (chances[stood] if forced else words[stood] == drafts[stood]):
                stood += 1
            tokens = [40 + span, *drafts]
            wanted.append((stood, tokens[stood], words[stood]))
            first.append(len(chosen))
            counts.append(count)
            chosen += words
            sure += [int(one) for one in chances]
            said += [40 + span, *(range(-2, -2 - count, -1) if late else drafts)]
            rows += [row] * (count + 1)
        there = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in
                 (chosen, said, rows, sure, first, counts, [3, 1, 0, 2])]  # fmt: skip
        out = torch.zeros(4, 9, dtype=torch.int32, device=DEVICE)
        moved = torch.zeros(4, dtype=torch.int32, device=DEVICE)
        some = there[3] if forced else None
        stand(there[0], there[1], there[2], last.to(DEVICE), there[4:], some, out, moved)
        for (stood, before, newest), to in zip(wanted, (3, 1, 0, 2), strict=True):
            assert (int(moved[to]), *out[to, :2].tolist()) == (stood, before, newest)
        assert np.unique([one[0] for one in wanted]).size > 1
