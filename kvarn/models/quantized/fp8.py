"""fp8 checkpoints in Hugging Face's own layouts: methods "fp8" and "fbgemm_fp8".

weight float8_e4m3fn [N, K], multiplied by weight_scale (or weight_scale_inv, which is no inverse):
one number, one a row, or one for every block of weight_block_size rows x inputs. Scales of
activations are not used: activations are scaled as they come, or stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvarn.core.errors import ModelError
from kvarn.kernels.linear.stored import Float8, Stored
from kvarn.models.quantized.convert import Kind
from kvarn.models.quantized.scheme import Fields
from kvarn.models.safetensors_file import FLOATS, SafetensorsWeights

FLOAT8 = "F8_E4M3"  #: safetensors' name of the type


class FP8:
    """See the module; a scale a block is expanded when it is read."""

    kind: Kind = "fp8"

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        get = Fields(config, name, "fp8")
        block = get("weight_block_size")
        self.block: tuple[int, int] | None = None
        self.label, self.expands = "fp8", ""
        if block is not None:
            if not (isinstance(block, list) and len(block) == 2 and min(block) > 0):
                get.refuse(f"weight_block_size {block!r}", "two numbers, such as [128, 128]")
            self.block = (int(block[0]), int(block[1]))
            self.label = f"fp8 in blocks of {self.block[0]} x {self.block[1]}"
            self.expands = "fp8 matrices here have a scale a row, not a block"

    def holds(self, files: SafetensorsWeights, stem: str) -> bool:
        """See `Scheme`."""
        name = f"{stem}.weight"
        return name in files and files.kind(name).startswith("F8")

    def matrix(self, files: SafetensorsWeights, stem: str, shape: tuple[int, int]) -> Stored:
        """See `Scheme`."""
        return float8(files, stem, shape, self.block)


def float8(
    files: SafetensorsWeights, stem: str, shape: tuple[int, int], block: tuple[int, int] | None
) -> Stored:
    """Codes [N, K] with their scale by matrix, row or block (dense, then)."""
    codes = files.tensor(f"{stem}.weight", shape, (FLOAT8,))
    names = [f"{stem}.weight_scale", f"{stem}.weight_scale_inv"]
    name = next((name for name in names if name in files), None)
    if name is None:
        raise ModelError(f"{files.folder}: no safetensors file here holds tensor {names[0]!r}")
    scale = files.tensor(name, None, FLOATS).float()
    n, k = shape
    if scale.numel() == 1:
        return Float8(codes, scale.reshape(1))
    if scale.shape in ((n,), (n, 1)):
        return Float8(codes, scale.reshape(n))
    if block is not None and scale.shape == (-(-n // block[0]), -(-k // block[1])):
        return _blocks(codes, scale, block)
    by_block = "" if block is None else f", one for each block of {block[0]} x {block[1]}"
    raise files.broken(
        name,
        f"has shape {list(scale.shape)}; {n} x {k} weights need one number or {n}{by_block}",
    )


def _blocks(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    n, k = codes.shape
    rows = scale.repeat_interleave(block[0], 0)[:n]
    wide: Tensor = codes.to(torch.float32) * rows.repeat_interleave(block[1], 1)[:, :k]
    return wide
