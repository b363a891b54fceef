"""The loads of the GPU yardstick and their floors.

The draws are those of the published comparison (W1's are nano-vllm's), so numbers compare across
engines and machines. Every repeat adds its number to all token ids: the same lengths and the same
sharing, but nothing that an earlier repeat has left in a prefix cache; for the same reason no two
loads of a setting draw the same prompts. W4's warm load asks for the prefix of its own repeat's
cold load with new endings.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

from kvarn.models.shapes import SHAPES

#: what a load is judged by: prompt tokens a second, generated tokens a second, or seconds
Metric = Literal["input_tok_s", "output_tok_s", "seconds"]
HIGHEST_ID = 100_000


@dataclass(slots=True)
class Requests:
    """What one repeat of a load asks for, all at once; every request runs to its full length."""

    prompts: list[list[int]]
    outputs: list[int]  #: tokens to generate, by request
    temperature: float = 0.0

    @property
    def n_input(self) -> int:
        """Prompt tokens."""
        return sum(map(len, self.prompts))

    def moved(self, by: int) -> "Requests":
        """The same requests with other token ids."""
        return replace(self, prompts=[[token + by for token in ids] for ids in self.prompts])


@dataclass(slots=True)
class Load:
    """A load of the yardstick."""

    name: str
    title: str
    metric: Metric
    make: Callable[[], Requests]
    shared: int = 0  #: prompt tokens that all requests begin with
    warm: bool = False  #: the shared tokens are in the cache already


@dataclass(slots=True)
class Setting:
    """An engine's start for some loads: shape, lengths, which caches are on."""

    name: str
    model: str
    loads: list[Load]
    max_len: int
    max_seqs: int
    prefix: bool  #: prefix caching
    fp8: bool = False  #: weights and KV in 8-bit floating point


def nano() -> Requests:
    """256 requests of 100 to 1024 tokens in and out, as nano-vllm's benchmark draws them."""
    rng = Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return Requests(prompts, [rng.randint(100, 1024) for _ in range(256)], 0.6)


def uniform(n: int, n_in: int, n_out: int, seed: int, highest: int = HIGHEST_ID) -> Requests:
    """`n` requests of equal lengths."""
    rng = Random(seed)
    return Requests([_ids(rng, n_in, highest) for _ in range(n)], [n_out] * n)


def sharing(
    n: int, shared: int, own: int, n_out: int, endings: int, highest: int = HIGHEST_ID
) -> Requests:
    """`n` requests that begin with the same tokens; `endings` is the seed of what follows."""
    prefix = _ids(Random(3), shared, highest)
    rng = Random(endings)
    return Requests([prefix + _ids(rng, own, highest) for _ in range(n)], [n_out] * n)


def _ids(rng: Random, n: int, highest: int) -> list[int]:
    return [rng.randint(0, highest) for _ in range(n)]


def settings(y3_requests: int = 256) -> list[Setting]:
    """The yardstick: every engine start with its loads."""
    eight = [
        Load("W2", "64 x (1024 + 256)", "output_tok_s", lambda: uniform(64, 1024, 256, 1)),
        Load("W2 prefill", "64 x 1024, 1 out", "input_tok_s", lambda: uniform(64, 1024, 1, 7)),
        Load("W3", "one stream, 128 + 256", "output_tok_s", lambda: uniform(1, 128, 256, 2)),
        Load("W3 first token", "one stream, 128 + 1", "seconds", lambda: uniform(1, 128, 1, 8)),
        Load(
            "W4 cold", "64 x (4096 shared + 128, + 128)", "output_tok_s",
            lambda: sharing(64, 4096, 128, 128, 4), shared=4096,
        ),
        Load(
            "W4 warm", "the same prefix again, new endings", "output_tok_s",
            lambda: sharing(64, 4096, 128, 128, 5), shared=4096, warm=True,
        ),
    ]  # fmt: skip
    w1 = [Load("W1", "256 requests, 100-1024 in and out", "output_tok_s", nano)]
    y3 = Load(
        "Y3", f"{y3_requests} x (1000 + 1000) at once", "output_tok_s",
        lambda: uniform(y3_requests, 1000, 1000, 6),
    )  # fmt: skip
    return [
        Setting("8b", "llama-3-8b", eight, 8192, 256, prefix=True),
        Setting("0.6b", "qwen3-0.6b", w1, 4096, 256, prefix=False),
        Setting("1b", "llama-3.2-1b", w1, 4096, 256, prefix=False),
        Setting("8b-fp8", "llama-3-8b", [y3], 4096, max(256, y3_requests), prefix=False, fp8=True),
        Setting("8b-again", "llama-3-8b", [], 8192, 256, prefix=True),  # a start, kernels compiled
    ]


