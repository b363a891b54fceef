"""What an acceptance head (SpecDec++, arXiv 2405.19715) says of drafted tokens, on a GPU.

x <- x + silu(W x + b), block after block, over the drafter's hidden state, then the sigmoid of a
linear function of x and of the log-odds of the drafter's own probability. Products in the drafter's
dtype, sums and x in fp32; a launch a block, and one for the last function.

Regime: some hundred rows or fewer, as drafts have, where a head in torch is a dozen launches that
take longer than what they do. Loses to the vendor's library where products are what takes time.

`python -m kvarn.kernels.residual_head` measures it on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu


@dataclass(slots=True)
class ResidualHead:
    """The weights, packed on one device."""

    blocks: list[tuple[Tensor, Tensor]]  #: W [hidden, hidden] and b [hidden] fp32
    weight: Tensor  #: fp32 [hidden + 1] of the last function: of x, then of the log-odds
    bias: Tensor  #: fp32 [1]

    def __call__(self, hidden: Tensor, logprobs: Tensor) -> Tensor:
        """Probabilities [n] in fp32, of hidden states [n, hidden] of any dtype and of the drafter's
        own log-probabilities [n]."""
        from kvarn.kernels.triton import residual_head as on_gpu

        x = hidden
        for weight, bias in self.blocks:
            x = on_gpu.block(x, weight, bias)
        return on_gpu.chance(x, logprobs, self.weight, self.bias)

    def compile(self, dtype: torch.dtype) -> None:
        """Whatever hidden states of `dtype` need: a request would wait for it."""
        for rows in (1, 64):  # a narrow tile, and a broad one
            hidden = self.weight.new_zeros((rows, len(self.weight) - 1), dtype=dtype)
            self(hidden, self.weight.new_zeros(rows))


def reference(head: ResidualHead, hidden: Tensor, logprobs: Tensor) -> Tensor:
    """The definition, in fp32."""
    x = hidden.float()
    for weight, bias in head.blocks:
        x = x + silu(linear(x, weight.float(), bias))
    odds = logprobs.float().exp().clamp(1e-4, 1 - 1e-4).logit()
    return (torch.cat((x, odds.unsqueeze(1)), 1) @ head.weight + head.bias).sigmoid()


def bench() -> None:
    """A block (kvarn's for SmolLM2) and three (the paper's) of 576, three of 4096; bf16 states."""
    from kvarn.kernels.sample import captured

    where: dict[str, Any] = {"device": "cuda"}
    for depth, hidden in ((1, 576), (3, 576), (3, 4096)):
        blocks = [
            (torch.randn(hidden, hidden, **where).bfloat16() / hidden, torch.zeros(hidden, **where))
            for _ in range(depth)
        ]
        head = ResidualHead(blocks, torch.randn(hidden + 1, **where), torch.zeros(1, **where))
        for rows in (4, 16, 64, 256):
            states = [torch.randn(rows, hidden, **where).bfloat16() for _ in range(16)]
            own = torch.rand(rows, **where).log()
            forms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
                "torch, fp32": partial(reference, head),
                "kernels": head,
            }
            taken = [captured(lambda x: form(x, own), states) for form in forms.values()]  # noqa: B023
            cells = [f"{name} {t * 1e6:7.1f} us" for name, t in zip(forms, taken, strict=True)]
            print(f"{depth} x {hidden}, {rows:3d} rows: {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    bench()
