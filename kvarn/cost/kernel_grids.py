"""Grids of measured kernels: products, attention, collectives and experts, and a device's peaks.

The files are those that kernel_tables.py names. Each grid carries the least time that its peak
allows (`sol`), which extrapolates beyond the measurements.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvarn.core.errors import ConfigError
from kvarn.cost.grid import Grid, Point
from kvarn.cost.table_files import Row, figures, number, rows

BYTES = {"bfloat16": 2.0, "fp8": 1.0, "fp8_block": 1.0}


@dataclass(slots=True, frozen=True)
class Peak:
    """What a device can do at most, from its system file."""

    flops: float  #: of the products' number format [1/s]
    bandwidth: float  #: of device memory [B/s]
    reachable: float  #: share of the bandwidth that small operations reach
    latency: float  #: of one small operation [s]


def pairs(rows: float, context: float, window: int | None) -> float:
    """Query-key pairs of the last `rows` of `context` positions."""
    start = context - rows
    if window is None or context <= window:
        return (context * (context + 1) - start * (start + 1)) / 2
    if start >= window:
        return rows * window
    return pairs(window - start, window, None) + (context - window) * window


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
    wide = BYTES[dtype]

    def sol(point: Point) -> float:
        n, k, m = point
        moved = (m * k + k * n) * wide + m * n * BYTES["bfloat16"]
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
    return Grid(f"all-reduce over {tp} GPUs of {path.name}", ("elements",), found.items(), size)


def gather_grid(path: Path, tp: int) -> Grid | None:
    """NCCL all-gather of 16-bit logits by elements; None for one rank."""
    if tp == 1:
        return None
    only = {"num_gpus": str(tp), "op_name": "all_gather", "nccl_dtype": "half"}
    found = _fastest(rows(path, only), ("message_size",), path)
    return Grid(f"all-gather over {tp} GPUs of {path.name}", ("elements",), found.items(), size)


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
    return Grid(f"{dtype} experts {shape} of {path.name}", ("tokens",), found.items(), size)


def size(point: Point) -> float:
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
