"""Captured decode and verify steps: from the input tokens to the next ones in one replay.

A bucket is a number of rows. Its captured graphs read their inputs from int32 arrays of fixed size
on the device, which one copy from pinned memory brings up to date before each replay; rows that a
step does not need idle: they write nothing and attend to nothing. The first step that needs a graph
captures it, which takes about as long as two eager steps; graphs of all buckets share their memory,
since only one runs at a time.

Where drafts are verified a span has several rows, and each of them chooses a token. The bucket
counts rows, whoever they belong to, so drafts of any lengths are padded to the same few graphs. How
many of them stand is the host's business.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.core.model import GroupSpec
from kvarn.kernels.attention import GraphBackend, GraphPlan
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.attention.selected import LayerPlan, SelectBackend, never
from kvarn.kernels.upload import ALIGN
from kvarn.models.decoder import Decoder
from kvarn.runner.batch import Batch
from kvarn.runner.heads import Kind, Layers
from kvarn.runner.logprobs import most_likely
from kvarn.runner.pool import KVPool
from kvarn.runner.sampler import sample_on_gpu
from kvarn.runner.selecting import Choice
from kvarn.runner.state import DeviceState

Ints = NDArray[np.int64]
Body = Callable[[], Tensor]
Replay = Callable[[], Tensor]

#: int32 numbers of each row
PER_ROW = {
    "token": 1, "row": 1, "position": 1, "temperature": 1, "top_k": 1, "top_p": 1, "min_p": 1,
    "key": 2, "length": 1,
}  # fmt: skip
EDITS = 2  #: page-table entries a row and group that a replay can write
MOST_VERIFIED = 1024  #: rows of a captured verify step; larger ones are bound by products
MOST_LOGITS = 256  #: of those whose logits are looked at: a graph keeps its own
MOST_GRAPHS = 128  #: captured at once; the one that was used longest ago gives way


class Capture(Protocol):
    """Makes a body that runs now into one that can be repeated."""

    def __call__(self, body: Body) -> Replay:
        """The inputs of `body` are those of an idle step."""
        ...


def buckets(most: int) -> list[int]:
    """Numbers of rows that graphs are captured for, up to `most`."""
    sizes = [1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128]
    sizes += range(160, 257, 32)
    sizes += range(320, max(most, 256) + 64, 64)
    return [size for size in sizes if size < most] + [most]


def verify_buckets(most: int) -> list[int]:
    """Numbers of rows that verify steps are captured for, up to `most` and `MOST_VERIFIED`."""
    sizes = [2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, MOST_VERIFIED]
    return [size for size in sizes if size < most] + [min(most, MOST_VERIFIED)]


class Inputs:
    """Named int32 arrays in one buffer: pinned copies that take turns, and the device's.

    While a replay reads the device's copy, and the copy before it may still be on its way, the
    host fills the other pinned one.
    """

    def __init__(self, sizes: Mapping[str, int], device: torch.device) -> None:
        step = ALIGN // 4
        starts, total = {}, 0
        for name, size in sizes.items():
            starts[name] = total
            total += -(-size // step) * step
        cuda = device.type == "cuda"
        self._pinned = [torch.zeros(total, dtype=torch.int32, pin_memory=cuda) for _ in range(2)]
        self.buffer = torch.zeros(total, dtype=torch.int32, device=device)
        self.starts = starts  #: of each array in the buffer
        self._turn = 0
        self.device = {n: self.buffer[s : s + sizes[n]] for n, s in starts.items()}
        self._hosts = [
            {n: pinned.numpy()[s : s + sizes[n]] for n, s in starts.items()}
            for pinned in self._pinned
        ]

    def host(self) -> dict[str, NDArray[np.int32]]:
        """The arrays to fill now."""
        self._turn = 1 - self._turn
        return self._hosts[self._turn]

    def send(self) -> None:
        """Copy what was filled to the device, after everything launched so far."""
        self.buffer.copy_(self._pinned[self._turn], non_blocking=True)


@dataclass(slots=True)
class Graph:
    """One captured step."""

    replay: Replay
    plans: list[GraphPlan]
    inputs: Inputs
    single: bool  #: every span has one row
    choice: Choice | None = None  #: the plans behind those of the groups are its own
    hidden: Tensor | None = None  #: [size, hidden] final ones, of the last replay
    top: Tensor | None = None  #: [2, size, k], as `most_likely` says; None: nobody asked


@dataclass(slots=True)
class Graphs:
    """The captured steps of a runner."""

    decoder: Decoder
    groups: Sequence[GroupSpec]
    pool: KVPool
    backend: GraphBackend
    state: DeviceState
    sizes: list[int]  #: buckets of decode steps
    capture: Capture
    verified: list[int] = field(default_factory=list)  #: buckets of verify steps; []: none are
    found: dict[Any, Graph] = field(default_factory=dict)  #: the newest use comes last
    captures: int = 0  #: made so far, chains of drafts too
    hidden: Tensor | None = None  #: [R, hidden] of the last step; the next one overwrites it
    inputs: Mapping[str, Tensor] = field(default_factory=dict)  #: of the last step, likewise
    top: Tensor | None = None  #: [2, R, k] of the last step, likewise
    layers: Layers = field(init=False)

    def __post_init__(self) -> None:
        self.layers = Layers(self.decoder.spec, self.groups, self.decoder.device)

    def take(self, batch: Batch, looked_at: bool) -> bool:
        """Whether a step can be replayed; `looked_at`: its logits are wanted, not its tokens."""
        n = len(batch.tokens)
        if batch.decodes:
            return 0 < n <= self.sizes[-1]
        if not batch.chooses or not self.verified or n > self.verified[-1]:
            return False
        spec = self.decoder.spec
        shape = (spec.n_heads, spec.n_kv_heads, spec.head_dim)
        small = all(self.backend.graph_fits(rows, *shape) for rows in batch.groups)
        return small and not (looked_at and n > MOST_LOGITS)

    def run(
        self,
        batch: Batch,
        entries: Sequence[tuple[Ints, Ints]],
        sampling: Mapping[str, NDArray[np.int32]] | None,
        filtered: bool,
        choice: Choice | None = None,
        top: int = 0,
    ) -> Tensor:
        """The next tokens [T] int32 of a batch whose rows all choose one, or its logits [T, V].

        `entries` are new entries of the page tables; `sampling` the arrays of
        `Sampler.parameters`, None for logits; `filtered`: whether they have filters;
        `choice`: the same rows where they choose what they see; `top`: the most likely tokens that
        are to be kept of each row.
        """
        n, sizes = len(batch.tokens), self.sizes if batch.decodes else self.verified
        size = sizes[bisect_left(sizes, n)]
        if any(len(at) > EDITS * size for at, _ in entries):  # sequences have started
            self.state.write(entries)
            entries = [(at[:0], pages[:0]) for at, pages in entries]
        kind = "logits" if sampling is None else "filtered" if filtered else "tokens"
        keys = [self._attention_key(kind, batch) for kind in self.layers.kinds]
        key = (size, kind, top, *keys, *self._choice_key(choice))
        graph = self.found.pop(key, None)
        if graph is None:
            if len(self.found) >= MOST_GRAPHS:
                del self.found[next(iter(self.found))]
            graph = self._capture(size, kind, batch, choice, top)
        self.found[key] = graph
        self._fill(graph, size, batch, choice, entries, sampling or {})
        graph.inputs.send()
        found = graph.replay()[:n]
        assert graph.hidden is not None
        self.hidden, self.inputs = graph.hidden[:n], graph.inputs.device
        self.top = None if graph.top is None else graph.top[:, :n]
        return found

    def _attention_key(self, kind: Kind, batch: Batch) -> tuple[Any, ...]:
        rows, dim = batch.groups[kind.group], self.decoder.spec.head_dim
        return self.backend.graph_key(rows, kind.n_heads, kind.n_kv_heads, dim)

    def _choice_key(self, choice: Choice | None) -> tuple[Any, ...]:
        if choice is None:
            return ()
        spec, backend = self.decoder.spec, self._selects
        shape = (spec.n_heads, spec.n_kv_heads, spec.head_dim)
        keys = [backend.selected_key(rows, *shape) for rows in choice.rows.values()]
        return (choice.dense, *keys)

    @property
    def _selects(self) -> SelectBackend:
        return cast(SelectBackend, self.backend)

    def _capture(
        self, size: int, kind: str, batch: Batch, choice: Choice | None, top: int
    ) -> Graph:
        spec = self.decoder.spec
        shape = (size, spec.n_heads, spec.n_kv_heads, spec.head_dim)
        plans: list[GraphPlan] = [
            self.backend.graph_plan(
                size, kind.n_heads, kind.n_kv_heads, spec.head_dim, batch.groups[kind.group]
            )
            for kind in self.layers.kinds
        ]
        tables = [kind.group for kind in self.layers.kinds]
        if choice is not None:
            for group, rows in choice.rows.items():
                plans.append(self._selects.selected_graph_plan(*shape, rows))
                tables.append(group)
        sizes = {name: count * size for name, count in PER_ROW.items()}
        for index in range(len(self.groups)):
            sizes |= {f"edit_at_{index}": EDITS * size, f"edit_page_{index}": EDITS * size}
        for index, plan in enumerate(plans):
            sizes |= {f"{name}_{index}": count for name, count in plan.sizes.items()}
        inputs = Inputs(sizes, self.decoder.device)
        graph = Graph(lambda: self.state.last, plans, inputs, batch.decodes, choice)
        for index, plan in enumerate(plans):
            mine = {name: inputs.device[f"{name}_{index}"] for name in plan.sizes}
            plan.bind(mine, self.state.tables[tables[index]])
        self._fill(graph, size, idle(batch), choice and choice.idle(), [], {})
        inputs.send()
        self.captures += 1
        graph.replay = self.capture(lambda: self._body(graph, kind, top))
        return graph

    def _fill(
        self,
        graph: Graph,
        size: int,
        batch: Batch,
        choice: Choice | None,
        entries: Sequence[tuple[Ints, Ints]],
        sampling: Mapping[str, NDArray[np.int32]],
    ) -> None:
        """Write a step into the host's arrays; what is left over idles."""
        host = graph.inputs.host()
        n = len(batch.tokens)
        for name, values in (
            ("token", batch.tokens), ("row", batch.row_of), ("position", batch.angles)
        ):  # fmt: skip
            host[name][:n] = values
            host[name][n:] = -1 if name == "row" else 0
        for name in PER_ROW:
            if name in sampling:
                host[name][: PER_ROW[name] * n] = sampling[name]
        for index in range(len(self.groups)):
            at, pages = entries[index] if entries else (batch.rows[:0], batch.rows[:0])
            host[f"edit_at_{index}"][: len(at)] = at
            host[f"edit_at_{index}"][len(at) :] = self.state.spare
            host[f"edit_page_{index}"][: len(at)] = pages
            host[f"edit_page_{index}"][len(at) :] = 0
        parts: list[Any] = [batch.groups[kind.group] for kind in self.layers.kinds]
        parts += choice.rows.values() if choice else ()
        for index, (plan, part) in enumerate(zip(graph.plans, parts, strict=True)):
            plan.fill(part, {name: host[f"{name}_{index}"] for name in plan.sizes})

    def _body(self, graph: Graph, kind: str, top: int) -> Tensor:
        """A whole step on the device."""
        from kvarn.kernels.triton.feed import feed, keep

        inputs, state = graph.inputs.device, self.state
        for index, table in enumerate(state.tables):
            at = inputs[f"edit_at_{index}"].long()
            table.index_copy_(0, at, inputs[f"edit_page_{index}"])
        tokens = feed(inputs["token"], inputs["row"], state.last)

        plans = self.layers.plans(graph.plans)
        if graph.choice is not None:
            group_of = {layer: g for g, group in enumerate(self.groups) for layer in group.layers}
            _choosing(plans, graph, graph.choice, group_of)
        attend = PagedAttend(plans, self.pool.cache, takes_projection=True)
        hidden = graph.hidden = self.decoder.forward(tokens, inputs["position"], attend)
        logits = self.decoder.logits(hidden)
        if top:
            graph.top = most_likely(logits, top)
        if kind == "logits":
            return logits
        chosen = sample_on_gpu(logits, inputs, kind == "filtered")
        if graph.single:  # else the host says what stands
            keep(state.last, inputs["row"], chosen)
        return chosen


def _choosing(plans: list[Any], graph: Graph, choice: Choice, group_of: Mapping[int, int]) -> None:
    """Put the plans of a choice in the places of those of the layers that choose."""
    chosen = dict(zip(choice.rows, graph.plans[-len(choice.rows) :]))
    for layer in range(choice.dense, len(plans)):
        if group_of[layer] in chosen:
            plans[layer] = LayerPlan(chosen[group_of[layer]], choice.books[layer], never)


def idle(batch: Batch) -> Batch:
    """A step of no rows."""
    none = batch.rows[:0]
    groups = [
        replace(
            rows,
            indptr=rows.indptr[:1],
            start=none,
            page_indptr=none,
            base=none,
            slots=none,
            shared=None,
        )
        for rows in batch.groups
    ]
    return replace(
        batch, rows=none, row_of=none, tokens=none, positions=none, angles=none, groups=groups
    )


class CudaCapture:
    """CUDA graphs on one side stream, out of one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, body: Body) -> Replay:
        """Run once, so that kernels are compiled and libraries set up, then capture."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            body()
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                out = body()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay
