"""Running out of device memory: the sequences of the step are computed again, in smaller steps."""

from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run

from kvarn.core.plan import StepPlan, StepResult


def limited(engine: Any, positions: int) -> list[int]:
    """Let the executor have room for `positions` a step only; sizes of the steps it was given."""
    real, sizes = engine.executor.run, []

    def run(plan: StepPlan) -> StepResult:
        sizes.append(plan.n_tokens)
        result = real(plan)  # what was computed before the failure stays on the device
        if plan.n_tokens > positions:
            raise torch.OutOfMemoryError("no room")
        return result

    engine.executor.run = run
    return sizes


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("positions", [3, 20])
def test_smaller_steps_give_the_same_tokens(tiny_folder: Any, positions: int, overlap: str) -> None:
    engine = make_engine(tiny_folder("llama"), budget=64, overlap=overlap)
    requests = make_requests(10)
    wanted = expected(engine, requests)
    sizes = limited(engine, positions)
    assert run(engine, requests, seed=2) == wanted
    assert max(sizes) > positions
    assert engine.stats().preemptions > 0
    assert engine.control.check_integrity() == []
    assert engine.stats().kv_pages_used == 0


def test_no_room_for_one_position_ends_the_request(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"), budget=64)
    limited(engine, 0)
    engine.add(make_requests(1)[0])
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert outputs[-1].finish == "error"
    assert "no room" in (outputs[-1].error or "")
