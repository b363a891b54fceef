"""Does serving slow down while a drafter learns beside it, and does the learning give way to load?

    python benchmarks/train_beside.py [--model FILE.gguf] [--learns on|idle] [--turns N]
                                      [--load SHARE | --rate N] [--seconds N] [--json FILE]

SmolLM2 with the drafter that comes with kvarn, twice in one process: A drafts and does not learn, B
learns in its thread, beside the steps or only while no request runs. They take turns with the same
requests at the same times (Poisson arrivals, on subjects that the drafter was not trained on), with
idle time between them. A's turns begin when B's thread has nothing to do.

Measured is the time per output token of each request, from when its tokens came out of `step`. What
B learns makes it faster and what it keeps for learning makes it slower, so its requests and its
steps are told apart by whether the thread computed meanwhile; steps are also held against A's of
as many sequences.

`--load` is the share of the time in which A is to have work. The rate that brings it about is found
first: for as many at once as there are (M/G/inf) a request that takes S seconds alone leaves an
engine without work for exp(-rate S) of the time; runs of a few seconds correct that for engines
that get slower with each request.

Meant to take less than two minutes on a GPU. On a CPU: --turns 2 --seconds 30 --pilot 15 --seqs 4
--output 32.
"""

import argparse
import math
import os
import random
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, median
from time import perf_counter, sleep
from typing import Any

from trainer_watch import Span, Watch, yields

from kvarn.bench import record
from kvarn.bench.drift import prompts
from kvarn.bench.stats import percentile
from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.engine.garbage import paced
from kvarn.speculate.train.load import shipped
from kvarn.speculate.train.trainer import OnlineTrainer

MODEL = Path.home() / ".cache" / "kvarn" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
PHASES = ("spanish", "code")
EACH = 288  #: prompts of a phase: as many as the smaller one has
LEAST = 8  #: tokens of an answer that counts
DRAFT = 2  #: tokens
ALONE = 8  #: requests that are served one by one, to begin with
PILOTS = 2  #: runs that correct the rate
DRAWS = 1000  #: of the bootstrap
ALIKE = 20  #: steps of one size, at least, to compare their times
STATS = (
    "output_tokens", "steps", "drafted_tokens", "accepted_tokens", "verify_steps",
    "replayed_verify_steps",
)  # fmt: skip
#: by our name for it
TRAINED = {
    "published": "published", "rolled_back": "rolled_back", "dropped": "dropped",
    "trained_s": "seconds",
}  # fmt: skip


# what is asked, and what came of it


@dataclass(slots=True)
class Ask:
    """A request to come."""

    at: float  #: from the beginning of the turn [s]
    prompt: list[int]


@dataclass(slots=True)
class Answer:
    """A request whose tokens come out of `step`."""

    arrived: float  #: by the clock, as all that follows [s]
    first: float = 0.0  #: when the first tokens were there
    last: float = 0.0
    tokens: int = 0

    def saw(self, now: float, tokens: int) -> None:
        """Some more."""
        if not self.tokens:
            self.first = now
        self.last = now
        self.tokens += tokens

    @property
    def tpot(self) -> float:
        """Time per output token behind the first one; of two tokens at least [s]."""
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(slots=True)
class Step:
    """A call of `step`."""

    span: Span
    size: int  #: sequences that it brought tokens
    decodes: bool  #: none of them was new
    captured: bool

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.span[1] - self.span[0]


