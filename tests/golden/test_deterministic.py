"""Batch-invariant mode: the same bits alone, in any batch, and under any chunking."""

import random
from typing import Any

import pytest
from golden.test_engine import make_engine

from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.kernels import native


def logprobs(engine: Engine, requests: list[Request], at_once: int) -> dict[str, list[float]]:
    """Raw logprobs of every token, with up to `at_once` requests open."""
    todo = list(requests)
    found: dict[str, list[float]] = {}
    while todo or engine.has_work:
        while todo and engine.stats().running + engine.stats().waiting < at_once:
            engine.add(todo.pop())
        for output in engine.step():
            values = [entry.logprob for entry in output.logprobs or []]
            found.setdefault(output.request_id, []).extend(values)
    return found


@pytest.fixture(params=["compiled", "plain torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and as on a machine without a compiler."""
    if request.param == "plain torch":
        monkeypatch.setattr(native, "_outcome", lambda: (None, "off"))
    elif not native.available():
        pytest.skip(native.reason())
    return str(request.param)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_same_bits_alone_and_in_a_batch(
    tiny_folder: Any, kernels: str, family: str, dtype: str
) -> None:
    chance = random.Random(4)
    sampling = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0)
    requests = [
        Request(f"r{i}", [chance.randrange(97) for _ in range(chance.randint(1, 40))], sampling)
        for i in range(8)
    ]
    runs = []
    for budget, at_once in ((64, 1), (64, 8), (7, 8), (512, 3)):
        engine = make_engine(
            tiny_folder(family), dtype=dtype, deterministic=True, budget=budget, prefix="none",
            pages=120,
        )  # fmt: skip
        assert engine.resolved.config.attention == (
            "native" if kernels == "compiled" else "invariant"
        )
        runs.append(logprobs(engine, requests, at_once))
    assert all(run == runs[0] for run in runs[1:])
