"""Endless streams on a GPU: the time of a step after 4K to 1M tokens, and of a window made anew.

    python benchmarks/stream_decode.py [--model llama-3.1-8b] [--budgets 1024,2048,4096]
                                       [--lengths 4096,65536,1048576] [--batch 1] [--json FILE]

Random weights: speed only. A stream's prompt goes through `streamingllm` and decodes; then the
engine is told that so many more tokens have passed, a whole number of rounds of the ring: they
stand in its lists and arrays, as they would, and the clock runs over steps from there. What the
tokens between would have computed is not computed: the cache holds as many positions as ever, and a
stream of a million tokens step by step takes hours. Lengths take turns. The baseline computes the
window of as many tokens anew for every token, one prompt at a time, as a sliding window must whose
positions start from 0 (the card's baseline); it has chunks, and all else that prompts have.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.core.seq import Seq
from kvarn.engine.engine import Engine
from kvarn.engine.llm import LLM

REPEATS, WARM, TIMED, ANEW = 3, 16, 128, 8  #: turns; steps before and under the clock; prompts
SINKS = 4


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens that no other number has."""
    return [(number * 7919 + i * 31 + i * i % 977) % 30000 + 1 for i in range(length)]


def pass_on(llm: LLM, seq: Seq, length: int, ring: int) -> None:
    """Whole rounds of the ring have passed, up to about `length` tokens; no step is in flight."""
    image = llm.engine.executor.image  # type: ignore[attr-defined]
    more = max(0, length - len(seq.tokens)) // ring * ring
    row = image.row(seq.id)
    at = int(image.known[row])
    values = seq.tokens[-1:] * more
    image.commit(row, at, values)
    seq.tokens += values
    seq.computed += more


def settle(engine: Engine) -> None:
    """Have the step in flight recorded, and none after it."""
    done, engine._in_flight = engine._in_flight, None
    if done is not None:
        engine._collect(*done)


def start(llm: LLM, batch: int, rule: str, budget: int) -> list[Seq]:
    """As many streams, all of them in their rings."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    for i in range(batch):
        engine.add(Request(f"r{i}", prompt_of(i, 2 * budget), params, sparsity=rule))
    started = set[str]()
    while len(started) < batch:
        started |= {out.request_id for out in engine.step()}
    return list(engine.control.queues.running)


def step_s(llm: LLM, batch: int, rule: str, budget: int, length: int) -> float:
    """Mean time of a decode step after `length` tokens [s]."""
    engine = llm.engine
    seqs = start(llm, batch, rule, budget)
    settle(engine)
    for seq in seqs:
        pass_on(llm, seq, length, budget - SINKS)
    for _ in range(WARM):
        engine.step()
    began = perf_counter()
    for _ in range(TIMED):
        tokens = sum(len(out.tokens) for out in engine.step())
        assert tokens == batch, f"{tokens} of {batch} streams decoded"
    took = (perf_counter() - began) / TIMED
    for i in range(batch):
        engine.abort(f"r{i}")
    while engine.has_work:
        engine.step()
    return took


def anew_s(llm: LLM, budget: int) -> float:
    """Mean time of a token whose window is computed for it alone [s]."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rule = f"streamingllm:budget={budget}"
    began = perf_counter()
    for i in range(ANEW):
        llm.generate(prompt_of(100 + i, budget), params, sparsity=rule)
    return (perf_counter() - began) / ANEW


def measure(llm: LLM, batch: int, budget: int, lengths: list[int]) -> dict[str, Any]:
    """One window, lengths in turns."""
    rule = f"streamingllm:budget={budget},sinks={SINKS}"
    runs: dict[int, list[float]] = {length: [] for length in lengths}
    anew = list[float]()
    step_s(llm, batch, rule, budget, lengths[0])  # kernels and graphs
    anew_s(llm, budget)
    for _ in range(REPEATS):
        for length, found in runs.items():
            found.append(step_s(llm, batch, rule, budget, length))
        anew.append(anew_s(llm, budget))
    steps = {length: median(found) for length, found in runs.items()}
    return {
        "budget": budget, "batch": batch, "step_s": steps, "anew_s": median(anew),
        "spread": max(steps.values()) / min(steps.values()) - 1,
        "times_faster": batch * median(anew) / max(steps.values()), "runs": runs, "anew_runs": anew,
    }  # fmt: skip


def main() -> None:
    """Every window."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--budgets", default="1024,2048,4096")
    parser.add_argument("--lengths", default="4096,65536,1048576")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    budgets = [int(part) for part in given.budgets.split(",")]
    lengths = [max(int(part), 2 * max(budgets)) for part in given.lengths.split(",")]
    llm = LLM(
        model=given.model, load="random", max_seqs=given.batch, prefix="none",
        sparsity=f"streamingllm:budget={max(budgets)}", max_len=2 * max(lengths),
    )  # fmt: skip
    results = []
    for budget in budgets:
        results.append(measure(llm, given.batch, budget, lengths))
        said = {k: v for k, v in results[-1].items() if "runs" not in k}
        print(said, flush=True)
    header = record.header("stream_decode", {"sinks": SINKS}, {"model": given.model})
    record.write(header | {"results": results}, given.json)


if __name__ == "__main__":
    main()
