"""AWQ checkpoints (arXiv 2306.00978) in the layout that AutoAWQ calls "gemm".

qweight int32 [K, N / 8]: codes packed along the outputs in AWQ's order; qzeros int32
[groups, N / 8]: zero points packed alike; scales [groups, N].
"""

from collections.abc import Mapping
from typing import Any

from kvarn.kernels.linear.stored import Stored
from kvarn.models.quantized.affine import affine, n_groups
from kvarn.models.quantized.convert import Kind
from kvarn.models.quantized.packing import unpack_awq
from kvarn.models.quantized.scheme import Fields, words_in_groups
from kvarn.models.safetensors_file import FLOATS, SafetensorsWeights


class AWQ:
    """See the module."""

    kind: Kind = "int4"
    expands = ""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        get = Fields(config, name, "AWQ")
        bits = "bits" if "bits" in config else "w_bit"
        get.one_of(bits, (4,))
        get.one_of("zero_point", (True,), True)
        version = str(get("version", "gemm")).lower()
        if version != "gemm":
            get.refuse(f"version {version!r}", "gemm")
        self.group = int(get("group_size", get("q_group_size", -1)))
        self.label = f"AWQ {words_in_groups(4, self.group)}"

    def holds(self, files: SafetensorsWeights, stem: str) -> bool:
        """See `Scheme`."""
        return f"{stem}.qweight" in files

    def matrix(self, files: SafetensorsWeights, stem: str, shape: tuple[int, int]) -> Stored:
        """See `Scheme`."""
        n, k = shape
        groups = n_groups(k, self.group)
        if groups is None or n % 8:
            raise files.broken(
                f"{stem}.qweight", f"cannot hold {n} x {k} weights in groups of {self.group}"
            )
        words = files.tensor(f"{stem}.qweight", (k, n // 8), ("I32",))
        zero = files.tensor(f"{stem}.qzeros", (groups, n // 8), ("I32",))
        scale = files.tensor(f"{stem}.scales", (groups, n), FLOATS)
        return affine(unpack_awq(words).T, unpack_awq(zero).T, scale.T, 4)
