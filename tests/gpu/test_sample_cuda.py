"""Sampling on the device against the sampler of the CPU.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_sample_cuda.py` runs it without a GPU.
"""

import os
from dataclasses import dataclass, fields

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvarn.kernels.triton.sample import sample
from kvarn.runner.choose import argmax, draw, lowest_kept
from kvarn.runner.uniform import uniform

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
ROWS = 6 if INTERPRETED else 512
DRAWS = 16 if INTERPRETED else 8192  #: from one row
VOCABS = [2500] if INTERPRETED else [97, 5000, 151936]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


@dataclass(slots=True)
class Wishes:
    """Parameters by row, [R] each."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    key: Tensor
    length: Tensor

    def row(self, at: int | slice) -> "Wishes":
        at = slice(at, at + 1) if isinstance(at, int) else at
        return Wishes(*(getattr(self, f.name)[at] for f in fields(self)))


def wishes(
    rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Wishes:
    torch.manual_seed(rows)
    return Wishes(
        torch.full((rows,), temperature),
        torch.full((rows,), top_k, dtype=torch.int32),
        torch.full((rows,), top_p),
        torch.full((rows,), min_p),
        torch.randint(-(2**63), 2**63 - 1, (rows,)),
        torch.randint(0, 5000, (rows,), dtype=torch.int32),
    )


def mixed(rows: int) -> Wishes:
    """Every kind of row beside the others."""
    wish = wishes(rows)
    some = torch.arange(rows)
    wish.temperature = torch.tensor([0.0, 1.0, 0.7, 1.3])[some % 4]
    wish.top_k = torch.tensor([0, 50, 1, 0, 400], dtype=torch.int32)[some % 5]
    wish.top_p = torch.tensor([1.0, 0.9, 0.5])[some % 3]
    wish.min_p = torch.tensor([0.0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.3])[some % 7]
    return wish


def found(logits: Tensor, wish: Wishes, filtered: bool) -> Tensor:
    there = [getattr(wish, f.name).to(DEVICE) for f in fields(wish)]
    return sample(logits.to(DEVICE), *there, filtered=filtered).cpu()


def weights_of(row: Tensor, wish: Wishes) -> Tensor:
    """The weights [1, V] that the CPU's sampler draws from."""
    weights = ((row.float() - row.float().amax()) / wish.temperature.clamp(min=1e-30)).exp()
    weights = torch.where(weights < wish.min_p, 0.0, weights)
    if wish.top_k > 0 or wish.top_p < 1:
        lowest = lowest_kept(weights, wish.top_k.long(), wish.top_p.double())
        weights = torch.where(weights < lowest[:, None], 0.0, weights)
    return weights


