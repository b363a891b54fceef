"""A `Speculation` from options: the proposer and the length control by name."""

import time
from typing import Any, cast

from kvarn.core.config import EngineConfig
from kvarn.core.part import find
from kvarn.speculate.part import LengthControl, Proposer
from kvarn.speculate.speculation import Speculation


def build_speculation(config: EngineConfig) -> Speculation:
    """Who drafts, and how much."""
    length: Any = find("draft-length", config.draft_length)
    return Speculation(
        make_proposer(config), cast(LengthControl, length()), config.draft_tokens, time.monotonic
    )


def make_proposer(config: EngineConfig) -> Proposer:
    """The proposer of that name."""
    part: Any = find("proposer", config.speculate)
    if config.speculate == "synthetic":
        return cast(Proposer, part(config.synthetic_acceptance))
    return cast(Proposer, part())
