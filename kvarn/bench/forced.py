"""Teacher forcing through the engine's own steps: given continuations under any rule of what stays.

What the model says at each position is compared with the full cache's words; what it would have
chosen there is replaced by what is given, so that all settings see the same text. The prompt is a
prompt and the continuation is generated, for eviction happens between the two.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvarn.core.request import Request, SamplingParams
from kvarn.engine.llm import LLM


@dataclass(slots=True)
class Case:
    """One text under one rule."""

    prompt: list[int]
    given: list[int]  #: the continuation's first tokens, whatever the model says
    free: int = 0  #: tokens that it may choose after them, greedily
    sparsity: str = "none"


@dataclass(slots=True)
class Answer:
    """What came of a case."""

    logprobs: list[Tensor] = field(default_factory=list)  #: [vocab] at each position, fp32
    chosen: list[int] = field(default_factory=list)  #: the free tokens
    slots: float = 0.0  #: positions of KV held at the end, of a head in the mean
    pages: int = 0


def force(llm: LLM, cases: Sequence[Case], keep_logprobs: bool = True) -> list[Answer]:
    """Run the cases together; steps are the engine's, one at a time."""
    control, runner = llm.engine.control, llm.engine.executor
    answers: dict[int, Answer] = {}
    found: list[Answer] = []
    wanted: dict[int, Case] = {}
    for i, case in enumerate(cases):
        count = len(case.given) + case.free
        params = SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
        request = Request(f"forced-{i}", case.prompt, params, sparsity=case.sparsity)
        llm.engine.assembly.rules.check(request)
        seq = control.add(request)[0]
        answers[seq.id], wanted[seq.id] = Answer(), case
        found.append(answers[seq.id])
    seen: list[Tensor] = []

    def tap(point: str, layer: int, x: Tensor) -> Tensor:
        if point == "logits":
            seen.append(x.log_softmax(-1))
        return x

    made: Any = runner
    made.tap = tap if keep_logprobs else None
    now = 0.0
    while control.has_work:
        now += 1.0
        plan = control.plan(now)
        result = made.run(plan)
        at = 0
        for i, span in enumerate(plan.spans):
            if not span.wants_logits:
                continue
            answer, case = answers[span.seq], wanted[span.seq]
            said = control.seqs[span.seq]
            if keep_logprobs:
                answer.logprobs.append(seen[-1][at])
            at += 1
            place = said.n_output
            if place < len(case.given):
                result.tokens[i] = [case.given[place]]
                row = made.image.row(span.seq)
                made.image.tokens[row, len(said.tokens)] = case.given[place]
            else:
                answer.chosen += result.tokens[i]
            answer.pages = sum(len(table) for table in said.tables)
            answer.slots = control.kv.seen(said, said.computed - 1) + 1
        control.apply(plan, result, now)
        seen.clear()
    made.tap = None
    return found


def kl(full: Answer, other: Answer) -> list[float]:
    """KL divergence of `other` from `full` at each of their positions [nats]."""
    pairs = zip(full.logprobs, other.logprobs, strict=True)
    return [float((p.exp() * (p - q)).sum()) for p, q in pairs]


def divergence(full: Answer, other: Answer) -> float:
    """Mean KL divergence of `other` from `full` over their positions [nats]."""
    return fmean(kl(full, other))


def perplexity(case: Case, answer: Answer) -> float:
    """Of the given tokens."""
    picked = [float(p[token]) for p, token in zip(answer.logprobs, case.given)]
    return float(torch.tensor(picked).mean().neg().exp())
