"""`Profile`: how much each KV head of a model looks beyond sinks and recent positions.

A JSON file with the model's name, how the scores were measured, and `scores`: a list of KV heads by
layer. Those in this package's folder `profiles` are known by their names.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from kvarn.core.errors import ConfigError

SHIPPED = Path(__file__).parent / "profiles"
MAKE = "python benchmarks/profile_heads.py --model MODEL --out FILE"


@dataclass(slots=True, frozen=True)
class Profile:
    """Scores of one model; the higher, the more is lost where the head streams."""

    name: str
    scores: tuple[tuple[float, ...], ...]  #: by layer and KV head

    def rank(self, pair: tuple[int, int]) -> tuple[float, int, int]:
        """What sorts (layer, KV head) pairs, those of the highest scores first."""
        layer, head = pair
        return -self.scores[layer][head], layer, head

    def check(self, every: list[tuple[int, int]]) -> None:
        """Raise `ConfigError` unless these are the pairs of the model that was measured."""
        mine = [(layer, head) for layer, row in enumerate(self.scores) for head in range(len(row))]
        if mine != every:
            layers, heads = every[-1][0] + 1, every[-1][1] + 1
            raise ConfigError(
                f"the head profile {self.name!r} has {len(self.scores)} layers of "
                f"{len(self.scores[0])} KV heads, and this model {layers} of {heads}: make one of "
                f"the model ({MAKE}) and say profile=FILE"
            )


@cache
def read(name: str) -> Profile:
    """A profile by the name of a shipped one, or a file."""
    path = SHIPPED / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        scores = tuple(tuple(float(score) for score in row) for row in said["scores"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
        raise ConfigError(
            f"no head profile can be read from {name!r} ({error}); known are {known}, and "
            f"{MAKE} makes one of any model"
        ) from None
    if not scores or not scores[0]:
        raise ConfigError(f"the head profile {name!r} has no scores; {MAKE} makes one")
    return Profile(name, scores)