@dataclass(slots=True)
class Turn:
    """What an engine did with some requests."""

    span: Span
    answers: list[Answer]  #: by request
    steps: list[Step]
    counts: dict[str, float]  #: by which the engine's own counters grew

    @property
    def busy(self) -> float:
        """Share of the time in which there was work."""
        return sum(step.seconds for step in self.steps) / (self.span[1] - self.span[0])


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, rising, all below `seconds`."""
    rng, at, found = random.Random(seed), 0.0, list[float]()
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append(at)
    return found


def corrected(rate: float, wanted: float, busy: float) -> float:
    """The rate that makes the engine busy for a share of the time, after one that did not.

    As if any number could be served at once; one correction comes close where they cannot.
    """
    busy = min(max(busy, 0.05), 0.95)  # of a short run; beyond that it says next to nothing
    return rate * math.log(1.0 - wanted) / math.log(1.0 - busy)


def meets(span: Span, others: Iterable[Span]) -> bool:
    """Whether any of the others happened meanwhile."""
    return any(began < span[1] and ended > span[0] for began, ended in others)


def covered(span: Span, others: Iterable[Span]) -> float:
    """Share of a time that others take, which do not overlap."""
    found = (min(span[1], ended) - max(span[0], began) for began, ended in others)
    return sum(max(0.0, seconds) for seconds in found) / (span[1] - span[0])


def counting(turn: Turn, warm_up: float) -> dict[int, Answer]:
    """Answers that count: long enough, behind the warm-up, and beside no step that captured."""
    captured = [step.span for step in turn.steps if step.captured]
    return {
        i: one
        for i, one in enumerate(turn.answers)
        if one.tokens >= LEAST
        and one.arrived >= turn.span[0] + warm_up
        and not meets((one.arrived, one.last), captured)
    }


def spread(values: Sequence[float]) -> float | None:
    """How far apart they are, over their median; of one nobody knows."""
    return (max(values) - min(values)) / median(values) if len(values) > 1 else None


def p95(values: Iterable[float]) -> float:
    """0 for no values."""
    return percentile(sorted(values), 95)


# serving


@dataclass(slots=True)
class Side:
    """One of the two engines."""

    name: str
    engine: Engine
    watch: Watch | None

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> "Side":
        """Load it."""
        engine = Engine(resolve(options, os.environ))
        trainer = None if engine.speculation is None else engine.speculation.trainer
        return cls(name, engine, Watch(trainer) if isinstance(trainer, OnlineTrainer) else None)

    def serve(self, asks: Sequence[Ask], output: int, seconds: float = 0.0) -> Turn:
        """Requests at their times, for so long at least; answers of up to `output` tokens."""
        self.engine.reset_prefix_cache()
        before, steps = self._counts(), list[Step]()
        params = SamplingParams(temperature=0.0, max_tokens=output)
        due, start = deque(enumerate(asks)), perf_counter()
        answers = [Answer(start + one.at) for one in asks]
        with paced() as stepped:
            while due or self.engine.has_work:
                while due and start + due[0][1].at <= perf_counter():
                    i, ask = due.popleft()
                    arrival = self.engine.clock()
                    self.engine.add(Request(str(i), ask.prompt, params, arrival=arrival))
                if self.engine.has_work:
                    steps.append(self._step(answers))
                    stepped()
                elif due:
                    sleep(max(0.0, start + due[0][1].at - perf_counter()))
        sleep(max(0.0, start + seconds - perf_counter()))
        after = self._counts()
        counts = {name: after[name] - before[name] for name in after}
        return Turn((start, perf_counter()), answers, steps, counts)

    def _step(self, answers: list[Answer]) -> Step:
        captures, began = self._captures, perf_counter()
        outputs = self.engine.step()
        ended, decodes, size = perf_counter(), True, 0
        for output in outputs:
            answer = answers[int(output.request_id)]
            decodes = decodes and answer.tokens > 0
            size += len(output.tokens) > 0
            answer.saw(ended, len(output.tokens))
        captured = self._captures > captures
        return Step((began, ended), size, decodes and size > 0, captured)

    @property
    def _captures(self) -> int:
        """Of the target's steps and of the drafter's."""
        speculation = self.engine.speculation
        assert speculation is not None
        return speculation.captures()

    def _counts(self) -> dict[str, float]:
        stats = self.engine.stats()
        found: dict[str, float] = {name: getattr(stats, name) for name in STATS}
        if stats.trainer is not None:
            found |= {name: getattr(stats.trainer, theirs) for name, theirs in TRAINED.items()}
        return found


class Texts:
    """Prompts of each phase, one after the other; they come again only when all were there."""

    def __init__(self, engine: Engine) -> None:
        tokenizer = engine.tokenizer
        assert tokenizer is not None, "a GGUF file has one"

        def encoded(phase: str) -> Iterator[list[int]]:
            for text in cycle(prompts(phase, EACH)):
                chat = tokenizer.chat([{"role": "user", "content": text}])
                yield tokenizer.encode(chat, add_special=False)

        self.of = {phase: encoded(phase) for phase in PHASES}

    def asks(self, times: Sequence[float], phase: str) -> list[Ask]:
        """Requests of one phase."""
        return [Ask(at, ids) for at, ids in zip(times, islice(self.of[phase], len(times)))]

    def mixed(self, times: Sequence[float]) -> list[Ask]:
        """Requests of all phases in turns."""
        return [Ask(at, next(self.of[phase])) for at, phase in zip(times, cycle(PHASES))]


def find_rate(sides: Sequence[Side], texts: Texts, given: argparse.Namespace) -> float:
    """The rate at which the first engine is busy for `--load` of the time; all of them warm up."""
    alone = list[float]()
    for ask in texts.mixed([0.0] * ALONE):
        turns = [side.serve([ask], given.output) for side in sides]
        alone.append(turns[0].span[1] - turns[0].span[0])
    # the first ones compile and capture
    rate = given.rate or -math.log(1.0 - given.load) / median(alone[ALONE // 2 :])
    for at in range(PILOTS):
        asks = texts.mixed(arrivals(rate, given.pilot, -1 - at))
        turns = [side.serve(asks, given.output, given.pilot) for side in sides]
        came = len(asks) / given.pilot  # which is not the rate exactly
        print(f"{came:.2f} requests/s: busy {turns[0].busy:.2f} of the time", flush=True)
        if asks and not given.rate:
            rate = corrected(came, given.load, turns[0].busy)
    return rate


# what it says


@dataclass(slots=True)
class Pair:
    """A request that counts in both engines' turns."""

    turn: int
    a: float  #: time per output token [s]
    b: float
    beside: bool  #: B's thread computed while its tokens came


