"""Quest: the pages whose keys could matter most to the query (arXiv 2406.10774, section 3).

Beside every page lie the least and the largest of each number of its (rotated) keys. The sum over
the numbers of max(q m, q M) is no less than the product of q with any key of the page; the pages
with the highest bounds are read, the others are not. Selection follows the query, so nothing is
lost for a later one, and no memory is saved: the bounds are as large as one position a page.

With grouped queries a KV head has one list, by the largest bound of its query heads (our choice:
the paper has a KV head for every query head). The first page and the page being written are always
read (our choice too). A step reads 1 / page_size + budget / length of what dense attention reads;
with `reuse`, the first of these in one of so many steps.

Regime: decoding after long prompts in large batches, where KV is most of what a step reads; small
batches are bound by the weights.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvarn.sparse.part import Pages, Selector

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, frozen=True)
class Quest(Selector):
    """The pages with the highest upper bound of q.k, for every row, layer and KV head."""

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "2406.10774"
    regime: ClassVar[str] = "decoding after long prompts in large batches; stores all KV"
    bounds: ClassVar[bool] = True

    def select(self, pages: Pages) -> "Tensor":
        """The bound: a positive number of q meets the largest of the keys, a negative the least."""
        q = pages.q.float()
        low, high = pages.low.float(), pages.high.float()
        up = q.clamp(min=0) @ high.permute(0, 2, 3, 1)
        return (up + q.clamp(max=0) @ low.permute(0, 2, 3, 1)).amax(2)
