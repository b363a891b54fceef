"""Which plan each layer attends by: its group's, or one for each group of its KV heads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvarn.core.model import GroupSpec, ModelSpec, shares_of
from kvarn.kernels.attention.heads import Heads, HeadsPlan


@dataclass(slots=True, frozen=True)
class Kind:
    """A plan of a step: layers in which a group has as many KV heads share it."""

    group: int
    n_heads: int  #: query heads
    n_kv_heads: int


class Layers:
    """The layers of one runner and the table groups that their KV heads lie in."""

    def __init__(self, spec: ModelSpec, groups: Sequence[GroupSpec], device: torch.device) -> None:
        self.kinds: list[Kind] = []
        self.parts: list[list[int]] = []  #: by layer: the kinds of its parts, as indices
        self.heads: list[list[Heads]] = []  #: and their heads; []: one part, with all of them
        per_kv = spec.n_heads // spec.n_kv_heads
        for layer, owners in shares_of(groups).items():
            lists = [groups[index].heads_of(layer) for index in owners]
            mine = [
                Kind(index, len(heads) * per_kv, len(heads))
                for index, heads in zip(owners, lists, strict=True)
            ]
            self.kinds += [kind for kind in mine if kind not in self.kinds]
            self.parts.append([self.kinds.index(kind) for kind in mine])
            shape = (spec.n_heads, spec.n_kv_heads, device)
            self.heads.append([Heads.of(x, *shape) for x in lists] if len(lists) > 1 else [])
        #: by layer: its kind; None where the heads of some layer lie apart
        self.whole: list[int] | None = None
        if not any(self.heads):
            self.whole = [kinds[0] for kinds in self.parts]

    def plans(
        self, made: Sequence[Any], seen: Callable[[int, int, Any], Any] | None = None
    ) -> list[Any]:
        """The plan of each layer, of those `made` of each kind; `seen(group, layer, plan)` may put
        another around it."""
        found: list[Any] = []
        for layer, (kinds, heads) in enumerate(zip(self.parts, self.heads, strict=True)):
            plans = [made[kind] for kind in kinds]
            if seen is not None:
                groups = [self.kinds[kind].group for kind in kinds]
                plans = [seen(group, layer, plan) for group, plan in zip(groups, plans)]
            found.append(HeadsPlan(list(zip(heads, plans))) if heads else plans[0])
        return found
