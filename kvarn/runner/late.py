"""Steps that verify what is still being drafted, and drafts behind what is still being verified.

A captured step chooses its tokens on the device, and so does a captured chain of drafts. Where
nobody has to see either in between, a step can be handed over while the chain that it verifies
runs, and the next chain behind that step: the device goes from one to the other without the host,
which learns what stood while the next chain runs.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from kvarn.core.plan import Draft, SeqId, StepPlan
from kvarn.kernels.upload import upload
from kvarn.runner.batch import Batch
from kvarn.runner.chain import LateDraft, Saying
from kvarn.runner.image import Image, Ints
from kvarn.runner.inflight import InFlight
from kvarn.runner.sampler import Sampler
from kvarn.runner.state import DRAFTED, DeviceState
from kvarn.runner.uniform import uniform


def wait_where_seen(plan: StepPlan, image: Image, sampler: Sampler, state: bool) -> None:
    """Wait for drafts that are being made where anything but a device with `state` looks at them:
    rules for their sequences, whose probabilities depend on the tokens before."""
    if all(draft.late is None for draft in plan.drafts.values()):
        return
    there = all(map(image.knows, plan.drafts))  # else one begins anew, and may have rules
    if not (state and there and sampler.plain(image.rows(list(plan.drafts)))):
        for draft in plan.drafts.values():
            draft.settle()


def remember(drafts: Mapping[SeqId, Draft], image: Image, state: DeviceState) -> None:
    """Have drafts that are being made put where the rows of the step behind them look."""
    found = defaultdict[Saying, list[tuple[SeqId, int]]](list)
    for seq, draft in drafts.items():
        if isinstance(draft.late, LateDraft):
            found[draft.late.saying].append((seq, draft.late.at))
    for saying, mine in found.items():
        seqs, columns = zip(*mine, strict=True)
        state.remember(saying.ids, image.rows(list(seqs)), np.array(columns, np.int64))


@dataclass(slots=True)
class Verified:
    """Some spans of a step in flight whose drafts the device can judge."""

    seqs: list[SeqId]
    spans: list[int]  #: as the plan counts them
    first: Ints  #: row of the step's tokens that each begins with
    drafts: Ints  #: drafts of each

    def only(self, which: list[int]) -> "Verified":
        """Some of them."""
        seqs, spans = ([x[i] for i in which] for x in (self.seqs, self.spans))
        return Verified(seqs, spans, self.first[which], self.drafts[which])


def verified(step: InFlight, most: int = DRAFTED) -> Verified | None:
    """The spans with drafts, at most so many each; None: the host has to judge them."""
    batch = step.batch
    if step.seen is None or batch is None or not batch.drafts:
        return None
    counts = np.diff(batch.indptr) - 1  # a replayed step's spans are a known token and its drafts
    mine = np.flatnonzero((counts > 0) & (counts <= most))
    owners = step.image.owner[batch.rows[mine]]
    spans = batch.spans[mine]
    return Verified(owners.tolist(), spans.tolist(), batch.indptr[mine], counts[mine])


def judge(
    step: InFlight, which: Verified, drafted: DeviceState, rows: Ints, state: DeviceState
) -> None:
    """Have the device find what stands of drafts: how many, and the last two tokens, go to the
    `rows` of another runner's `state`. `drafted`: where the step's own rows looked for theirs."""
    from kvarn.kernels.triton.standing import stand

    seen, batch = step.seen, step.batch
    assert seen is not None and batch is not None
    arrays = [which.first, which.drafts, rows]
    if step.acceptance:
        arrays.append(_pretended(step, batch))
    first, count, to, *sure = upload(arrays, torch.int32, state.device)
    stand(
        seen.chosen, seen.said, seen.rows, drafted.last, [first, count, to],
        sure[0] if sure else None, state.last, state.moved,
    )  # fmt: skip


def _pretended(step: InFlight, batch: Batch) -> Ints:
    """[T] 1 where the draft behind a row stands by chance (`InFlight.acceptance`)."""
    keys = step.image.owner[batch.row_of].astype(np.uint64)
    chance = uniform(keys, batch.positions + 1)
    return (chance < step.acceptance).astype(np.int64)
