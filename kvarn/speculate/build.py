"""A `Speculation` from options: the proposer and the length control by name."""

import logging
import time
from typing import Any, cast

from kvarn.core.config import EngineConfig
from kvarn.core.part import find
from kvarn.speculate.part import LengthControl, Proposer
from kvarn.speculate.propose import native_tree
from kvarn.speculate.propose.native_tree import NativeTree
from kvarn.speculate.propose.suffix_tree import Drafting, SuffixTree
from kvarn.speculate.speculation import Speculation

log = logging.getLogger("kvarn.speculate")

NEED_DRAFTER = ("draft", "mix")  #: proposers that take a drafting model

NEED_TREES = ("suffix", "mix")  #: proposers that keep suffix trees


def build_speculation(config: EngineConfig, drafter: Proposer | None) -> Speculation:
    """Who drafts, and how much. `drafter`: the model's proposer, where one is needed."""
    length: Any = find("draft-length", config.draft_length)
    return Speculation(
        _proposer(config, drafter),
        cast(LengthControl, length()),
        config.draft_tokens,
        time.monotonic,
    )


def suffix_trees() -> dict[str, str]:
    """For `explain`: which form of the suffix tree is in force, and why."""
    how = "compiled" if native_tree.available() else "in Python"
    return {"what": "suffix trees", "how": how, "why": native_tree.reason()}


def _proposer(config: EngineConfig, drafter: Proposer | None) -> Proposer:
    part: Any = find("proposer", config.speculate)
    if config.speculate == "synthetic":
        return cast(Proposer, part(config.synthetic_acceptance))
    if config.speculate in NEED_TREES:
        suffix: Any = find("proposer", "suffix")
        if not native_tree.available():
            log.warning("suffix trees in Python, slower: %s", native_tree.reason())
        make = NativeTree if native_tree.available() else SuffixTree
        how = Drafting(factor=config.draft_factor, tree=config.draft_shape == "tree")
        free = suffix(how, tree=make)
        return cast(Proposer, part(free, drafter) if config.speculate == "mix" else free)
    return drafter if drafter is not None else cast(Proposer, part())