def paired(at: int, a: Turn, b: Turn, pieces: Sequence[Span], warm_up: float) -> list[Pair]:
    """Requests of a turn that count on both sides."""
    mine, theirs = counting(a, warm_up), counting(b, warm_up)
    return [
        Pair(at, one.tpot, other.tpot, meets((other.first, other.last), pieces))
        for i, one in mine.items()
        if (other := theirs.get(i)) is not None
    ]


def interval(pairs: Sequence[Pair], seed: int = 0) -> Span:
    """Of the ratio of the p95s, B over A: 90 % of what draws of as many pairs say."""
    rng, found = random.Random(seed), list[float]()
    for _ in range(DRAWS):
        some = rng.choices(pairs, k=len(pairs))
        found.append(p95(one.b for one in some) / p95(one.a for one in some))
    found.sort()
    return percentile(found, 5), percentile(found, 95)


def requests_row(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Times per output token of some requests [ms], and B over A."""
    if not pairs:
        return {"requests": 0}
    a, b = sorted(one.a for one in pairs), sorted(one.b for one in pairs)
    row: dict[str, Any] = {"requests": len(pairs)}
    for share in (50, 95):
        mine, theirs = percentile(a, share), percentile(b, share)
        row |= {f"a_p{share}_ms": 1e3 * mine, f"b_p{share}_ms": 1e3 * theirs}
        row[f"ratio_p{share}"] = theirs / mine
    return row | {"interval_p95": interval(pairs)}


def steps_row(a: Sequence[Step], b: Sequence[Step]) -> dict[str, Any]:
    """Steps that only decode [ms]; and B's over A's of as many sequences, by means and medians."""
    by_size: list[dict[int, list[float]]] = [defaultdict(list), defaultdict(list)]
    row: dict[str, Any] = {}
    for name, found, steps in zip("ab", by_size, (a, b)):
        for step in steps:
            found[step.size].append(step.seconds)
        seconds = sorted(step.seconds for step in steps)
        row |= {f"{name}_steps": len(seconds)}
        row |= {f"{name}_p{p}_ms": 1e3 * percentile(seconds, p) for p in (50, 95, 99)}
    sizes = [size for size in by_size[1] if min(len(one.get(size, ())) for one in by_size) >= ALIKE]
    total = sum(len(by_size[1][size]) for size in sizes)
    for name, of in (("mean", fmean), ("median", median)):
        parts = (of(by_size[1][k]) / of(by_size[0][k]) * len(by_size[1][k]) for k in sizes)
        row[f"alike_{name}"] = sum(parts) / total if total else None
    return row | {"alike_steps": total}


def plain(steps: Iterable[Step]) -> list[Step]:
    """Those that only decode, and captured nothing."""
    return [step for step in steps if step.decodes and not step.captured]


def turn_row(side: Side, at: int, turn: Turn, warm_up: float) -> dict[str, Any]:
    """What a turn was like."""
    tpots = sorted(one.tpot for one in counting(turn, warm_up).values())
    counts = turn.counts
    row = {
        "turn": at, "engine": side.name, "phase": PHASES[at % len(PHASES)],
        "asked": len(turn.answers), "counted": len(tpots), "busy": turn.busy,
        "seconds": turn.span[1] - turn.span[0],
        "p50_ms": 1e3 * percentile(tpots, 50), "p95_ms": 1e3 * percentile(tpots, 95),
        "accepted": counts["accepted_tokens"] / max(1.0, counts["drafted_tokens"]),
        "captured_steps": sum(step.captured for step in turn.steps), **counts,
    }  # fmt: skip
    if side.watch is not None:
        row["under_way"] = covered(turn.span, (job.span for job in side.watch.jobs))
        row["computing"] = covered(turn.span, side.watch.pieces)
        row["in_steps"] = in_steps(turn, side.watch.pieces)
    return row


def in_steps(turn: Turn, pieces: Sequence[Span]) -> float | None:
    """Share of the thread's computing in a turn that went on beside steps, not in idle time."""
    total = covered(turn.span, pieces) * (turn.span[1] - turn.span[0])
    beside = sum(covered(step.span, pieces) * step.seconds for step in turn.steps)
    return beside / total if total else None


def milliseconds(values: Sequence[float]) -> dict[str, float]:
    """How many, their median and the greatest."""
    if not values:
        return {"count": 0}
    return {"count": len(values), "median": 1e3 * median(values), "max": 1e3 * max(values)}


def yielding(watch: Watch) -> dict[str, Any]:
    """How long the thread computes without asking, and what it does when load comes."""
    jobs = [job for job in watch.jobs if len(job.pieces) > 1]
    found = yields(watch.jobs, watch.told)
    lengths = [ended - began for job in jobs for began, ended in job.pieces[1:-1]]
    made = [ended - began for job in jobs for began, ended in (job.pieces[-1],)]
    return {
        "lesson_ms": milliseconds(lengths),
        "version_ms": milliseconds(made),
        "renewal_ms": milliseconds([ended - began for began, ended in watch.renewals]),
        "waited_ms": milliseconds([one.waited for one in found]),
        "went_on_ms": milliseconds([one.went_on for one in found if one.pieces]),
        "pieces_after": dict(Counter(str(one.pieces) for one in found)),
        "gave_way": sum(one.went_on < one.waited for one in found),
    }


@dataclass(slots=True)
class Found:
    """All turns so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    a: list[Step] = field(default_factory=list)
    beside: list[Step] = field(default_factory=list)  #: B's, while its thread computed
    apart: list[Step] = field(default_factory=list)

    def add(self, at: int, sides: Sequence[Side], turns: Sequence[Turn], warm_up: float) -> None:
        """A turn of either."""
        watch = sides[1].watch
        pieces = watch.pieces if watch is not None else []
        self.pairs += paired(at, turns[0], turns[1], pieces, warm_up)
        self.a += plain(turns[0].steps)
        for step in plain(turns[1].steps):
            (self.beside if meets(step.span, pieces) else self.apart).append(step)
        for side, turn in zip(sides, turns):
            row = turn_row(side, at, turn, warm_up)
            self.rows.append(row)
            print(row, flush=True)

    def result(self) -> dict[str, Any]:
        """What the turns say together."""
        turns = sorted({one.turn for one in self.pairs})
        kinds = {
            "all": self.pairs,
            "beside": [one for one in self.pairs if one.beside],
            "apart": [one for one in self.pairs if not one.beside],
        }
        return {
            "results": self.rows,
            "requests": {kind: requests_row(some) for kind, some in kinds.items()},
            "by_turn": {
                str(at): requests_row([one for one in self.pairs if one.turn == at]) for at in turns
            },
            "spread_of_a": {phase: spread(self._own(phase)) for phase in PHASES},
            "steps": {
                "all": steps_row(self.a, self.beside + self.apart),
                "beside": steps_row(self.a, self.beside),
                "apart": steps_row(self.a, self.apart),
            },
        }

    def _own(self, phase: str) -> list[float]:
        """p95 of A in each turn of a phase."""
        return [
            row["p95_ms"] for row in self.rows if row["engine"] == "off" and row["phase"] == phase
        ]


def run(given: argparse.Namespace) -> None:
    """Turns of both; the result is written after each pair of them."""
    options: dict[str, Any] = {
        "model": given.model, "max_len": 512, "max_seqs": given.seqs, "kv_memory": 0.5,
        "speculate": "draft", "draft_model": str(shipped("smollm2-135m")),
        "draft_choice": "likeliest", "draft_length": "fixed", "draft_tokens": DRAFT,
    }  # fmt: skip
    sides = [Side.of(name, options | {"train_drafter": name}) for name in ("off", given.learns)]
    watch = sides[1].watch
    assert watch is not None
    texts = Texts(sides[0].engine)
    rate = find_rate(sides, texts, given)
    said = {
        "phases": PHASES, "load": given.load, "output": given.output, "turns": given.turns,
        "seconds": given.seconds, "warm_up": given.warm_up, "least": LEAST,
        "learns": given.learns,
    }  # fmt: skip
    shown = {"model": Path(given.model).stem, "draft_model": Path(options["draft_model"]).name}
    result = record.header("train_beside", said, options | shown) | {"rate": rate}
    found = Found()
    for at in range(given.turns):
        times = arrivals(rate, given.seconds, at)
        asks, turns = texts.asks(times, PHASES[at % len(PHASES)]), list[Turn]()
        for side in sides:
            watch.rest()
            turns.append(side.serve(asks, given.output, given.seconds))
        watch.rest()
        found.add(at, sides, turns, given.warm_up)
        stats = sides[1].engine.stats().trainer
        assert stats is not None
        result |= found.result() | {"yielding": yielding(watch), "trainer": asdict(stats)}
        record.write(result, given.json)
    for name in ("requests", "by_turn", "spread_of_a", "steps", "yielding", "trainer"):
        print(name, result[name])
    for side in sides:
        side.engine.close()


def main() -> None:
    """Both engines in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL), help="SmolLM2-135M-Instruct, as a GGUF file")
    parser.add_argument("--load", type=float, default=0.6, help="share of the time with work")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s; 0: found from --load")
    parser.add_argument("--turns", type=int, default=4, help="of each engine")
    parser.add_argument("--seconds", type=float, default=8.0, help="that requests of a turn come")
    parser.add_argument("--pilot", type=float, default=3.0, help="each run that finds the rate [s]")
    parser.add_argument("--warm-up", type=float, default=0.5, help="of a turn, not counted [s]")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--seqs", type=int, default=16, help="sequences at once, at most")
    parser.add_argument("--learns", default="idle", choices=("on", "idle"), help="when B learns")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    if not 0 < given.load < 1 or given.turns < 1:
        parser.error("--load is a share between 0 and 1, and --turns is at least 1")
    run(given)


if __name__ == "__main__":
    main()
