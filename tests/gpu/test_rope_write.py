"""The launch between the qkv projection and attention, and the feed of input ids.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_rope_write.py` runs it without a GPU.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvarn.core.errors import ConfigError
from kvarn.kernels import norm, rope
from kvarn.kernels.triton import feed
from kvarn.kernels.triton import norm as triton_norm
from kvarn.kernels.triton.rope_write import rope_write, rope_write_keep

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
MAX_LEN, PAGE, PAGES, EPS = 300, 16, 9, 1e-5

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


@dataclass(slots=True)
class Case:
    """A step of fused rows; the cache is poisoned."""

    heads: tuple[int, int]  #: of q, and of k and v
    qkv: Tensor
    positions: Tensor
    slots: Tensor
    table: rope.Rope
    weights: tuple[Tensor, Tensor] | tuple[None, None]
    cache: Tensor

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        q_heads, kv_heads = self.heads
        rows = self.qkv.view(len(self.qkv), q_heads + 2 * kv_heads, -1)
        q, k, v = rows.split((q_heads, kv_heads, kv_heads), 1)
        return q, k, v

    def arguments(self) -> tuple[Tensor, ...]:
        return self.qkv, self.positions, self.slots, self.table.cos, self.table.sin, self.cache


def make_case(
    rows: int, heads: tuple[int, int], dim: int, dtype: torch.dtype, normed: bool,
    kept: torch.dtype | None = None, index: torch.dtype = torch.int32,
) -> Case:  # fmt: skip
    """Random rows at random positions; every third row has no slot."""
    torch.manual_seed(rows + dim)
    qkv = torch.randn(rows, (heads[0] + 2 * heads[1]) * dim).to(dtype)
    slots = torch.randperm(PAGES * PAGE)[:rows]
    slots[2::3] = -1
    weights = tuple(torch.rand(2, dim).to(dtype).to(DEVICE).unbind(0)) if normed else (None, None)
    cache = torch.full((PAGES, heads[1], 2, PAGE, dim), 0.5, device=DEVICE)
    return Case(
        heads,
        qkv.to(DEVICE),
        torch.randint(0, MAX_LEN, (rows,)).to(DEVICE, index),
        slots.to(DEVICE, index),
        rope.Rope(dim, 1e4, None, MAX_LEN, torch.float32, DEVICE),
        weights,
        cache.to(kept or dtype),
    )


def expected(case: Case, rounded: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v [T, H, d] in fp32, normalised (and then rounded) and turned."""
    q, k, v = case.split()
    if case.weights[0] is not None and case.weights[1] is not None:
        q = norm.reference(q, case.weights[0], EPS).to(rounded)
        k = norm.reference(k, case.weights[1], EPS).to(rounded)
    inverse = rope.frequencies(q.shape[2], 1e4, None).to(DEVICE)
    positions = case.positions.long()
    return rope.reference(q, positions, inverse), rope.reference(k, positions, inverse), v.float()


def check_cache(case: Case, k: Tensor, v: Tensor, astray: float = 0.0) -> None:
    """Slots hold k and v, but for a share `astray`; nothing else was touched."""
    found = case.cache.float()
    wanted = torch.full_like(found, 0.5)
    for row, slot in enumerate(case.slots.tolist()):
        if slot >= 0:
            wanted[slot // PAGE, :, 0, slot % PAGE] = k[row].float()
            wanted[slot // PAGE, :, 1, slot % PAGE] = v[row].float()
    assert torch.isfinite(found).all() and (found != wanted).float().mean() <= astray


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("heads", "dim"), [((4, 2), 12), ((9, 3), 64), ((32, 8), 128), ((8, 1), 256), ((6, 6), 96)]
)
def test_against_the_definition(
    dtype: torch.dtype, normed: bool, heads: tuple[int, int], dim: int
) -> None:
    case = make_case(7, heads, dim, dtype, normed)
    q, k, v = rope_write_keep(*case.arguments(), *heads, *case.weights, EPS)
    wanted = expected(case, dtype)
    for found, right in zip((q, k, v), wanted):
        assert found.dtype == dtype
        close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype]}
        torch.testing.assert_close(found.float(), right, **close)
    check_cache(case, k, v)
    alone = make_case(7, heads, dim, dtype, normed, index=torch.int64)
    assert torch.equal(rope_write(*alone.arguments(), *heads, *alone.weights, EPS), q)
    assert torch.equal(alone.cache, case.cache)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("dim", [64, 128])
def test_same_bits_as_the_separate_kernels(dtype: torch.dtype, dim: int) -> None:
    case = make_case(6, (8, 2), dim, dtype, False)
    q, k, _ = rope_write_keep(*case.arguments(), *case.heads)
    from kvarn.kernels.triton.rope import rotate

    angles = case.table.at(case.positions)
    q_apart, k_apart = rotate(*case.split()[:2], angles.cos, angles.sin)
    assert torch.equal(q, q_apart) and torch.equal(k, k_apart)