def wanted(logits: Tensor, wish: Wishes) -> Tensor:
    """What the CPU's sampler chooses."""
    tokens = []
    for r in range(len(logits)):
        row, mine = logits[r : r + 1], wish.row(r)
        if mine.temperature == 0:
            tokens.append(argmax(row.float())[0])
            continue
        u = uniform(mine.key.numpy().view(np.uint64), mine.length.numpy().astype(np.int64))
        tokens.append(draw(weights_of(row, mine), torch.from_numpy(u)))
    return torch.cat(tokens).int()


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_as_the_cpu_does(vocab: int, spread: float, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits = (torch.randn(ROWS, vocab) * spread).to(dtype)
    wish = wishes(ROWS)
    apart = (found(logits, wish, False) != wanted(logits, wish)).float().mean()
    # u may lie within the rounding of fp32 sums of an edge between two tokens
    assert apart <= (0.02 if vocab > 5000 else 0.004)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_filters_as_the_cpu_does(vocab: int, spread: float) -> None:
    torch.manual_seed(vocab + 1)
    rows = ROWS if vocab < 100_000 else 128
    logits, wish = torch.randn(rows, vocab) * spread, mixed(rows)
    apart = (found(logits, wish, True) != wanted(logits, wish)).float().mean()
    assert apart <= (0.02 if vocab > 5000 else 0.004)


@pytest.mark.parametrize("filters", [(5, 1.0, 0.0), (0, 0.6, 0.0), (0, 1.0, 0.1), (8, 0.7, 0.05)])
def test_only_what_filters_keep_is_drawn(filters: tuple[int, float, float]) -> None:
    """Many draws from one row reach exactly the tokens that the CPU keeps."""
    torch.manual_seed(3)
    row = torch.randn(1, 300)
    wish = wishes(DRAWS, 1.0, *filters)
    tokens = found(row.expand(len(wish.key), -1).contiguous(), wish, True)
    kept = weights_of(row, wish.row(0))[0]
    assert bool((kept[tokens.long()] > 0).all())
    if not INTERPRETED:
        likely = kept / kept.sum() > 5e-3
        assert set(torch.nonzero(likely)[:, 0].tolist()) <= set(tokens.tolist())


def test_top_p_where_more_tokens_are_in_doubt_than_there_is_room_for() -> None:
    """One token far ahead of thousands that are nearly equal."""
    torch.manual_seed(9)
    logits = torch.randn(2, 4000) * 1e-4
    logits[:, 17] = 8.0
    wish = wishes(2, 1.0, top_p=0.8)
    assert torch.equal(found(logits, wish, True), wanted(logits, wish))


def test_ties_share_their_fate() -> None:
    row = torch.zeros(40)
    row[[3, 9, 20]] = 2.0
    row[[5, 6]] = 1.0
    logits = row.expand(DRAWS, -1).contiguous()
    assert set(found(logits, wishes(len(logits), top_k=1), True).tolist()) <= {3, 9, 20}
    assert set(found(logits, wishes(len(logits), top_k=4), True).tolist()) <= {3, 5, 6, 9, 20}
    assert set(found(logits, wishes(len(logits), top_p=0.01), True).tolist()) <= {3, 9, 20}


@pytest.mark.skipif(INTERPRETED, reason="too many draws for the interpreter")
@pytest.mark.parametrize("filtered", [False, True])
def test_distribution(filtered: bool) -> None:
    """Pearson's chi-square of 64 tokens stays below the 1e-6 quantile for 63 degrees."""
    torch.manual_seed(5)
    row, draws = torch.randn(1, 64), 1 << 17
    wish = wishes(draws, 0.8)
    wish.key[:] = wish.key[0]
    wish.length = torch.arange(draws, dtype=torch.int32)
    tokens = found(row.expand(draws, -1).contiguous(), wish, filtered)
    share = weights_of(row, wish.row(0))[0].double()
    expected = share / share.sum() * draws
    seen = torch.bincount(tokens.long(), minlength=64)
    assert float(((seen - expected) ** 2 / expected).sum()) < 131.0


@pytest.mark.parametrize("filtered", [False, True])
def test_greedy_takes_the_lowest_of_equals(filtered: bool) -> None:
    logits = torch.randn(4, 9000)
    logits[0, [8000, 70, 4000]] = 20.0
    logits[1, [8999, 2048]] = 20.0
    logits[2] = -torch.inf
    logits[2, 5000] = -3.0
    logits[3] = 1.0
    assert found(logits, wishes(4, 0.0), filtered).tolist() == [70, 2048, 5000, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filtered", [False, True])
def test_no_token_where_the_largest_logit_is_not_finite(temperature: float, filtered: bool) -> None:
    logits = torch.randn(5, 5000)
    logits[0, 4500] = torch.nan
    logits[1, 3] = torch.inf
    logits[2] = -torch.inf
    logits[3, :4999] = -torch.inf
    tokens = found(logits, wishes(5, temperature, 7, 0.9), filtered)
    assert tokens[:4].tolist() == [-1, -1, -1, 4999] and tokens[4] >= 0


def test_top_1_and_the_coldest_are_greedy() -> None:
    torch.manual_seed(6)
    logits = torch.randn(8, 5000) * 3
    best = logits.argmax(-1).int()
    assert torch.equal(found(logits, wishes(8, 1.0, top_k=1), True), best)
    assert torch.equal(found(logits, wishes(8, 1e-38), False), best)


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(7)
    logits, wish = torch.randn(ROWS, 5000), mixed(ROWS)
    together = found(logits, wish, True)
    for r in range(0, ROWS, 5):
        mine = wish.row(r)
        assert found(logits[r : r + 1], mine, True) == together[r]
        if mine.top_k == 0 and mine.top_p == 1 and mine.min_p == 0:
            assert found(logits[r : r + 1], mine, False) == together[r]


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
@pytest.mark.parametrize("filtered", [False, True])
def test_captured(filtered: bool) -> None:
    torch.manual_seed(8)
    logits, wish = torch.randn(32, 5000, device=DEVICE), mixed(32)
    there = [getattr(wish, f.name).to(DEVICE) for f in fields(wish)]
    sample(logits, *there, filtered=filtered)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample(logits, *there, filtered=filtered)
    for _ in range(3):
        logits.copy_(torch.randn(32, 5000))
        graph.replay()
        assert torch.equal(tokens, sample(logits, *there, filtered=filtered))
