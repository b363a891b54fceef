"""The simulated overlapped loop plans what an engine planned: a recorded run, page for page."""

from collections import defaultdict, deque
from pathlib import Path
from typing import Any

import msgspec

from kvarn.core.model import GroupSpec
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.cost.shape import Estimate, StepShape
from kvarn.schedule.build import build_control
from kvarn.schedule.control import Capacity, ControlPlane
from kvarn.sim.heap import NS
from kvarn.sim.instance import Instance
from kvarn.sim.replay import records
from kvarn.sim.run import Tally

DATA = Path(__file__).parents[1] / "data"
FROM_OUTSIDE = ("add", "abort", "finish", "clear", "check")


class Second:
    """Every step takes a second."""

    name = "one second"

    def step(self, shape: StepShape) -> Estimate:
        return Estimate(linear=1.0)

    def idle_watts(self) -> float:
        return 0.0


class Unwatched(Tally):
    """The log's requests have no records here."""

    def committed(self, instance: Instance, seqs: Any, first: int, last: int, gaps: Any) -> None:
        pass


def control_of(begin: dict[str, Any], write: Any) -> ControlPlane:
    said = begin["options"]
    limits = (said[name] for name in ("budget", "max_seqs", "max_len", "max_queue"))
    return build_control(
        msgspec.convert(begin["groups"], list[GroupSpec]), begin["pages"], said["page_size"],
        said["scheduler"], said["prefix"], said["evict"], Capacity(*limits), write,
    )  # fmt: skip


def call(control: ControlPlane, one: dict[str, Any], now: float) -> None:
    """Repeat what came from outside."""
    match one["call"]:
        case "add":
            control.add(msgspec.convert(one["request"], Request, str_keys=True))
        case "abort":
            control.abort(one["id"], now)
        case "finish":
            control.finish(control.seqs[one["seq"]], one["reason"], now, one["keep"])
        case "clear":
            control.clear_prefixes(now)
        case "check":
            control.check_integrity()


def repeat(path: str) -> tuple[list[Any], list[Any]]:
    """Plans of the log, and those of a simulated instance that is asked the same."""
    log = list(records(path))
    outside: deque[tuple[int, dict[str, Any]]] = deque()  # with the plans made before
    recorded, tokens = list[Any](), defaultdict[int, list[int]](list)
    for one in log[1:]:
        if one["call"] in FROM_OUTSIDE:
            outside.append((len(recorded), one))
        elif one["call"] == "plan":
            recorded.append(one["plan"])
        elif one["call"] == "apply":
            spans = recorded[one["step"]]["spans"]
            for (seq, *_), got in zip(spans, one["tokens"], strict=True):
                tokens[seq] += got

    planned = list[Any]()

    def write(said: dict[str, Any]) -> None:
        if said["call"] == "plan":
            planned.append(msgspec.to_builtins(said["plan"]))

    instance = Instance("x", control_of(log[0], write), Second(), Unwatched(), False, True)

    def token_of(seq: Seq) -> int:
        return tokens[seq.id][seq.n_output]

    end: int | None = None
    now = 0
    while outside or end is not None:
        if end is not None:
            instance.finish(end, token_of)
            now, end = end, None
        while outside and outside[0][0] <= len(planned):
            call(instance.control, outside.popleft()[1], now / NS)
        if not instance.is_busy:
            end = instance.start(now)
            assert end is not None or not outside or outside[0][0] <= len(planned), "stuck"
        while outside and outside[0][0] <= len(planned) and instance._ahead is None:
            call(instance.control, outside.popleft()[1], now / NS)
    return recorded, planned


def test_the_overlapped_loop_plans_what_a_gpu_engine_planned():
    recorded, planned = repeat(str(DATA / "steps_1b_h100.jsonl.gz"))
    assert len(recorded) > 2000
    differing = [i for i, (a, b) in enumerate(zip(recorded, planned, strict=False)) if a != b]
    assert differing == []
    assert len(planned) >= len(recorded) - 2