@pytest.mark.parametrize("dim", [64, 128])
def test_norm_rounds_as_the_separate_kernels(dim: int) -> None:
    """The order of a head's sum differs, so a last bit may differ here and there."""
    from kvarn.kernels.triton.rope import rotate

    case = make_case(40, (8, 2), dim, torch.bfloat16, True)
    q, k, _ = rope_write_keep(*case.arguments(), *case.heads, *case.weights, EPS)
    angles = case.table.at(case.positions)
    assert case.weights[0] is not None and case.weights[1] is not None
    apart = [triton_norm.rms_norm(x, weight, EPS) for x, weight in zip(case.split(), case.weights)]
    for found, right in zip((q, k), rotate(apart[0], apart[1], angles.cos, angles.sin)):
        assert (found != right).float().mean() < 1e-3


@pytest.mark.parametrize("normed", [False, True])
def test_rows_do_not_depend_on_their_number(normed: bool) -> None:
    case = make_case(50, (16, 8), 128, torch.bfloat16, normed)
    q = rope_write(*case.arguments(), *case.heads, *case.weights, EPS)
    for row in (0, 7, 49):
        part = [t[row : row + 1] for t in (case.qkv, case.positions, case.slots)]
        alone = torch.full_like(case.cache, 0.5)
        found = rope_write(
            *part, case.table.cos, case.table.sin, alone, *case.heads, *case.weights, EPS
        )
        assert torch.equal(found[0], q[row])
        slot = int(case.slots[row])
        if slot >= 0:
            at = (slot // PAGE, slice(None), slice(None), slot % PAGE)
            assert torch.equal(alone[at], case.cache[at])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_fp8_cache_saturates(dtype: torch.dtype) -> None:
    case = make_case(9, (4, 2), 64, dtype, False, torch.float8_e4m3fn)
    case.qkv[0] = 1000.0
    _, k, v = rope_write_keep(*case.arguments(), *case.heads)
    saved = [x.float().clamp(-448, 448).to(torch.float8_e4m3fn) for x in (k, v)]
    # the interpreter loses the carry where the mantissa rounds up to the next power of two
    check_cache(case, *saved, 1e-2 if INTERPRETED else 0.0)


@pytest.mark.parametrize("kept", [torch.float16, torch.float32])
def test_cache_of_another_dtype(kept: torch.dtype) -> None:
    case = make_case(9, (4, 2), 64, torch.bfloat16, True, kept)
    _, k, v = rope_write_keep(*case.arguments(), *case.heads, *case.weights, EPS)
    check_cache(case, k.to(kept), v.to(kept))


def test_rows_that_do_not_fit() -> None:
    case = make_case(2, (4, 2), 64, torch.float32, False)
    with pytest.raises(ConfigError, match="packed heads"):
        rope_write(*case.arguments(), 5, 2)
    with pytest.raises(ConfigError, match="both or not at all"):
        rope_write(*case.arguments(), 4, 2, torch.ones(64, device=DEVICE))
    empty = make_case(0, (4, 2), 64, torch.float32, False)
    assert rope_write(*empty.arguments(), 4, 2).shape == (0, 4, 64)


@pytest.mark.parametrize("n", [0, 1, 300])
def test_feed(n: int) -> None:
    torch.manual_seed(n)
    last = torch.randint(0, 40, (n + 5, 4), dtype=torch.int32)
    last[0] = -1
    rows = torch.randperm(n + 5, dtype=torch.int32)[:n]
    rows[n // 2 : n // 2 + 1] = -1
    column = torch.randint(0, 4, (n,))
    said = torch.where(torch.rand(n) < 0.5, torch.randint(0, 40, (n,)), -1 - column).int()
    sampled = torch.where(rows >= 0, last[rows.clamp(min=0).long(), column], 0).clamp(min=0)
    wanted = torch.where(said >= 0, said, sampled).long()
    here = [t.to(DEVICE) for t in (said, rows, last)]
    assert torch.equal(feed.feed(*here).cpu(), wanted)


def test_keep() -> None:
    last = torch.arange(20, dtype=torch.int32, device=DEVICE).view(10, 2)
    rows = torch.tensor([3, -1, 7, 0], dtype=torch.int32, device=DEVICE)
    tokens = torch.tensor([50, 51, -1, 53], dtype=torch.int32, device=DEVICE)
    feed.keep(last, rows, tokens)
    assert last[:, 0].tolist() == [53, 2, 4, 50, 8, 10, 12, 0, 16, 18]
    assert last[:, 1].tolist() == list(range(1, 20, 2))
