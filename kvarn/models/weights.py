"""Where a decoder's tensors come from: one protocol, one vocabulary of names.

Names are those of Hugging Face checkpoints without the leading "model.": `embed_tokens.weight`,
`layers.0.self_attn.q_proj.weight`, `layers.0.mlp.down_proj.weight`, `norm.weight`,
`lm_head.weight`. Norm weights are as stored there (Gemma's are offsets from 1), and q and k rows
are in rotate-half order. A source in another convention translates.
"""

from typing import Protocol

from torch import Tensor

from kvarn.kernels.linear.stored import Stored

Part = tuple[slice, ...]  #: of a tensor, a slice for each dimension


class Weights(Protocol):
    """Tensors by name, read one at a time."""

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor on any device, in any float dtype; expanded where it is quantised.

        Raises `ModelError` naming file and tensor when it is missing, broken or of another shape.
        """
        ...

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """A matrix as it is held, quantised or not, on any device; raises as `read` does."""
        ...
