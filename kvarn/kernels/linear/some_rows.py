"""An output matrix of which only some rows are multiplied: a drafter's own vocabulary.

Most of what a small drafter reads is the output matrix, and most of that is rows of tokens that it
would never draft (FR-Spec, arXiv 2502.14856).
"""

import torch
from torch import Tensor

from kvarn.kernels.linear.base import Linear


class SomeRows(Linear):
    """`wide` alone: logits [T, n_out] in fp32, minus infinity where a token has no row."""

    mode = "some_rows"

    def __init__(self, rows: Linear, tokens: Tensor, n_out: int) -> None:
        """`rows` multiplies by the rows of `tokens` [n], of the `n_out` that there are."""
        self.rows, self.tokens = rows, tokens
        self.n_out, self.n_in = n_out, rows.n_in
        self.bias = None
        self.weight_bytes = rows.weight_bytes

    def wide(self, x: Tensor) -> Tensor:
        """See `Linear.wide`."""
        found = x.new_full((x.shape[0], self.n_out), -torch.inf, dtype=torch.float32)
        return found.index_copy_(1, self.tokens, self.rows.wide(x))
