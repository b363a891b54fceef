"""GemFilter: early layers choose the tokens that the model is asked with (arXiv 2409.17422).

The first layers, up to `layer`, read the whole prompt. There the last token's queries meet all
keys: products as they are, without softmax or scale, are summed over the heads and averaged over
five neighbours; the `budget` best positions, in their order, are the prompt that all layers then
read, at positions of its own (algorithm 1). The whole prompt costs (layer + 1) of L layers, and
decoding sees `budget` tokens.

The released code chooses by scores alone; here the first token and the last `recent` ones always
go on (our choice: the model is to see the question), and the step log says how many of them the
scores lacked.

Which layer knows differs by model: 13 of 32 in Llama-3.1-8B, 19 of 40 in Mistral-Nemo-12B and 19 of
32 in Phi-3.5-mini (the paper, section 4), seven tenths of the way up in SmolLM2-135M, where nothing
below the middle finds a needle (`kvarn reproduce gemfilter`). The last is the default, since it is
the safest; name a `layer` that a sweep has found, and the prompt is cheaper.

With `then` another part evicts from what went on, down to `stays` positions of every head.

Regime: one question about a long prompt. Loses what needs more of the prompt than goes on, or two
places of which the question names one (results: docs/sparsity.md).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.part import PromptFilter

if TYPE_CHECKING:
    from torch import Tensor

NEIGHBOURS = 5  #: positions that are averaged over (the released code's kernel)


@dataclass(slots=True, frozen=True)
class GemFilter(PromptFilter):
    """The tokens that the last one's queries in an early layer point at."""

    name: ClassVar[str] = "gemfilter"
    paper: ClassVar[str] = "2409.17422"
    regime: ClassVar[str] = (
        "one question about a long prompt; loses what needs much of it, or a chain of facts"
    )

    def score(self, q: "Tensor", k: "Tensor") -> "Tensor":
        """See `PromptFilter`. Query heads of a KV head are added up before they meet its keys."""
        folded = q.float().reshape(k.shape[1], -1, q.shape[1]).sum(1)
        scores = k.flatten(1).float() @ folded.flatten()
        padded = scores.new_zeros(len(scores) + NEIGHBOURS - 1)
        padded[NEIGHBOURS // 2 : NEIGHBOURS // 2 + len(scores)] = scores
        return padded.unfold(0, NEIGHBOURS, 1).mean(-1)
