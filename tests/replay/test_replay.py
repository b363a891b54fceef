"""Decision replay (trust protocol T1): recorded runs decide again as they did, to the page."""

import gzip
import json
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from torch import OutOfMemoryError

from kvarn.cli import main
from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.core.plan import SpanResult, StepPlan, StepResult
from kvarn.core.request import SLO, Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.engine.steplog import StepLog
from kvarn.sim.replay import records, replay, step_rows

DATA = Path(__file__).parents[1] / "data"
RECORDED = DATA / "steps_smollm2_cpu.jsonl.gz"


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


@pytest.mark.parametrize(
    "log, ends",
    [
        ("steps_smollm2_cpu.jsonl.gz", {"length", "stop", "abort"}),
        ("steps_1b_h100.jsonl.gz", {"length", "abort"}),  # overlapped; random weights never stop
    ],
)
def test_a_recorded_run_decides_as_it_did(log, ends):
    report = replay(str(DATA / log))
    assert report.steps >= 2000 and report.differing == 0
    assert report.stats is not None and report.forks and report.aborts
    assert report.stats.preemptions > 100 and report.stats.cached_tokens > 1000
    assert report.stats.finished.keys() >= ends


@pytest.mark.parametrize("overlap", ["on", "off"])
@pytest.mark.parametrize("scheduler", ["continuous", "orca", "prefill-first", "static"])
@pytest.mark.parametrize("prefix", ["hash", "radix", "none"])
def test_a_live_run_decides_as_it_did(tiny_folder, tmp_path, scheduler, prefix, overlap):
    path = str(tmp_path / "log.jsonl")
    record(tiny_folder("llama"), path, scheduler=scheduler, prefix=prefix, overlap=overlap)
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown


@pytest.mark.parametrize("prefix", ["hash", "radix"])
@pytest.mark.parametrize("window", [4, 30])
def test_head_groups_decide_as_they_did(tiny_folder, tmp_path, prefix, window):
    """The windows of a table group of heads give pages back, and their sinks stay."""
    path = str(tmp_path / "log.jsonl")
    rule = f"duoattention:by=random,sinks=6,window={window}"
    record(tiny_folder("llama"), path, prefix=prefix, sparsity=rule)
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_speculation_decides_as_it_did(tiny_folder, tmp_path, proposer):
    path = str(tmp_path / "log.jsonl")
    record(tiny_folder("llama"), path, speculate=proposer, draft_length="fixed", overlap="on")
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown
    assert report.stats is not None and report.stats.drafted_tokens > 0


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


class Faulty:
    """An executor that fails now and then: out of memory, broken, or a request at fault."""

    def __init__(self, executor: Any) -> None:
        self._executor, self._calls = executor, 0

    def run(self, plan: StepPlan) -> StepResult:
        self._calls += 1
        if plan.spans and self._calls % 11 == 0:
            raise OutOfMemoryError("no memory for this step")
        if plan.spans and self._calls % 29 == 0:
            raise RuntimeError("this step broke")
        result = self._executor.run(plan)
        if plan.spans and self._calls % 17 == 0:
            result.extras[0] = SpanResult(error="this request is at fault")
        return result

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        pending: Future[StepResult] = Future()
        try:
            pending.set_result(self.run(plan))
        except Exception as error:
            pending.set_exception(error)
        return pending

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_failed_steps_decide_as_they_did(tiny_folder, tmp_path, monkeypatch, overlap):
    made = Engine.__init__

    def faulty(engine: Engine, *arguments: Any) -> None:
        made(engine, *arguments)
        engine.executor = Faulty(engine.executor)

    monkeypatch.setattr(Engine, "__init__", faulty)
    path = str(tmp_path / "log.jsonl")
    record(tiny_folder("llama"), path, overlap=overlap)
    calls = Counter(one["call"] for one in records(path))
    assert calls["fail"] and calls["retreat"]
    assert any(one["call"] == "apply" and one["errors"] for one in records(path))
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown
    assert len(list(step_rows(path))) <= calls["apply"]


def test_ranks_write_one_log(tiny_folder, tmp_path):
    path = str(tmp_path / "log.jsonl")
    record(tiny_folder("llama"), path, tp=2)
    assert Counter(one["call"] for one in records(path))["begin"] == 1
    report = replay(path)
    assert report.steps > 40 and report.differing == 0, report.shown


