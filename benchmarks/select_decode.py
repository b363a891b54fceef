"""Decoding after long prompts: every row sees all, or the pages that it chooses.

    python benchmarks/select_decode.py [--model llama-3.1-8b] [--prompt 32768] [--budget 4096]
                                       [--batches 1,8,16] [--kv-dtype auto] [--reuse 4]
                                       [--json FILE]

Random weights: speed only. One engine; the same prompts serve every setting through the prefix
cache, and settings take turns. The step is timed while all sequences of the batch decode: dense
steps are replayed from captured graphs, as they always are. With `--reuse` above 1 a third setting
takes its turns: a choice that serves so many rows.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.llm import LLM

REPEATS, WARM, TIMED = 3, 8, 64  #: turns; decode steps before and under the clock
ROOM = 2 * (WARM + TIMED)  #: tokens that the first to start may generate before the last one does


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens that no other number has."""
    return [(number * 7919 + i * 31 + i * i % 977) % 30000 + 1 for i in range(length)]


def step_s(llm: LLM, rule: str, batch: int, length: int) -> float:
    """Mean time of a decode step of `batch` sequences [s]."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=4 * ROOM, ignore_eos=True)
    for i in range(batch):
        engine.add(Request(f"r{i}", prompt_of(i, length), params, sparsity=rule))
    started = set[str]()
    while len(started) < batch:
        started |= {out.request_id for out in engine.step()}
    for _ in range(WARM):
        engine.step()
    began = perf_counter()
    for _ in range(TIMED):
        tokens = sum(len(out.tokens) for out in engine.step())
        assert tokens == batch, f"{tokens} of {batch} sequences decoded"
    took = (perf_counter() - began) / TIMED
    for i in range(batch):
        engine.abort(f"r{i}")
    while engine.has_work:
        engine.step()
    return took


def main() -> None:
    """Every batch, settings in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--budget", type=int, default=4096)
    parser.add_argument("--batches", default="1,8,16")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--json", default=None)
    parser.add_argument("--reuse", type=int, default=4)
    given = parser.parse_args()
    batches = [int(part) for part in given.batches.split(",")]
    rule = f"quest:budget={given.budget}"
    shared = f"{rule},reuse={given.reuse}"
    rules = ["none", rule, shared] if given.reuse > 1 else ["none", rule]
    llm = LLM(
        model=given.model, load="random", max_seqs=max(batches), sparsity=rules[-1],
        max_len=given.prompt + 8 * ROOM, kv_dtype=given.kv_dtype,
    )  # fmt: skip
    results = []
    for batch in batches:
        runs: dict[str, list[float]] = {name: [] for name in rules}
        for name in rules:  # prompts into the cache, graphs and kernels made
            step_s(llm, name, batch, given.prompt)
        for _ in range(REPEATS):
            for name, found in runs.items():
                found.append(step_s(llm, name, batch, given.prompt))
        dense, chosen, *reused = (median(found) for found in runs.values())
        row: dict[str, Any] = {
            "batch": batch, "dense_step_s": dense, "step_s": chosen, "ratio": chosen / dense,
        }  # fmt: skip
        if reused:
            row |= {"reuse": given.reuse, "reuse_step_s": reused[0]}
            row["reuse_ratio"] = reused[0] / dense
        row["runs"] = runs
        results.append(row)
        print({key: value for key, value in row.items() if key != "runs"}, flush=True)
    said = {"prompt": given.prompt, "budget": given.budget, "kv_dtype": given.kv_dtype}
    header = record.header("select_decode", said, {"model": given.model, "load": "random"})
    record.write(header | {"results": results}, given.json)


if __name__ == "__main__":
    main()
