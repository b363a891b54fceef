"""Attention mass: how much rows look at each position, summed up in blocks, by KV head."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64  #: rows at once: the probabilities of more are never in memory


def attention_mass(q: "Tensor", k: "Tensor", start: int) -> "Tensor":
    """Sum over rows of the probabilities, mean over the query heads of each KV head.

    q [t, Hq, d] at positions `start` on, k [L, Hkv, d] with L = start + t; returns [Hkv, L] fp32.
    """
    length, heads, dim = k.shape
    keys = k.float().permute(1, 2, 0)  # [Hkv, d, L]
    total = keys.new_zeros(heads, length)
    for first in range(0, len(q), BLOCK):
        rows = q[first : first + BLOCK].float()
        n = len(rows)
        folded = rows.view(n, heads, -1, dim).permute(1, 2, 0, 3).flatten(1, 2)  # [Hkv, G n, d]
        scores = (folded @ keys * dim**-0.5).view(heads, -1, n, length)
        hidden = scores.new_ones(n, length).triu(start + first + 1).bool()
        chances = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        total += chances.sum(2).mean(1)
    return total
