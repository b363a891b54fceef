"""A model put together from measured kernels: AIConfigurator's GEMM, attention and collectives.

`aic_<device>_<...>_{gemm,context_attention,generation_attention,custom_allreduce,nccl}_perf.csv.gz`
hold one row a kernel shape, `latency` in ms (ai-dynamo/aiconfigurator, Apache-2.0). Every layer is
QKV, output, gate-up and down projections, two norms and one activation, attention, and with
tensor parallelism two all-reduces; the head once a step. Where kernels of several backends were
measured at a shape, the fastest counts. Norms and activations were not measured: their bytes over
the system file's empirical bandwidth and its constant launch latency, as AIConfigurator does.
"""

from dataclasses import dataclass
from pathlib import Path

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.grid import Grid, Point
from kvarn.cost.kernel_grids import (
    BYTES,
    attention_grid,
    gather_grid,
    gemm_grid,
    pairs,
    read_peak,
    reduce_grid,
    size,
)
from kvarn.cost.shape import Chunk, Estimate, StepShape

#: device operations of a layer that are neither product nor attention: two norms, one activation
SMALL_OPS = 3
#: between the medians that LLMServingSim fitted to decode-only steps of two GPUs (0.036 and 0.025)
DECODE_SKEW = 0.03


@dataclass(slots=True)
class _Curve:
    """Seconds by one number, with the part of them that was measured."""

    grid: Grid
    share: Grid

    def at(self, x: float) -> tuple[float, float]:
        """(seconds, measured seconds)"""
        seconds, inside = self.grid.at(x)
        return seconds, seconds * (self.share.at(x)[0] - 1.0) if inside else 0.0


