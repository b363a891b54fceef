"""`Part`, the base of every technique, the registry that finds them, and the capability solver.

A part says what it `needs` and what it `gives`. The engine solves the capabilities once, at start;
a conflict is one error that names both parts and the missing capability. Nothing is switched off in
silence. Parts outside this package register through the entry-point group `kvarn.parts`.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, ClassVar

from kvarn.core.errors import ConfigError, nearest


class Cap(Enum):
    """A property that one part may rely on and another may give or take away."""

    PAGED_KV = "KV in pages behind tables"
    TABLE_GROUPS = "several page tables for a sequence"
    PREFIX_SHARING = "sequences share the pages of equal prefixes"
    WINDOW_HOLES = "leading pages of a table may be given back"
    FULL_LOGITS = "logits of every position, not only the last"
    BATCH_INVARIANT = "results do not depend on the rest of the batch"
    CPU_DEVICE = "computation on the CPU"
    CUDA_DEVICE = "computation on an NVIDIA GPU"
    CAPTURE = "attention plans of fixed launches, over page tables that the device keeps"
    STEP_TIMES = "measured or modelled time of a step"


class Part:
    """A technique: one file, one class. Class attributes say what it is; fields are its options."""

    name: ClassVar[str] = ""  #: what the user types
    kind: ClassVar[str] = ""  #: the seam it plugs into: "scheduler", "prefix", "evict", ...
    paper: ClassVar[str] = ""  #: arXiv id or venue; "" where there is none
    regime: ClassVar[str] = ""  #: where it wins and where it loses, in a sentence
    needs: ClassVar[frozenset[Cap]] = frozenset()
    gives: ClassVar[frozenset[Cap]] = frozenset()
    forbids: ClassVar[frozenset[Cap]] = frozenset()  #: cannot run beside a part that gives these


#: parts that ship with kvarn: (kind, name) -> "module:Class"; imported only when asked for
BUILT_IN: dict[tuple[str, str], str] = {
    ("scheduler", "continuous"): "kvarn.schedule.continuous:Continuous",
    ("scheduler", "prefill-first"): "kvarn.schedule.prefill_first:PrefillFirst",
    ("scheduler", "orca"): "kvarn.schedule.orca:Orca",
    ("scheduler", "static"): "kvarn.schedule.static:Static",
    ("prefix", "hash"): "kvarn.kv.prefix.hashed:HashChain",
    ("prefix", "radix"): "kvarn.kv.prefix.radix:Radix",
    ("evict", "lru"): "kvarn.kv.evict.lru:LRU",
    ("evict", "lfu"): "kvarn.kv.evict.lfu:LFU",
    ("router", "round_robin"): "kvarn.cluster.router.round_robin:RoundRobin",
    ("router", "least_loaded"): "kvarn.cluster.router.least_loaded:LeastLoaded",
    ("router", "prefix_aware"): "kvarn.cluster.router.prefix_aware:PrefixAware",
    ("proposer", "suffix"): "kvarn.speculate.propose.suffix:Suffix",
    ("proposer", "mix"): "kvarn.speculate.propose.mix:Mix",
    ("proposer", "draft"): "kvarn.speculate.propose.draft_model:DraftModel",
    ("proposer", "synthetic"): "kvarn.speculate.propose.synthetic:Synthetic",
    ("proposer", "ngram"): "kvarn.speculate.propose.ngram:NGram",
    ("draft-length", "fixed"): "kvarn.speculate.length.fixed:Fixed",
    ("draft-length", "gammatune"): "kvarn.speculate.length.gammatune:GammaTune",
    ("draft-length", "gammatune-plus"): ("kvarn.speculate.length.gammatune:GammaTunePlus"),
    ("draft-length", "specdec-pp"): "kvarn.speculate.length.specdec_pp:SpecDecPP",
    ("draft-length", "utility"): "kvarn.speculate.length.utility:Utility",
    ("draft-length", "hf-heuristic"): "kvarn.speculate.length.baselines:Heuristic",
    ("draft-length", "confidence"): "kvarn.speculate.length.baselines:Confidence",
    ("draft-length", "survival"): "kvarn.speculate.length.survival:Survival",
    ("sparsity", "streamingllm"): "kvarn.sparse.streamingllm:StreamingLLM",
    ("sparsity", "sage-kv"): "kvarn.sparse.sage_kv:SageKV",
    ("sparsity", "snapkv"): "kvarn.sparse.snapkv:SnapKV",
    ("sparsity", "h2o"): "kvarn.sparse.h2o:H2O",
    ("sparsity", "pyramid"): "kvarn.sparse.pyramid:Pyramid",
    ("sparsity", "knorm"): "kvarn.sparse.knorm:KNorm",
    ("sparsity", "random"): "kvarn.sparse.random:Random",
    ("sparsity", "duoattention"): "kvarn.sparse.duoattention:DuoAttention",
    ("sparsity", "gemfilter"): "kvarn.sparse.gemfilter:GemFilter",
    ("sparsity", "quest"): "kvarn.sparse.quest:Quest",
    ("sparsity", "random-pages"): "kvarn.sparse.random_pages:RandomPages",
    ("trainer", "online-spec"): "kvarn.speculate.train.trainer:OnlineTrainer",
    ("attention", "reference"): "kvarn.kernels.attention.reference:Reference",
    ("attention", "cpu"): "kvarn.kernels.attention.cpu:CPUAttention",
    ("attention", "invariant"): "kvarn.kernels.attention.invariant:Invariant",
    ("attention", "native"): "kvarn.kernels.attention.native:NativeAttention",
    ("attention", "triton"): "kvarn.kernels.attention.triton:TritonAttention",
    ("attention", "triton-invariant"): ("kvarn.kernels.attention.triton_invariant:TritonInvariant"),
}


def known() -> dict[tuple[str, str], str]:
    """Every part that can be named: built in, and registered by installed packages."""
    return BUILT_IN | _installed()


@cache
def _installed() -> dict[tuple[str, str], str]:
    """Parts of installed packages; what is installed is read once."""
    parts = {}
    for point in entry_points(group="kvarn.parts"):
        kind, _, name = point.name.partition(".")
        parts[kind, name] = point.value
    return parts


def find(kind: str, name: str) -> type[Part]:
    """The class of a part; an unknown name is an error that names the nearest."""
    parts = known()
    names = [n for k, n in parts if k == kind]
    if (kind, name) not in parts:
        raise ConfigError(f"unknown {kind} {name!r}{nearest(name, names)}")
    module, _, attribute = parts[kind, name].partition(":")
    part: type[Part] = getattr(import_module(module), attribute)
    return part


def describe() -> list[dict[str, Any]]:
    """One row for each known part, for `kvarn parts`."""
    rows = []
    for kind, name in sorted(known()):
        part = find(kind, name)
        rows.append(
            {
                "name": name,
                "kind": kind,
                "paper": part.paper,
                "needs": sorted(cap.name for cap in part.needs),
                "gives": sorted(cap.name for cap in part.gives),
                "regime": part.regime,
            }
        )
    return rows


def solve(parts: Sequence[type[Part]], base: Iterable[Cap] = ()) -> frozenset[Cap]:
    """Check that every need is given and nothing forbidden is; return the capabilities in force.

    `base` is what the engine gives without any part (by the model's shape and the device).
    """
    given = frozenset(base).union(*(part.gives for part in parts))
    for part in parts:
        for cap in sorted(part.needs - given, key=lambda c: c.name):
            raise ConfigError(
                f"{part.kind} {part.name!r} needs {cap.name} ({cap.value}), which nothing gives"
            )
        for other in parts:
            for cap in sorted(part.forbids & other.gives, key=lambda c: c.name):
                raise ConfigError(
                    f"{part.kind} {part.name!r} cannot run beside {other.kind} {other.name!r}, "
                    f"which gives {cap.name} ({cap.value})"
                )
    return given
