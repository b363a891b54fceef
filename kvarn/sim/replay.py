"""Decision replay: a recorded run's inputs and times through the very same decision code.

An engine with `--step-log` records every call of its control plane. Here an equal control plane
gets the same calls at the same times, with the tokens that the device gave, and every plan must
come out equal: the same spans, preemptions, forks, evictions, page for page. What differs is no
noise but a decision that depends on something besides its inputs (trust protocol T1).
"""

import gzip
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from kvarn.core.errors import ConfigError, QueueFull
from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.core.output import EngineStats
from kvarn.core.plan import SpanResult, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.cost.shape import StepShape, shape_of
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.schedule.logged import as_record

SHOWN = 5  #: differences kept for people


@dataclass(slots=True)
class Difference:
    """One step that was decided otherwise."""

    step: int
    what: str  #: field of the plan
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        return f"step {self.step}, {self.what}: recorded {self.recorded}, now {self.replayed}"


@dataclass(slots=True)
class Report:
    """What a replay found."""

    steps: int = 0
    differing: int = 0
    shown: list[Difference] = field(default_factory=list)  #: the first differences
    aborts: int = 0
    forks: int = 0  #: sequences that share a prompt with their first sibling
    truncated: bool = False  #: the last line was cut off
    stats: EngineStats | None = None


def records(path: str) -> Iterator[dict[str, Any]]:
    """The records of a log. A last line that was cut off yields `{"call": "truncated"}`."""
    number, broken = 0, None
    for number, line in enumerate(_lines(path), 1):
        if broken is not None:
            raise ConfigError(f"{path}, line {broken}: not a record of a step log")
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError:
            broken = number
            continue
        if not isinstance(record, dict) or "call" not in record:
            raise ConfigError(f"{path}, line {number}: not a record of a step log")
        yield record
    if broken is not None:
        yield {"call": "truncated"}
    if number == 0:
        raise ConfigError(f"{path} is empty: a step log is written with --step-log")


def _lines(path: str) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            yield from file
    except EOFError:
        return  # a compressed log of a killed engine
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None


def replay(path: str) -> Report:
    """Repeat every recorded call; what was decided otherwise."""
    lines = records(path)
    control = _control(next(lines), path)
    report, plans = Report(), dict[int, StepPlan]()
    for record in lines:
        try:
            _repeat(control, record, plans, report)
        except (KeyError, IndexError, AssertionError) as error:
            if not report.differing:
                raise ConfigError(f"{path}: a record cannot be replayed: {error!r}") from None
            note = f"the replay could not go on: {error!r}"
            _differs(report, Difference(report.steps, "state", "", note))
            break
    report.stats = control.stats()
    return report


def _control(begin: dict[str, Any], path: str) -> ControlPlane:
    """The control plane that a log's first record describes."""
    if begin.get("call") != "begin" or begin.get("format") != 1:
        raise ConfigError(f"{path} is no step log of this version: its first line must say so")
    options = begin["options"]
    groups = msgspec.convert(begin["groups"], list[GroupSpec])
    limits = (options[name] for name in ("budget", "max_seqs", "max_len", "max_queue"))
    return build_control(
        groups, begin["pages"], options["page_size"], options["scheduler"], options["prefix"],
        options["evict"], Capacity(*limits),
    )  # fmt: skip


def _repeat(
    control: ControlPlane, record: dict[str, Any], plans: dict[int, StepPlan], report: Report
) -> None:
    """One recorded call."""
    now = record.get("now", 0.0)
    match record["call"]:
        case "add":
            with suppress(QueueFull):  # as it was when it was recorded
                control.add(msgspec.convert(record["request"], Request))
        case "abort":
            report.aborts += 1
            control.abort(record["id"], now)
        case "finish":
            control.finish(control.seqs[record["seq"]], record["reason"], now, record["keep"])
        case "plan":
            plan = control.plan(now)
            plans[plan.step] = plan
            _compare(as_record(plan), record["plan"], report)
        case "apply":
            plan = plans.pop(record["step"])
            extras = {int(i): SpanResult(error=text) for i, text in record["errors"].items()}
            control.apply(plan, StepResult(plan.step, record["tokens"], extras), now)
        case "fail":
            control.fail([plans.pop(step) for step in record["steps"]], now)
        case "retreat":
            control.retreat([plans.pop(step) for step in record["steps"]], now)
        case "clear":
            control.clear_prefixes(now)
        case "truncated":
            report.truncated = True
        case other:
            raise ConfigError(f"a step log has no call {other!r}")


def _compare(replayed: dict[str, Any], recorded: dict[str, Any], report: Report) -> None:
    report.steps += 1
    report.forks += len({target for _, _, target in recorded["copies"]})
    plain = msgspec.to_builtins(replayed)
    for name, value in recorded.items():
        if plain.get(name) != value:
            _differs(report, Difference(recorded["step"], name, value, plain.get(name)))
            return


def _differs(report: Report, difference: Difference) -> None:
    report.differing += 1
    if len(report.shown) < SHOWN:
        report.shown.append(difference)


def spec_of(path: str) -> ModelSpec:
    """The model of a log."""
    return msgspec.convert(next(records(path))["spec"], ModelSpec)


def step_rows(path: str) -> Iterator[tuple[StepShape, float]]:
    """(shape, seconds) of every recorded step that computed something, for fitted cost models.

    Left out: the first step of each kind (decodes only, with prompts), which warms caches up, and
    steps that failed or did not fit, which no result ended.
    """
    spans: dict[int, list[list[Any]]] = {}
    warm: set[bool] = set()
    for record in records(path):
        if record["call"] == "plan":
            spans[record["plan"]["step"]] = record["plan"]["spans"]
        elif record["call"] == "apply":
            found = spans.pop(record["step"])
            if not found:
                continue
            shape = shape_of((start, length, wants) for _, start, length, _, wants in found)
            kind = bool(shape.chunks)
            if kind in warm and record["seconds"] > 0:
                yield shape, record["seconds"]
            warm.add(kind)
