"""Long prompts whose KV is kept whole, or shrinks after prefill: memory, prefill time, decode rate.

    python benchmarks/sparse_decode.py [--model llama-3-8b] [--prompt 32768] [--budget 2048]
                                       [--most 64] [--json FILE]

Random weights: speed only. Each setting gets the same memory for KV and as many sequences as that
holds (at most `--most`), all with prompts of their own and no prefix cache. Decode is timed while
all of them run; prefill is the time to the first token of one prompt, in turns.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.llm import LLM

REPEATS, WARM, TIMED = 5, 8, 64  #: prompts; decode steps before and under the clock
ROOM = 1024  #: tokens that the first to start may generate before the last has started


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens that no other number has."""
    return [(number * 7919 + i * 31 + i * i % 977) % 30000 + 1 for i in range(length)]


def first_token_s(llm: LLM, number: int, length: int) -> float:
    """Time to the first token of a prompt alone [s]."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    began = perf_counter()
    llm.generate(prompt_of(number, length), params)
    return perf_counter() - began


def decode_rate(llm: LLM, count: int, length: int) -> dict[str, Any]:
    """`count` sequences decode together: tokens a second, and the pages that they hold."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=ROOM, ignore_eos=True)
    for i in range(count):
        engine.add(Request(f"r{i}", prompt_of(i, length), params))
    began, started = perf_counter(), set[str]()
    while len(started) < count:
        started |= {out.request_id for out in engine.step()}
    prefill = perf_counter() - began
    for _ in range(WARM):
        engine.step()
    times = []
    for _ in range(TIMED):
        began = perf_counter()
        tokens = sum(len(out.tokens) for out in engine.step())
        times.append(perf_counter() - began)
        assert tokens == count, f"{tokens} of {count} sequences decoded"
    held = engine.control.kv.held(0)
    for i in range(count):
        engine.abort(f"r{i}")
    while engine.has_work:
        engine.step()
    return {
        "sequences": count, "tokens_per_s": count / (sum(times) / TIMED),
        "step_s": median(times), "pages_held": held, "prompts_s": prefill,
    }  # fmt: skip


def main() -> None:
    """Dense and sparse, in turns where that is possible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--prompt", type=int, default=32768)
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--most", type=int, default=64)
    parser.add_argument("--part", default="sage-kv")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    llm = LLM(
        model=given.model, load="random", prefix="none", max_seqs=given.most,
        max_len=given.prompt + ROOM, kv_dtype=given.kv_dtype,
    )  # fmt: skip
    engine = llm.engine
    size, pages = engine.control.kv.page_size, engine.control.kv.pages[0]
    spec = f"{given.part}:budget={given.budget}"
    rows = list[dict[str, Any]]()
    first_token_s(llm, 999, given.prompt)  # compiles
    seconds: dict[str, list[float]] = {"none": [], spec: []}
    for repeat in range(REPEATS):
        for name, found in seconds.items():
            engine.assembly.rules.default = name
            found.append(first_token_s(llm, 1000 + repeat, given.prompt))
    room = {"none": -(-(given.prompt + ROOM) // size), spec: -(-given.budget // size)}
    for name, need in room.items():
        engine.assembly.rules.default = name
        whole = -(-given.prompt // size)  # one prompt must find room beside those that shrank
        count = min(given.most, (pages - (whole if name != "none" else 0)) // need)
        rows.append(
            {
                "sparsity": name, "first_token_s": median(seconds[name]), "runs": seconds[name],
                "pages_of_one": need, **decode_rate(llm, count, given.prompt),
            }
        )  # fmt: skip
        print(rows[-1], flush=True)
    dense, sparse = rows
    result = {
        "pages": pages, "page_size": size,
        "kv_bytes_ratio": (dense["pages_held"] / dense["sequences"])
        / (sparse["pages_held"] / sparse["sequences"]),
        "decode_ratio": sparse["tokens_per_s"] / dense["tokens_per_s"],
        "prefill_ratio": sparse["first_token_s"] / dense["first_token_s"],
        "results": rows,
    }  # fmt: skip
    said = {"prompt": given.prompt, "budget": given.budget, "part": given.part}
    options = {"model": given.model, "load": "random", "prefix": "none"}
    record.write(record.header("sparse_decode", said, options) | result, given.json)
    print({key: result[key] for key in ("kv_bytes_ratio", "decode_ratio", "prefill_ratio")})


if __name__ == "__main__":
    main()
