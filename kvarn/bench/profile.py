"""`kvarn profile`: times of steps over a grid of shapes, for the cost model of the simulator.

Plans are made up and go straight to the executor: no scheduler, no queue, the shapes exactly as
wanted. What is timed is `executor.run` of a plan that only computes (sequences enter and leave in
plans of their own): batch building, forward pass, sampling, and waiting for the device. The
contents of the pages mean nothing; sequences have pages of their own as far as the pool goes.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from kvarn.bench import record
from kvarn.core.config import option
from kvarn.core.errors import ConfigError
from kvarn.core.plan import SeqStart, Span, StepPlan
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.rows import to_row
from kvarn.cost.shape import shape_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=1)
#: what a step computes: (first position, rows) of each sequence
Shape = tuple[tuple[int, int], ...]


@dataclass(slots=True)
class Profile:
    """What `kvarn profile` runs."""

    batches: tuple[int, ...] = option((1, 2, 4, 8, 16, 32, 64, 128, 256), "sequences of decodes")
    contexts: tuple[int, ...] = option(
        (16, 256, 1024, 4096, 16384), "of decodes, and what chunks find computed", "tokens"
    )
    chunks: tuple[int, ...] = option((2, 16, 64, 256, 1024, 4096), "rows of prefills", "tokens")
    repeats: int = option(5, "rounds over all shapes; medians count")
    seconds: float = option(100.0, "no further step begins that would end later", "s")


@dataclass(slots=True, frozen=True)
class Bounds:
    """What the engine can run in one step."""

    max_seqs: int
    budget: int  #: rows of a step
    max_len: int
    page_size: int
    pages: tuple[int, ...]  #: of the pool, by group

    def allow(self, shape: Shape) -> bool:
        """Whether a step of this shape fits, every sequence with pages of its own."""
        pages = sum(-(-(start + rows + 1) // self.page_size) for start, rows in shape)
        return (
            len(shape) <= self.max_seqs
            and sum(rows for _, rows in shape) <= self.budget
            and max(start + rows for start, rows in shape) < self.max_len
            and pages <= min(self.pages)
        )


def bounds(llm: Any) -> Bounds:
    """The limits of a loaded engine, pages as it measured them."""
    control, config = llm.engine.control, llm.engine.resolved.config
    longest = config.max_len or llm.spec.max_len
    return Bounds(
        control.max_seqs, control.budget, longest, config.page_size, tuple(control.kv.pages)
    )


def shapes(how: Profile, most: Bounds) -> list[Shape]:
    """The grid of shapes that fit, the cheapest first."""
    decodes = [((context - 1, 1),) * n for n in how.batches for context in how.contexts]
    prefills = [((past, rows),) for rows in how.chunks for past in (0, *how.contexts)]
    several = [((0, rows),) * n for rows in how.chunks for n in (2, 8)]
    mixed = [
        ((past, rows), *((context - 1, 1),) * n)
        for rows in how.chunks[1::2]
        for past in (0, *how.contexts[1:3])
        for context in how.contexts[1:3]
        for n in how.batches[2::2]
    ]
    fitting = [s for s in (*decodes, *prefills, *several, *mixed) if most.allow(s)]
    if not any(s[0][1] == 1 for s in fitting) or not any(s[0][1] > 1 for s in fitting):
        raise ConfigError(
            f"no decode or no prefill of the profile fits this engine: at most {most.max_seqs} "
            f"sequences, {most.budget} rows, {most.max_len} positions, {min(most.pages)} pages"
        )
    return sorted(fitting, key=_work)


def run(
    llm: Any,
    how: Profile,
    watch: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measure on a loaded, idle engine; `watch` gets steps done and steps planned.

    The pages of prefixes that the engine had kept are overwritten, so it forgets them.
    """
    check(how)
    if llm.engine.has_work:
        raise ConfigError("a profile needs an idle engine: requests are running")
    llm.engine.control.kv.clear(llm.engine.clock())
    most = bounds(llm)
    wanted = shapes(how, most)
    for shape in (wanted[0], wanted[len(wanted) // 2]):  # threads, allocator, kernels wake up
        timed(llm.engine.executor, shape, most, clock)
    times: dict[Shape, list[float]] = {shape: [] for shape in wanted}
    begin, done = clock(), 0
    for _ in range(how.repeats):
        last = 0.0
        for shape in wanted:
            # the step before was cheaper, so a shape not tried yet takes at least as long
            expected = times[shape][-1] if times[shape] else last
            if clock() - begin + expected > how.seconds:
                continue
            last = timed(llm.engine.executor, shape, most, clock)
            times[shape].append(last)
            done += 1
            watch(done, how.repeats * len(wanted))
    return _result(llm, how, most, times)


def check(how: Profile) -> None:
    """Raise `ConfigError` for what cannot be run."""
    if how.repeats < 1 or how.seconds <= 0:
        raise ConfigError(f"repeats={how.repeats} and seconds={how.seconds} must be above 0")
    for name, least in (("batches", 1), ("contexts", 1), ("chunks", 2)):
        values = getattr(how, name)
        if not values or min(values) < least or sorted(set(values)) != list(values):
            raise ConfigError(f"{name} must be rising numbers of at least {least}, got {values}")


def timed(executor: Any, shape: Shape, most: Bounds, clock: Callable[[], float]) -> float:
    """Seconds of one step of `shape`."""
    spans = [Span(seq, start, rows) for seq, (start, rows) in enumerate(shape)]
    executor.run(StepPlan(0, starts=_starts(shape, most)))
    try:
        begin = clock()
        executor.run(StepPlan(0, spans=spans))
        return clock() - begin
    finally:
        executor.run(StepPlan(0, stops=[span.seq for span in spans]))


def _starts(shape: Shape, most: Bounds) -> list[SeqStart]:
    """Sequences whose pages follow each other in the pool, none shared."""
    starts, page = [], 0
    for seq, (start, rows) in enumerate(shape):
        length = start + rows
        need = -(-(length + 1) // most.page_size)
        tokens = [0] * length
        request = Request(id=f"profile-{seq}", prompt=tokens, sampling=GREEDY)
        tables = [list(range(page, page + need)) for _ in most.pages]
        starts.append(SeqStart(seq, request, 0, list(tokens), length, tables))
        page += need
    return starts


def _result(
    llm: Any, how: Profile, most: Bounds, times: dict[Shape, list[float]]
) -> dict[str, Any]:
    config = {row["option"]: row["value"] for row in llm.engine.explain()["options"]}
    result = record.header("profile", asdict(how), config)
    spec = asdict(llm.spec)
    result |= {"model_id": config["model"], "spec": spec, "pages": list(most.pages)}
    result |= {"page_size": most.page_size, "max_seqs": most.max_seqs, "budget": most.budget}
    result["rows"] = list(_rows(times.items()))
    result["skipped"] = sum(not seen for seen in times.values())
    return result


def _rows(times: Iterable[tuple[Shape, list[float]]]) -> Iterable[dict[str, Any]]:
    for shape, seen in times:
        if seen:
            spans = ((start, rows, True) for start, rows in shape)
            yield to_row(shape_of(spans), statistics.median(seen)) | {"times": seen}


def _work(shape: Shape) -> float:
    """Order of the shapes: rows, and positions that they look at."""
    return sum(rows * (1.0 + (start + rows) / 1000) for start, rows in shape)
