"""Does kvarn work on this GPU? Its GPU tests, and a short run of the engine in both loops.

    PYTHONPATH=. python benchmarks/gpu/smoke.py

Random weights; the engine's run is profiled once more for the share of its time in which the device
computes, and for the kernels that take it. Speed beside peers: run.py and attention.py.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvarn import LLM, SamplingParams
from kvarn.bench.record import header, write


def measure_engine(
    model: str, requests: int, n_in: int, n_out: int, overlap: str
) -> dict[str, Any]:
    """Output tokens a second, and the share of the time in which the device computes."""
    began = time.perf_counter()
    llm = LLM(model, load="random", device="cuda", max_len=4096, prefix="none", overlap=overlap)
    started = time.perf_counter() - began
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0.0, max_tokens=n_out, ignore_eos=True)

    def burst() -> float:
        vocab = llm.spec.vocab
        prompts = [rng.integers(0, vocab, n_in).tolist() for _ in range(requests)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        done = llm.generate(prompts, sampling)
        taken = time.perf_counter() - began
        assert all(len(one.outputs[0].tokens) == n_out for one in done)
        return taken

    first = burst()
    runs = [burst() for _ in range(4)]
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        burst()
    events = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 1e6
    seconds = float(np.median(runs))
    stages = llm.engine.explain()["startup"]
    llm.close()
    return {
        "model": model, "requests": requests, "input": n_in, "output": n_out,
        "output_tokens_per_second": requests * n_out / seconds, "seconds": runs,
        "start_seconds": started, "startup": stages, "first_burst_seconds": first,
        "device_busy_seconds": busy, "host_share": max(0.0, 1 - busy / seconds),
        "kernels": [
            {"name": e.key[:70], "ms": round(e.self_device_time_total / 1e3, 2), "calls": e.count}
            for e in events[:14]
        ],
    }  # fmt: skip


def run_tests() -> dict[str, Any]:
    """`pytest -m gpu`, on several processes where pytest-xdist is there."""
    many = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", *many]
    began = time.perf_counter()
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], done.stderr[-1000:], flush=True)
    return {
        "exit": done.returncode, "seconds": time.perf_counter() - began,
        "summary": done.stdout.strip().splitlines()[-1:],
    }  # fmt: skip


def main() -> int:
    """Everything, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).parents[1] / "results" / "gpu_smoke.json"
    parser.add_argument("--json", type=Path, default=default)
    parser.add_argument("--skip-tests", action="store_true")
    options = parser.parse_args()
    found = header("gpu_smoke", {}, {})

    def keep(name: str, value: Any) -> None:
        found[name] = value
        write(found, str(options.json))
        print(f"{name}: {json.dumps(value)}", flush=True)

    if not options.skip_tests:
        keep("tests", run_tests())
    for overlap in ("off", "on"):
        keep(f"engine_overlap_{overlap}", measure_engine("llama-3.2-1b", 64, 256, 128, overlap))
    return int(found.get("tests", {}).get("exit", 0))


if __name__ == "__main__":
    sys.exit(main())
