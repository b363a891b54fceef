"""SAGE-KV: eviction once after prefill, by the last token's attention (arXiv 2503.08879).

After its prompt a model knows, head by head, which of it the answer needs: each KV head keeps
`sinks`, the positions that the prompt's last token looks at most (mean over the query heads of the
KV head), and a ring of the `recent` ones. Keys stay rotated by their place in the text.

Regime: one question after a long prompt. A second, different question finds only what the first one
needed (results: docs/sparsity.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.mass import attention_mass
from kvarn.sparse.part import OneShot, Prompt

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class SageKV(OneShot):
    """Sinks, what the last token of the prompt attends to, and a ring of recent positions."""

    name: ClassVar[str] = "sage-kv"
    paper: ClassVar[str] = "2503.08879"
    regime: ClassVar[str] = (
        "one question after a long prompt; a second, different question loses recall"
    )
    watch: ClassVar[int] = 1

    def observe(self, q: "Tensor", k: "Tensor", start: int) -> "Tensor":
        """See `OneShot`."""
        return attention_mass(q, k, start)

    def score(self, prompt: Prompt) -> "Tensor":
        """See `OneShot`."""
        assert prompt.mass is not None
        return prompt.mass
