"""One matrix, ready to multiply: what every form of a linear layer offers."""

from typing import ClassVar

from torch import Tensor

from kvarn.core.model import Activation
from kvarn.kernels import activation as pointwise
from kvarn.kernels.linear.stored import Quantized, Stored


class Linear:
    """A matrix ready to multiply: callable x [T, K] -> [T, N] in x's dtype."""

    mode: ClassVar[str]
    batch_invariant: ClassVar[bool] = False  #: a row's bits do not depend on the other rows
    n_out: int
    n_in: int
    weight_bytes: int  #: read from memory by one call

    def __init__(self, weight: Stored, bias: Tensor | None) -> None:
        self.n_out, self.n_in = weight.shape
        self.bias = bias
        if isinstance(weight, Tensor):
            self.weight_bytes = weight.numel() * weight.element_size()

    @classmethod
    def takes(cls, weight: Quantized) -> bool:
        """Whether this form multiplies by the quantised matrix as it is, on its device."""
        return False

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def wide(self, x: Tensor) -> Tensor:
        """The product in fp32, for logits: bf16 steps by an eighth where logits are decided."""
        return self(x).float()

    def gated(self, x: Tensor, activation: Activation) -> Tensor:
        """act(gate) * up of a matrix [gate; up]: x [T, K] -> [T, N / 2]."""
        return pointwise.gated(self(x), activation)
