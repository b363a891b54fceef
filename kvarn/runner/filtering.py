"""Prompts of which a part goes on: a step whose rows leave at different layers.

The rows of a prompt that is filtered go through the first layers and leave. Where a step holds the
prompt's last position, the last of these layers sees its query with all keys of the prompt, and the
part says which positions go on; the sequence then starts anew with those, as any other does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarn.core.keep import Filter
from kvarn.core.plan import Span, StepPlan
from kvarn.kernels.attention import AttentionBackend, AttentionPlan, Ints
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.collective import Collective
from kvarn.kernels.upload import upload
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image
from kvarn.runner.inflight import InFlight
from kvarn.sparse.part import PromptFilter
from kvarn.sparse.rules import Rules

#: lays out some spans of a plan, by their indices
Build = Callable[[StepPlan, Sequence[int]], Batch]


@dataclass(slots=True)
class Asked:
    """A prompt whose last position is in a step, where its choice is made."""

    part: PromptFilter
    rule: Filter
    span: int  #: of the plan
    row: int  #: flattened, of the last position
    slots: Ints  #: [n] where the prompt's keys are


@dataclass(slots=True)
class Part:
    """Consecutive layers of a step, through which the same rows go."""

    end: int  #: the layer after its last
    batch: Batch
    rows: Ints | None  #: flattened rows of the part before that go on; None: all
    asked: list[Asked] = field(default_factory=list)  #: in a part of one layer


class Filtering:
    """What one runner does for prompts that are filtered; nothing is kept between steps."""

    def __init__(
        self, rules: Rules, backend: AttentionBackend, image: Image, group: Collective
    ) -> None:
        self.rules, self.backend, self.image, self.group = rules, backend, image, group

    def parts(self, plan: StepPlan, n_layers: int, build: Build) -> list[Part]:
        """The parts of a step: a new one wherever rows leave, and around a layer that chooses."""
        ends = [span.layers or n_layers for span in plan.spans]
        chooses = {i for i, span in enumerate(plan.spans) if span.layers and self._ends(span)}
        cuts = set(ends) | {ends[i] - 1 for i in chooses} - {0}
        found = list[Part]()
        for end in sorted(cuts):
            mine = [i for i, last in enumerate(ends) if last >= end]
            if found and len(mine) == len(found[-1].batch.spans):
                part = Part(end, found[-1].batch, None)
            else:
                batch = build(plan, mine)
                part = Part(end, batch, _kept(found[-1].batch, batch) if found else None)
            asked = [i for i in mine if i in chooses and ends[i] == end]
            part.asked = [self._asked(plan, part.batch, i) for i in asked]
            found.append(part)
        return found

    def _ends(self, span: Span) -> bool:
        """Whether a span of a filtered prompt holds its last position."""
        end = span.start + span.length
        return end == int(self.image.prompt_len[self.image.row(span.seq)])

    def _asked(self, plan: StepPlan, batch: Batch, index: int) -> Asked:
        span = plan.spans[index]
        image_row = self.image.row(span.seq)
        request = self.image.requests[image_row]
        part, rule = self.rules.part(request), self.rules.filters(request)
        assert isinstance(part, PromptFilter) and rule is not None
        group = next(g for g, one in enumerate(self.rules.groups) if span.layers - 1 in one.layers)
        n, size = span.start + span.length, self.image.page_size
        pages = self.image.tables[group][image_row, : -(-n // size)].astype(np.int64)
        slots = (pages[:, None] * size + np.arange(size)).ravel()[:n]
        at = int(np.flatnonzero(batch.spans == index)[0])
        return Asked(part, rule, index, int(batch.indptr[at + 1]) - 1, slots)

    def asking(self, part: Part, attend: PagedAttend, step: InFlight) -> PagedAttend:
        """The attention of a part whose one layer chooses, which tells `step` what."""
        layer = part.end - 1
        plans = list(attend.plans)
        plans[layer] = ChoosingPlan(plans[layer], self, part.asked, step)
        return PagedAttend(plans, attend.cache)

    def choose(self, asked: Asked, cache: Any, q: Tensor) -> Tensor:
        """What goes on, of the layer's queries q [T, Hq, d] and the keys in its cache."""
        slots = upload([asked.slots], torch.int64, q.device)[0]
        scores = asked.part.score(q[asked.row], self.backend.keys(cache, slots))
        return chosen(self.group.sum(scores), asked.rule)


def _kept(before: Batch, after: Batch) -> Ints:
    """The flattened rows of `before` that are those of `after`, in its order."""
    where = {span: at for at, span in enumerate(before.spans.tolist())}
    at = [where[span] for span in after.spans.tolist()]
    begin, end = before.indptr[:-1][at].tolist(), before.indptr[1:][at].tolist()
    return np.concatenate([np.arange(a, b) for a, b in zip(begin, end, strict=True)])


def chosen(scores: Tensor, rule: Filter) -> Tensor:
    """Positions that go on, ascending, and how many of them the scores alone lack: [budget + 1]."""
    n = len(scores)
    last, middle = n - rule.recent, rule.budget - rule.sinks - rule.recent
    best = scores[rule.sinks : last].topk(middle).indices + rule.sinks
    here = torch.arange(n, device=scores.device)
    found = torch.cat([here[: rule.sinks], best.sort().values, here[last:]])
    alone = torch.zeros(n, dtype=torch.bool, device=scores.device)
    alone[scores.topk(rule.budget).indices] = True
    return torch.cat([found, (~alone[found]).sum().view(1)])


@dataclass(slots=True)
class ChoosingPlan:
    """An `AttentionPlan` of the layer whose queries choose what goes on of some prompts."""

    plain: AttentionPlan
    filtering: Filtering
    asked: list[Asked]
    step: InFlight

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        found = self.plain.run(cache, q, k, v)
        for asked in self.asked:
            self.step.choose(asked.span, self.filtering.choose(asked, cache, q))
        return found