def tiny_settings() -> list[Setting]:
    """Loads of the same kinds that a CPU finishes in a second."""
    loads = [
        Load("W2", "4 x (16 + 4)", "output_tok_s", lambda: uniform(4, 16, 4, 1, 40000)),
        Load("W2 prefill", "4 x 16, 1 out", "input_tok_s", lambda: uniform(4, 16, 1, 1, 40000)),
        Load("W3", "one stream, 8 + 4", "output_tok_s", lambda: uniform(1, 8, 4, 2, 40000)),
        Load("W3 first token", "one stream, 8 + 1", "seconds", lambda: uniform(1, 8, 1, 2, 40000)),
        Load(
            "W4 cold", "4 x (32 shared + 8, + 4)", "output_tok_s",
            lambda: sharing(4, 32, 8, 4, 4, 40000), shared=32,
        ),
        Load(
            "W4 warm", "new endings", "output_tok_s",
            lambda: sharing(4, 32, 8, 4, 5, 40000), shared=32, warm=True,
        ),
    ]  # fmt: skip
    return [Setting("tiny", "smollm2-135m", loads, 128, 8, prefix=True)]


# ---- what a load cannot be faster than


@dataclass(slots=True)
class Sizes:
    """What a shape computes and reads. Numbers of weights, then bytes."""

    layers: int  #: weights of all layers' matrices
    head: int  #: weights of the output head
    kv_bytes: int  #: of one position
    weight_bytes: int  #: read in a step
    heads_wide: int  #: layers x heads x head_dim: attention costs 4 times this, a pair of positions


@dataclass(slots=True)
class Ceilings:
    """What the device reaches, measured in the same run."""

    read_gb_s: float
    matmul_tflop_s: float
    fp8_tflop_s: float | None = None


def sizes(model: str, fp8: bool = False) -> Sizes:
    """Of a named shape in 16-bit numbers; with `fp8`, layers and KV in 8-bit ones."""
    shape: dict[str, Any] = SHAPES[model]
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_heads, n_layers = shape["num_key_value_heads"], shape["num_hidden_layers"]
    dim = shape.get("head_dim", hidden // heads)
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    layers = n_layers * (attention + 3 * hidden * shape["intermediate_size"])
    head, wide = shape["vocab_size"] * hidden, 1 if fp8 else 2
    kv = 2 * n_layers * kv_heads * dim * wide
    return Sizes(layers, head, kv, layers * wide + head * 2, n_layers * heads * dim)


@dataclass(slots=True)
class Floor:
    """Least work and least time of a load when all its sequences are admitted at once."""

    seconds: float
    read_bytes: float  #: weights and live KV, step by step
    flops: float


def floor(model: str, load: Load, ceilings: Ceilings, fp8: bool = False) -> Floor:
    """Prompts at the matmul rate; every decode step reads weights and KV or multiplies, whichever
    takes longer; shared positions are computed and read once; no host time."""
    asked, size = load.make(), sizes(model, fp8)
    matmul = (ceilings.fp8_tflop_s if fp8 else None) or ceilings.matmul_tflop_s
    read_s, flop_s = 1 / (ceilings.read_gb_s * 1e9), 1 / (matmul * 1e12)
    flops = _prompt_flops(asked, size, load)
    seconds = max(flops * flop_s, size.weight_bytes * read_s)
    read_bytes = float(size.weight_bytes)
    for active, positions in _steps(asked, load.shared):
        kv = positions * size.kv_bytes
        step_flops = 2 * (size.layers + size.head) * active
        seconds += kv * read_s + max(size.weight_bytes * read_s, step_flops * flop_s)
        read_bytes += size.weight_bytes + kv
        flops += step_flops
    return Floor(seconds, read_bytes, flops)


def _prompt_flops(asked: Requests, size: Sizes, load: Load) -> float:
    """Of all prompts; shared positions once, or not at all when they are cached."""
    lengths = [len(ids) for ids in asked.prompts]
    own = [n - load.shared for n in lengths]
    alone = 0 if load.warm else load.shared
    pairs = sum((n * n - load.shared**2) / 2 for n in lengths) + alone**2 / 2
    head = 2 * size.head * len(lengths)
    return 2 * size.layers * (sum(own) + alone) + 4 * size.heads_wide * pairs + head


def _steps(asked: Requests, shared: int) -> Iterator[tuple[int, int]]:
    """For every decode step: running sequences and positions to read, shared ones once."""
    for step in range(max(asked.outputs) - 1):
        running = [
            len(ids) - shared + step + 1
            for ids, n in zip(asked.prompts, asked.outputs)
            if n - 1 > step
        ]
        yield len(running), sum(running) + shared
