"""`Roofline`: the time of a step from the model's shape and the device's peaks, nothing measured.

Each kernel takes the longer of its arithmetic and its memory traffic, and a launch. Known to be
wrong where kernels fall far from their roofline (small batches of odd shapes); what it gets right
is how time grows with tokens, context, ranks and precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from kvarn.core.errors import ConfigError
from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.cost.collective import all_reduce, all_to_all, pipeline_rounds
from kvarn.cost.devices import Device
from kvarn.cost.energy import joules
from kvarn.cost.moe import MoEShape, active_experts
from kvarn.cost.precision import Precision
from kvarn.cost.shape import Chunk, Estimate, StepShape

#: kernels of a layer besides matrix products and attention, after fusion (our choice)
SMALL_KERNELS = 2
#: kernels of attention in a layer: write the KV, attend, merge the splits (our choice)
ATTENTION_KERNELS = 3
#: numbers of rows whose products stay known
CACHED = 1 << 12


@dataclass(slots=True, frozen=True)
class Host:
    """Time of the host for a step: planning, launching, sampling. Defaults are our choice."""

    step: float = 300e-6  #: whatever the batch [s]
    seq: float = 5e-6  #: for each sequence [s]
    exposed: float = 50e-6  #: what remains when computation hides the rest [s]

    def seconds(self, n_seqs: int, hidden_by: float) -> float:
        """What the device waits for the host, which works beside `hidden_by` seconds of it."""
        return max(self.exposed, self.step + self.seq * n_seqs - hidden_by)


class _Work(NamedTuple):
    """Part of a step on one device."""

    seconds: float
    compute: float  #: for which the arithmetic units would be busy at their best [s]
    memory: float  #: for which the memory would be [s]


_NOTHING = _Work(0.0, 0.0, 0.0)


class Roofline:
    """A `CostModel` of `tp` x `pp` devices that share one model; all steps are analytic.

    `microbatches` parts of a step follow each other through the `pp` stages. With
    `expert_parallel` the `tp` ranks hold whole experts instead of a part of each. `skew` is the
    share of the time at the longest context, above that at the mean, by which unequal contexts
    slow decode attention (0.1: median of LLMServingSim 2.0's fits); never more than a doubling,
    for kernels split long contexts (our choice).
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: Device,
        precision: Precision | None = None,
        *,
        tp: int = 1,
        pp: int = 1,
        microbatches: int = 1,
        moe: MoEShape | None = None,
        expert_parallel: bool = False,
        host: Host | None = None,
        overlap: bool = True,
        skew: float = 0.1,
    ) -> None:
        if min(tp, pp, microbatches) < 1:
            raise ConfigError(
                f"tp, pp and microbatches must be at least 1, got {tp}, {pp}, {microbatches}"
            )
        self.name = f"roofline:{device.name}" + (f" tp={tp}" if tp > 1 else "")
        self.spec, self.device, self.tp, self.pp = spec, device, tp, pp
        self.precision = precision or Precision()
        self.microbatches, self.moe, self.expert_parallel = microbatches, moe, expert_parallel
        self.host, self.overlap, self.skew = host or Host(), overlap, skew
        self._groups = spec.groups()
        self._layer = _matrices(spec, tp)
        self._mlp_layers = spec.n_layers - (moe.layers if moe else 0)
        # decodes ask for the same number of rows step after step
        self._linear_of = lru_cache(CACHED)(self._linear)
        self._head_of = lru_cache(CACHED)(self._head)
        self._experts_of = lru_cache(CACHED)(self._experts)
        self._comm_of = lru_cache(CACHED)(self._comm)

    def idle_watts(self) -> float:
        """Power of all devices of the instance while they wait [W]."""
        return self.tp * self.pp * self.device.idle_watts

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of `shape`; a step without rows costs its host time only."""
        if shape.n_tokens == 0:
            return self._with_host(shape, Estimate(), _NOTHING)
        part = 1.0 / self.microbatches
        tokens = shape.n_tokens * part
        linear = self._linear_of(tokens)
        head = self._head_of(shape.n_logits * part)
        prefill = self._prefill(shape.chunks, part)
        decode = self._decode(shape, part)
        experts = self._experts_of(tokens)
        # every stage computes its part of the layers; only the last has the output head
        rounds = pipeline_rounds(self.pp, self.microbatches) / self.pp
        estimate = Estimate(
            linear=linear.seconds * rounds + head.seconds * self.microbatches,
            prefill=prefill.seconds * rounds,
            decode=decode.seconds * rounds,
            experts=experts.seconds * rounds,
            comm=self._comm_of(tokens) * rounds + self._sends(tokens),
        )
        parts = (linear, head, prefill, decode, experts)
        times = self.microbatches / self.pp
        total = _add(*parts)
        busy = _Work(0.0, total.compute * times, total.memory * times)
        return self._with_host(shape, estimate, busy)

    def _with_host(self, shape: StepShape, estimate: Estimate, busy: _Work) -> Estimate:
        device = estimate.seconds
        estimate.host = self.host.seconds(shape.n_seqs, device if self.overlap else 0.0)
        n = self.tp * self.pp
        estimate.joules = joules(self.device, n, estimate.seconds, busy.compute, busy.memory)
        return estimate

    def _linear(self, tokens: float) -> _Work:
        """The products of all layers but the experts', and the small kernels between them."""
        layers = self.spec.n_layers
        attn = self._products(self._layer[:2], tokens, self.precision.weight, layers)
        mlp = self._products(self._layer[2:], tokens, self.precision.weight, self._mlp_layers)
        moved = 2 * tokens * self.spec.hidden * self.precision.act
        small = self._kernel(0.0, moved, self.precision.compute, layers * SMALL_KERNELS)
        return _add(attn, mlp, small)

    def _head(self, rows: float) -> _Work:
        """Output head, split over the ranks by vocabulary, for the rows that want logits."""
        if rows == 0:
            return _NOTHING
        n_in, n_out = self.spec.hidden, self.spec.vocab / self.tp
        moved = n_in * n_out * self.precision.head + rows * (n_in + n_out) * self.precision.act
        return self._kernel(2 * rows * n_in * n_out, moved, self.precision.attention, 1)

    def _products(
        self, shapes: Sequence[tuple[float, float]], rows: float, weight: float, times: int
    ) -> _Work:
        parts = []
        for n_in, n_out in shapes:
            moved = n_in * n_out * weight + rows * (n_in + n_out) * self.precision.act
            parts.append(
                self._kernel(2 * rows * n_in * n_out, moved, self.precision.compute, times)
            )
        return _add(*parts)

    def _kernel(self, flops: float, n_bytes: float, form: str, times: float) -> _Work:
        """`times` kernels in a row, each of so much arithmetic and traffic."""
        d = self.device
        compute = flops / (d.flops[form] * d.mfu)
        memory = n_bytes / (d.bandwidth * d.mbu)
        seconds = max(compute, memory) + d.launch
        return _Work(seconds * times, compute * times, memory * times)

    def _prefill(self, chunks: Sequence[Chunk], part: float) -> _Work:
        """Causal attention of the chunks: every row sees the context before it and itself."""
        if not chunks:
            return _NOTHING
        d, spec, compute, memory, seconds = self.device, self.spec, 0.0, 0.0, 0.0
        each = 4.0 * spec.n_heads / self.tp * spec.head_dim
        for group in self._groups:
            seen = sum(seen_by(rows, context, group.window) for rows, context in chunks)
            keys = sum(min(c, (group.window or c) + rows) for rows, c in chunks)
            layers = len(group.layers)
            flops = each * layers * seen * part
            moved = keys * part * self._kv(group)
            in_compute = flops / (d.flops[self.precision.attention] * d.attention_mfu)
            in_memory = moved / (d.bandwidth * d.mbu)
            compute, memory = compute + in_compute, memory + in_memory
            seconds += max(in_compute, in_memory) + d.launch * ATTENTION_KERNELS * layers
        return _Work(seconds, compute, memory)

    def _decode(self, shape: StepShape, part: float) -> _Work:
        """Attention of single rows: their KV is read once, windows cut it at the mean context."""
        if shape.n_decode == 0:
            return _NOTHING
        mean = shape.decode_sum / shape.n_decode
        parts = [self._decode_group(g, shape.n_decode * part, mean) for g in self._groups]
        at_mean = _add(*parts)
        if shape.decode_max <= mean or self.skew == 0:
            return at_mean
        most = [
            self._decode_group(g, shape.n_decode * part, shape.decode_max) for g in self._groups
        ]
        more = self.skew * (_add(*most).seconds - at_mean.seconds)
        return at_mean._replace(seconds=at_mean.seconds + min(more, at_mean.seconds))

    def _decode_group(self, group: GroupSpec, n: float, context: float) -> _Work:
        d, spec, layers = self.device, self.spec, len(group.layers)
        seen = n * min(context, group.window or context)
        flops = 4.0 * spec.n_heads / self.tp * spec.head_dim * layers * seen
        compute = flops / (d.flops[self.precision.attention] * d.attention_mfu)
        memory = seen * self._kv(group) / (d.bandwidth * d.mbu)
        launches = d.launch * ATTENTION_KERNELS * layers
        return _Work(max(compute, memory) + launches, compute, memory)

    def _kv(self, group: GroupSpec) -> float:
        """Bytes of one position in the layers of a group, on one rank."""
        heads = max(1.0, group.n_kv_heads / self.tp)  # fewer heads than ranks: they are copied
        return group.bytes_per_token(self.precision.kv) * heads / group.n_kv_heads

    def _experts(self, tokens: float) -> _Work:
        """Routed experts that the batch wakes, spread evenly over the ranks; router and shared."""
        moe = self.moe
        if moe is None:
            return _NOTHING
        hidden, inter = self.spec.hidden, moe.inter / self.tp
        active = active_experts(moe.n_experts, moe.topk, tokens)
        pairs = tokens * moe.topk
        flops = 2 * pairs * 3 * hidden * inter
        moved = active * 3 * hidden * inter * self.precision.weight
        moved += pairs / self.tp * 2 * (hidden + moe.inter) * self.precision.act
        routed = self._kernel(flops, moved, self.precision.compute, moe.layers)
        dense: list[tuple[float, float]] = [(hidden, moe.n_experts)]
        if moe.shared:
            wide = moe.shared * inter
            dense += [(hidden, 2 * wide), (wide, hidden)]
        return _add(routed, self._products(dense, tokens, self.precision.weight, moe.layers))

    def _comm(self, tokens: float) -> float:
        """Sums after attention and MLP of every layer; expert parallelism moves tokens instead."""
        n_bytes = tokens * self.spec.hidden * self.precision.act
        sum_once = all_reduce(n_bytes, self.tp, self.device.peer)
        if self.moe is None or not self.expert_parallel:
            return 2 * self.spec.n_layers * sum_once
        own = n_bytes / self.tp * self.moe.topk
        there_and_back = 2 * all_to_all(own, self.tp, self.device.peer)
        sums = self.spec.n_layers + self._mlp_layers
        return sums * sum_once + self.moe.layers * there_and_back

    def _sends(self, tokens: float) -> float:
        """Activations from stage to stage, in all rounds in which a stage waits for one."""
        if self.pp == 1:
            return 0.0
        n_bytes = tokens * self.spec.hidden * self.precision.act
        rounds = pipeline_rounds(self.pp, self.microbatches) - 1
        return rounds * self.device.peer.seconds(n_bytes)


def seen_by(rows: int, context: int, window: int | None) -> float:
    """Positions that the last `rows` of `context` see together: rows (context - rows/2), exactly.

    The row at position p (from 1) sees min(p, window).
    """
    first = context - rows  # positions before the chunk
    if window is None or context <= window:
        return rows * (first + context + 1) / 2
    growing = max(0, window - first)
    return growing * (first + window + 1) / 2 + (rows - growing) * window


def _matrices(spec: ModelSpec, tp: int) -> list[tuple[float, float]]:
    """(inputs, outputs) on one rank: q, k and v; attention output; gate and up; down."""
    kv_heads = max(1.0, spec.n_kv_heads / tp)
    qkv = (spec.n_heads / tp + 2 * kv_heads) * spec.head_dim
    ffn = spec.ffn / tp
    return [
        (spec.hidden, qkv),
        (spec.n_heads / tp * spec.head_dim, spec.hidden),
        (spec.hidden, 2 * ffn),
        (ffn, spec.hidden),
    ]


def _add(*parts: _Work) -> _Work:
    seconds, compute, memory = 0.0, 0.0, 0.0
    for part in parts:
        seconds, compute, memory = seconds + part[0], compute + part[1], memory + part[2]
    return _Work(seconds, compute, memory)
