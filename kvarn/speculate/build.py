"""A `Speculation` from options: the proposer and the length control by name."""

import time
from typing import Any, cast

from kvarn.core.config import EngineConfig
from kvarn.core.part import find
from kvarn.speculate.part import LengthControl, Proposer
from kvarn.speculate.speculation import Speculation

NEED_DRAFTER = ("draft", "mix")  #: proposers that take a drafting model


def build_speculation(config: EngineConfig, drafter: Proposer | None) -> Speculation:
    """Who drafts, and how much. `drafter`: the model's proposer, where one is needed."""
    length: Any = find("draft-length", config.draft_length)
    return Speculation(
        _proposer(config, drafter),
        cast(LengthControl, length()),
        config.draft_tokens,
        time.monotonic,
    )


def _proposer(config: EngineConfig, drafter: Proposer | None) -> Proposer:
    part: Any = find("proposer", config.speculate)
    if config.speculate == "synthetic":
        return cast(Proposer, part(config.synthetic_acceptance))
    if config.speculate == "mix":
        suffix: Any = find("proposer", "suffix")
        return cast(Proposer, part(suffix(), drafter))
    return drafter if drafter is not None else cast(Proposer, part())
