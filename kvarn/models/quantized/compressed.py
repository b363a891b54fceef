"""Checkpoints of compressed-tensors (llm-compressor): int4, int8 and fp8 weights.

pack-quantized: weight_packed int32 [N, K * bits / 32], codes + 2^(bits - 1) packed along the
inputs, lowest bits first; weight_scale [N, groups]; weight_zero_point, where the weights are not
symmetric, packed along the outputs [N * bits / 32, groups]; weight_g_idx [K] where activations
ordered the groups. int-quantized and naive-quantized: weight int8 [N, K] with weight_scale and
weight_zero_point (int8) [N, groups] or one number. float-quantized: see `fp8`.

Matrices that the config leaves out ("ignore") are in the files as they were. Activations are never
rounded here because a config says so: what a linear layer does to them is its own affair.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels.linear.stored import Stored
from kvarn.models.quantized.affine import affine, n_groups
from kvarn.models.quantized.convert import Kind
from kvarn.models.quantized.fp8 import float8
from kvarn.models.quantized.packing import unpack
from kvarn.models.quantized.scheme import Fields, words_in_groups
from kvarn.models.safetensors_file import FLOATS, SafetensorsWeights

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")
STRATEGIES = ("tensor", "channel", "group", "block")


class CompressedTensors:
    """See the module; one kind of weights a checkpoint."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        whole = Fields(config, name, "compressed-tensors")
        self._refuse_more(whole)
        weights, layout = self._one_group(whole)
        get = Fields(weights, name, "compressed-tensors")
        if get("type", "int") == "float":
            get.one_of("num_bits", (8,))
            self.kind: Kind = "fp8"
        else:
            get.one_of("type", ("int",), "int")
            self.kind = "int4" if get.one_of("num_bits", (4, 8)) == 4 else "int8"
        self.packed = layout == "pack-quantized"
        if (self.kind == "int4") and not self.packed:
            whole.refuse(f"4-bit weights in format {layout!r}", "pack-quantized")
        self.strategy = get.one_of("strategy", STRATEGIES, "tensor")
        self.group = int(get("group_size", -1)) if self.strategy == "group" else -1
        self.symmetric = bool(get("symmetric", True))
        block = get("block_structure")
        self.block: tuple[int, int] | None = None
        self._describe(get("actorder"), block)

    def _describe(self, order: Any, block: Any) -> None:
        """Label, and why the matrices can only be expanded."""
        self.expands = ""
        if self.kind == "fp8":
            self.label = "compressed-tensors fp8"
            if self.strategy == "block":
                self.block = (int(block[0]), int(block[1])) if block else (128, 128)
                self.expands = "fp8 matrices here have a scale a row, not a block"
            return
        bits = 4 if self.kind == "int4" else 8
        self.label = f"compressed-tensors {words_in_groups(bits, self.group)}"
        if order in (True, "group") and self.group > 0:
            self.expands = "its groups are of inputs out of order (actorder)"

    @staticmethod
    def _refuse_more(get: Fields) -> None:
        """What would change the arithmetic and is not there."""
        sparsity = get("sparsity_config", {}).get("format", "dense")
        if sparsity not in ("dense", None):
            get.refuse(f"sparsity format {sparsity!r}", "dense")
        if get("transform_config", {}):
            get.refuse("a transform_config", "no transforms")

    @staticmethod
    def _one_group(get: Fields) -> tuple[Mapping[str, Any], str]:
        """The weights' arguments and the format; all config groups must agree on them."""
        groups = list(get("config_groups", {}).values())
        if not groups or any(not group.get("weights") for group in groups):
            get.refuse("config_groups that say nothing of weights", "one kind of weights")
        weights = groups[0]["weights"]
        layouts = {group.get("format") or get("format") for group in groups}
        if len(layouts) > 1 or any(group["weights"] != weights for group in groups):
            get.refuse("several config_groups that differ", "one kind of weights")
        (layout,) = layouts
        if layout not in FORMATS:
            get.refuse(f"format {layout!r}", ", ".join(FORMATS))
        return weights, layout

    def holds(self, files: SafetensorsWeights, stem: str) -> bool:
        """See `Scheme`."""
        if self.packed:
            return f"{stem}.weight_packed" in files
        name = f"{stem}.weight"
        return name in files and files.kind(name) not in FLOATS

    def matrix(self, files: SafetensorsWeights, stem: str, shape: tuple[int, int]) -> Stored:
        """See `Scheme`."""
        if self.kind == "fp8":
            return float8(files, stem, shape, self.block)
        bits = 4 if self.kind == "int4" else 8
        groups = n_groups(shape[1], self.group)
        name = f"{stem}.weight_packed" if self.packed else f"{stem}.weight"
        if groups is None:
            raise files.broken(name, f"has {shape[1]} inputs, no multiple of {self.group}")
        codes = self._codes(files, name, shape, bits)
        scale = self._by_row(files, f"{stem}.weight_scale", FLOATS, shape[0], groups)
        zero = None if self.symmetric else self._zero(files, stem, shape[0], groups, bits)
        order = self._order(files, stem, shape[1], groups)
        if order is not None:
            middle = 1 << (bits - 1)
            signed = codes.float() - (middle if zero is None else zero[:, order])
            return signed * scale.float()[:, order]
        return affine(codes, zero, scale, bits)

    def _codes(
        self, files: SafetensorsWeights, name: str, shape: tuple[int, int], bits: int
    ) -> Tensor:
        """Unsigned codes [N, K]; a last word that is not full is cut."""
        n, k = shape
        if not self.packed:
            return files.tensor(name, shape, ("I8",)).view(torch.uint8) ^ 128
        about = name.removesuffix("packed") + "shape"
        said = files.tensor(about, (2,), ("I32", "I64")).tolist()
        if said != [n, k]:
            raise files.broken(about, f"says {said}, expected {[n, k]}")
        words = files.tensor(name, (n, -(-k * bits // 32)), ("I32",))
        return unpack(words, bits)[:, :k]

    def _zero(self, files: SafetensorsWeights, stem: str, n: int, groups: int, bits: int) -> Tensor:
        """Zero points [N, groups], unsigned as the codes are."""
        name = f"{stem}.weight_zero_point"
        if not self.packed:
            return self._by_row(files, name, ("I8",), n, groups).int() + 128
        words = files.tensor(name, (-(-n * bits // 32), groups), ("I32",))
        return unpack(words.T, bits)[:, :n].T.int()

    @staticmethod
    def _by_row(
        files: SafetensorsWeights, name: str, kinds: tuple[str, ...], n: int, groups: int
    ) -> Tensor:
        """Numbers [N, groups]; one number, or one a row without a second dimension, are spread."""
        found = files.tensor(name, None, kinds)
        if found.numel() == 1:
            return found.reshape(1, 1).expand(n, groups)
        if found.numel() == n * groups and found.shape[0] == n:
            return found.reshape(n, groups)
        raise files.broken(name, f"has shape {list(found.shape)}, expected {[n, groups]}")

    @staticmethod
    def _order(files: SafetensorsWeights, stem: str, k: int, groups: int) -> Tensor | None:
        """The group of each input where they are out of order."""
        name = f"{stem}.weight_g_idx"
        if name not in files or groups == 1:
            return None
        found = files.tensor(name, (k,), ("I32", "I64")).long()
        if bool((found == -1).all()) or torch.equal(found, torch.arange(k) // (k // groups)):
            return None
        if found.min() < 0 or found.max() >= groups:
            raise files.broken(name, f"names groups beyond 0 to {groups - 1}")
        return found
