"""Decision replay: a recorded run's inputs and times through the very same decision code.

An engine with `--step-log` records every call of its control plane. Here an equal control plane
gets the same calls at the same times, with the tokens that the device gave, and every plan must
come out equal: the same spans, preemptions, forks, evictions, page for page. What differs is no
noise but a decision that depends on something besides its inputs (trust protocol T1).
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec

from kvarn.core.errors import ConfigError, QueueFull
from kvarn.core.model import GroupSpec, ModelSpec
from kvarn.core.output import EngineStats
from kvarn.core.plan import Choice, Draft, SpanResult, StepPlan, StepResult
from kvarn.core.request import Request
from kvarn.cost.fitted import regime
from kvarn.cost.shape import StepShape, shape_of
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.schedule.logged import as_record
from kvarn.sparse.rules import NONE, Rules

SHOWN = 5  #: differences kept for people

#: what a record with missing or wrong fields, or one that contradicts the others, raises
_BAD = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, AssertionError,
    msgspec.ValidationError,
)  # fmt: skip


@dataclass(slots=True)
class Difference:
    """One step that was decided otherwise."""

    step: int
    what: str  #: field of the plan, and where in it
    recorded: Any
    replayed: Any

    def __str__(self) -> str:
        return f"step {self.step}, {self.what}: recorded {self.recorded}, now {self.replayed}"


@dataclass(slots=True)
class Report:
    """What a replay found."""

    steps: int = 0
    differing: int = 0
    #: the first differences, and where the replay ended if it could not go on after them
    shown: list[Difference] = field(default_factory=list)
    regimes: dict[str, int] = field(default_factory=dict)  #: steps by what they computed
    aborts: int = 0
    forks: int = 0  #: sequences that copied a sibling's last page (whole ones need no copy)
    truncated: bool = False  #: the log ends in the middle of a record, which was left out
    stats: EngineStats | None = None


def records(path: str) -> Iterator[dict[str, Any]]:
    """The records of a log, one a line. Where its end was cut off: `{"call": "truncated"}`."""
    number = 0
    for number, line in enumerate(_lines(path), 1):
        try:
            record = msgspec.json.decode(line)
        except msgspec.DecodeError:
            if line.endswith(b"\n"):
                raise _error(path, number, "not a record of a step log") from None
            record = {"call": "truncated"}
        if not isinstance(record, dict) or "call" not in record:
            raise _error(path, number, "not a record of a step log")
        yield record
    if number == 0:
        raise ConfigError(f"{path} is empty: a step log is written with --step-log")


def _lines(path: str) -> Iterator[bytes]:
    """Lines with their ends; a last one without is what a killed engine left."""
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            yield from cast(Iterator[bytes], file)
    except EOFError:
        yield b""  # a compressed log that was not closed: what came last is lost
    except (OSError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read {path}: {reason}") from None


def _error(path: str, number: int, what: str) -> ConfigError:
    return ConfigError(f"{path}, line {number}: {what}")


def replay(path: str) -> Report:
    """Repeat every recorded call; what was decided otherwise."""
    lines = records(path)
    control = _control(next(lines), path)
    report, plans = Report(), dict[int, StepPlan]()
    for number, record in enumerate(lines, 2):
        try:
            _repeat(control, record, plans, report)
        except _BAD as error:
            reason = f"cannot be replayed: {error!r}"
            if not report.differing:
                raise _error(path, number, reason) from error
            # the calls that follow presume decisions that were not taken here
            report.shown.append(Difference(report.steps, f"line {number}", record["call"], reason))
            break
    report.stats = control.stats()
    return report


def _control(begin: dict[str, Any], path: str) -> ControlPlane:
    """The control plane that a log's first record describes."""
    if begin["call"] != "begin" or begin.get("format") != 1:
        raise ConfigError(f"{path} is no step log of this version: its first line must say so")
    try:
        options = begin["options"]
        groups = msgspec.convert(begin["groups"], list[GroupSpec])
        limits = (options[name] for name in ("budget", "max_seqs", "max_len", "max_queue"))
        rules = Rules(groups, options["page_size"], options.get("sparsity", NONE))
        return build_control(
            groups, begin["pages"], options["page_size"], options["scheduler"], options["prefix"],
            options["evict"], Capacity(*limits),
            keeps=rules.keeps, selects=rules.selects, filters=rules.filters,
        )  # fmt: skip
    except _BAD as error:
        raise _error(path, 1, f"describes no engine: {error!r}") from error


