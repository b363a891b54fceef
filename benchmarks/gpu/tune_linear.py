"""Which tile multiplies a weight matrix fastest for few rows, beside cuBLAS in the same run.

    PYTHONPATH=. python benchmarks/gpu/tune_linear.py --out kvarn/kernels/linear/tuned.py

Weights are rotated past the L2 and every candidate runs in a CUDA graph, back to back, as in a
decode step. Writes the table that `kvarn.kernels.linear.small_m` chooses by: per shape and bucket
of rows the best tile, or None where cuBLAS is as fast.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvarn.kernels.linear.tiles import Tile
from kvarn.kernels.linear.tuned import H100
from kvarn.kernels.triton.gated import gated
from kvarn.kernels.triton.launch import Matrix, multiply

#: (hidden, ffn, q heads, kv heads, head dim, vocab)
MODELS = {
    "llama-3-8b": (4096, 14336, 32, 8, 128, 128256),
    "llama-3.2-1b": (2048, 8192, 32, 8, 64, 128256),
    "qwen3-0.6b": (1024, 3072, 16, 8, 128, 151936),
}
BUCKETS = (1, 8, 16, 32, 64, 128, 256)
SHARED_MEMORY = 227 * 1024
POOL = 400 << 20  #: weights of a graph, well past the L2 [bytes]
GAIN = 0.98  #: of cuBLAS's time: what is not faster by 2 % is not chosen

Shape = tuple[int, int, bool]  # N (gated: of the result), K, gated


def shapes() -> list[Shape]:
    """Every matrix of the models, once; the output matrices last."""
    found: dict[Shape, None] = {}
    for hidden, ffn, q_heads, kv_heads, dim, _ in MODELS.values():
        found[((q_heads + 2 * kv_heads) * dim, hidden, False)] = None
        found[(hidden, q_heads * dim, False)] = None
        found[(ffn, hidden, True)] = None
        found[(hidden, ffn, False)] = None
    for model in MODELS.values():
        found[(model[5], model[0], False)] = None
    return list(found)


def tiles(bucket: int) -> list[Tile]:
    """Tiles worth trying for a bucket of rows, one split."""
    if bucket == 1:
        plain = [(2, 1024, 2), (4, 1024, 4), (8, 1024, 8), (8, 512, 4), (4, 512, 2), (2, 2048, 4)]
        deep = [(8, 512, 4, 4), (4, 1024, 4, 3), (16, 256, 4, 5), (16, 512, 8, 3), (4, 512, 2, 4)]
        found = [Tile("gemv", 1, n, k, warps, 1) for n, k, warps in plain]
        return found + [Tile("gemv", 1, *rest) for rest in deep] + tiles(8)
    if bucket <= 16:
        small = [(16, 256, 1, 4), (16, 512, 2, 3), (32, 256, 2, 4), (32, 128, 2, 5)]
        wide = [(64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 256, 4, 3), (128, 64, 4, 6)]
    elif bucket <= 64:
        small = []
        wide = [(64, 64, 4, 6), (64, 128, 4, 4), (64, 256, 4, 3), (128, 64, 4, 6), (128, 128, 8, 4)]
    else:
        small = []
        wide = [(64, 64, 4, 5), (64, 128, 4, 4), (128, 64, 8, 4), (128, 64, 8, 5), (128, 128, 8, 3)]
    rows = 128 if bucket == 256 else bucket
    found = [Tile("dot", bucket, *rest) for rest in small]
    found += [Tile("tma", max(rows, 16), *rest) for rest in wide]
    if bucket <= 64:
        found += [Tile("dot", max(rows, 16), *rest) for rest in wide[:2]]
    if bucket == 256:
        found += [Tile("tma", 256, 64, 64, 8, 4), Tile("tma", 256, 128, 64, 8, 3)]
    return found


def fits(tile: Tile, gate: bool, rows: int, n: int, k: int) -> bool:
    """Whether a tile can be launched and fills the device without drowning it."""
    if tile.kernel == "gemv":
        return True
    taken = (tile.block_n * (2 if gate else 1) + tile.block_m) * tile.block_k * 2 * tile.stages
    blocks = -(-n // tile.block_n) * -(-rows // tile.block_m)
    registers = tile.block_n * tile.block_m * (2 if gate else 1) / (32 * tile.warps)
    if taken > SHARED_MEMORY or registers > 128 or k // tile.splits < 2 * tile.block_k:
        return False
    return tile.splits == 1 or 100 <= blocks * tile.splits <= 132 * 8


def candidates(shape: Shape, bucket: int) -> Iterator[Tile]:
    """Tiles with every number of splits that suits the shape."""
    n, k, gate = shape
    for tile in tiles(bucket):
        for splits in (1,) if tile.kernel == "gemv" else (1, 2, 4, 8):
            made = replace(tile, splits=splits, ahead=1)
            if fits(made, gate, bucket, n, k):
                yield made


def build(job: tuple[Tile, bool, torch.dtype]) -> str:
    """Compile one variant into the cache on disk, by a small launch."""
    tile, gate, dtype = job
    try:
        weight = torch.zeros(512, 4096, dtype=torch.bfloat16, device="cuda")
        x = torch.zeros(tile.block_m, 4096, dtype=torch.bfloat16, device="cuda")
        multiply(x, Matrix.of(weight, None), tile, dtype=dtype, gate="silu" if gate else None)
        torch.cuda.synchronize()
    except Exception as error:
        return f"{tile}: {type(error).__name__} {str(error)[:100]}"
    return ""


def build_all() -> None:
    """Compile every variant on all cores."""
    jobs: dict[tuple[Tile, bool, torch.dtype], None] = {}
    for shape in shapes():
        dtype = torch.float32 if shape[0] > 100_000 else torch.bfloat16
        for bucket in BUCKETS:
            for tile in candidates(shape, bucket):
                jobs[(replace(tile, splits=min(tile.splits, 2)), shape[2], dtype)] = None
    began = time.perf_counter()
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        failed = [line for line in pool.map(build, jobs, chunksize=4) if line]
    print(f"{len(jobs)} variants built in {time.perf_counter() - began:.1f} s", flush=True)
    print("\n".join(failed), flush=True)


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """Time of one call: all of them in one graph, the median of replays."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 1e3 * sorted(times)[1] / len(calls)


