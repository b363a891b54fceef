"""Decision replay (trust protocol T1): recorded runs decide again as they did, to the page."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from kvarn.cli import main
from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.sim.replay import records, replay, step_rows

RECORDED = Path(__file__).parents[1] / "data" / "steps_smollm2_cpu.jsonl.gz"


def record(folder: str, path: str, **options: Any) -> None:
    """A short run of a tiny random model with little memory: everything that can happen does."""
    given = {
        "model": folder, "load": "random", "dtype": "float32", "pages": 30, "page_size": 4,
        "max_len": 100, "budget": 24, "max_seqs": 8, "step_log": path,
    }  # fmt: skip
    engine = Engine(resolve(given | options))
    rng = Random(1)
    for i in range(40):
        prompt = [5] * rng.choice((0, 9, 24)) + [rng.randrange(90) for _ in range(1 + i % 11)]
        params = SamplingParams(
            n=1 + (i % 9 == 4), max_tokens=rng.randrange(1, 30), ignore_eos=True, seed=i
        )
        engine.add(Request(f"r{i}", prompt, params, priority=i % 3, arrival=engine.clock()))
        for _ in range(rng.randrange(4)):
            engine.step()
        if i % 13 == 7:
            engine.abort(f"r{i - 1}")
        if i == 20:
            engine.reset_prefix_cache()
    while engine.has_work:
        engine.step()
    engine.close()


def test_a_recorded_run_of_a_real_model_decides_as_it_did():
    report = replay(str(RECORDED))
    assert report.steps >= 2000 and report.differing == 0
    assert report.stats is not None and report.forks and report.aborts
    assert report.stats.preemptions > 100 and report.stats.cached_tokens > 1000
    assert report.stats.finished.keys() >= {"length", "stop", "abort"}


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("scheduler", ["continuous", "orca", "prefill-first", "static"])
@pytest.mark.parametrize("prefix", ["hash", "radix", "none"])
def test_a_live_run_decides_as_it_did(tiny_folder, tmp_path, scheduler, prefix, overlap):
    path = str(tmp_path / "log.jsonl")
    record(tiny_folder("llama"), path, scheduler=scheduler, prefix=prefix, overlap=overlap)
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown


def test_window_groups_decide_as_they_did(tiny_folder, tmp_path):
    path = str(tmp_path / "log.jsonl.gz")
    record(tiny_folder("gemma2"), path)
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown


def edited(tmp_path: Path, change: Any) -> str:
    """The recorded log with `change` applied to its list of records."""
    with gzip.open(RECORDED, "rt") as file:
        found = [json.loads(line) for line in file]
    change(found)
    path = tmp_path / "edited.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in found))
    return str(path)


def test_one_wrong_page_is_found(tmp_path, capsys):
    def change(found: list[Any]) -> None:
        plan = next(r for r in found[2000:] if r["call"] == "plan" and r["plan"]["edits"])
        plan["plan"]["edits"][0][3][0] += 1

    path = edited(tmp_path, change)
    assert main(["replay", path]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[-1].endswith("steps, 1 differ") and "edits" in said[0]


@pytest.mark.parametrize("name, value", [("scheduler", "prefill-first"), ("budget", 40)])
def test_another_policy_is_found(tmp_path, name, value):
    path = edited(tmp_path, lambda found: found[0]["options"].update({name: value}))
    assert replay(path).differing > 0


def test_the_command_says_so_on_its_last_line(capsys):
    assert main(["replay", str(RECORDED)]) == 0
    report = replay(str(RECORDED))
    assert capsys.readouterr().out.splitlines()[-1] == f"{report.steps} steps, 0 differ"


def test_a_line_cut_off_at_the_end_is_left_out(tmp_path):
    text = gzip.decompress(RECORDED.read_bytes())
    path = tmp_path / "cut.jsonl"
    path.write_bytes(text[: len(text) // 2])
    report = replay(str(path))
    assert report.truncated and report.differing == 0 and report.steps > 500


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "is empty"),
        ('{"call": "plan"}\n{"call": "plan"}\n', "is no step log of this version"),
        ('{"call": "begin", "format": 1\n{}\n', "line 1: not a record"),
        ("[1, 2]\n", "line 1: not a record"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path, text, says):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says):
        replay(str(path))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        list(records(str(tmp_path / "none.jsonl")))


def test_steps_are_priced_by_shape():
    rows = list(step_rows(str(RECORDED)))
    assert len(rows) > 2000
    assert all(0 < seconds < 10 and shape.n_tokens <= 48 for shape, seconds in rows)
    assert {bool(shape.chunks) for shape, _ in rows} == {True, False}
