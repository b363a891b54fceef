"""Multi-query associative recall (MQAR) in token ids: pairs to remember, and questions about them.

A context is filler with pairs `key value` in it; a question is a key said again, and its answer is
the value that followed it. Keys of a context are unlike, so every question has one answer. A key
may also be asked and passed over (`key filler`): that leaves its answer to be asked again later.

The task: Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language
Models". Filler between the pairs and questions passed over are this project's.
"""

from dataclasses import dataclass
from random import Random

from kvarn.core.errors import ConfigError

# The vocabulary: 2048 ids in four ranges.
END = 0  #: end of text, never written; 1 to 15 stay free
FILLER = range(16, 512)
VALUES = range(512, 1024)
KEYS = range(1024, 2048)
VOCAB = 2048


@dataclass(slots=True)
class Recall:
    """A context and what was said in it."""

    context: list[int]
    pairs: dict[int, int]  #: key -> value, in the order of the context


def recall(seed: int, tokens: int, pairs: int) -> Recall:
    """A context of `tokens` tokens with `pairs` pairs at random places; equal for equal seeds."""
    if not 1 <= pairs <= len(KEYS):
        raise ConfigError(f"a context has 1 to {len(KEYS)} pairs, one for each key, not {pairs}")
    spare = tokens - 2 * pairs
    if spare < 0:
        raise ConfigError(f"{pairs} pairs take {2 * pairs} tokens; a context of {tokens} is short")
    rng = Random(f"mqar {seed} {tokens} {pairs}")
    said = dict(zip(rng.sample(KEYS, pairs), rng.choices(VALUES, k=pairs)))
    cuts = sorted(rng.randrange(spare + 1) for _ in range(pairs))
    context, before = list[int](), 0
    for (key, value), cut in zip(said.items(), cuts):
        context += [*rng.choices(FILLER, k=cut - before), key, value]
        before = cut
    context += rng.choices(FILLER, k=spare - before)
    return Recall(context, said)


def questions(seed: int, made: Recall, count: int) -> list[int]:
    """`count` keys of the context in random order, each once."""
    if count > len(made.pairs):
        raise ConfigError(f"{count} questions about {len(made.pairs)} pairs: ask each at most once")
    return Random(f"asked {seed}").sample(list(made.pairs), count)
