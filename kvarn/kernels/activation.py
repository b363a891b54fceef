"""The gated activation of the MLP: act(gate) * up."""

from torch import Tensor
from torch.nn.functional import gelu, silu

from kvarn.core.model import Activation


def gated(x: Tensor, kind: Activation) -> Tensor:
    """act(gate) * up; x [T, 2F] holds gate in its first F columns and up in the rest."""
    gate, up = x.chunk(2, dim=-1)
    if kind == "silu":
        return silu(gate).mul_(up)
    return gelu(gate, approximate="tanh").mul_(up)


def reference(x: Tensor, kind: Activation) -> Tensor:
    """The definition, in fp32."""
    gate, up = x.float().chunk(2, dim=-1)
    return (silu(gate) if kind == "silu" else gelu(gate, approximate="tanh")) * up
