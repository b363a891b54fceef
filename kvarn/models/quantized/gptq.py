"""GPTQ checkpoints (arXiv 2210.17323), as AutoGPTQ and GPTQModel write them.

qweight int32 [K * bits / 32, N]: codes packed along the inputs, lowest bits first; qzeros int32
[groups, N * bits / 32]: zero points packed along the outputs, one less than they are in the first
checkpoint format ("gptq") and as they are in the second ("gptq_v2"); scales [groups, N];
g_idx int32 [K]: the group of each input.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels.linear.stored import Stored
from kvarn.models.quantized.affine import affine, n_groups
from kvarn.models.quantized.convert import Kind
from kvarn.models.quantized.packing import unpack
from kvarn.models.quantized.scheme import Fields, words_in_groups
from kvarn.models.safetensors_file import FLOATS, SafetensorsWeights


class GPTQ:
    """See the module; groups out of order (desc_act) are expanded when they are read."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        get = Fields(config, name, "GPTQ")
        self.bits: int = get.one_of("bits", (4, 8))
        self.group: int = int(get("group_size", -1))
        layout = get.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        self.zero_less = 1 if layout == "gptq" else 0
        self.label = f"GPTQ {words_in_groups(self.bits, self.group)}"
        self.kind: Kind = "int4" if self.bits == 4 else "int8"
        self.expands = ""
        if get("desc_act", False) and self.group > 0 and not get("static_groups", False):
            self.expands = "its groups are of inputs out of order (desc_act)"

    def holds(self, files: SafetensorsWeights, stem: str) -> bool:
        """See `Scheme`."""
        return f"{stem}.qweight" in files

    def matrix(self, files: SafetensorsWeights, stem: str, shape: tuple[int, int]) -> Stored:
        """See `Scheme`."""
        (n, k), per_word = shape, 32 // self.bits
        groups = n_groups(k, self.group)
        if groups is None or n % per_word or k % per_word:
            raise files.broken(
                f"{stem}.qweight",
                f"cannot hold {n} x {k} weights of {self.bits} bits in groups of {self.group}",
            )
        words = files.tensor(f"{stem}.qweight", (k // per_word, n), ("I32",))
        zero_words = files.tensor(f"{stem}.qzeros", (groups, n // per_word), ("I32",))
        scale = files.tensor(f"{stem}.scales", (groups, n), FLOATS)
        codes = unpack(words.T, self.bits)
        # the sum wraps round as the codes do: a zero point of 0 is stored as the largest code
        zero = (unpack(zero_words, self.bits).int() + self.zero_less) & ((1 << self.bits) - 1)
        order = self._order(files, stem, k)
        if order is not None:
            return (codes - zero.T[:, order]) * scale.T[:, order].float()
        return affine(codes, zero.T, scale.T, self.bits)

    def _order(self, files: SafetensorsWeights, stem: str, k: int) -> Tensor | None:
        """The group of each input where they are out of order."""
        if f"{stem}.g_idx" not in files or self.group < 1:
            return None
        found = files.tensor(f"{stem}.g_idx", (k,), ("I32", "I64")).long()
        if torch.equal(found, torch.arange(k) // self.group):
            return None
        if found.min() < 0 or found.max() >= k // self.group:
            raise files.broken(f"{stem}.g_idx", f"names groups beyond 0 to {k // self.group - 1}")
        return found