class KernelTables:
    """Prices steps of `spec` with `tp` GPUs of one kind. Stateless after it was built."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        spec: ModelSpec,
        *,
        tp: int = 1,
        gemm: str = "bfloat16",
        kv: str = "bfloat16",
        host: float = 0.0,
        host_per_seq: float = 0.0,
        skew: float = DECODE_SKEW,
        busy_watts: float = 0.0,
        idle_watts: float = 0.0,
    ) -> None:
        """`host` [s] and `host_per_seq` [s] are what the device waits for the host: no table of
        this family holds them, so they are given. `skew` is the share of the way from the time at
        the mean context to that at the longest which unequal decodes cost.
        """
        self.name = f"{prefix}tp{tp}"
        self.spec, self.tp = spec, tp
        self.host, self.host_per_seq, self.skew = host, host_per_seq, skew
        self.busy_watts, self._idle_watts = busy_watts, idle_watts
        self.peak = read_peak(folder, prefix, gemm)
        heads = _heads(spec, tp)
        table = folder / f"{prefix}gemm_perf.csv.gz"
        products = gemm_grid(table, gemm, self.peak)
        self._layer = _curve(products, layer_matrices(spec, tp), spec.n_layers)
        self._head = _curve(products, [(-(-spec.vocab // tp), spec.hidden)], 1)
        self._prefill, self._prefill_scale = attention_grid(
            folder / f"{prefix}context_attention_perf.csv.gz", heads, kv, self.peak, prefill=True
        )
        self._decode, self._decode_scale = attention_grid(
            folder / f"{prefix}generation_attention_perf.csv.gz", heads, kv, self.peak
        )
        self._reduce = reduce_grid(folder / f"{prefix}custom_allreduce_perf.csv.gz", tp)
        self._gather = gather_grid(folder / f"{prefix}nccl_perf.csv.gz", tp)
        self._windows = [(len(g.layers), g.window) for g in spec.groups()]

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of a step, by term."""
        out = Estimate(host=self.host + self.host_per_seq * shape.n_seqs)
        if shape.n_tokens == 0:
            return out
        out.linear, measured = self._products(shape)
        for term, (seconds, inside) in (
            ("prefill", self._chunks(shape.chunks)),
            ("decode", self._decodes(shape)),
            ("comm", self._collectives(shape)),
        ):
            setattr(out, term, seconds)
            measured += inside
        total = out.seconds
        out.confidence = min(1.0, measured / total)
        out.joules = total * self.busy_watts
        return out

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]; 0 where none was given."""
        return self._idle_watts

    def _products(self, shape: StepShape) -> tuple[float, float]:
        seconds, measured = self._layer.at(shape.n_tokens)
        if shape.n_logits:
            head, head_measured = self._head.at(shape.n_logits)
            seconds, measured = seconds + head, measured + head_measured
        return seconds + self._small(shape.n_tokens), measured

    def _small(self, n_tokens: int) -> float:
        """Norms read and write the residual, the activation reads two halves and writes one."""
        width = 2 * 2 * self.spec.hidden + 3 * self.spec.ffn / self.tp
        moved = n_tokens * width * BYTES["bfloat16"]
        rate = self.peak.bandwidth * self.peak.reachable
        return self.spec.n_layers * (moved / rate + SMALL_OPS * self.peak.latency)

    def _decodes(self, shape: StepShape) -> tuple[float, float]:
        if not shape.n_decode:
            return 0.0, 0.0
        mean = shape.decode_sum / shape.n_decode
        total = measured = 0.0
        for n_layers, window in self._windows:
            seen = mean if window is None else min(mean, window)
            seconds, inside = self._decode.at(shape.n_decode, seen)
            if self.skew and shape.decode_max > mean:
                most = shape.decode_max if window is None else min(shape.decode_max, window)
                longest, inside_too = self._decode.at(shape.n_decode, most)
                seconds += self.skew * (longest - seconds)
                inside = inside and inside_too
            seconds *= n_layers * self._decode_scale
            total += seconds
            measured += seconds if inside and self._decode_scale == 1.0 else 0.0
        return total, measured

    def _chunks(self, chunks: tuple[Chunk, ...]) -> tuple[float, float]:
        """One launch for all chunks: the time of as many whole prompts with as much work each."""
        if not chunks:
            return 0.0, 0.0
        n = len(chunks)
        total = measured = 0.0
        whole = all(rows == context for rows, context in chunks)
        length = (sum(context * context for _, context in chunks) / n) ** 0.5
        base, inside = self._prefill.at(n, length)
        for n_layers, window in self._windows:
            work = sum(pairs(rows, context, window) for rows, context in chunks)
            seconds = base * work / (n * pairs(length, length, None))
            if not whole:  # few rows, long context: at least the time to read the keys
                mean = sum(context for _, context in chunks) / n
                seconds = max(seconds, self._decode.at(n, min(mean, window or mean))[0])
            seconds *= n_layers * self._prefill_scale
            total += seconds
            sure = inside and whole and (window is None or length <= window)
            measured += seconds if sure and self._prefill_scale == 1.0 else 0.0
        return total, measured

    def _collectives(self, shape: StepShape) -> tuple[float, float]:
        if self._reduce is None or self._gather is None:
            return 0.0, 0.0
        seconds, inside = self._reduce.at(shape.n_tokens * self.spec.hidden)
        seconds *= 2 * self.spec.n_layers
        measured = seconds if inside else 0.0
        if shape.n_logits:
            gather, inside = self._gather.at(shape.n_logits * self.spec.vocab)
            seconds += gather
            measured += gather if inside else 0.0
        return seconds, measured


def layer_matrices(spec: ModelSpec, tp: int) -> list[tuple[int, int]]:
    """(n, k) of the products of one layer on one of `tp` ranks."""
    heads, kv_heads, head_dim = _heads(spec, tp)
    ffn = spec.ffn // tp
    return [
        ((heads + 2 * kv_heads) * head_dim, spec.hidden),
        (spec.hidden, heads * head_dim),
        (2 * ffn, spec.hidden),
        (spec.hidden, ffn),
    ]


def _heads(spec: ModelSpec, tp: int) -> tuple[int, int, int]:
    if tp < 1 or spec.n_heads % tp or spec.ffn % tp:
        raise ConfigError(
            f"tp={tp} does not divide the {spec.n_heads} heads and the MLP of {spec.name}"
        )
    return spec.n_heads // tp, max(1, spec.n_kv_heads // tp), spec.head_dim


def _curve(products: Grid, matrices: list[tuple[int, int]], times: int) -> _Curve:
    """Seconds of all `matrices`, `times` over, by m at the m's that were measured."""
    marks = sorted({point[2] for point in products.points()})
    total, share = {}, {}
    for m in marks:
        parts = [products.at(n, k, m) for n, k in matrices]
        seconds = sum(part for part, _ in parts)
        total[(m,)] = seconds * times
        # shares are kept above 1: a grid holds no zeros
        share[(m,)] = 1.0 + sum(part for part, inside in parts if inside) / seconds
    last = marks[-1]

    def sol(point: Point) -> float:
        assert products.sol is not None
        return sum(products.sol((n, k, max(point[0], last))) for n, k in matrices)

    name = f"{products.name}, summed"
    return _Curve(Grid(name, ("m",), total.items(), sol), Grid(name, ("m",), share.items(), size))
