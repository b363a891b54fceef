"""A model put together from measured layers: LLMServingSim's per-layer tables of a vLLM run.

`llmservingsim_<gpu>_<model>_{dense,per_sequence,attention,skew_fit}.csv.gz` (casys-kaist/
LLMServingSim `profiler/perf`, MIT), `time_us` each: dense layers by tokens of the step, head and
sampler by sequences, attention by (prefill rows, their past, decodes, their context). Decodes of
unequal context cost more than at their mean: `t = t(mean) + alpha (t(longest) - t(mean))`, alpha
fitted by bucket. The tables belong to one model on one GPU; there is no host time in them.
"""

import statistics
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.grid import Grid, Point, line
from kvarn.cost.shape import Chunk, Estimate, StepShape
from kvarn.cost.table_files import Row, number, rows

#: times that a dense layer runs in a decoder layer; `ONCE` runs once a step
PER_LAYER = {
    "layernorm": 2, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1,
    "down_proj": 1,
}  # fmt: skip
ONCE = ("embedding", "final_layernorm")
#: (layers, hidden, MLP, heads, KV heads, vocabulary) of the models that file names speak of
SHAPES = {"llama31_8b": (32, 4096, 14336, 32, 8, 128256)}

Bucket = tuple[int, ...]


class LayerTables:
    """Prices steps of the model that the tables were measured with."""

    def __init__(
        self,
        folder: Path,
        prefix: str,
        spec: ModelSpec,
        *,
        host: float = 0.0,
        host_per_seq: float = 0.0,
        busy_watts: float = 0.0,
        idle_watts: float = 0.0,
    ) -> None:
        """`host` [s] and `host_per_seq` [s]: what the device waits for the host, not in the
        tables. The sampler, which is, counts to the estimate's `host`.
        """
        _check(prefix, spec)
        self.name = prefix.rstrip("_")
        self.n_layers = spec.n_layers
        self.host, self.host_per_seq = host, host_per_seq
        self.busy_watts, self._idle_watts = busy_watts, idle_watts
        self._dense = _dense(folder / f"{prefix}dense.csv.gz", spec.n_layers)
        path = folder / f"{prefix}per_sequence.csv.gz"
        by_layer = _by_layer(rows(path), "sequences", path)
        head, sampler = by_layer["lm_head"], by_layer["sampler"]
        self._head = Grid(f"lm_head of {path.name}", ("sequences",), head, line(head))
        self._sampler = Grid(f"sampler of {path.name}", ("sequences",), sampler, line(sampler))
        self._attention = attention_grid(folder / f"{prefix}attention.csv.gz", spec)
        self._skew = Skew(folder / f"{prefix}skew_fit.csv.gz")

    def step(self, shape: StepShape) -> Estimate:
        """Time and energy of a step, by term."""
        out = Estimate(host=self.host + self.host_per_seq * shape.n_seqs)
        if shape.n_tokens == 0:
            return out
        out.linear, inside = self._dense.at(shape.n_tokens)
        measured = out.linear if inside else 0.0
        if shape.n_logits:
            seconds, inside = self._head.at(shape.n_logits)
            out.linear += seconds
            sampling, inside_too = self._sampler.at(shape.n_logits)
            out.host += sampling
            measured += (seconds if inside else 0.0) + (sampling if inside_too else 0.0)
        out.prefill, out.decode, inside = self._attend(shape)
        measured += out.prefill + out.decode if inside else 0.0
        total = out.seconds
        out.confidence = min(1.0, measured / total)
        out.joules = total * self.busy_watts
        return out

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]; 0 where none was given."""
        return self._idle_watts

    def _attend(self, shape: StepShape) -> tuple[float, float, bool]:
        """(prefill, decode) seconds of all layers: they share a launch, so decode is the rest."""
        rows, past = merged(shape.chunks)
        n = shape.n_decode
        if not n:
            seconds, inside = self._attention.at(rows, past, 0, 0)
            return seconds * self.n_layers, 0.0, inside
        mean = shape.decode_sum / n
        seconds, inside = self._attention.at(rows, past, n, mean)
        if shape.decode_max > mean:
            longest, _ = self._attention.at(rows, past, n, shape.decode_max)
            alpha = self._skew.alpha(rows, n, mean / shape.decode_max, shape.decode_max, past)
            seconds += alpha * (longest - seconds)
        if not shape.chunks:
            return 0.0, seconds * self.n_layers, inside
        alone = min(seconds, self._attention.at(rows, past, 0, 0)[0])
        return alone * self.n_layers, (seconds - alone) * self.n_layers, inside


class Skew:
    """The fitted alpha by bucket: rows, decodes, share of long ones, longest, past."""

    def __init__(self, path: Path) -> None:
        self._alpha: dict[Bucket, float] = {}
        names = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")
        for row in rows(path):
            n, rate, big, past = (_limit(row[name]) for name in names)
            self._alpha[int(row["pc"]), n, rate, big, past] = number(row, "alpha", path)
        if not self._alpha:
            raise ConfigError(f"{path} holds no fitted alpha")
        self._marks = [sorted({key[i] for key in self._alpha}) for i in range(5)]
        by_rows: dict[int, list[float]] = {}
        for key, alpha in self._alpha.items():
            by_rows.setdefault(key[0], []).append(alpha)
        self._median = {n: statistics.median(alphas) for n, alphas in by_rows.items()}

    def alpha(self, rows: float, n: int, rate: float, longest: int, past: float) -> float:
        """Share of the way from the time at the mean to that at the longest context.

        `rate` is the share of long sequences if the others were empty: mean / longest. A bucket
        that was not measured takes the median of its rows.
        """
        values = (rows, n, 100 * rate, longest, past)
        key = tuple(_ceiling(marks, value) for marks, value in zip(self._marks, values))
        found = self._alpha.get(key)
        return found if found is not None else self._median[key[0]]


def merged(chunks: tuple[Chunk, ...]) -> tuple[float, float]:
    """(rows, past) of one chunk with as many rows and query-key pairs as all `chunks`."""
    if len(chunks) == 1:
        rows, context = chunks[0]
        return rows, context - rows
    total = float(sum(rows for rows, _ in chunks))
    if not total:
        return 0.0, 0.0
    work = sum(rows * (context - rows / 2) for rows, context in chunks)
    past = work / total - total / 2
    return (total, past) if past >= 0 else ((2 * work) ** 0.5, 0.0)


def attention_grid(path: Path, spec: ModelSpec) -> Grid:
    """Attention of one layer by (rows, past, decodes, context); beyond it time follows work."""
    width = spec.n_heads * spec.head_dim

    def sol(point: Point) -> float:
        rows, past, n, context = point
        # a decode's pairs are read from memory: as dear as `REUSE` pairs of a prefill
        return width * (rows * (past + rows / 2) + REUSE * n * context)

    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    points = [
        (tuple(number(row, name, path) for name in names), number(row, "time_us", path) / 1e6)
        for row in rows(path)
    ]
    return Grid(f"attention of {path.name}", names, _planes(points), sol)


def _planes(points: list[tuple[Point, float]]) -> list[tuple[Point, float]]:
    """Points of the (rows, past) that were swept over decodes; strays would stop the others."""
    planes: dict[Point, list[tuple[Point, float]]] = {}
    for point, seconds in points:
        planes.setdefault(point[:2], []).append((point, seconds))
    usual = statistics.median(len(plane) for plane in planes.values())
    return [item for plane in planes.values() if 2 * len(plane) > usual for item in plane]


#: operations per byte at which these GPUs are balanced, per pair of a group of four query heads:
#: 165 Tflop/s over 1.0 TB/s (RTX 4090 data sheet) at one operation per byte and head of a group
REUSE = 40.0


def _dense(path: Path, n_layers: int) -> Grid:
    """All dense layers of a step by tokens."""
    by_layer = _by_layer(rows(path), "tokens", path)
    total: dict[Point, float] = {}
    often = {name: times * n_layers for name, times in PER_LAYER.items()}
    for name, times in (often | dict.fromkeys(ONCE, 1)).items():
        if name not in by_layer:
            raise ConfigError(f"{path} has no layer {name!r}; it has: {', '.join(by_layer)}")
        for point, seconds in by_layer[name]:
            total[point] = total.get(point, 0.0) + seconds * times
    return Grid(f"dense layers of {path.name}", ("tokens",), total.items(), _size)


def _by_layer(found: Iterable[Row], key: str, path: Path) -> dict[str, list[tuple[Point, float]]]:
    out: dict[str, list[tuple[Point, float]]] = {}
    for row in found:
        point = ((number(row, key, path),), number(row, "time_us", path) / 1e6)
        out.setdefault(row["layer"], []).append(point)
    return out


def _size(point: Point) -> float:
    return point[0]


def _limit(label: str) -> int:
    """Upper end of a bucket: 'n<=128', 'sr<=15%', 'sr>70%', 'kvB<=4k', 'kp=0'."""
    if ">" in label:
        return 100
    text = label.rpartition("=")[2].rstrip("%")
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text)


def _ceiling(marks: list[int], value: float) -> int:
    return marks[min(bisect_left(marks, value), len(marks) - 1)]


def _check(prefix: str, spec: ModelSpec) -> None:
    """The tables hold one model's layers; another model's steps cannot be priced from them."""
    mine = (spec.n_layers, spec.hidden, spec.ffn, spec.n_heads, spec.n_kv_heads, spec.vocab)
    for name, shape in SHAPES.items():
        if f"_{name}_" in prefix and mine != shape:
            raise ConfigError(
                f"the tables {prefix}* were measured with a model of (layers, hidden, MLP, heads, "
                f"KV heads, vocabulary) = {shape}, but {spec.name} has {mine}; kernel tables "
                "(aic_*) are put together for any model"
            )