def _repeat(
    control: ControlPlane, record: dict[str, Any], plans: dict[int, StepPlan], report: Report
) -> None:
    """One recorded call."""
    now = record.get("now", 0.0)
    match record["call"]:
        case "add":
            with suppress(QueueFull):  # as it was when it was recorded
                control.add(msgspec.convert(record["request"], Request, str_keys=True))
        case "abort":
            report.aborts += 1
            control.abort(record["id"], now)
        case "finish":
            control.finish(control.seqs[record["seq"]], record["reason"], now, record["keep"])
        case "draft":
            control.draft({int(i): Draft(*said) for i, said in record["drafts"].items()})
        case "plan":
            plan = control.plan(now)
            plans[plan.step] = plan
            _compare(msgspec.to_builtins(as_record(plan)), record["plan"], report)
        case "apply":
            plan = plans.pop(record["step"])
            extras = {int(i): SpanResult(error=text) for i, text in record["errors"].items()}
            for i, said in record.get("choices", {}).items():
                extras.setdefault(int(i), SpanResult()).choice = msgspec.convert(said, Choice)
            control.apply(plan, StepResult(plan.step, record["tokens"], extras), now)
        case "fail":
            control.fail([plans.pop(step) for step in record["steps"]], now)
        case "retreat":
            control.retreat([plans.pop(step) for step in record["steps"]], now)
        case "clear":
            control.clear_prefixes(now)
        case "check":
            control.check_integrity()
        case "truncated":
            report.truncated = True
        case other:
            raise ValueError(f"a step log has no call {other!r}")


def _compare(replayed: dict[str, Any], recorded: dict[str, Any], report: Report) -> None:
    """Count a step, and note the first place where its plan differs."""
    report.steps += 1
    kind = regime(_shape(replayed["spans"])) if replayed["spans"] else "nothing computed"
    report.regimes[kind] = report.regimes.get(kind, 0) + 1
    report.forks += sum(group == 0 for group, _, _ in replayed["copies"])
    for name in {**replayed, **recorded}:
        before, now = recorded.get(name), replayed.get(name)
        if before != now:
            report.differing += 1
            if len(report.shown) < SHOWN:
                report.shown.append(_first(replayed["step"], name, before, now))
            return


def _first(step: int, name: str, recorded: Any, replayed: Any) -> Difference:
    """The first entry that differs, of fields that are lists."""
    if isinstance(recorded, list) and isinstance(replayed, list):
        for at in range(max(len(recorded), len(replayed))):
            before, now = recorded[at : at + 1], replayed[at : at + 1]
            if before != now:
                shown = [one[0] if one else "nothing" for one in (before, now)]
                return Difference(step, f"{name}[{at}]", *shown)
    return Difference(step, name, recorded, replayed)


def _shape(spans: list[list[Any]]) -> StepShape:
    return shape_of((start, length, wants) for _, start, length, _, wants in spans)


def spec_of(path: str) -> ModelSpec:
    """The model of a log."""
    begin = next(records(path))
    try:
        return msgspec.convert(begin["spec"], ModelSpec)
    except _BAD as error:
        raise _error(path, 1, f"describes no model: {error!r}") from error


def step_rows(path: str) -> Iterator[tuple[StepShape, float]]:
    """(shape, seconds) of every recorded step that computed something, for fitted cost models.

    A step that was handed over while another ran counts from the other's end, since what it waited
    for the device is not its own. Left out: the first step of each kind (decodes only, with
    prompts), which warms caches up, steps that failed or did not fit, which no result ended, and
    those in which rows left after the first layers.
    """
    spans: dict[int, list[list[Any]]] = {}
    queued: set[int] = set()  # handed over behind another
    warm: set[bool] = set()
    ended = 0.0
    for number, record in enumerate(records(path), 1):
        try:
            match record["call"]:
                case "plan":
                    step = record["plan"]["step"]
                    if spans:
                        queued.add(step)
                    if record["plan"]["spans"] and "layers" not in record["plan"]:
                        spans[step] = record["plan"]["spans"]
                case "fail" | "retreat":
                    for step in record["steps"]:
                        spans.pop(step, None)
                case "apply":
                    step, seconds = record["step"], record["seconds"]
                    since, ended = record["now"] - ended, record["now"]
                    if step not in spans:
                        continue
                    shape = _shape(spans.pop(step))
                    seconds = min(seconds, since) if step in queued else seconds
                    kind = bool(shape.chunks)
                    if kind in warm and seconds > 0:
                        yield shape, seconds
                    warm.add(kind)
        except _BAD as error:
            raise _error(path, number, f"no step of a step log: {error!r}") from error
