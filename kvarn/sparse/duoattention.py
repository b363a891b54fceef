"""Retrieval heads and streaming heads (DuoAttention, arXiv 2410.10819; LServe's static part).

Some heads look for things anywhere in the context; most look at its first positions and at recent
ones. The first kind keeps all of its KV. The second keeps `sinks` and a `window`: its pages are a
table group of their own, which gives back what no row will see, in the midst of a prompt too.

Which heads are which is known before anything runs: the `share` of all (layer, KV head) pairs with
the highest scores of a profile retrieve (`benchmarks/profile_heads.py` makes one in minutes). The
paper trains a gate for each head instead. What of a prompt stays in them may in turn be chosen by
another part, `of`, with a `budget`.

Regime: long prompts and contexts of any length; half of the heads' memory and reads go. Loses where
a needed head is taken for a streaming one, and on prompts of less than a few windows.
"""

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, ClassVar

from kvarn.core.errors import ConfigError
from kvarn.core.keep import ENDLESS, Keep
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.sparse.part import OneShot, Prompt
from kvarn.sparse.profile import read

if TYPE_CHECKING:
    from torch import Tensor

ALL = Keep(ENDLESS, 1)  #: no ring ever
Pair = tuple[int, int]  #: layer and KV head


@dataclass(slots=True, frozen=True)
class DuoAttention(OneShot):
    """Heads that retrieve keep all, heads that stream keep sinks and a window."""

    name: ClassVar[str] = "duoattention"
    paper: ClassVar[str] = "2410.10819"
    regime: ClassVar[str] = (
        "long contexts, with a profile of the model; loses where a head that retrieves streams"
    )
    fixed: ClassVar[bool] = True

    budget: int = 0  #: with `of`: positions that a head that retrieves keeps [tokens]
    of: str = "none"  #: the part that chooses them; none: all stay
    share: float = 0.5  #: of all (layer, KV head) pairs, those that retrieve
    sinks: int = 16  #: first positions that a streaming head sees [tokens]
    window: int = 240  #: and the last, the row's own among them [tokens]
    by: str = "profile"  #: who retrieves: the highest scores of the profile, or random: a baseline
    profile: str = "smollm2-135m"  #: one that comes with kvarn, or a file
    seed: int = 0  #: of by=random

    def split(self, groups: list[GroupSpec]) -> list[GroupSpec]:
        """See `Sparsity`: who retrieves comes first."""
        if len(groups) > 1 or groups[0].window is not None:
            raise ConfigError(
                "sparsity 'duoattention' cannot serve a model with sliding-window layers, whose "
                "heads all stream by a rule of their own; sparsity=none does"
            )
        self.check(1, 1)
        whole = groups[0]
        every = [(layer, head) for layer in whole.layers for head in range(whole.n_kv_heads)]
        retrieve = set(self._ranked(every)[: round(self.share * len(every))])
        kinds = (
            (part_of(whole, retrieve), None, 0),
            (part_of(whole, set(every) - retrieve), self.window, self.sinks),
        )
        return [
            GroupSpec(
                tuple(heads), whole.n_kv_heads, whole.head_dim, window, sinks=sinks,
                heads=tuple(heads.values()),
            )
            for heads, window, sinks in kinds
            if heads
        ]  # fmt: skip

    def keep(self, group: GroupSpec, n_layers: int) -> Keep | None:
        """See `Sparsity`: `of`'s rule for who retrieves; a window is a rule of its own."""
        if self.of == "none":
            return None
        return self._part.keep(group, n_layers) if group.window is None else ALL

    def check(self, page_size: int, groups: int) -> None:
        """See `Sparsity`."""
        if self.of != "none":
            self._part.check(page_size, groups)
        elif self.budget or self.recent:
            raise ConfigError(
                f"sparsity 'duoattention': budget={self.budget} and recent={self.recent} are those "
                f"of a part that chooses, of=snapkv for one; with of=none heads that retrieve keep "
                f"all"
            )
        if not 0 <= self.share <= 1 or self.sinks < 0 or self.window < 1:
            raise ConfigError(
                f"sparsity 'duoattention': share={self.share:g} must be 0 to 1, "
                f"sinks={self.sinks} 0 or more and window={self.window} at least 1"
            )
        if self.by not in ("profile", "random"):
            raise ConfigError(f"sparsity 'duoattention': by={self.by!r} must be profile or random")

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """See `OneShot`."""
        return self._part.observe(q, k, start)

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        return self._part.score(prompt)

    @property
    def _part(self) -> OneShot:
        part = find("sparsity", self.of)
        if not issubclass(part, OneShot) or part.fixed or part(self.budget, self.sinks).turns:
            raise ConfigError(
                f"sparsity 'duoattention' cannot be of {self.of!r}: it scores nothing, or counts "
                f"positions in a way of its own; of=snapkv is one that can be"
            )
        return part(self.budget, self.sinks, self.recent)

    def _ranked(self, every: list[Pair]) -> list[Pair]:
        """All pairs, the first of which retrieve."""
        if self.by == "random":
            return Random(self.seed).sample(every, len(every))
        found = read(self.profile)
        found.check(every)
        return sorted(every, key=found.rank)


def part_of(group: GroupSpec, pairs: set[Pair]) -> dict[int, tuple[int, ...]]:
    """The heads of each layer that are among `pairs`; layers without any are left out."""
    heads = range(group.n_kv_heads)
    found = {
        layer: tuple(head for head in heads if (layer, head) in pairs) for layer in group.layers
    }
    return {layer: mine for layer, mine in found.items() if mine}
