"""Launch of the kernels for few rows: which tile, which buffers."""

from dataclasses import dataclass
from typing import Literal

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kvarn.kernels.linear.tiles import Tile
from kvarn.kernels.triton.gemv import gemv
from kvarn.kernels.triton.small_m import small_m


@dataclass(slots=True)
class Matrix:
    """W [N, K] packed and what every product with it needs."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None  #: fp32 [N] of fp8 weights
    arrived: Tensor  #: int32, zeros: programs that have finished their part of a tile

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> "Matrix":
        """With counters for the smallest tiles, 16 x 16, of up to 256 rows."""
        n_tiles = -(-len(weight) // 16) * 16
        arrived = torch.zeros(n_tiles, dtype=torch.int32, device=weight.device)
        return cls(weight.contiguous(), bias, scale, arrived)


def multiply(
    x: Tensor,
    matrix: Matrix,
    tile: Tile,
    *,
    dtype: torch.dtype,
    x_scale: Tensor | None = None,
    gate: Literal["silu", "gelu_tanh"] | None = None,
) -> Tensor:
    """x [M, K] times the matrix -> [M, N] in `dtype`.

    With `gate` the matrix is [gate; up] and the result act(gate) * up, [M, N / 2].
    """
    weight = matrix.weight
    (m, k), gated = x.shape, gate is not None
    n = len(weight) // 2 if gated else len(weight)
    out = torch.empty((m, n), dtype=dtype, device=x.device)
    if m == 0:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    flags = (gated, gate == "gelu_tanh", matrix.bias is not None)
    # the interpreter on CPU tensors knows neither dependent launches nor descriptors of the GPU
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    if pdl:
        options["launch_pdl"] = True
    ahead = tile.ahead if k * weight.element_size() % 16 == 0 else 0
    if tile.kernel == "gemv":
        gemv[(triton.cdiv(n, tile.block_n),)](
            x, weight, matrix.bias, out, n, k, ahead, *flags, k % tile.block_k == 0,
            tile.block_n, tile.block_k, tile.stages, pdl, **options,
        )  # fmt: skip
        return out
    parts = tile.splits * tile.segments
    span = triton.cdiv(triton.cdiv(k, parts), tile.block_k) * tile.block_k
    planes = tile.splits * (2 if gated else 1)
    split = tile.splits > 1
    part = torch.empty((planes, m, n), dtype=torch.float32, device=x.device) if split else None
    tma = tile.kernel == "tma" and pdl
    tiles = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]) if tma else weight
    small_m[(triton.cdiv(n, tile.block_n) * tile.splits * triton.cdiv(m, tile.block_m),)](
        x, weight, tiles, matrix.bias, x_scale, matrix.scale, out, part, matrix.arrived, m, n, k,
        x.stride(0), span, tile.splits, ahead, *flags, x_scale is not None, split, tile.segments,
        k % tile.block_k == 0, tma, tile.block_m, tile.block_n, tile.block_k, tile.stages,
        "ieee" if x.dtype == torch.float32 else "tf32", pdl, **options,
    )  # fmt: skip
    return out
