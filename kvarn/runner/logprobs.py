"""Logprobs, ranks and most likely alternatives, for those requests that ask for them."""

import math

import torch
from torch import Tensor

from kvarn.core.plan import TokenLogprobs

#: rows handled at a time: bounds the fp32 temporaries of a long prompt
CHUNK = 64
#: more alternatives than asked for are fetched, so that equal ones are reported lowest id first
SLACK = 8


def logprobs(logits: Tensor, tokens: list[int], k: int) -> list[TokenLogprobs]:
    """Of `tokens` [R] under the softmax of `logits` [R, V], with the `k` most likely tokens.

    Rank 1 is the most likely; equal tokens share a rank. Impossible tokens (logit -inf) are never
    among the alternatives.
    """
    found: list[TokenLogprobs] = []
    for start in range(0, len(tokens), CHUNK):
        found += _chunk(logits[start : start + CHUNK], tokens[start : start + CHUNK], k)
    return found


def most_likely(logits: Tensor, k: int) -> Tensor:
    """The `k` most likely tokens of each row of `logits` [R, V] and their logprobs, best first:
    [2, R, k] in fp32, where ids are exact below 2^24."""
    best = logits.topk(min(k, logits.shape[1]), dim=-1)
    values = best.values - logits.logsumexp(-1, keepdim=True)
    return torch.stack((best.indices.float(), values.float()))


def _chunk(logits: Tensor, tokens: list[int], k: int) -> list[TokenLogprobs]:
    scores = logits.float().log_softmax(-1)
    chosen = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])
    ranks = ((scores > chosen).sum(-1) + 1).tolist()
    own = chosen[:, 0].tolist()
    found = [TokenLogprobs(t, p, r) for t, p, r in zip(tokens, own, ranks)]
    if k == 0:
        return found
    best = scores.topk(min(k + SLACK, scores.shape[1]), dim=-1)
    for one, ids, values in zip(found, best.indices.tolist(), best.values.tolist()):
        one.top = _ordered(ids, values, k)
    return found


def _ordered(ids: list[int], values: list[float], k: int) -> list[tuple[int, float]]:
    pairs = sorted(zip(ids, values), key=lambda pair: (-pair[1], pair[0]))
    return [pair for pair in pairs[:k] if pair[1] > -math.inf]
