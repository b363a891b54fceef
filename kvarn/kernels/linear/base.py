"""One matrix, ready to multiply: what every form of a linear layer offers."""

from typing import ClassVar

from torch import Tensor


class Linear:
    """A matrix ready to multiply: callable x [T, K] -> [T, N] in x's dtype."""

    mode: ClassVar[str]
    n_out: int
    n_in: int
    weight_bytes: int  #: read from memory by one call

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.n_out, self.n_in = weight.shape
        self.bias = bias
        self.weight_bytes = weight.numel() * weight.element_size()

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def wide(self, x: Tensor) -> Tensor:
        """The product in fp32, for logits: bf16 steps by an eighth where logits are decided."""
        return self(x).float()
