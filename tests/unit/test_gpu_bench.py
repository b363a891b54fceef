"""The GPU yardstick: its draws, its floors, a whole run on the CPU, and the page that it makes."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import table

from benchmarks.gpu import run
from benchmarks.gpu.workloads import Ceilings, Load, floor, nano, settings, sizes, uniform
from kvarn.bench import record
from kvarn.core.errors import KvarnError

ROOT = Path(__file__).parents[2]
CEILINGS = Ceilings(3107.0, 720.0, 1350.0)


def load_of(setting: str, name: str) -> Load:
    loads = next(one.loads for one in settings() if one.name == setting)
    return next(load for load in loads if load.name == name)


def test_draws_are_those_of_the_published_comparison():
    asked = nano()
    assert (asked.n_input, sum(asked.outputs)) == (142_827, 133_966)
    rng = Random(1)
    assert uniform(64, 1024, 256, 1).prompts[0] == [rng.randint(0, 100_000) for _ in range(1024)]
    cold, warm = (load_of("8b", f"W4 {kind}").make() for kind in ("cold", "warm"))
    prefix = {tuple(ids[:4096]) for ids in cold.prompts + warm.prompts}
    assert len(prefix) == 1
    assert not {tuple(ids[4096:]) for ids in cold.prompts} & {
        tuple(ids[4096:]) for ids in warm.prompts
    }


def test_a_moved_load_shares_nothing_with_itself():
    asked = uniform(2, 8, 1, 1)
    moved = asked.moved(1)
    assert [len(ids) for ids in moved.prompts] == [8, 8]
    assert all(a[0] != b[0] for a, b in zip(asked.prompts, moved.prompts))


def test_sizes_of_known_shapes():
    assert sizes("llama-3-8b").weight_bytes == pytest.approx(15.01e9, rel=1e-3)
    assert sizes("llama-3-8b").kv_bytes == 131_072
    assert sizes("llama-3.2-1b").kv_bytes == 32_768
    assert sizes("qwen3-0.6b").weight_bytes == pytest.approx(1.19e9, rel=2e-3)
    assert sizes("llama-3-8b", fp8=True).kv_bytes == 65_536


@pytest.mark.parametrize(
    ("setting", "name", "rate"),
    [("0.6b", "W1", 26_500), ("1b", "W1", 53_700), ("8b", "W2", 4935), ("8b", "W3", 207)],
)
def test_floors_are_the_published_ones(setting, name, rate):
    load = load_of(setting, name)
    model = next(one.model for one in settings() if one.name == setting)
    seconds = floor(model, load, CEILINGS).seconds
    assert sum(load.make().outputs) / seconds == pytest.approx(rate, rel=5e-3)


def test_floor_of_a_decode_step_reads_weights_and_kv_once():
    size = sizes("llama-3-8b")
    load = Load("one", "", "output_tok_s", lambda: uniform(1, 8, 2, 0))
    least = floor("llama-3-8b", load, CEILINGS)
    assert least.read_bytes == 2 * size.weight_bytes + 9 * size.kv_bytes
    assert least.seconds == pytest.approx(least.read_bytes / 3107e9)


def test_a_cached_prefix_costs_less():
    cold, warm = (
        floor("llama-3-8b", load_of("8b", f"W4 {kind}"), CEILINGS) for kind in ("cold", "warm")
    )
    assert warm.seconds < cold.seconds
    assert warm.read_bytes == cold.read_bytes


def test_a_plan_names_engines_and_settings():
    plan = run.planned(run.parse(["--plan", "kvarn:1b,kvarn:8b"]))
    assert [(kind.name, setting.name) for kind, setting in plan] == [
        ("kvarn", "1b"), ("kvarn", "8b"),
    ]  # fmt: skip
    variants = run.parse(["--kvarn", "a:overlap=off,page_size=32", "--plan", "a:1b"])
    assert run.planned(variants)[0][0].options == {"overlap": "off", "page_size": "32"}
    with pytest.raises(KvarnError, match="unknown starts"):
        run.planned(run.parse(["--plan", "kvarn:7b"]))


def test_an_engine_that_ends_is_left_out(tmp_path):
    path = tmp_path / "gpu_engines.json"
    words = ["--device", "cpu", "--tiny", "--json", str(path), "--kvarn", "kvarn:nonsense=1"]
    assert run.main([*words, "--plan", "kvarn:tiny"]) == 1
    (left,) = json.loads(path.read_text())["left_out"]
    assert left["setting"] == "tiny"
    assert "nonsense" in left["why"]


def test_a_run_on_the_cpu_makes_a_page(tmp_path):
    path = tmp_path / "gpu_engines.json"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py"), "--device", "cpu", "--tiny",
        "--repeats", "1", "--json", str(path), "--kvarn", "kvarn:threads=1",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True,
        text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["left_out"] == []
    by_load = {row["load"]: row for row in result["results"]}
    assert set(by_load) == {
        "W2", "W2 prefill", "W3", "W3 first token", "W4 cold", "W4 warm",
    }  # fmt: skip
    assert by_load["W2"]["output_tok_s"] == pytest.approx(16 / by_load["W2"]["seconds"])
    assert all(len(row["runs"]) == 1 and row["share"] > 0 for row in by_load.values())
    assert "W4 warm" in done.stdout
    page = table.page({path.name: result})
    assert "| W2, 4 x (16 + 4) | smollm2-135m | output tok/s |" in page


def test_page_shows_targets_and_attention_rates():
    row = {
        "engine": "kvarn", "setting": "8b", "model": "llama-3-8b", "load": "W3", "title": "t",
        "metric": "output_tok_s", "value": 160.0, "runs": [1.6], "share": 0.8,
        "read_gb_s": 2500.0, "tflop_s": 3.0,
    }  # fmt: skip
    engines = record.header("gpu_engines", {"repeats": 4}, {}) | {
        "ceilings": {"read_gb_s": 3100.0, "matmul_tflop_s": 720.0, "fp8_tflop_s": None},
        "starts": [
            {"engine": "kvarn", "setting": "8b", "model": "llama-3-8b", "start_s": 12.5,
             "about": {"version": "1", "startup": [{"stage": "weights", "seconds": 2.0}]}}
        ],
        "results": [row],
        "left_out": [{"engine": "vllm", "setting": "1b", "why": "no time left"}],
    }  # fmt: skip
    attention = record.header("gpu_attention", {"heads": 32, "kv_heads": 8, "page": 16}, {}) | {
        "read_gb_s": 3100.0,
        "results": [
            {"case": "decode", "dim": 128, "kernel": "kvarn", "ms": 0.7, "rate": 2950.0,
             "unit": "GB/s"},
            {"case": "decode", "dim": 128, "kernel": "flash3", "why": "not there"},
        ],
    }  # fmt: skip
    page = table.page({"a.json": engines, "b.json": attention})
    assert "| W3, t | llama-3-8b | output tok/s | 160 | 165 | 185 | 200 |" in page
    assert "Not measured: vllm, 1b: no time left." in page
    assert "| kvarn | 8b | llama-3-8b | 12.5 | weights 2 |" in page
    assert "| case | head dim | unit | kvarn |" in page
    assert "| decode | 128 | GB/s | 2950 |" in page
