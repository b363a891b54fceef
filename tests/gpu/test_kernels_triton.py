"""The Triton forms of the small operations against their fp32 definitions."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kvarn.core.model import Activation
from kvarn.kernels import activation, norm, rope
from kvarn.kernels.triton import gated as triton_gated
from kvarn.kernels.triton import norm as triton_norm
from kvarn.kernels.triton import rope as triton_rope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.parametrize("dtype", TOLERANCE),
]


def near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.float().cpu(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dim", [48, 576, 2048, 5120])
def test_norms(dtype: torch.dtype, dim: int) -> None:
    torch.manual_seed(0)
    x, residual, weight = (torch.randn(*n, dim).to(dtype) for n in ((5,), (5,), ()))
    here = [t.to(DEVICE) for t in (x, residual, weight)]
    near(triton_norm.rms_norm(here[0], here[2], 1e-5), norm.reference(x, weight, 1e-5), dtype)
    out, total = triton_norm.add_rms_norm(*here, 1e-5)
    assert torch.equal(total.cpu(), x + residual)
    near(out, norm.reference(x + residual, weight, 1e-5), dtype)


def test_norm_of_heads_in_a_fused_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    fused, weight = torch.randn(7, 8, 64).to(dtype), torch.randn(64).to(dtype)
    found = triton_norm.rms_norm(fused.to(DEVICE)[:, 4:6], weight.to(DEVICE), 1e-5)
    near(found, norm.reference(fused[:, 4:6], weight, 1e-5), dtype)


@pytest.mark.parametrize("heads", [(4, 2), (9, 3), (32, 8)])
@pytest.mark.parametrize("dim", [12, 64, 96, 128, 256])
def test_rope(dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    torch.manual_seed(0)
    fused, positions = torch.randn(6, sum(heads) + 1, dim).to(dtype), torch.randint(0, 500, (6,))
    table = rope.Rope(dim, 1e4, None, 500, torch.float32, DEVICE)
    angles = table.at(positions.to(DEVICE))
    q, k, _ = fused.split((*heads, 1), 1)
    there = fused.to(DEVICE).split((*heads, 1), 1)
    q_found, k_found = triton_rope.rotate(there[0], there[1], angles.cos, angles.sin)
    inverse = rope.frequencies(dim, 1e4, None)
    near(q_found, rope.reference(q, positions, inverse), dtype)
    near(k_found, rope.reference(k, positions, inverse), dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [64, 1500])
def test_gated(dtype: torch.dtype, kind: Activation, width: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 2 * width) * 2).to(dtype)
    found = triton_gated.gated(x.to(DEVICE), kind == "gelu_tanh")
    near(found, activation.reference(x, kind), dtype)
