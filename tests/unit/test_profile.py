"""`kvarn profile` on a tiny model: every shape is run and timed, and a cost model reads it."""

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from kvarn.bench import profile
from kvarn.bench.profile import Bounds, Profile
from kvarn.cli import main
from kvarn.core.errors import ConfigError
from kvarn.core.request import SamplingParams
from kvarn.cost.shape import StepShape
from kvarn.cost.tables import from_table
from kvarn.engine.llm import LLM

SMALL = Profile(batches=(1, 2, 4), contexts=(8, 64), chunks=(2, 16, 64), repeats=2, seconds=20)


@pytest.fixture(scope="module")
def llm(tiny_folder: Any) -> Iterator[LLM]:
    engine = LLM(
        tiny_folder("llama"), load="random", device="cpu", max_seqs=4, budget=96, kv_memory=0.0625
    )
    yield engine
    engine.close()


def test_a_profile_becomes_a_cost_model(llm: LLM, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = profile.run(llm, SMALL, lambda done, total: seen.append((done, total)))
    assert result["skipped"] == 0
    assert seen[-1] == (2 * len(result["rows"]), 2 * len(result["rows"]))
    assert all(len(row["times"]) == 2 and row["seconds"] > 0 for row in result["rows"])
    assert result["pages"] == list(llm.engine.control.kv.pages)
    assert {"device", "versions", "git_commit", "spec"} <= set(result)
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(result))
    model = from_table(path, llm.spec)
    row = next(r for r in result["rows"] if r["n_decode"] == 4 and not r["chunks"])
    shape = StepShape((), 4, row["decode_sum"], row["decode_max"], 4)
    assert model.step(shape).seconds == pytest.approx(row["seconds"])
    assert model.step(StepShape(((30, 40),), 3, 100, 50, 4)).seconds > 0


def test_the_engine_serves_as_before_after_a_profile(llm: LLM) -> None:
    prompt = [n % 90 for n in range(60)]  # pages of it stay in the prefix index
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    before = llm.generate(prompt, greedy)[0].outputs[0].tokens
    profile.run(llm, SMALL)
    assert llm.generate(prompt, greedy)[0].outputs[0].tokens == before
    assert llm.engine.control.check_integrity() == []


def test_time_is_bounded_and_what_was_left_out_is_counted(llm: LLM) -> None:
    ticks = count()
    how = Profile(batches=(1, 2), contexts=(8,), chunks=(2,), repeats=3, seconds=8)
    result = profile.run(llm, how, clock=lambda: float(next(ticks)))
    assert result["skipped"] > 0
    assert all(row["times"] == [1.0] for row in result["rows"])


def test_only_what_fits_is_run() -> None:
    tight = Bounds(max_seqs=2, budget=32, max_len=100, page_size=16, pages=(8,))
    for shape in profile.shapes(SMALL, tight):
        assert len(shape) <= 2
        assert sum(rows for _, rows in shape) <= 32
        assert sum(-(-(start + rows + 1) // 16) for start, rows in shape) <= 8
    with pytest.raises(ConfigError, match="no decode or no prefill"):
        profile.shapes(SMALL, Bounds(2, 1, 100, 16, (8,)))


def test_wrong_grids_are_refused() -> None:
    with pytest.raises(ConfigError, match="chunks must be rising numbers of at least 2"):
        profile.check(Profile(chunks=(1, 2)))
    with pytest.raises(ConfigError, match="batches must be rising"):
        profile.check(Profile(batches=(4, 2)))
    with pytest.raises(ConfigError, match="must be above 0"):
        profile.check(Profile(repeats=0))


def test_the_command_writes_a_profile(
    tiny_folder: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.json"
    words = ["profile", tiny_folder("llama"), "--load", "random", "--device", "cpu"]
    words += ["--batches", "1,2", "--contexts", "8", "--chunks", "2,16", "--repeats", "1"]
    assert main([*words, "--kv-memory", "0.0625", "--json", str(path)]) == 0
    assert "prefill rows" in capsys.readouterr().out
    assert json.loads(path.read_text())["bench"] == "profile"
