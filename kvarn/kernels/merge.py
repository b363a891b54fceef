"""Merge of attention states (o, lse) over a partition of the KV (arXiv 2501.01005, 2.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvarn.kernels.timing import compare


def merge(states: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of KV, from the attention over each.

    A state is o [T, H, d] and its log-sum-exp [T, H] (fp32, natural log); the state of an empty set
    has lse = -inf and any finite o. The result is in the dtype of the first o.
    """
    lses = torch.stack([lse for _, lse in states])
    peak = lses.amax(0)
    weights = (lses - peak.masked_fill(peak == -torch.inf, 0.0)).exp()
    total = weights.sum(0)
    o = sum(w.unsqueeze(-1) * o.float() for w, (o, _) in zip(weights, states, strict=True))
    assert isinstance(o, Tensor)
    o = o / total.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)
    return o.to(states[0][0].dtype), peak + total.log()


def bench() -> None:
    """Two and eight states of 16 rows and 9 heads of 64, fp32."""
    for parts in (2, 8):
        states = [(torch.randn(16, 9, 64), torch.randn(16, 9)) for _ in range(parts)]
        compare(f"merge of {parts} [16, 9, 64]", torch=lambda: merge(states))  # noqa: B023


if __name__ == "__main__":
    bench()
