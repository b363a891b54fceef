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
        owners = shares_of(groups)
        found = [[groups[at].heads_of(layer) for at in mine] for layer, mine in owners.items()]
        counts = {
            (index, len(heads))
            for mine, parts in zip(owners.values(), found)
            for index, heads in zip(mine, parts)
        }
        per_kv = spec.n_heads // spec.n_kv_heads
        self.kinds = [Kind(index, count * per_kv, count) for index, count in sorted(counts)]
        where = {(kind.group, kind.n_kv_heads): at for at, kind in enumerate(self.kinds)}
        #: by layer: the kind of each part, as an index, and its heads
        self.parts = [
            [
                (where[index, len(heads)], Heads.of(heads, spec.n_heads, spec.n_kv_heads, device))
                for index, heads in zip(mine, parts)
            ]
            for mine, parts in zip(owners.values(), found)
        ]
        #: by layer: its kind; None where the heads of some layer lie apart
        self.whole: list[int] | None = None
        if all(len(parts) == 1 for parts in self.parts):
            self.whole = [parts[0][0] for parts in self.parts]

    def plans(
        self, made: Sequence[Any], seen: Callable[[int, int, Any], Any] | None = None
    ) -> list[Any]:
        """The plan of each layer, of those `made` of each kind; `seen(group, layer, plan)` may put
        another around it."""
        found: list[Any] = []
        for layer, parts in enumerate(self.parts):
            plans = [made[kind] for kind, _ in parts]
            if seen is not None:
                plans = [
                    seen(self.kinds[kind].group, layer, plan)
                    for (kind, _), plan in zip(parts, plans)
                ]
            heads = [heads for _, heads in parts]
            found.append(plans[0] if len(plans) == 1 else HeadsPlan(list(zip(heads, plans))))
        return found
