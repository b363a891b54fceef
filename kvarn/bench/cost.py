"""Bytes read and operations done by a run, from the model's shape: what speed is measured against.

Decode is bounded by bytes, prefill by operations; a rate in tokens says neither. Counted are the
weights once a step, the KV of every position that a query attends to once a span, and two
operations for each multiply-add of matrices and attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from kvarn.core.model import ModelSpec
from kvarn.models.fit import BYTES
from kvarn.models.quantized.convert import HEADS, Kind


@dataclass(slots=True)
class Work:
    """What a run did."""

    steps: int  #: forward passes: each reads all weights once
    prefill: list[tuple[int, int]]  #: (first position computed, length of the prompt) a request
    decode: list[tuple[int, int]]  #: (length of the prompt, tokens generated) a request


def weight_bytes(spec: ModelSpec, dtype: str, quantization: str) -> float:
    """Weights that one step reads: all but the rows of an embedding that is no output head."""
    head = spec.vocab * spec.hidden
    body = spec.n_params() - head * (1 if spec.tie_embeddings else 2)
    kind = cast(Kind, quantization)
    wide = {**BYTES, "none": BYTES[dtype]}
    return body * wide[kind] + head * wide[HEADS[kind]]


def kv_bytes(spec: ModelSpec, n: int, dtype: str) -> float:
    """KV that a query at the end of `n` positions reads in all layers."""
    return sum(
        group.bytes_per_token(BYTES[dtype]) * min(n, group.window or n) for group in spec.groups()
    )


def bytes_read(spec: ModelSpec, work: Work, dtype: str, quantization: str) -> float:
    """Weights a step and KV a decoded token (prefill reads the KV from the cache's own lines)."""
    kv = sum(
        kv_bytes(spec, n_prompt + i, dtype) for n_prompt, n in work.decode for i in range(1, n)
    )
    return work.steps * weight_bytes(spec, dtype, quantization) + kv


def operations(spec: ModelSpec, work: Work) -> float:
    """Floating-point operations of the whole run; the output head once a generated token."""
    head = 2.0 * spec.vocab * spec.hidden
    body = 2.0 * (spec.n_params() - spec.vocab * spec.hidden * (1 if spec.tie_embeddings else 2))
    total = 0.0
    for start, n_prompt in work.prefill:
        total += (n_prompt - start) * body + head + attention(spec, start, n_prompt)
    for n_prompt, n in work.decode:
        total += max(0, n - 1) * (body + head) + attention(spec, n_prompt, n_prompt + max(0, n - 1))
    return total


def attention(spec: ModelSpec, start: int, end: int) -> float:
    """Operations of q.k and p.v for the queries at positions [start, end), all layers."""
    each = 4.0 * spec.n_heads * spec.head_dim
    return sum(
        each * len(group.layers) * _seen(start, end, group.window) for group in spec.groups()
    )


def _seen(start: int, end: int, window: int | None) -> float:
    """Sum over the queries of [start, end) of the positions that each sees (itself included)."""
    if window is None or end <= window:
        return (end * (end + 1) - start * (start + 1)) / 2
    if start >= window:
        return float((end - start) * window)
    return _seen(start, window, None) + (end - window) * window


def requests_of(lengths: Sequence[tuple[int, int, int]], steps: int) -> Work:
    """`Work` of a run whose requests had (prompt, cached, generated) tokens."""
    return Work(
        steps=steps,
        prefill=[(min(cached, n_prompt - 1), n_prompt) for n_prompt, cached, _ in lengths],
        decode=[(n_prompt, n) for n_prompt, _, n in lengths],
    )
