"""Drafts in simulation, by the options of a fleet: what is asked is checked, and made."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.resources import files
from statistics import fmean
from typing import Any, cast

from kvarn.bench.options import Fleet
from kvarn.core.config import CHOICES
from kvarn.core.errors import ConfigError, nearest
from kvarn.core.part import find
from kvarn.cost.perturb import TERMS, Perturbed
from kvarn.cost.roofline import Host
from kvarn.cost.shape import CostModel
from kvarn.schedule.control import ControlPlane
from kvarn.sim.acceptance import Acceptance, Luck, Stated
from kvarn.sim.drafter import Clock, Drafter
from kvarn.sim.heap import NS
from kvarn.sim.instance import Instance
from kvarn.sim.learner import Learner, Mode
from kvarn.sim.learnt import Curve, Learnt, Turns, check_subjects, fitted
from kvarn.sim.run import Tally
from kvarn.sim.speculating import Speculating
from kvarn.speculate.part import LengthControl
from kvarn.speculate.speculation import Speculation

KINDS = ("none", "draft", "synthetic")
#: of the engine's proposers, those that look at tokens: a simulation has none
OF_TOKENS = ("ngram", "suffix", "mix")
MEASURED = "measured"


@lru_cache
def _data() -> dict[str, Any]:
    """What `benchmarks/table.py` found in the results of real runs."""
    text = files("kvarn").joinpath("bench", "learning.json").read_text()
    return cast(dict[str, Any], json.loads(text))


@lru_cache
def measured_curve() -> Curve:
    """SmolLM2's drafter, as it learnt on two cores."""
    return fitted(_data())


def slowdown() -> float:
    """Steps beside an update in a thread, over others of as many sequences, on an H200."""
    return cast(float, _data()["slowdown"])


def waits_for_host() -> Host:
    """Between two steps that verify, on an H200: the line through the measured gaps by sequences.

    For what stands to reach the host, judging, planning, and the next step's inputs.
    """
    gaps = [(float(seqs), float(seconds)) for seqs, seconds in _data()["gaps"]]
    n_mean, mean = fmean(n for n, _ in gaps), fmean(gap for _, gap in gaps)
    both = sum((n - n_mean) * (gap - mean) for n, gap in gaps)
    seq = both / sum((n - n_mean) ** 2 for n, _ in gaps)
    return Host(step=mean - seq * n_mean, seq=seq)


def check_drafts(fleet: Fleet) -> None:
    """Raise `ConfigError` for drafts that cannot be."""
    said = fleet.speculate
    if said in OF_TOKENS:
        raise ConfigError(
            f"speculate={said} looks at tokens, and simulated ones mean nothing: say "
            f"speculate=synthetic, and with acceptance what it would reach"
        )
    if said not in KINDS:
        raise ConfigError(f"speculate cannot be {said!r}{nearest(said, KINDS)}")
    if said == "none":
        _unused(fleet)
        return
    if fleet.draft_tokens < 1:
        raise ConfigError(f"draft_tokens must be at least 1, got {fleet.draft_tokens}")
    find("draft-length", fleet.draft_length)
    _check_price(fleet)
    if fleet.acceptance == MEASURED:
        check_subjects(measured_curve(), subjects_of(fleet))
        if fleet.subject_seconds <= 0:
            raise ConfigError(f"subject_seconds must be above 0, got {fleet.subject_seconds:g}")
    else:
        shares_of(fleet.acceptance)
        if fleet.subjects:
            raise ConfigError("subjects differ in acceptance as measured: say acceptance=measured")
    _check_training(fleet)


def _unused(fleet: Fleet) -> None:
    """What has no meaning without drafts is no silent wish."""
    default = Fleet()
    for name in ("acceptance", "draft_model", "draft_cost", "subjects", "train_drafter"):
        if getattr(fleet, name) != getattr(default, name):
            raise ConfigError(f"{name} is about drafts, and there are none: say speculate=draft")


def _check_price(fleet: Fleet) -> None:
    if fleet.draft_cost < 0:
        raise ConfigError(f"draft_cost must be at least 0, got {fleet.draft_cost:g}")
    priced = [name for name in ("draft_model", "draft_cost") if getattr(fleet, name)]
    if fleet.speculate == "synthetic" and priced:
        raise ConfigError(
            f"speculate=synthetic drafts at no cost, and {priced[0]} is one: say speculate=draft"
        )
    if fleet.speculate == "draft" and len(priced) != 1:
        raise ConfigError(
            "speculate=draft needs the price of a pass: either draft_model or draft_cost above 0"
        )
    if fleet.draft_model and fleet.cost != "roofline":
        raise ConfigError(
            f"draft_model is priced by the roofline, and cost={fleet.cost} prices the model by "
            f"measurements of its own: say draft_cost"
        )


