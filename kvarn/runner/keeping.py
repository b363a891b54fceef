"""What is kept of prompts: watched while they are computed, moved together when they are whole.

Each layer does it right after its own attention, so no more than one layer's keys are ever read
twice. Which positions stay differs by layer and KV head; how many does not (within a group), so
what stays is one table, and every later step is an ordinary one.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarn.core.keep import Keep
from kvarn.core.plan import Compaction, SeqId, SeqStart, StepPlan
from kvarn.kernels.attention import AttentionBackend, AttentionPlan, Ints
from kvarn.kernels.upload import upload
from kvarn.runner.batch import Batch
from kvarn.runner.image import Image
from kvarn.runner.pool import KVPool
from kvarn.sparse.part import OneShot, Prompt
from kvarn.sparse.rules import Rules


@dataclass(slots=True)
class Kept:
    """A sequence whose prompt will shrink."""

    part: OneShot
    keep: tuple[Keep, ...]
    prompt_len: int
    #: by group and layer, until the prompt is whole, or of what is held by slot: [Hkv, slots]
    mass: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    #: positions that stayed, ascending, by group and layer: [Hkv, budget]; what came later is in
    #: the ring
    positions: dict[tuple[int, int], Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Watched:
    """One span of a step, in one group: rows to see, and what to do when it is done."""

    seq: Kept
    group: int
    first: int  #: flattened rows first .. last
    last: int
    start: int  #: of the positions that are there, which the first is
    slots: Tensor  #: [positions that are there] where their KV is
    target: Tensor | None  #: [budget] where what stays goes; None: the prompt is not whole yet
    keep: Keep


class Keeping:
    """The sequences of one runner that do not keep all."""

    def __init__(self, rules: Rules, backend: AttentionBackend, image: Image) -> None:
        self.rules = rules
        self.backend = backend
        self.image = image
        self.seqs: dict[SeqId, Kept] = {}

    def start(self, start: SeqStart) -> Kept | None:
        """Remember a sequence, if anything of it will go."""
        part = self.rules.evicts(start.request)
        if part is not None and start.keep:
            self.seqs[start.seq] = Kept(part, start.keep, start.prompt_len)
        return self.seqs.get(start.seq)

    def stop(self, seq: SeqId) -> None:
        """Forget a sequence."""
        self.seqs.pop(seq, None)

    def watched(self, plan: StepPlan, batch: Batch, device: torch.device) -> list[list[Watched]]:
        """What this step must see, by group; [] almost always."""
        if not self.seqs:
            return []
        groups: list[list[Watched]] = [[] for _ in self.image.tables]
        moves = {(move.seq, move.group): move for move in plan.compactions}
        for at, index in enumerate(batch.spans.tolist()):
            span = plan.spans[index]
            seq = self.seqs.get(span.seq)
            if seq is None or (span.start >= seq.prompt_len and not seq.part.sums):
                continue
            end = span.start + span.length
            for group, keep in enumerate(seq.keep):
                begin = max(span.start, seq.prompt_len - keep.watch)
                move = moves.get((span.seq, group))
                some = keep.compacts(seq.prompt_len) or seq.part.sums
                if not some or (move is None and begin >= end):
                    continue
                there = keep.seen(seq.prompt_len, end - 1) + 1
                first = int(batch.indptr[at]) + begin - span.start
                row = int(batch.rows[at])
                slots, target = self._where(group, row, there, move, device)
                last = int(batch.indptr[at + 1])
                start = there - (end - begin)
                groups[group].append(Watched(seq, group, first, last, start, slots, target, keep))
        return groups if any(groups) else []

    def _where(
        self, group: int, row: int, there: int, move: Compaction | None, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """The first `there` slots, and those of what stays."""
        size = self.image.page_size
        pages = self.image.tables[group][row, : -(-there // size)]
        arrays: list[Ints] = [_slots(pages, size, there)]
        if move is not None:
            arrays.append(_slots(move.pages, size, move.kept))
        slots, *target = upload(arrays, torch.int64, device)
        return slots, target[0] if target else None

    def fold(self, batch: Batch, pool: KVPool, device: torch.device) -> None:
        """Before a step: where a ring is full, what stays of all slots moves to the first ones."""
        if not any(keep.folds for seq in self.seqs.values() for keep in seq.keep):
            return
        for index, row in enumerate(batch.rows.tolist()):
            seq = self.seqs.get(int(self.image.owner[row]))
            if seq is None:
                continue
            for group, keep in enumerate(seq.keep):
                at = int(batch.ends[index]) - 1 - keep.since(seq.prompt_len)
                if not keep.folds or at < 0 or at % keep.recent:
                    continue
                pages = self.image.tables[group][row, : -(-keep.budget // self.image.page_size)]
                found = _slots(pages, self.image.page_size, keep.budget)
                slots = upload([found], torch.int64, device)[0]
                for layer, cache in pool.by_group[group].items():
                    self._fold(seq, keep, (group, layer), cache, slots)

    def _fold(self, seq: Kept, keep: Keep, at: tuple[int, int], cache: Any, slots: Tensor) -> None:
        """Slots are in the order of their positions: the last of them are the newest."""
        held = keep.budget - keep.recent
        mass = seq.mass.get(at)
        scores = seq.part.score(Prompt(self.backend.keys(cache, slots), mass, at[1]))
        stays = chosen(scores, Keep(held, int(held * seq.part.newest)), seq.part.sinks)
        if mass is not None:
            seq.mass[at] = mass.gather(1, stays)
        k, v = self.backend.read(cache, slots[stays.T])
        self.backend.write(cache, slots[:held], k, v)

    def see(self, watched: Watched, layer: int, cache: Any, q: Tensor) -> None:
        """One layer has attended with q [T, Hq, d], and its KV is in `cache`."""
        seq, at = watched.seq, (watched.group, layer)
        k = self.backend.keys(cache, watched.slots)
        if watched.last > watched.first:
            new = seq.part.observe(q[watched.first : watched.last], k, watched.start)
            if at in seq.mass:
                before = seq.mass[at]
                new[:, : before.shape[1]] += before
            seq.mass[at] = new
        if watched.target is not None:
            sums, keep = seq.mass.get(at), watched.keep
            if keep.folds:  # what stays is chosen from again: what is new then stays now
                recent = max(keep.recent, int(keep.budget * seq.part.newest))
                keep = Keep(keep.budget, recent)
            stays = chosen(seq.part.score(Prompt(k, sums, layer)), keep, seq.part.sinks)
            seq.positions[at] = stays
            if sums is not None:
                del seq.mass[at]
                if seq.part.sums:
                    seq.mass[at] = sums.gather(1, stays)
            k, v = self.backend.read(cache, watched.slots[stays.T])
            self.backend.write(cache, watched.target, k, v)


def _slots(pages: Any, size: int, count: int) -> Ints:
    """The first `count` slots of a table."""
    table = np.asarray(pages, np.int64)
    return (table[:, None] * size + np.arange(size)).ravel()[:count]


def chosen(scores: Tensor, keep: Keep, sinks: int) -> Tensor:
    """Positions that stay, ascending: [Hkv, budget] of scores [Hkv, L], L > budget."""
    heads, length = scores.shape
    recent = length - keep.recent
    best = scores[:, sinks:recent].topk(keep.budget - sinks - keep.recent, dim=1).indices + sinks
    here = torch.arange(length, device=scores.device).expand(heads, -1)
    return torch.cat([here[:, :sinks], best.sort(dim=1).values, here[:, recent:]], 1)


@dataclass(slots=True)
class WatchingPlan:
    """An `AttentionPlan` of one layer that lets `Keeping` see its queries and keys."""

    plain: AttentionPlan
    keeping: Keeping
    layer: int
    watched: list[Watched]

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        found = self.plain.run(cache, q, k, v)
        for watched in self.watched:
            self.keeping.see(watched, self.layer, cache, q)
        return found
