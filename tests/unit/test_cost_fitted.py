"""Cost models fitted to steps: the solver, what is recovered, how errors are judged."""

import json
import random
from pathlib import Path

import pytest
from scipy.optimize import nnls as reference

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.cost.fitted import NAMES, errors, features, fit, held_out, regime
from kvarn.cost.nnls import nnls
from kvarn.cost.shape import Estimate, StepShape
from kvarn.cost.tables import from_table

SPEC = ModelSpec("llama", "tiny", 2, 64, 128, 4, 2, 16, 100, 1024)


def steps(n: int, seed: int = 0, noise: float = 0.0) -> list[tuple[StepShape, float]]:
    """Steps of a made-up machine with a launch floor, a ridge at 64 rows, and KV reads."""
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        decodes = [rng.randint(1, 2000) for _ in range(rng.choice((0, 1, 4, 16, 64)))]
        n_chunks = rng.choice((0, 0, 1, 2)) if decodes else 1
        chunks = []
        for _ in range(n_chunks):
            rows = rng.randint(2, 512)
            chunks.append((rows, rows + rng.choice((0, 0, 700))))
        shape = StepShape(
            tuple(chunks), len(decodes), sum(decodes), max(decodes, default=0),
            len(decodes) + n_chunks,
        )  # fmt: skip
        found.append((shape, truth(shape) * rng.lognormvariate(0, noise)))
    return found


def truth(shape: StepShape) -> float:
    pairs = sum(rows * (context - rows / 2) for rows, context in shape.chunks)
    linear = 5e-5 * max(64, shape.n_tokens)
    return 2e-3 + linear + 2e-5 * shape.n_seqs + 1e-7 * shape.decode_sum + 2e-8 * pairs


@pytest.mark.parametrize("seed", range(20))
def test_the_solver_agrees_with_scipy(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 12)
    matrix = [[rng.uniform(-1, 1) * 10**j for j in range(n)] for _ in range(40)]
    target = [rng.uniform(-1, 1) for _ in range(40)]
    mine, (theirs, _) = nnls(matrix, target), reference(matrix, target)
    assert min(mine) >= 0
    assert mine == pytest.approx(list(theirs), rel=1e-5, abs=1e-9)


def test_the_solver_takes_columns_that_say_the_same() -> None:
    x = nnls([[1, 2, 0], [2, 4, 0], [3, 6, 0]], [2, 4, 6])
    assert x[0] + 2 * x[1] == pytest.approx(2)
    assert x[2] == 0
    with pytest.raises(ConfigError, match="nothing to fit"):
        nnls([], [])


def test_held_out_steps_of_a_known_machine_are_met() -> None:
    judged = held_out(steps(400))
    assert set(judged) == {"decode-only", "prefill-only", "mixed", "all"}
    assert judged["all"].n == 400
    for errors_ in judged.values():
        assert errors_.mape < 0.01
        assert abs(errors_.bias) < 0.005


def test_noise_is_not_fitted() -> None:
    model = fit(steps(400, noise=0.05))
    clean = errors([(model.step(shape), truth(shape)) for shape, _ in steps(200, seed=1)])
    assert clean.mape < 0.02
    assert held_out(steps(400, noise=0.05))["all"].mape == pytest.approx(0.04, abs=0.01)


def test_more_work_never_takes_less() -> None:
    model = fit(steps(200, noise=0.2))
    assert min(model.weights) >= 0
    times = [model.step(StepShape((), n, 500 * n, 500, n)).seconds for n in (1, 8, 64, 512, 4096)]
    assert times == sorted(times)


def test_confidence_falls_outside_what_was_seen() -> None:
    model = fit(steps(200))
    inside = model.step(StepShape(((100, 100),), 4, 2000, 600, 5))
    assert inside.confidence == 1.0
    outside = model.step(StepShape(((100, 100),), 4, 4 * 100000, 100000, 5))
    assert outside.confidence < 0.5
    assert inside.linear > 0 and inside.host > 0
    assert inside.joules == 0 and model.idle_watts() == 0


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    model = fit(steps(100), "cpu")
    model.busy_watts, model.idle = 50.0, 10.0
    path = tmp_path / "fitted.json"
    model.save(path)
    again = from_table(path, SPEC)
    shape = StepShape(((100, 100),), 4, 2000, 600, 5)
    assert again.step(shape) == model.step(shape)
    assert again.idle_watts() == 10 and again.name == "cpu"
    kept = json.loads(path.read_text())
    del kept["features"]["tokens"]
    path.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match="fit it again"):
        from_table(path, SPEC)


def test_errors_by_definition() -> None:
    pairs = [(Estimate(host=1.1, confidence=1), 1.0), (Estimate(host=1.8, confidence=0.5), 2.0)]
    found = errors(pairs)
    assert found.mape == pytest.approx(0.1)
    assert found.bias == pytest.approx(-0.1 / 3)
    assert found.p95 == pytest.approx(0.1)
    assert found.extrapolated == pytest.approx(0.25)


def test_regimes() -> None:
    assert regime(StepShape((), 1, 5, 5, 1)) == "decode-only"
    assert regime(StepShape(((5, 5),))) == "prefill-only"
    assert regime(StepShape(((5, 5),), 1, 5, 5, 1)) == "mixed"
    assert len(features(StepShape())) == len(NAMES)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ConfigError, match="no step with tokens"):
        fit([(StepShape(), 1.0)])
    with pytest.raises(ConfigError, match="0 s or less"):
        fit([(StepShape((), 1, 1, 1, 1), 0.0)])
    with pytest.raises(ConfigError, match="folds"):
        held_out(steps(3), folds=5)
    with pytest.raises(ConfigError, match="no prediction"):
        errors([])
