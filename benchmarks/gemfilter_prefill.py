"""Time to the first token and KV of long prompts: whole, whole and then evicted, or filtered.

    python benchmarks/gemfilter_prefill.py [--model llama-3.1-8b] [--prompts 32768,65536]
                                           [--budget 1024] [--layer 13] [--chunk 8192]
                                           [--repeats 5] [--json FILE]

Random weights: speed and memory only. Two engines are in memory at once and take turns: one keeps
all KV (and, by request, what `snapkv` leaves), the other filters, with table groups for the layers
that see whole prompts and for the others. Each has pages for one request of the longest prompt.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.llm import LLM

ROOM = 64  #: tokens that may be generated


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens that no other number has."""
    return [(number * 7919 + i * 31 + i * i % 977) % 30000 + 1 for i in range(length)]


def first_token_s(llm: LLM, rule: str, number: int, length: int) -> float:
    """Time to the first token of a prompt alone [s]."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    began = perf_counter()
    llm.generate(prompt_of(number, length), params, sparsity=rule)
    return perf_counter() - began


def memory(llm: LLM, rule: str, number: int, length: int) -> dict[str, int]:
    """What one request holds of KV at most, at its end, and what its steps take besides [bytes]."""
    engine, on_gpu = llm.engine, torch.cuda.is_available()
    kv = engine.control.kv
    wide = torch.empty(0, dtype=engine.assembly.model.dtype).element_size()
    page = [int(group.bytes_per_token(wide)) * kv.page_size for group in kv.groups]
    params = SamplingParams(temperature=0, max_tokens=ROOM // 2, ignore_eos=True)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    engine.add(Request("r", prompt_of(number, length), params, sparsity=rule))
    held = list[int]()
    while engine.has_work:
        engine.step()
        now = sum(kv.held(group) * size for group, size in enumerate(page))
        held += [now] if now else []
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    return {"kv_peak_bytes": max(held), "kv_end_bytes": held[-1], "step_peak_bytes": peak}


def pool_bytes(llm: LLM) -> Any:
    """Memory of an engine's KV pages, used or not."""
    ledger = llm.engine.explain()["memory"]
    return next(row["bytes"] for row in ledger if row["what"] == "kv cache")


def main() -> None:
    """Every prompt length, settings in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--prompts", default="32768,65536")
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--layer", type=int, default=13)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    prompts = [int(text) for text in given.prompts.split(",")]
    longest, size = max(prompts), 16
    filtered = f"gemfilter:budget={given.budget},layer={given.layer}"
    rules = {"none": "none", "snapkv": f"snapkv:budget={given.budget}", "gemfilter": filtered}
    options: dict[str, Any] = {
        "model": given.model, "load": "random", "prefix": "none", "max_seqs": 2,
        "max_len": longest + ROOM, "budget": given.chunk, "page_size": size,
    }  # fmt: skip
    one = -(-(longest + ROOM) // size) + 1
    after = -(-(given.budget + ROOM) // size) + 1
    whole = LLM(**options, pages=one + after)
    part = LLM(**options, pages=one, sparsity=f"{filtered},upper={after / one}")
    engines = {"none": whole, "snapkv": whole, "gemfilter": part}
    n_layers, rows = whole.spec.n_layers, list[dict[str, Any]]()
    for length in prompts:
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for name, llm in engines.items():
            first_token_s(llm, rules[name], 999, length)  # compiles
        for repeat in range(given.repeats):
            for name, llm in engines.items():
                seconds[name].append(first_token_s(llm, rules[name], repeat, length))
        found = {
            name: {
                "sparsity": name, "first_token_s": median(seconds[name]), "runs": seconds[name],
                **memory(llm, rules[name], 500, length),
            }
            for name, llm in engines.items()
        }  # fmt: skip
        ours, full, evicted = found["gemfilter"], found["none"], found["snapkv"]
        rows.append(
            {
                "prompt": length,
                "speedup": full["first_token_s"] / ours["first_token_s"],
                "ideal": 1 / ((given.layer + 1) / n_layers + given.budget / length),
                "kv_peak_over_snapkv": ours["kv_peak_bytes"] / evicted["kv_peak_bytes"],
                "settings": list(found.values()),
            }
        )
        print(rows[-1], flush=True)
    said = {"budget": given.budget, "layer": given.layer, "layers": n_layers, "chunk": given.chunk}
    pools = {name: pool_bytes(llm) for name, llm in (("none", whole), ("gemfilter", part))}
    header = record.header("gemfilter_prefill", said, {"model": given.model, "load": "random"})
    record.write(header | {"pool_bytes": pools, "results": rows}, given.json)


if __name__ == "__main__":
    main()
