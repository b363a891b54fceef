"""The acceptance head where a drafting model's passes are one replay: what it costs, what it saves.

    PYTHONPATH=. python benchmarks/gpu/head_in_chain.py [--model FILE.gguf] [--json FILE]

SmolLM2 with the drafter and the head that come with kvarn, one request after the other, greedy, on
questions that the drafter was not trained on. Stops by the head (`specdec-pp`) with a replay for
every four passes and with a step of the runner for each, beside a fixed length without a head and
plain decoding; and the device's time of a pass, with the head and without. Then one and the same
replay again and again, as it is and with other heads or none, in turns: what a head adds to it.
"""

import argparse
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu.verify_gap import Marked
from kvarn.bench import record
from kvarn.bench.drift import prompts
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.runner.chain import Judge
from kvarn.speculate.propose.making import JUDGED_AT_ONCE
from kvarn.speculate.train.head import AcceptanceHead
from kvarn.speculate.train.load import shipped

MODEL = Path.home() / ".cache" / "kvarn" / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUESTS, OUTPUT, REPEATS = 6, 128, 3  #: of a run; tokens; runs behind the one that captures
TURNS = 300  #: replays of each head's chain
PAPERS_DEPTH = 3  #: blocks of the head that was published
COUNTS = ("output_tokens", "steps", "drafted_tokens", "accepted_tokens")


def run(llm: LLM, asked: list[list[int]]) -> dict[str, float]:
    """Rates and counts of all requests, one after the other."""
    params = SamplingParams(temperature=0, max_tokens=OUTPUT)
    llm.engine.reset_prefix_cache()
    before, began = llm.engine.stats(), perf_counter()
    for one in asked:
        llm.generate([one], params)
    seconds, after = perf_counter() - began, llm.engine.stats()
    found = {name: getattr(after, name) - getattr(before, name) for name in COUNTS}
    return found | {"tokens_per_s": found["output_tokens"] / seconds}


def pass_s(marked: Marked) -> float:
    """Median time of a pass of a replay on the device [s]."""
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in marked.marks) / 1e3 / JUDGED_AT_ONCE


@torch.inference_mode()
def heads_alone(chains: Any, capture: Any, head: AcceptanceHead) -> list[dict[str, Any]]:
    """What heads add to a chain that was replayed lately, by the inputs that it had [s].

    None, the shipped one, one of as many blocks as the paper's, and the shipped one in torch.
    """
    lengths = list(chains.found.values())[-1]
    passes = max(lengths)
    chain, graphs = lengths[passes], chains.graphs
    device, kind = head.out.weight.device, graphs.decoder.dtype
    deep = AcceptanceHead(graphs.decoder.spec.hidden, PAPERS_DEPTH).to(device)
    forms: dict[str, Judge | None] = {
        "none": None,
        "as shipped": head.captured(kind),
        f"{PAPERS_DEPTH} blocks": deep.captured(kind),
        "as shipped, in torch": lambda x, own: head.accepted(x, own.exp()),
    }
    replays = list[Any]()
    for judge in forms.values():
        chains.judge = judge
        replays.append(capture(lambda: chains._body(chain)))
    taken: list[list[float]] = [[] for _ in forms]
    for _ in range(TURNS):
        for replay, times in zip(replays, taken, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            replay()  # clocks and caches are what they are in a row of replays
            begin.record()
            replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    seconds = [median(times) for times in taken]
    rows = [
        {"head": name, "passes": passes, "replay_s": one, "pass_s": one / passes,
         "added_s": one - seconds[0], "added": one / seconds[0] - 1}
        for name, one in zip(forms, seconds, strict=True)
    ]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def main() -> None:
    """All settings, in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    common: dict[str, Any] = {"model": given.model, "max_len": 512, "max_seqs": 4}
    drafted = common | {
        "speculate": "draft", "draft_model": str(shipped("smollm2-135m")),
        "draft_choice": "likeliest",
    }  # fmt: skip
    fixed = drafted | {"draft_length": "fixed", "draft_tokens": JUDGED_AT_ONCE}
    headed = drafted | {"draft_length": "specdec-pp", "draft_tokens": 12}
    engines = {
        "plain": LLM(**common),
        f"fixed {JUDGED_AT_ONCE}, no head": LLM(**fixed),
        "specdec-pp, replays": LLM(**headed),
        "specdec-pp, single passes": LLM(**headed),
    }
    marks = dict[str, Marked]()
    for name, llm in engines.items():
        engine: Any = llm.engine
        if name.endswith("single passes"):
            engine.speculation.proposer.chains = None
        elif engine.speculation is not None:
            marks[name] = Marked(engine.speculation.proposer.runner.graphs, [])
    tokenizer: Any = engines["plain"].tokenizer
    chats = [[{"role": "user", "content": text}] for text in prompts("talk", REQUESTS)]
    asked = [tokenizer.encode(tokenizer.chat(chat), add_special=False) for chat in chats]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for turn in range(REPEATS + 1):
        for name, llm in engines.items():
            if name in marks:
                marks[name].marks.clear()
            once = run(llm, asked)
            runs[name] += [once] if turn else []
    rows = list[dict[str, Any]]()
    plain = median(one["tokens_per_s"] for one in runs["plain"])
    for name, found in runs.items():
        rate = median(one["tokens_per_s"] for one in found)
        row = {"setting": name, "tokens_per_s": rate, "ratio": rate / plain}
        row |= {"pass_s": pass_s(marks[name]) if name in marks else None}
        rows.append(row | {key: found[-1][key] for key in COUNTS} | {"runs": found})
        print({key: value for key, value in rows[-1].items() if key != "runs"}, flush=True)
    proposer: Any = engines["specdec-pp, replays"].engine.speculation.proposer
    capture = marks["specdec-pp, replays"].capture
    heads = heads_alone(proposer.chains, capture, proposer.head)
    said = {"requests": REQUESTS, "output": OUTPUT, "repeats": REPEATS}
    shown = {"model": Path(given.model).stem, "draft_model": Path(headed["draft_model"]).name}
    header = record.header("head_in_chain", said, headed | shown)
    record.write(header | {"results": rows, "heads": heads}, given.json)
    for llm in engines.values():
        llm.close()


if __name__ == "__main__":
    main()
