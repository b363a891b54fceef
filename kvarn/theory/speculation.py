"""Limits of speculative decoding: what a draft can bring, and what no verifier can exceed.

Times are in steps of the target without drafts. Sources: arXiv 2211.17192 (i.i.d. acceptance,
speedup), 2310.15141 (several drafts), 2504.15475 (trees that do not share the sampler's numbers).
"""

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush

#: probabilities of the next token
Distribution = Sequence[float]


def acceptance(p: Distribution, q: Distribution) -> float:
    """Most that a token drawn from q can be accepted with: 1 - TV(p, q)."""
    return sum(min(a, b) for a, b in zip(p, q, strict=True))


def expected_tokens(share: float, length: int) -> float:
    """Tokens of a round when each of `length` drafts is accepted with `share`, independently."""
    return sum(share**i for i in range(length + 1))


def tokens_of_survival(survival: Sequence[float]) -> float:
    """Tokens of a round when the first i drafts all stand with probability survival[i - 1]."""
    return 1.0 + sum(survival)


def speedup(tokens: float, length: int, draft: float, verify: float) -> float:
    """Over plain decoding: `draft` a drafted token, `verify` the step that judges them all."""
    return tokens / (length * draft + verify)


def best_length(
    share: float, draft: float, verify: Callable[[int], float], most: int
) -> tuple[int, float]:
    """The length from 0 to `most` with the greatest speedup, and that speedup.

    `verify(k)`: the step with k drafts for every sequence; verify(0) is 1.
    """
    found = [speedup(expected_tokens(share, k), k, draft, verify(k)) for k in range(most + 1)]
    best = max(range(most + 1), key=lambda k: found[k])
    return best, found[best]


def drafts_at_one_position(p: Distribution, q: Distribution, drafts: int) -> float:
    """Upper bound on accepting one of `drafts` tokens from q: sum of min(p, 1 - (1 - q)^k)."""
    return sum(min(a, 1.0 - (1.0 - b) ** drafts) for a, b in zip(p, q, strict=True))


def tree_bound(children: Callable[[tuple[int, ...]], Mapping[int, float]], nodes: int) -> float:
    """Most tokens of a round with any deterministic tree of `nodes` drafts.

    `children(path)`: probabilities of the tokens after `path` under the target. The best tree takes
    the likeliest prefixes; prefixes of these are likelier still, so they are a tree.
    """
    total, heap = 1.0, list[tuple[float, tuple[int, ...]]]()
    for token, chance in children(()).items():
        heappush(heap, (-chance, (token,)))
    for _ in range(nodes):
        if not heap:
            break
        chance, path = heappop(heap)
        total -= chance
        for token, further in children(path).items():
            if further > 0:
                heappush(heap, (chance * further, (*path, token)))
    return total
