"""What a GPU itself remembers of each row between steps: its page tables, its last token, drafts.

With them a step needs nothing that the host has yet to learn: it can be launched while the step
before, which samples its input tokens, still runs; and so can a step that verifies what is still
being drafted, and a draft behind what is still being verified.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvarn.kernels.upload import upload
from kvarn.runner.image import Image

Ints = NDArray[np.int64]
DRAFTED = 8  #: tokens drafted for a row that it remembers


class DeviceState:
    """Tables [n_rows * width + 1] int32 by group; of each row its newest token and what was drafted
    behind it, `last` [n_rows, 1 + DRAFTED]; and how many drafts stood when the device judged them
    last, `moved` [n_rows].

    The entry behind the last row is nobody's: edits of fixed number write there when they have
    nothing to say.
    """

    def __init__(self, n_rows: int, n_groups: int, width: int, device: torch.device) -> None:
        """`width`: pages of the longest sequence."""
        self.width = width
        self.spare = n_rows * width
        self.device = device
        self.last = torch.zeros(n_rows, 1 + DRAFTED, dtype=torch.int32, device=device)
        self.moved = torch.zeros(n_rows, dtype=torch.int32, device=device)
        self.tables = [
            torch.zeros(self.spare + 1, dtype=torch.int32, device=device) for _ in range(n_groups)
        ]

    def entries(self, image: Image) -> list[tuple[Ints, Ints]]:
        """What the image has written since the last call, by group: (entries, pages)."""
        found: list[dict[int, int]] = [{} for _ in self.tables]  # the last value of each wins
        for group, row, at, pages in image.writes:
            begin = row * self.width + at
            found[group].update(zip(range(begin, begin + len(pages)), pages))
        image.writes.clear()
        return [(np.array(list(d), np.int64), np.array(list(d.values()), np.int64)) for d in found]

    def write(self, entries: Sequence[tuple[Ints, Ints]]) -> None:
        """Bring the tables up to date; no place may be there twice."""
        arrays = [array for pair in entries for array in pair]
        if not any(array.size for array in arrays):
            return
        uploaded = upload(arrays, torch.int64, self.device)
        for group, table in enumerate(self.tables):
            at, pages = uploaded[2 * group : 2 * group + 2]
            if len(at):
                table.index_copy_(0, at, pages.to(torch.int32))

    def set_last(self, rows: Tensor, tokens: Tensor) -> None:
        """The newest tokens [R] of `rows` [R], int32."""
        from kvarn.kernels.triton.feed import keep

        keep(self.last, rows, tokens)

    def remember(self, ids: Tensor, rows: Ints, at: Ints) -> None:
        """What was drafted behind `rows` [R]: columns `at` [R] of ids [n, size], n <= DRAFTED."""
        from kvarn.kernels.triton.standing import remember

        there, column = upload([rows, at], torch.int32, self.device)
        remember(self.last, there, column, ids)