class Bench:
    """The candidates of one shape on rotated weights."""

    def __init__(self, shape: Shape, noise: Tensor) -> None:
        self.shape = shape
        n, k, gate = shape
        size = n * k * (2 if gate else 1)
        copies = min(max(2, -(-POOL // (2 * size))), 40, len(noise) // size)
        weights = noise[: copies * size].view(copies, -1, k)
        self.matrices = [Matrix.of(weight, None) for weight in weights]
        self.dtype = torch.float32 if n > 100_000 else torch.bfloat16
        self.n_bytes = 2 * size

    def cublas(self, rows: int) -> float:
        """Time through torch, activation included."""
        x = torch.randn(rows, self.shape[1], dtype=torch.bfloat16, device="cuda")

        def call(w: Tensor) -> Tensor:
            if self.dtype == torch.float32:
                return torch.mm(x, w.t(), out_dtype=torch.float32)
            return gated(linear(x, w), False) if self.shape[2] else linear(x, w)

        return microseconds([lambda m=m: call(m.weight) for m in self.matrices])  # type: ignore

    def ours(self, rows: int, tile: Tile) -> float:
        """Time of a tile; infinite where it cannot be launched."""
        x = torch.randn(rows, self.shape[1], dtype=torch.bfloat16, device="cuda")
        gate: Any = "silu" if self.shape[2] else None
        try:
            return microseconds(
                [
                    lambda m=m: multiply(x, m, tile, dtype=self.dtype, gate=gate)  # type: ignore
                    for m in self.matrices
                ]
            )
        except Exception as error:
            print(f"{tile}: {type(error).__name__} {str(error)[:80]}", flush=True)
            return float("inf")

    def best(self, bucket: int) -> tuple[Tile, float]:
        """The fastest tile, then how far it should prefetch."""
        times = {tile: self.ours(bucket, tile) for tile in candidates(self.shape, bucket)}
        for tile in sorted(times, key=lambda tile: times[tile])[:2]:
            for ahead in (0, 2, 4):
                made = replace(tile, ahead=ahead)
                times[made] = self.ours(bucket, made)
        chosen = min(times, key=lambda tile: times[tile])
        return chosen, times[chosen]


def tune(seconds: float) -> dict[Shape, dict[int, Tile | None]]:
    """The table, and a line for every point, until the time is over."""
    noise = torch.randn(640 << 20, dtype=torch.bfloat16, device="cuda")
    table: dict[Shape, dict[int, Tile | None]] = {}
    began = time.perf_counter()
    for shape in shapes():
        bench = Bench(shape, noise)
        for bucket in BUCKETS:
            if time.perf_counter() - began > seconds:
                print(f"no time left for {shape} {bucket}")
                continue
            tile, ours = bench.best(bucket)
            theirs = bench.cublas(bucket)
            rate = bench.n_bytes / 1e3
            table.setdefault(shape, {})[bucket] = tile if ours < GAIN * theirs else None
            print(
                f"{shape} M={bucket}: {ours:.1f} us {rate / ours:.0f} GB/s, cuBLAS {theirs:.1f} us "
                f"{rate / theirs:.0f} GB/s, {tuple(asdict(tile).values())}",
                flush=True,
            )
    return table


def in_chains(table: dict[Shape, dict[int, Tile | None]]) -> None:
    """For up to 16 rows: choose again among a shape's tiles by the time of a model's whole chain.

    What is fastest back to back with itself is not always so between other matrices, whose
    programs start while the ones before finish.
    """
    for name, (hidden, ffn, q_heads, kv_heads, dim, _) in MODELS.items():
        keys: list[Shape] = [
            ((q_heads + 2 * kv_heads) * dim, hidden, False),
            (hidden, q_heads * dim, False),
            (ffn, hidden, True),
            (hidden, ffn, False),
        ]
        size = sum(n * k * (2 if gate else 1) for n, k, gate in keys)
        layers = [
            [noisy(n * (2 if gate else 1), k) for n, k, gate in keys]
            for _ in range(max(6, -(-(POOL // 2) // size)))
        ]
        for bucket in (1, 8, 16):
            chosen = {key: table[key][bucket] for key in keys}
            least = chain_time(layers, chosen, bucket)
            print(f"{name} M={bucket}: {least:.1f} us a layer", flush=True)
            for key in keys:
                for tile in {table[key][most] for most in (1, 8, 16)} - {chosen[key]}:
                    if tile is not None and tile.block_m < bucket:
                        continue
                    taken = chain_time(layers, chosen | {key: tile}, bucket)
                    if taken < 0.995 * least:
                        least, chosen = taken, chosen | {key: tile}
            print(f"{name} M={bucket}: {least:.1f} us a layer, {chosen}", flush=True)
            for key, tile in chosen.items():
                table[key][bucket] = tile


def noisy(n: int, k: int) -> Matrix:
    """A random matrix on the device."""
    weight = torch.empty(n, k, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)
    return Matrix.of(weight, None)


def chain_time(layers: list[list[Matrix]], tiles_of: dict[Shape, Tile | None], rows: int) -> float:
    """Time of a layer's four products."""
    width = layers[0][0].weight.shape[1]
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")

    def run() -> None:
        h = x
        for layer in layers:
            for matrix, (key, tile) in zip(layer, tiles_of.items()):
                h = h[:, : key[1]]
                gate: Any = "silu" if key[2] else None
                if tile is not None:
                    h = multiply(h, matrix, tile, dtype=x.dtype, gate=gate)
                else:
                    h = linear(h, matrix.weight)
                    h = gated(h, False) if gate else h

    return microseconds([run]) / len(layers)


def written(table: dict[Shape, dict[int, Tile | None]]) -> str:
    """The table as a Python file."""
    lines = [
        '"""Generated by benchmarks/gpu/tune_linear.py: the fastest tile by shape and rows."""\n',
        "#: (kernel, block_m, block_n, block_k, warps, stages, splits, ahead); None: cuBLAS",
        "Entry = tuple[str, int, int, int, int, int, int, int] | None\n",
        "#: by (N of the result, K, gated), then by the most rows",
        "H100: dict[tuple[int, int, bool], dict[int, Entry]] = {",
    ]
    for shape, buckets in table.items():
        lines.append(f"    {shape}: {{")
        for bucket, tile in buckets.items():
            entry = None if tile is None else tuple(asdict(tile).values())[:8]
            lines.append(f"        {bucket}: {entry},".replace("'", '"'))
        lines.append("    },")
    return "\n".join([*lines, "}\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=300.0, help="time for the timings [s]")
    parser.add_argument("--refine", action="store_true", help="only choose again in chains")
    options = parser.parse_args()
    if options.refine:
        table = {
            shape: {most: None if entry is None else Tile(*entry) for most, entry in found.items()}  # type: ignore[arg-type]
            for shape, found in H100.items()
        }
    else:
        build_all()
        table = tune(options.seconds)
    in_chains(table)
    options.out.write_text(written(table))


if __name__ == "__main__":
    main()
