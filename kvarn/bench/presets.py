"""Named workloads of the offline benchmark, each one shape of load that says something different.

W1 is one stream of 128 prompt and 128 new tokens; W8 and W16 are so many at once; P16 is 16
requests that share a 512-token prefix, first with an empty prefix cache, then with a warm one;
prefill-512 is the time to the first token of one long prompt.
"""

from dataclasses import dataclass
from random import Random

from kvarn.bench.prompts import Turn, tokens
from kvarn.core.errors import ConfigError, nearest


@dataclass(slots=True, frozen=True)
class Preset:
    """Requests that are given to an engine together."""

    n: int  #: requests
    input_len: int  #: own tokens of each prompt
    output_len: int
    prefix_len: int = 0  #: shared by all prompts [tokens]
    again: bool = False  #: run a second time with the prefix in the cache ("warm")


PRESETS = {
    "W1": Preset(1, 128, 128),
    "W8": Preset(8, 128, 128),
    "W16": Preset(16, 128, 128),
    "P16": Preset(16, 32, 64, prefix_len=512, again=True),
    "prefill-512": Preset(1, 512, 1),
}


def find_preset(name: str) -> Preset:
    """The preset of that name; an unknown one is an error that names the nearest."""
    if name not in PRESETS:
        raise ConfigError(f"unknown workload {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def bursts(preset: Preset, vocab: int, rng: Random) -> list[tuple[str, list[Turn]]]:
    """(name, requests) of each burst of one repetition; fresh random prompts every time."""
    prefix = tokens(preset.prefix_len, vocab, rng)

    def one() -> list[Turn]:
        own = [tokens(preset.input_len, vocab, rng) for _ in range(preset.n)]
        return [Turn(prefix + ids, preset.output_len) for ids in own]

    return [("cold", one()), ("warm", one())] if preset.again else [("", one())]
