"""Drafts that a model draws: the engine's tokens have the target's distribution, as without them.

A request with a seed, or a greedy one, gets the very tokens of plain decoding. Records of what was
judged agree with what came out.
"""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden.naive import naive_logits
from golden.test_engine import make_engine
from unit.test_verify import Floats, Prefix, p_value, redraw_from_p

from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.runner import sampler as sampling
from kvarn.runner.drafting import DraftSampler
from kvarn.runner.verify import Run
from kvarn.speculate.propose.following import GREEDY
from kvarn.speculate.records import Record

N, PROMPT = 4000, [3, 14, 15]
#: a random model's logits are alike, so it is made surer of itself, and three tokens are left
PARAMS = SamplingParams(temperature=0.4, top_k=3, max_tokens=4, ignore_eos=True)


def drafting(folder: str, drafter: str, **options: Any) -> Engine:
    return make_engine(
        folder, speculate="draft", draft_model=drafter, draft_length="fixed", draft_tokens=3,
        **{"max_seqs": 64, "pages": 400, "budget": 512, "max_queue": N} | options,
    )  # fmt: skip


def generate(engine: Engine, params: list[SamplingParams]) -> list[list[int]]:
    for i, one in enumerate(params):
        engine.add(Request(str(i), PROMPT, one))
    found: list[list[int]] = [[] for _ in params]
    while engine.has_work:
        for output in engine.step():
            found[int(output.request_id)] += output.tokens
    return found


@dataclass(frozen=True)
class Known:
    """The target's logits at each place of the answer, where top-k leaves something."""

    engine: Engine

    @property
    def vocab(self) -> int:
        return self.engine.spec.vocab

    @cache  # noqa: B019
    def logits(self, prefix: Prefix) -> Floats:
        decoder = self.engine.assembly.model.decoder
        found = naive_logits(decoder, self.engine.spec, [*PROMPT, *prefix])[-1].double().numpy()
        found[found < np.sort(found)[-PARAMS.top_k]] = -np.inf
        return found


def p_of(folder: str) -> float:
    """Of the chi-square statistics of the tokens at all four places.

    The drafter is the target, but warmer and with more tokens to choose from.
    """
    engine = drafting(folder, folder)
    assert engine.speculation is not None
    proposer: Any = engine.speculation.proposer
    proposer.following.sampling = lambda wanted: replace(GREEDY, temperature=0.9, top_k=5)
    answers = generate(engine, [PARAMS] * N)
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return p_value(Known(engine), PARAMS, [Run([], answer) for answer in answers])


def test_tokens_have_the_targets_distribution(tiny_folder: Any) -> None:
    assert p_of(tiny_folder("llama")) > 0.01


def test_a_verifier_with_a_fault_is_found(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "accept", redraw_from_p)
    assert p_of(tiny_folder("llama")) < 1e-6


def test_a_drafter_that_names_another_q_is_found(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DraftSampler.sample

    def wrong(self: DraftSampler, *args: Any) -> Any:
        sampled = right(self, *args)
        self.q = {row: q**4 / (q**4).sum() for row, q in self.q.items()}  # colder
        return sampled

    monkeypatch.setattr(DraftSampler, "sample", wrong)
    assert p_of(tiny_folder("llama")) < 1e-6


def test_what_the_target_would_draw_from_is_accepted(tiny_folder: Any) -> None:
    folder = tiny_folder("llama")
    share = {}
    for choice in ("drawn", "likeliest"):
        engine = drafting(folder, folder, draft_choice=choice)
        generate(engine, [PARAMS] * 200)
        share[choice] = engine.stats().accepted_tokens / engine.stats().drafted_tokens
    assert share["drawn"] > 0.99 > 0.9 > share["likeliest"]


def test_a_seed_or_greed_gets_the_tokens_of_plain_decoding(
    tiny_folder: Any, tmp_path: Path
) -> None:
    params = [
        SamplingParams(temperature=0.8, seed=7, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True),
    ]
    plain = generate(make_engine(tiny_folder("llama")), params)
    log = tmp_path / "steps.jsonl"
    engine = drafting(tiny_folder("llama"), tiny_folder("qwen3"), step_log=str(log))
    drafted = generate(engine, params)
    assert engine.assembly.step_log is not None
    engine.assembly.step_log.close()
    assert '"draft"' in log.read_text()
    assert drafted[:2] == plain[:2]
    same = drafting(tiny_folder("llama"), tiny_folder("qwen3"), draft_choice="likeliest")
    assert generate(same, params) == plain


def test_records_tell_what_was_judged(tiny_folder: Any) -> None:
    engine = drafting(tiny_folder("llama"), tiny_folder("qwen3"))
    assert engine.speculation is not None
    heard = list[Record]()
    engine.speculation.listeners.append(heard.extend)
    params = [SamplingParams(temperature=t, max_tokens=16, ignore_eos=True) for t in (0, 1, 1)]
    answers = dict(enumerate(generate(engine, params)))
    stats = engine.stats()
    assert sum(len(one.draft.tokens) for one in heard) == stats.drafted_tokens
    assert sum(one.accepted for one in heard) == stats.accepted_tokens
    for one in heard:
        answer = answers[one.seq]
        at = one.place - len(PROMPT)
        assert answer[at : at + len(one.committed)] == one.committed
        assert one.committed[: one.accepted] == one.draft.tokens[: one.accepted]
        assert one.chosen == answer[at + one.accepted]
        assert (one.draft.q is None) == (params[one.seq].temperature == 0)
        if one.draft.q is not None:
            assert torch.allclose(one.draft.q.sum(1), torch.ones(len(one.draft.tokens)))
