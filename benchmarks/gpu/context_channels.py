"""What a long context costs, measured on a GPU beside the closed forms of `kvarn.cost.session`.

    PYTHONPATH=. python benchmarks/gpu/context_channels.py [--model llama-3.1-8b] [--device h200]
                                                           [--contexts 4096,32768,126976]
                                                           [--fit 32768] [--json FILE]

Random weights: times only. Prefill is a prompt alone, up to its first token; decode the step of one
or four sequences behind such prompts; a switch copies all KV of a sequence out of its pages to
pinned host memory, and back into them. Three efficiencies (of the peak arithmetic, of the memory
bandwidth, of the host link) are fitted to one sequence at one context, and must do for the others.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

import torch

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.devices import Device, find_device
from kvarn.cost.precision import Precision
from kvarn.cost.session import SessionModel, session_model
from kvarn.engine.llm import LLM

USERS = (1, 4)  #: sequences that decode together
REPEATS, WARM, TIMED = 3, 8, 32  #: of everything; decode steps before and under the clock
ROOM = 4096  #: tokens that the first to start may generate while the others' prompts are computed


def prompt_of(number: int, length: int) -> list[int]:
    """Tokens that no other number has."""
    return [(number * 7919 + i * 31 + i * i % 977) % 30000 + 1 for i in range(length)]


def prefill_s(llm: LLM, number: int, length: int) -> float:
    """Time to the first token of a prompt alone [s]."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    began = perf_counter()
    llm.generate(prompt_of(number, length), params)
    return perf_counter() - began


def decode_s(llm: LLM, users: int, length: int) -> list[float]:
    """Times of a decode step of so many sequences, in the middle of what is timed [s]."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=ROOM, ignore_eos=True)
    for i in range(users):
        engine.add(Request(f"r{i}", prompt_of(i, length), params))
    started = set[str]()
    while len(started) < users:
        started |= {out.request_id for out in engine.step()}
    found = list[float]()
    for _ in range(REPEATS):
        for _ in range(WARM):
            engine.step()
        began = perf_counter()
        outputs = [out for _ in range(TIMED) for out in engine.step()]
        found.append((perf_counter() - began) / TIMED)
        ends = [(out.request_id, out.finish, out.error) for out in outputs if out.finish]
        if len(outputs) != users * TIMED or ends:
            raise RuntimeError(f"not all decoded: {len(outputs)}, {ends}, {engine.stats()}")
    return found


def switch_s(llm: LLM) -> list[float]:
    """Times in which all KV of the first running sequence leaves its pages and comes back [s]."""
    engine: Any = llm.engine
    seq = engine.control.queues.running[0]
    caches = list(engine.executor.pool.cache.values())
    pages = torch.tensor(list(seq.tables[0]), device="cuda")
    layer = caches[0][pages]
    away = [torch.empty(layer.shape, dtype=layer.dtype, pin_memory=True) for _ in caches]
    found = list[float]()
    for _ in range(REPEATS + 1):
        torch.cuda.synchronize()
        began = perf_counter()
        for cache, there in zip(caches, away):
            there.copy_(cache[pages], non_blocking=True)
        torch.cuda.synchronize()
        for cache, there in zip(caches, away):
            cache.index_copy_(0, pages, there.to("cuda", non_blocking=True))
        torch.cuda.synchronize()
        found.append(perf_counter() - began)
    assert torch.equal(caches[0][pages].cpu(), away[0])
    return found[1:]  # the first makes room for what is under way


def drop(llm: LLM) -> None:
    """End all requests."""
    for seq in list(llm.engine.control.queues.running):
        llm.engine.abort(seq.request.id)
    while llm.engine.has_work:
        llm.engine.step()


def measured(llm: LLM, context: int) -> list[dict[str, Any]]:
    """Rows of one context; `at` is the mean context of the decode steps."""
    prefill_s(llm, 99, context)  # kernels and tables
    runs = [prefill_s(llm, 100 + turn, context) for turn in range(REPEATS)]
    rows: list[dict[str, Any]] = [{"channel": "prefill", "users": 1, "at": context, "runs": runs}]
    at = context + REPEATS * (WARM + TIMED) // 2
    for users in USERS:
        runs = decode_s(llm, users, context)
        rows.append({"channel": "decode", "users": users, "at": at, "runs": runs})
        if users == 1:
            rows.append({"channel": "switch", "users": 1, "at": context, "runs": switch_s(llm)})
        drop(llm)
    for row in rows:
        row |= {"context": context, "measured_s": median(row["runs"])}
        print({key: value for key, value in row.items() if key != "runs"}, flush=True)
    return rows


def predicted_s(model: SessionModel, row: dict[str, Any]) -> float:
    """What the closed form says of a row [s]."""
    if row["channel"] == "prefill":
        return model.prefill(row["at"])
    if row["channel"] == "decode":
        return model.decode(row["at"], row["users"])
    return model.switch(row["at"])


def fitted(spec: Any, device: Device, rows: list[dict[str, Any]], fit: int) -> dict[str, float]:
    """The three efficiencies of the context `fit`."""
    peak, found = session_model(spec, device, Precision()), dict[str, float]()
    for name, channel in (("mfu", "prefill"), ("mbu", "decode"), ("link", "switch")):
        (row,) = (
            row for row in rows
            if (row["channel"], row["users"], row["context"]) == (channel, 1, fit)
        )  # fmt: skip
        found[name] = predicted_s(peak, row) / row["measured_s"]
    return found


def main() -> None:
    """All contexts, the fit, and the errors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="h200")
    parser.add_argument("--contexts", default="4096,32768,126976")
    parser.add_argument("--fit", type=int, default=32768)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    contexts = [int(part) for part in given.contexts.split(",")]
    options: dict[str, Any] = {
        "model": given.model, "load": "random", "prefix": "none", "max_seqs": max(USERS),
        "max_len": max(contexts) + ROOM,
    }  # fmt: skip
    llm = LLM(**options)
    rows = [row for context in contexts for row in measured(llm, context)]
    device, spec = find_device(given.device), llm.engine.spec
    shares = fitted(spec, device, rows, given.fit)
    model = session_model(spec, device, Precision(), **shares)
    for row in rows:
        row["predicted_s"] = predicted_s(model, row)
        row["error"] = row["predicted_s"] / row["measured_s"] - 1
        print(f"{row['channel']:8} {row['context']:7} x{row['users']} {row['error']:+.1%}")
    said = {"contexts": contexts, "fit": given.fit, "priced_as": given.device}
    header = record.header("context_channels", said, options)
    record.write(header | {"efficiencies": shares, "results": rows}, given.json)
    llm.close()


if __name__ == "__main__":
    main()
