"""Traffic whose subject changes, and what is counted of drafts."""

import pytest

from kvarn.bench.drift import PHASES, prompts
from kvarn.bench.online_spec import POSITIONS, SETTINGS, Count, curves, speeds
from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.speculate.part import Verified


@pytest.mark.parametrize("phase", PHASES)
def test_prompts_of_a_phase_are_all_unlike_and_of_the_seed(phase: str) -> None:
    some = prompts(phase, 200)
    assert len(set(some)) == 200 and all("{" not in text for text in some)
    assert some == prompts(phase, 200) and some[:50] == prompts(phase, 50)
    assert some != prompts(phase, 200, seed=1)
    with pytest.raises(ConfigError, match="prompts, not"):
        prompts(phase, 100_000)


def test_an_unknown_phase_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="spanish"):
        prompts("spansh", 1)


def test_positions_behind_a_refused_draft_were_not_judged() -> None:
    count = Count()
    count.observe([Verified(0, 3, 1), Verified(1, 2, 2), Verified(2, 0, 0), Verified(3, 1, 0)])
    assert count.judged == [3, 2, 0, 0] and count.accepted == [2, 1, 0, 0]
    assert count.acceptance == [pytest.approx(2 / 3), 0.5, None, None]
    assert len(count.judged) == POSITIONS


def test_every_setting_is_one_that_an_engine_takes() -> None:
    for setting in SETTINGS.values():
        assert resolve({"threads": 1} | setting.options)


def test_tables_sum_up_the_quarters_of_a_phase() -> None:
    def row(setting: str, quarter: int, seconds: float, steps: int) -> dict[str, object]:
        return {
            "setting": setting, "phase": "talk", "quarter": quarter, "seconds": seconds,
            "steps": steps, "acceptance": [0.1 * quarter] * POSITIONS,
        }  # fmt: skip

    rows = [row("plain", q, 2.0, 40) for q in range(1, 5)]
    rows += [row("learns", q, 1.0, 20) for q in range(1, 5)]
    trained = {"learns": {"published": 3, "rolled_back": 1, "seconds": 1.0}}
    result = {"results": rows, "workload": {"phases": ["talk"]}, "training": trained}
    assert speeds(result) == [
        ["plain", 1.0, 1.0, None, None, None], ["learns", 2.0, 2.0, 3, 1, 0.25],
    ]  # fmt: skip
    assert curves(result, ["learns"], 0)[3] == ["talk", 4, 0.4]