def _check_training(fleet: Fleet) -> None:
    choices = CHOICES["train_drafter"]
    if fleet.train_drafter not in choices:
        wrong = fleet.train_drafter
        raise ConfigError(f"train_drafter cannot be {wrong!r}{nearest(wrong, choices)}")
    if fleet.train_drafter == "off":
        return
    if fleet.acceptance != MEASURED:
        raise ConfigError("what learning brings is known as measured: say acceptance=measured")
    if fleet.train_interval < 1:
        raise ConfigError(f"train_interval must be at least 1, got {fleet.train_interval}")
    if fleet.train_seconds < 0 or (fleet.train_slowdown and fleet.train_slowdown < 1):
        raise ConfigError(
            f"train_seconds must be at least 0 and train_slowdown at least 1 (or 0), got "
            f"{fleet.train_seconds:g} and {fleet.train_slowdown:g}"
        )


def shares_of(text: str) -> tuple[float, ...]:
    """Probabilities out of '0.7,0.6'."""
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not shares or not all(0.0 <= share <= 1.0 for share in shares):
        raise ConfigError(
            f"acceptance must be probabilities by place such as 0.7,0.6, or measured; not {text!r}"
        )
    return shares


def subjects_of(fleet: Fleet) -> tuple[str, ...]:
    """What the traffic is about, in turn."""
    return tuple(fleet.subjects.split(",")) if fleet.subjects else tuple(measured_curve().subjects)


def draft_prices(
    fleet: Fleet, cost: CostModel, price_of: Callable[[str], CostModel]
) -> CostModel | None:
    """The price list of the drafter; `price_of` makes one of a model by name."""
    if fleet.draft_model:
        return price_of(fleet.draft_model)
    return Perturbed(cost, dict.fromkeys(TERMS, fleet.draft_cost)) if fleet.draft_cost else None


def speculating(
    fleet: Fleet, name: str, control: ControlPlane, costs: Sequence[CostModel], tally: Tally,
    drafting: CostModel | None, overlap: bool,
) -> Speculating:  # fmt: skip
    """An instance that drafts. `costs`: of steps planned ahead, and of those that are not."""
    clock = Clock()
    learnt = _learnt(fleet) if fleet.acceptance == MEASURED else None
    acceptance: Acceptance = learnt or Stated(shares_of(fleet.acceptance))
    drafter = Drafter(acceptance, drafting, clock, Luck(fleet.draft_seed))
    length: Any = find("draft-length", fleet.draft_length)
    speculation = Speculation(drafter, cast(LengthControl, length()), fleet.draft_tokens, clock)
    learner = None
    if fleet.train_drafter != "off" and learnt is not None:
        learner = _learner(fleet, learnt, clock)
        speculation.trainer = learner
        speculation.listeners.append(learner.hear)
    return Speculating(
        name, control, costs[0], tally, overlap=overlap, speculation=speculation, drafter=drafter,
        late=costs[1], learner=learner,
    )  # fmt: skip


def _learnt(fleet: Fleet) -> Learnt:
    curve = measured_curve()
    return Learnt(curve, Turns(subjects_of(fleet), fleet.subject_seconds))


def _learner(fleet: Fleet, drafts: Learnt, clock: Clock) -> Learner:
    return Learner(
        drafts, clock, cast(Mode, fleet.train_drafter), fleet.train_interval,
        fleet.train_seconds or drafts.curve.seconds, fleet.train_slowdown or slowdown(),
    )  # fmt: skip


def drafting_side(instances: Sequence[Instance]) -> dict[str, Any]:
    """What became of drafts, of all instances; nothing where there are none."""
    some = [one for one in instances if isinstance(one, Speculating)]
    if not some:
        return {}
    counts = [one.control.counters for one in some]
    drafted = sum(one.drafted_tokens for one in counts)
    stood = sum(one.accepted_tokens for one in counts)
    learners = [one.learner.stats() for one in some if one.learner is not None]
    return {
        "drafted_tokens": drafted,
        "accepted_tokens": stood,
        "acceptance": stood / drafted if drafted else None,
        "verify_steps": sum(one.verify_steps for one in counts),
        "updates": sum(one.published for one in learners),
        "taken_back": sum(one.rolled_back for one in learners),
        "training_s": sum(one.seconds for one in learners),
        "paused_s": sum(one.paused for one in some) / NS,
    }
