"""Attention of draft trees: every row over what is committed, merged with its own ancestors.

The first part is any backend's paged attention, each row a span of its own; the second a small
masked attention over the rows of the same tree, whose K and V are at hand (arXiv 2305.09781,
section 4.2; the split as in arXiv 2501.01005, section 2.1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.attention import AttentionPlan, Ints
from kvarn.kernels.merge import merge
from kvarn.kernels.upload import upload


@dataclass(slots=True)
class Forest:
    """The B trees of a step, of at most M rows each, on the host."""

    rows: Ints  #: [B, M] flattened rows of the step; -1: no more
    seen: NDArray[np.bool_]  #: [B, M, M] whether row i sees row j: itself and its ancestors


class TreePlan:
    """An `AttentionPlan` whose rows of trees see their ancestors too."""

    def __init__(
        self, plain: AttentionPlan, forest: Forest, scale: float, softcap: float | None,
        kind: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        """`plain`, made with `lse`, lets every row of a tree see what is committed, and no more.

        `kind`: the dtype of the cache, which K and V pass through in every other step.
        """
        self.plain, self.scale, self.softcap, self.kind = plain, scale, softcap, kind
        there = np.flatnonzero(forest.rows.ravel() >= 0)
        rows = np.maximum(forest.rows, 0)
        # what fills up a small tree sees itself, so that it is a number
        seen = forest.seen | np.eye(forest.rows.shape[1], dtype=np.bool_)
        found = upload([rows, there, rows.ravel()[there], seen], torch.int64, device)
        self.rows, self.there, self.flat = found[:3]
        self.hidden = found[3] == 0

    def run(self, cache: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `AttentionPlan`."""
        o, lse = self.plain.run(cache, q, k, v)
        assert lse is not None
        keys, values = (x[self.rows].to(self.kind).float() for x in (k, v))
        own, own_lse = self._among(q[self.rows].float(), keys, values)
        own, own_lse = own.flatten(0, 1)[self.there], own_lse.flatten(0, 1)[self.there]
        at = self.flat
        o[at], lse[at] = merge([(o[at], lse[at]), (own, own_lse)])
        return o, lse

    def _among(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, M, Hq, d], k and v [B, M, Hkv, d], fp32: o [B, M, Hq, d], lse [B, M, Hq]."""
        folded = q.view(*k.shape[:3], -1, k.shape[3])
        scores = torch.einsum("bihgd,bjhd->bihgj", folded, k) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores.masked_fill_(self.hidden[:, :, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        o = torch.einsum("bihgj,bjhd->bihgd", (scores - lse.unsqueeze(-1)).exp(), v)
        return o.flatten(2, 3), lse.flatten(2, 3)
