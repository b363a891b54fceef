"""`PagedAttend`: what a decoder attends to in one step, by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kvarn.kernels.attention import Rotary


@dataclass(slots=True)
class PagedAttend:
    """The plans of a step and the caches of its layers."""

    plans: Sequence[Any]  #: `AttentionPlan` of each layer
    cache: Mapping[int, Any]  #: KV storage of each layer
    takes_projection: bool = False  #: whether the plans are `FusedPlan`s

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v and attend with q, rotated: z [T, Hq, d]."""
        z: Tensor = self.plans[layer].run(self.cache[layer], q, k, v)[0]
        return z

    def fused(self, layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        """The same from a projection [T, (Hq + 2 Hkv) * d] as it is."""
        z: Tensor = self.plans[layer].fused(self.cache[layer], qkv, rotary)[0]
        return z
