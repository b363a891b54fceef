"""Requests of several stages: retrieval before the model, branches and tools around it. Plain data.

A pipeline is a graph of stages; each waits for those before it. A stage runs on the model's
instances (`MODEL`) or on a station that is known by name, where `work` is in the station's own
units (tokens, queries, bytes).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from kvarn.core.errors import ConfigError
from kvarn.workload import arrivals
from kvarn.workload.chains import Chains, Piece, length
from kvarn.workload.trace import Trace, TraceRequest

MODEL = "model"  #: where the stages of the language model run


@dataclass(slots=True, frozen=True)
class Stage:
    """One step of a request's way."""

    where: str  #: `MODEL`, or the name of a station
    after: tuple[int, ...] = ()  #: places of the stages that must have ended
    first: bool = False  #: one of them is enough: the first to end; the others are dropped
    work: float = 1.0  #: of a station
    n_in: int = 0  #: of the model: prompt [tokens]
    n_out: int = 0  #: of the model: answer [tokens]
    blocks: tuple[int, ...] = ()  #: of the model: content, as a trace names it
    fetched: int = 0  #: leading positions of the prompt whose KV has come with a stage before


@dataclass(slots=True, frozen=True)
class Pipeline:
    """A request from its arrival to its last stage."""

    id: str
    at: float  #: arrival [s]
    stages: tuple[Stage, ...]
    kind: str = ""

    def unwanted(self, join: int, ended: Sequence[bool]) -> set[int]:
        """Stages that nobody waits for once stage `join` begins, of those that have not ended.

        They are the losers of a race and what leads to them alone.
        """
        gone, none = {join}, set[int]()
        for place in reversed(range(join)):
            waiting = {i for i, stage in enumerate(self.stages) if place in stage.after}
            if not ended[place] and waiting and waiting <= gone:
                gone.add(place)
        return gone - {join} if self.stages[join].first else none

    def __post_init__(self) -> None:
        for place, stage in enumerate(self.stages):
            if any(not 0 <= before < place for before in stage.after):
                raise ConfigError(
                    f"pipeline {self.id!r}: stage {place} waits for {stage.after}, but may only "
                    f"wait for stages before it"
                )
        if not self.stages:
            raise ConfigError(f"pipeline {self.id!r} has no stage")


@dataclass(slots=True, frozen=True)
class Pipelines:
    """Pipelines in order of arrival, with one unit of content."""

    requests: tuple[Pipeline, ...]
    block_size: int  #: positions of an entry of `blocks` [tokens]

    def __iter__(self) -> Iterator[Pipeline]:
        return iter(self.requests)

    def __len__(self) -> int:
        return len(self.requests)


def single(trace: Trace) -> Pipelines:
    """A trace as pipelines of one stage each."""
    found = (Pipeline(one.id, one.at, (model_stage(one),), one.kind) for one in trace)
    return Pipelines(tuple(found), trace.block_size)


def model_stage(one: TraceRequest, after: tuple[int, ...] = ()) -> Stage:
    """A stage of the model with a request's lengths and content."""
    return Stage(MODEL, after, n_in=one.n_in, n_out=one.n_out, blocks=one.blocks)


def in_front(trace: Trace, before: Sequence[Stage], kind: str) -> Pipelines:
    """Each request of a trace behind a chain of stages: RAG is embed, search, rerank, model."""
    chain = tuple(replace(one, after=(i - 1,) if i else ()) for i, one in enumerate(before))
    last = (len(chain) - 1,) if chain else ()
    found = (Pipeline(one.id, one.at, (*chain, model_stage(one, last)), kind) for one in trace)
    return Pipelines(tuple(found), trace.block_size)


def merged(*parts: Pipelines) -> Pipelines:
    """Several loads on one cluster; their contents count as unlike."""
    size = parts[0].block_size
    if any(part.block_size != size for part in parts):
        raise ConfigError("loads with unequal block sizes cannot be put on one cluster")
    found, shift = list[Pipeline](), 0
    for n, part in enumerate(parts):
        highest = -1
        for one in part:
            stages = tuple(
                replace(s, blocks=tuple(b + shift for b in s.blocks)) for s in one.stages
            )
            highest = max([highest, *(b for s in stages for b in s.blocks)])
            found.append(replace(one, id=f"{n}.{one.id}", stages=stages))
        shift = highest + 1
    return Pipelines(tuple(sorted(found, key=lambda one: one.at)), size)


def race(
    n: int, rate: float, k: int, n_in: int, n_out: int, answer: int, block_size: int, seed: int
) -> Pipelines:
    """`k` thoughts of one prompt, of 1 to 2 `n_out` tokens; the first to end is answered to."""
    rng, found = Random(f"race {seed}"), []
    for one in branches(n, rate, k, n_in, n_out, answer, block_size, seed):
        *thoughts, last = one.stages
        paths = [replace(path, n_out=rng.randint(1, 2 * n_out)) for path in thoughts]
        # what is answered to is the prompt and one thought, whichever it was
        blocks = last.blocks[: -(-(n_in + n_out) // block_size)]
        last = replace(last, first=True, n_in=n_in + n_out, blocks=blocks)
        found.append(replace(one, stages=(*paths, last), kind=f"first of {k} paths"))
    return Pipelines(tuple(found), block_size)


def branches(
    n: int, rate: float, k: int, n_in: int, n_out: int, answer: int, block_size: int, seed: int
) -> Pipelines:
    """Multi-path reasoning: `k` thoughts of one prompt; when all have ended, an answer to them."""
    if min(n, k, n_in, n_out, answer) < 1:
        raise ConfigError("requests, branches and lengths must be at least 1")
    chains, times = Chains(block_size), arrivals.poisson(Random(f"branches {seed}"), rate)
    found = []
    for i, at in zip(range(n), times):
        prompt: list[Piece] = [(("prompt", i), n_in)]
        thought = Stage(MODEL, n_in=n_in, n_out=n_out, blocks=chains.blocks(prompt))
        whole = [*prompt, *((("thought", i, j), n_out) for j in range(k))]
        last = Stage(
            MODEL, tuple(range(k)), n_in=length(whole), n_out=answer, blocks=chains.blocks(whole)
        )
        found.append(Pipeline(str(i), at, (*[thought] * k, last), f"{k} paths"))
    return Pipelines(tuple(found), block_size)


def tools(
    n: int, rate: float, rounds: int, n_in: int, n_out: int, result: int, tool: str,
    block_size: int, seed: int,
) -> Pipelines:  # fmt: skip
    """An agent: the model calls a tool `rounds` times, and reads each result before it goes on."""
    if min(n, n_in, n_out) < 1 or min(rounds, result) < 0:
        raise ConfigError("requests and lengths must be at least 1, rounds and results at least 0")
    chains, times = Chains(block_size), arrivals.poisson(Random(f"tools {seed}"), rate)
    found = []
    for i, at in zip(range(n), times):
        pieces: list[Piece] = [(("prompt", i), n_in)]
        stages: list[Stage] = []
        for turn in range(rounds + 1):
            if turn:
                stages.append(Stage(tool, (len(stages) - 1,)))
                pieces += [(("said", i, turn), n_out), (("result", i, turn), result)]
            before = (len(stages) - 1,) if stages else ()
            blocks = chains.blocks(pieces)
            stages.append(Stage(MODEL, before, n_in=length(pieces), n_out=n_out, blocks=blocks))
        found.append(Pipeline(str(i), at, tuple(stages), f"{rounds} calls"))
    return Pipelines(tuple(found), block_size)
