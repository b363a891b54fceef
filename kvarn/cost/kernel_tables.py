"""A model put together from measured kernels: AIConfigurator's GEMM, attention and collectives.

`aic_<device>_<...>_{gemm,context_attention,generation_attention,custom_allreduce,nccl}_perf.csv.gz`
hold one row a kernel shape, `latency` in ms (ai-dynamo/aiconfigurator, Apache-2.0). Every layer is
QKV, output, gate-up and down projections, two norms and one activation, attention, and with
tensor parallelism two all-reduces; the head once a step. Where kernels of several backends were
measured at a shape, the fastest counts. Norms and activations were not measured: their bytes over
the system file's empirical bandwidth and its constant launch latency, as AIConfigurator does.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.grid import Grid, Point
from kvarn.cost.shape import Chunk, Estimate, StepShape
from kvarn.cost.table_files import Row, figures, number, rows

BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0}
#: device operations of a layer that are neither product nor attention: two norms, one activation
SMALL_OPS = 3
#: between the medians that LLMServingSim fitted to decode-only steps of two GPUs (0.036 and 0.025)
DECODE_SKEW = 0.03


@dataclass(slots=True, frozen=True)
class Peak:
    """What a device can do at most, from its system file."""

    flops: float  #: of the products' number format [1/s]
    bandwidth: float  #: of device memory [B/s]
    reachable: float  #: share of the bandwidth that small operations reach
    latency: float  #: of one small operation [s]


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


def pairs(rows: float, context: float, window: int | None) -> float:
    """Query-key pairs of the last `rows` of `context` positions."""
    start = context - rows
    if window is None or context <= window:
        return (context * (context + 1) - start * (start + 1)) / 2
    if start >= window:
        return rows * window
    return pairs(window - start, window, None) + (context - window) * window


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


def read_peak(folder: Path, prefix: str, gemm: str) -> Peak:
    """Peaks from `aic_<device>_system.yaml` beside the tables."""
    found = [p for p in sorted(folder.glob("aic_*_system.yaml")) if prefix.startswith(p.name[:-11])]
    if not found:
        raise ConfigError(f"no aic_*_system.yaml in {folder} belongs to the tables {prefix}*")
    values = figures(found[0])
    if gemm not in BYTES:
        raise ConfigError(f"no number format {gemm!r}; known: {', '.join(BYTES)}")
    try:
        return Peak(
            values["fp8_tc_flops" if gemm.startswith("fp8") else "bfloat16_tc_flops"],
            values["mem_bw"],
            values["mem_bw_empirical_scaling_factor"],
            values["mem_empirical_constant_latency"],
        )
    except KeyError as error:
        raise ConfigError(f"{found[0]} has no {error}") from None


def gemm_grid(path: Path, dtype: str, peak: Peak) -> Grid:
    """Products (m x k) @ (k x n) by (n, k, m)."""
    size = BYTES[dtype]

    def sol(point: Point) -> float:
        n, k, m = point
        moved = (m * k + k * n) * size + m * n * BYTES["bfloat16"]
        return max(2 * m * n * k / peak.flops, moved / peak.bandwidth)

    found = _fastest(rows(path, {"gemm_dtype": dtype}), ("n", "k", "m"), path)
    return Grid(f"{dtype} products of {path.name}", ("n", "k", "m"), found.items(), sol)


def attention_grid(
    path: Path, heads: tuple[int, int, int], kv: str, peak: Peak, *, prefill: bool = False
) -> tuple[Grid, float]:
    """Attention of one layer, full window, by (sequences, positions); and a factor on its times.

    The factor is 1 where these heads were measured; else it carries the utilisation of the
    nearest measured heads of the same width over to them.
    """
    only = {"kv_cache_dtype": kv, "attn_dtype": "bfloat16", "window_size": "0"}
    by_heads: dict[tuple[int, int, int], list[Row]] = {}
    for row in rows(path, only):
        if prefill and row["step"] != "0":
            continue
        key = (int(row["num_heads"]), int(row["num_key_value_heads"]), int(row["head_dim"]))
        by_heads.setdefault(key, []).append(row)
    near = _nearest(heads, by_heads, path)
    chosen = by_heads[near]
    if not prefill:
        chosen = [{**row, "length": str(int(row["isl"]) + int(row["step"]))} for row in chosen]
    found = _fastest(chosen, ("batch_size", "isl" if prefill else "length"), path)

    def least(point: Point, shape: tuple[int, int, int]) -> float:
        n_heads, kv_heads, head_dim = shape
        n, length = point
        work = pairs(length, length, None) if prefill else length
        moved = 2 * n * length * kv_heads * head_dim * BYTES[kv]
        return max(4 * n * n_heads * head_dim * work / peak.flops, moved / peak.bandwidth)

    kind = "prefill" if prefill else "decode"
    grid = Grid(
        f"{kind} attention of {path.name}", ("sequences", "positions"), found.items(),
        lambda point: least(point, near), sqrt=("positions",) if prefill else (),
    )  # fmt: skip
    largest = max(found, key=lambda point: least(point, near))
    return grid, least(largest, heads) / least(largest, near)


def _nearest(
    heads: tuple[int, int, int], known: Mapping[tuple[int, int, int], object], path: Path
) -> tuple[int, int, int]:
    wide = [shape for shape in known if shape[2] == heads[2]]
    if not wide:
        dims = sorted({shape[2] for shape in known})
        raise ConfigError(f"{path.name} has no attention of heads {heads[2]} wide; it has: {dims}")

    def distance(shape: tuple[int, int, int]) -> float:
        ratios = (shape[0] / heads[0], shape[1] / heads[1])
        return sum(max(r, 1 / r) for r in ratios)

    return min(wide, key=lambda shape: (distance(shape), shape))


def reduce_grid(path: Path, tp: int) -> Grid | None:
    """All-reduce in a captured graph by elements; None where one rank has nobody to talk to."""
    if tp == 1:
        return None
    only = {"num_gpus": str(tp), "backend": "vllm_graph"}
    found = _fastest(rows(path, only), ("message_size",), path)
    return Grid(f"all-reduce over {tp} GPUs of {path.name}", ("elements",), found.items(), _size)


def gather_grid(path: Path, tp: int) -> Grid | None:
    """NCCL all-gather of 16-bit logits by elements; None for one rank."""
    if tp == 1:
        return None
    only = {"num_gpus": str(tp), "op_name": "all_gather", "nccl_dtype": "half"}
    found = _fastest(rows(path, only), ("message_size",), path)
    return Grid(f"all-gather over {tp} GPUs of {path.name}", ("elements",), found.items(), _size)


def expert_grid(
    path: Path,
    shape: tuple[int, int, int, int],
    *,
    tp: int = 1,
    ep: int = 1,
    dtype: str = "bfloat16",
    distribution: str = "balanced",
) -> Grid:
    """One mixture-of-experts layer by tokens; `shape` is (hidden, inter, top k, experts)."""
    names = ("hidden_size", "inter_size", "topk", "num_experts", "moe_tp_size", "moe_ep_size")
    only = dict(zip(names, map(str, (*shape, tp, ep)), strict=True))
    only |= {"moe_dtype": dtype, "distribution": distribution}
    found = _fastest(rows(path, only), ("num_tokens",), path)
    return Grid(f"{dtype} experts {shape} of {path.name}", ("tokens",), found.items(), _size)


def _size(point: Point) -> float:
    """Beyond the largest measurement time grows with the size."""
    return point[0]


def _fastest(found: Iterable[Row], names: tuple[str, ...], path: Path) -> dict[Point, float]:
    """Least latency [s] by coordinates, over kernels of several backends."""
    best: dict[Point, float] = {}
    for row in found:
        point = tuple(number(row, name, path) for name in names)
        seconds = number(row, "latency", path) / 1000
        best[point] = min(seconds, best.get(point, seconds))
    return best


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
    return _Curve(Grid(name, ("m",), total.items(), sol), Grid(name, ("m",), share.items(), _size))
