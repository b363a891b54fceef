"""The kernels of an acceptance head against the head in torch, fp32.

`TRITON_INTERPRET=1 pytest -m gpu tests/gpu/test_residual_head.py` runs it without a GPU.
"""

import copy
import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvarn.kernels.residual_head import reference
from kvarn.speculate.train.head import AcceptanceHead

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = [one for one in TOLERANCE if not INTERPRETED or one != torch.bfloat16]  # no such products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


def made(hidden: int, depth: int, dtype: torch.dtype) -> AcceptanceHead:
    """A head of some opinion, its blocks in numbers that `dtype` has."""
    torch.manual_seed(hidden + depth)
    head = AcceptanceHead(hidden, depth)
    torch.nn.init.normal_(head.out.weight, std=1.5 / hidden**0.5)
    for block in head.blocks:
        block.weight.data = block.weight.data.mul(3).to(dtype).float()
    return head.eval()


def asked(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states, and probabilities from none to all."""
    return torch.randn(rows, hidden).to(dtype), torch.linspace(0, 1, rows + 2)[1:-1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "depth"), [(48, 0), (48, 3), (200, 2), (576, 1), (2056, 1)])
def test_it_says_what_the_head_says(dtype: torch.dtype, hidden: int, depth: int) -> None:
    """Rows that are one tile, fewer or more; widths that no tile divides."""
    head = made(hidden, depth, dtype)
    fused = copy.deepcopy(head).to(DEVICE).captured(dtype)
    for rows in (1, 4, 16, 17, 70) if hidden < 2048 else (3, 65):
        states, own = asked(rows, hidden, dtype)
        wanted = head.accepted(states, own)
        assert rows == 1 or wanted.std() > 0.1
        found = fused(states.to(DEVICE), own.log().to(DEVICE))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu(), wanted, atol=TOLERANCE[dtype], rtol=0.0)
        defined = reference(fused, states.to(DEVICE), own.log().to(DEVICE))
        torch.testing.assert_close(defined.cpu(), wanted, atol=1e-5, rtol=0.0)


def test_a_row_hears_the_same_in_any_company() -> None:
    """To the last bit, in a tile of as many rows."""
    head = made(200, 2, torch.float32).to(DEVICE).captured(torch.float32)
    states, own = (one.to(DEVICE) for one in asked(16, 200, torch.float32))
    together = head(states, own.log())
    for rows in (1, 5):
        assert torch.equal(head(states[:rows], own[:rows].log()), together[:rows])


def test_certain_words_have_bounded_odds() -> None:
    head = AcceptanceHead(8, depth=0).to(DEVICE).captured(torch.float32)
    said = head(torch.zeros(3, 8, device=DEVICE), torch.tensor([-50.0, 0.0, -1e-7], device=DEVICE))
    assert said.tolist() == pytest.approx([1e-4, 1 - 1e-4, 1 - 1e-4], rel=1e-4)


def test_nobody_is_judged() -> None:
    head = made(48, 1, torch.float32).to(DEVICE).captured(torch.float32)
    assert head(torch.zeros(0, 48, device=DEVICE), torch.zeros(0, device=DEVICE)).shape == (0,)
