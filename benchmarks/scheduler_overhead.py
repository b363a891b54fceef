"""Time of the decisions of one step: `plan` + `apply` with many running sequences.

    python benchmarks/scheduler_overhead.py [--json FILE]

No model runs: the executor is played by a list of tokens. Decode steps of 256 sequences over
16-token pages, so that in every step some sequences need a new page and publish a full one.
"""

import argparse
import statistics
import time
from random import Random
from typing import Any

from kvarn.bench import record
from kvarn.core.model import GroupSpec
from kvarn.core.part import find
from kvarn.core.plan import StepPlan, StepResult
from kvarn.core.request import Request, SamplingParams
from kvarn.kv.manager import KVManager
from kvarn.schedule.control import Capacity, ControlPlane

TARGET_MS = 1.0


def control_plane(n: int, page: int, longest: int, prefix: str, windows: list[int | None]) -> Any:
    """A control plane with room for `n` sequences of `longest` tokens."""
    groups = [GroupSpec((0,), 1, 64, window) for window in windows]
    pages = [n * (longest // page + 2)] * len(groups)
    index = None
    if prefix != "none":
        evict: Any = find("evict", "lru")
        part: Any = find("prefix", prefix)
        index = part(page, windows, evict())
    scheduler: Any = find("scheduler", "continuous")
    capacity = Capacity(budget=8192, max_seqs=n, max_len=longest, max_queue=n)
    return ControlPlane(scheduler(), KVManager(groups, pages, page, index), capacity)


def answer(plan: StepPlan, rng: Random) -> StepResult:
    """What an executor would return: a random token for each span that wants one."""
    tokens = [[rng.randrange(1000, 30000)] if span.wants_logits else [] for span in plan.spans]
    return StepResult(plan.step, tokens)


def measure(
    n: int, page: int, prompt: int, steps: int, prefix: str, windows: list[int | None]
) -> list[float]:
    """Milliseconds of `plan` + `apply` of each decode step, with all `n` sequences running."""
    rng = Random(0)
    longest = prompt + steps + 80
    control = control_plane(n, page, longest, prefix, windows)
    params = SamplingParams(max_tokens=longest - prompt, temperature=0.0, ignore_eos=True)
    for i in range(n):
        own = prompt + rng.randrange(page)  # so that pages fill up at different steps
        ids = [rng.randrange(1000, 30000) for _ in range(own)]
        control.add(Request(str(i), ids, params))
    found: list[float] = []
    while len(found) < steps:
        begin = time.perf_counter()
        plan = control.plan(begin)
        middle = time.perf_counter()
        result = answer(plan, rng)
        resumed = time.perf_counter()
        control.apply(plan, result, resumed)
        end = time.perf_counter()
        if len(plan.spans) == n and plan.n_tokens == n:
            found.append((end - resumed + middle - begin) * 1000)
    return found


def main() -> None:
    """Measure the cases, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json")
    options = parser.parse_args()
    cases: list[tuple[str, str, list[int | None]]] = [
        ("no prefix cache", "none", [None]),
        ("hash", "hash", [None]),
        ("radix", "radix", [None]),
        ("hash, full + window 128", "hash", [None, 128]),
    ]
    rows = []
    for name, prefix, windows in cases:
        times = measure(
            options.sequences, options.page_size, options.prompt, options.steps, prefix, windows
        )
        ordered = sorted(times)
        row = {
            "workload": name,
            "median_ms": statistics.median(times),
            "p90_ms": ordered[int(len(ordered) * 0.9)],
            "p99_ms": ordered[int(len(ordered) * 0.99)],
            "max_ms": ordered[-1],
        }
        rows.append(row)
        print(
            f"{name:26} median {row['median_ms']:.3f} ms   p90 {row['p90_ms']:.3f}   "
            f"p99 {row['p99_ms']:.3f}   (target: median at most {TARGET_MS} ms)"
        )
    said = vars(options) | {"json": None}
    record.write(record.header("scheduler_overhead", said, {}) | {"results": rows}, options.json)


if __name__ == "__main__":
    main()
