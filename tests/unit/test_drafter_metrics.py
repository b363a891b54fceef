"""What Prometheus reads of a drafter that learns."""

import msgspec

from kvarn.core.output import EngineStats, TrainerStats
from kvarn.serve.metrics import Metrics


def scraped(stats: EngineStats) -> dict[str, float]:
    metrics = Metrics()
    metrics.engine.stats = msgspec.convert(msgspec.to_builtins(stats), EngineStats)  # the wire
    lines = metrics.render().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith("kvarn_drafter")]
    return {name: float(value) for name, value in pairs}


def test_nothing_is_said_where_nothing_is_learnt() -> None:
    assert scraped(EngineStats()) == {}


def test_versions_and_acceptance() -> None:
    trainer = TrainerStats(
        version=3, published=5, rolled_back=1, acceptance_before=0.25, acceptance=0.5, lessons=2,
        dropped=7, loss=1.5, seconds=9.0,
    )  # fmt: skip
    assert scraped(EngineStats(trainer=trainer)) == {
        "kvarn_drafter_training": 1.0, "kvarn_drafter_version": 3.0,
        "kvarn_drafter_acceptance_ratio": 0.5, "kvarn_drafter_acceptance_ratio_before": 0.25,
        "kvarn_drafter_lessons_waiting": 2.0, "kvarn_drafter_loss_nats": 1.5,
        "kvarn_drafter_updates_total": 5.0, "kvarn_drafter_rollbacks_total": 1.0,
        "kvarn_drafter_lessons_dropped_total": 7.0, "kvarn_drafter_training_seconds_total": 9.0,
    }  # fmt: skip
    trainer.failed = "RuntimeError: no"
    assert scraped(EngineStats(trainer=trainer))["kvarn_drafter_training"] == 0.0
