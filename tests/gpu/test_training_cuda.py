"""A drafter that learns while its passes are captured: replays meet the new weights where they are.

Under TRITON_INTERPRET=1 it runs on the CPU, too (see `test_captured_steps`).
"""

from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_online_speculation import folders, training

pytest.importorskip("triton")

from gpu.test_captured_steps import DEVICE, INTERPRETED
from gpu.test_chains_cuda import chained, proposer_of

from kvarn.models.reader import tensors_of

__all__ = ["folders"]  # a fixture

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def wanted(folders: Any) -> Any:
    """Requests and their answers; few for the interpreter, which takes its time."""
    requests = make_requests(8 if INTERPRETED else 24, seed=3)
    return requests, expected(make_engine(folders["target"], device=DEVICE.type), requests)


@pytest.mark.parametrize("mode", ["inline", "on"])
def test_replays_meet_new_weights(folders: Any, wanted: Any, mode: str) -> None:
    """Output stays; the weights in force are the trainer's, at the addresses of the first."""
    requests, answers = wanted
    engine, trainer = training(folders, "small", mode, device=DEVICE.type)
    capture = chained(engine)
    decoder = proposer_of(engine).runner.decoder
    held = [decoder.layers, decoder.norm]
    places = [x.data_ptr() for x in tensors_of(held)]
    for seed in range(3 if INTERPRETED else 20):
        assert run(engine, requests, seed=seed) == answers
        if trainer.versions.published >= 3:
            break
    assert trainer.failed == "" and trainer.versions.published >= (1 if INTERPRETED else 3)
    assert capture.replays > 5 and [x.data_ptr() for x in tensors_of(held)] == places
    made = trainer._weights.decoder
    assert all(map(torch.equal, tensors_of(held), tensors_of([made.layers, made.norm])))
    engine.close()


def test_versions_go_back_in_place(folders: Any, wanted: Any) -> None:
    """With garbage in force no draft stands; with the first weights again, all do."""
    requests, answers = wanted
    engine, trainer = training(folders, "equal", "inline", device=DEVICE.type)
    chained(engine)
    trainer.pace.interval = 1000
    proposer, sound = proposer_of(engine), trainer._weights
    garbage = {name: torch.randn_like(x) for name, x in sound.tensors.items()}
    build: Any = trainer.updates
    shares = []
    for decoder in (build.build(garbage), sound.decoder):
        proposer.renew(decoder, False)
        before = engine.stats()
        assert run(engine, requests, seed=1) == answers
        after = engine.stats()
        drafted = after.drafted_tokens - before.drafted_tokens
        shares.append((after.accepted_tokens - before.accepted_tokens) / drafted)
    assert shares[0] < 0.2 and shares[1] > 0.9