def test_a_request_with_every_field_is_recorded(tiny_folder, tmp_path):
    path = str(tmp_path / "log.jsonl.gz")
    options = {"model": tiny_folder("llama"), "load": "random", "step_log": path}
    engine = Engine(resolve(options | {"pages": 20, "page_size": 4, "max_len": 64}))
    params = SamplingParams(
        logit_bias={3: 1.5}, bad_word_ids=((1, 2),), allowed_token_ids=(3, 4, 5), seed=1,
        stop_token_ids=(7,), max_tokens=3,
    )  # fmt: skip
    request = Request(
        "a", [1, 2, 3], params, -2, 0.1, "user", "salt", SLO(ttft=0.5), None, eos_ids=(2,)
    )
    engine.add(request)
    while engine.has_work:
        engine.step()
    engine.close()  # ends the log: compressed, its last records would be missing
    added = next(one for one in records(path) if one["call"] == "add")
    assert msgspec.convert(added["request"], Request, str_keys=True) == request
    report = replay(path)
    assert (report.steps > 0, report.differing, report.truncated) == (True, 0, False)


def test_a_compressed_log_that_was_not_closed_is_read(tmp_path):
    path = tmp_path / "killed.jsonl.gz"
    data = RECORDED.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    report = replay(str(path))
    assert report.truncated and report.differing == 0 and report.steps > 500


def test_a_killed_engine_leaves_its_log(tiny_folder, tmp_path):
    path = tmp_path / "log.jsonl"
    log = StepLog(str(path))
    log({"call": "begin"})
    log({"call": "plan", "now": 0.1})
    assert [one["call"] for one in records(str(path))] == ["begin", "plan"]  # not closed
    log.close()
    log({"call": "plan"})
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_ends_the_log_and_not_the_engine(caplog):
    log = StepLog("/dev/full")
    log({"call": "begin"})
    log({"call": "plan"})
    assert "/dev/full ends at record 1" in caplog.text


def test_a_log_in_no_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot write"):
        StepLog(str(tmp_path / "none" / "log.jsonl"))


def broken(number: int, **change: Any) -> Any:
    """A change of record `number` (from 1) of a log."""
    return lambda found: found[number - 1].update(change)


@pytest.mark.parametrize(
    "change, says",
    [
        (broken(1, options={}), "line 1: describes no engine"),
        (broken(1, groups=[{}]), "line 1: describes no engine"),
        (broken(2, request={"id": 3}), "line 2: cannot be replayed"),
        (broken(2, call="nap"), "line 2: .*no call 'nap'"),
        (broken(40, call="apply", step=9999), "line 40: cannot be replayed"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, change, says):
    with pytest.raises(ConfigError, match=says):
        replay(edited(tmp_path, change))


def test_a_damaged_line_is_named_even_when_it_is_the_last(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = gzip.decompress(RECORDED.read_bytes()).splitlines(keepends=True)[:9]
    path.write_bytes(b"".join(lines[:8]) + lines[8][:20] + b"\n")
    with pytest.raises(ConfigError, match="line 9: not a record"):
        replay(str(path))


def test_a_plan_that_lacks_a_field_differs(tmp_path):
    def change(found: list[Any]) -> None:
        plans = [one for one in found if one["call"] == "plan" and one["plan"]["spans"]]
        del plans[100]["plan"]["spans"]

    report = replay(edited(tmp_path, change))
    assert report.differing == 1 and report.shown[0].what == "spans"


def test_queued_steps_count_from_the_end_of_the_step_before(tmp_path):
    def plan(step: int, now: float) -> dict[str, Any]:
        return {"call": "plan", "now": now, "plan": {"step": step, "spans": [[0, 5, 1, 0, True]]}}

    def apply(step: int, now: float, seconds: float) -> dict[str, Any]:
        return {"call": "apply", "step": step, "now": now, "seconds": seconds}

    log = [plan(0, 0.0), plan(1, 1.0), apply(0, 4.0, 4.0), plan(2, 5.0), apply(1, 8.0, 7.0)]
    log += [apply(2, 11.0, 6.0), plan(3, 12.0), apply(3, 14.0, 2.0)]
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in log))
    assert [seconds for _, seconds in step_rows(str(path))] == [4.0, 3.0, 2.0]
