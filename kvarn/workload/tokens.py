"""Tokens that stand for a trace's contents: equal blocks get equal tokens, all else is unlike."""

import hashlib
from random import Random

from kvarn.workload.trace import TraceRequest

#: lower ids are often special tokens
FIRST_ID = 256


def block_tokens(request: TraceRequest, block_size: int) -> list[int]:
    """Prompt tokens for the simulator, where only equality counts: a block is its id, repeated.

    What lies past the known blocks is unlike any other request's. Ids of whole prefixes are large
    enough never to meet those of unknown content.
    """
    tokens: list[int] = []
    for block in request.blocks:
        tokens += [block] * block_size
    del tokens[request.n_in :]
    if len(tokens) < request.n_in:
        tokens += [_own(request.id)] * (request.n_in - len(tokens))
    return tokens


def _own(name: str) -> int:
    """A number above 2^61 for a request's own content."""
    return (1 << 61) | int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")


def prompt_tokens(request: TraceRequest, block_size: int, vocab: int, seed: int) -> list[int]:
    """Prompt tokens for a real engine: token j of block b depends on (seed, b, j) alone.

    Below `vocab`, and none of the low ids that are often special.
    """
    low = min(FIRST_ID, vocab // 2)
    tokens: list[int] = []
    for block in request.blocks:
        rng = Random(f"{seed} {block}")
        tokens += [rng.randrange(low, vocab) for _ in range(block_size)]
    del tokens[request.n_in :]
    rng = Random(f"{seed} own {request.id}")
    tokens += [rng.randrange(low, vocab) for _ in range(request.n_in - len(tokens))]
    return tokens
