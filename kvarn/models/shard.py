"""Tensor parallelism: which rank holds which heads, neurons and rows of the vocabulary.

Megatron's layout (arXiv 1909.08053, section 3): q, k, v, gate and up are cut by outputs, the
matrices after them by inputs, so that a layer needs two sums over the ranks. KV heads stay with
their query heads; uneven shares are allowed. The embedding is whole on every rank (a lookup is then
no collective; it costs vocab x hidden a rank), the output matrix is cut by vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.kernels.linear.stored import Affine, Float8, Stored
from kvarn.models.weights import Part

WIDEST_UNIT = 128  #: neurons that stay together where the width allows: a quantised group
UNITS_A_RANK = 4  #: at least, so that no share is more than a quarter above another

#: matrices by what their outputs (rows) or inputs (columns) are
ROWS = {
    "q_proj": "q", "k_proj": "kv", "v_proj": "kv", "gate_proj": "ffn", "up_proj": "ffn",
    "lm_head": "vocab", "embed_tokens": "vocab",
}  # fmt: skip
COLUMNS = {"o_proj": "q", "down_proj": "ffn"}


@dataclass(slots=True, frozen=True)
class Holding:
    """What one rank holds of every layer and of the output matrix."""

    rank: int
    ranks: int
    q_heads: range
    kv_heads: range  #: also held by other ranks where there are more ranks than KV heads
    ffn: range  #: neurons of the MLP
    vocab: range  #: rows of the output matrix

    def row(self) -> dict[str, object]:
        """For `explain`."""
        shares = {
            "query heads": self.q_heads, "kv heads": self.kv_heads, "neurons": self.ffn,
            "vocabulary": self.vocab,
        }  # fmt: skip
        return {"rank": self.rank} | {what: _words(share) for what, share in shares.items()}


def _words(share: range) -> str:
    return f"{share[0]} to {share[-1]}" if len(share) > 1 else str(share[0])


def split(n: int, shares: int, unit: int = 1) -> list[range]:
    """0 .. n in `shares` consecutive ranges of whole units, the first ones a unit longer."""
    units, more = divmod(n // unit, shares)
    ends = [(units * (i + 1) + min(i + 1, more)) * unit for i in range(shares)]
    return [range(a, b) for a, b in zip([0, *ends], ends)]


def holding(spec: ModelSpec, rank: int, ranks: int) -> Holding:
    """What `rank` of `ranks` holds; `ConfigError` where one would be left without a query head."""
    if ranks > spec.n_heads:
        raise ConfigError(
            f"tp={ranks} is more than the {spec.n_heads} query heads of {spec.name}; "
            f"tp={spec.n_heads} is the most"
        )
    q_heads, kv_heads = _heads(spec, rank, ranks)
    return Holding(
        rank=rank,
        ranks=ranks,
        q_heads=q_heads,
        kv_heads=kv_heads,
        ffn=split(spec.ffn, ranks, _unit(spec.ffn, ranks))[rank],
        vocab=split(spec.vocab, ranks)[rank],
    )


def widths(vocab: int, ranks: int) -> list[int]:
    """Logits that each rank computes."""
    return [len(share) for share in split(vocab, ranks)]


def _heads(spec: ModelSpec, rank: int, ranks: int) -> tuple[range, range]:
    """Query heads and KV heads of a rank."""
    per_kv = spec.n_heads // spec.n_kv_heads
    if ranks <= spec.n_kv_heads:
        kv = split(spec.n_kv_heads, ranks)[rank]
        return range(kv.start * per_kv, kv.stop * per_kv), kv
    # several ranks share a KV head and divide its query heads
    crowd = next(
        (head, ranks_of)
        for head, ranks_of in enumerate(split(ranks, spec.n_kv_heads))
        if rank in ranks_of
    )
    head, ranks_of = crowd
    mine = split(per_kv, len(ranks_of))[rank - ranks_of.start]
    first = head * per_kv
    return range(first + mine.start, first + mine.stop), range(head, head + 1)


def _unit(width: int, ranks: int) -> int:
    unit = WIDEST_UNIT
    while unit > 1 and (width % unit or width // unit < UNITS_A_RANK * ranks):
        unit //= 2
    return unit


def local_spec(spec: ModelSpec, mine: Holding) -> ModelSpec:
    """The shape that one rank computes with; hidden size and vocabulary stay whole."""
    return replace(
        spec, n_heads=len(mine.q_heads), n_kv_heads=len(mine.kv_heads), ffn=len(mine.ffn)
    )


def part_of(name: str, shape: tuple[int, ...], spec: ModelSpec, mine: Holding) -> Part | None:
    """The part of tensor `name` that a rank holds; None: all of it."""
    stem, _, kind = name.rpartition(".")
    projection = stem.rpartition(".")[2]
    shares = {
        "q": _scaled(mine.q_heads, spec.head_dim),
        "kv": _scaled(mine.kv_heads, spec.head_dim),
        "ffn": mine.ffn,
        "vocab": mine.vocab,
    }
    if projection in ROWS:
        share = shares[ROWS[projection]]
        return (slice(share.start, share.stop), *(slice(0, n) for n in shape[1:]))
    if projection in COLUMNS and kind == "weight":
        share = shares[COLUMNS[projection]]
        return slice(0, shape[0]), slice(share.start, share.stop)
    return None


def _scaled(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)


class Divisible(Protocol):
    """A source of weights that reads parts of tensors; shapes are those of the whole tensors."""

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`."""
        ...

    def stored(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Stored:
        """See `Weights.stored`."""
        ...


class ShardedWeights:
    """`Weights` of one rank: the reader asks for whole shapes and gets this rank's part."""

    def __init__(self, source: Divisible, spec: ModelSpec, mine: Holding) -> None:
        self.source, self.spec, self.mine = source, spec, mine

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See `Weights.read`. A bias that follows a sum over the ranks is added by the first."""
        if name == "embed_tokens.weight":  # to look tokens up in: whole
            return self.source.read(name, shape)
        x = _own(self.source.read(name, shape, part_of(name, shape, self.spec, self.mine)))
        summed = name.endswith(".bias") and name.split(".")[-2] in COLUMNS
        return torch.zeros_like(x) if summed and self.mine.rank else x

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`; the embedding is asked for as the output matrix."""
        part = part_of(name, shape, self.spec, self.mine)
        try:
            found = self.source.stored(name, shape, part)
        except ValueError as error:
            raise ConfigError(
                f"tp={self.mine.ranks} cannot cut {name} between quantised groups: {error}; use "
                f"fewer ranks or an unquantised checkpoint"
            ) from None
        if isinstance(found, Tensor):
            return _own(found)
        if isinstance(found, Float8):
            return Float8(_own(found.codes), _own(found.scale))
        offset = None if found.offset is None else _own(found.offset)
        return Affine(_own(found.codes), _own(found.scale), offset, found.bits, found.group)


def _own(x: Tensor) -> Tensor:
    """Contiguous, and no view that would keep the whole tensor in memory."""
    return (
        x
        if x.untyped_storage().nbytes() == x.nbytes
        else x.clone(memory_format=torch.contiguous_format)
    )
