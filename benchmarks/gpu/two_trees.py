"""Dense steps of two trees on one GPU: did a change cost anything where it is not used?

    git archive COMMIT kvarn | tar x -C OLD
    PYTHONPATH=. python benchmarks/gpu/two_trees.py OLD [--json FILE]

Each tree serves an 8B shape with random weights in processes of its own, turn about. Decode steps
are timed on the device: the captured step of the batch, replayed; a prompt from end to end. Rows
are times of either tree, the best of each process, and the ratio of their medians (below 1: this
tree is the faster).
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

TURNS, REPLAYS, ROUNDS = 2, 50, 9
CASES = ((1, 2048), (8, 2048), (32, 2048), (64, 512))  #: sequences, tokens of a prompt; of each
#: all prompts are one step (`budget`), so that all decode together
PROMPT = 8192  #: tokens of the one that is timed from end to end
OPTIONS: dict[str, Any] = {
    "model": "llama-3.1-8b", "load": "random", "max_len": 16384, "max_seqs": 64,
    "device": "cuda", "prefix": "none", "budget": 65536,
}  # fmt: skip


def measure() -> dict[str, float]:
    """Of the tree that this process imports: milliseconds by kind of step."""
    import torch

    from kvarn.core.request import SamplingParams
    from kvarn.engine.llm import LLM

    llm = LLM(**OPTIONS)
    graphs: Any = llm.engine.executor.graphs  # type: ignore[union-attr]
    fill, last, found = type(graphs)._fill, list[Any](), dict[str, float]()

    def heard(self: Any, graph: Any, *rest: Any) -> None:
        last[:] = [graph]
        fill(self, graph, *rest)

    type(graphs)._fill = heard

    def run(batch: int, length: int, tokens: int) -> float:
        asked = [[1 + (7 * i + 13 * j) % 1000 for j in range(length)] for i in range(batch)]
        began = perf_counter()
        llm.generate(asked, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        return 1e3 * (perf_counter() - began)

    for batch, length in CASES:
        run(batch, length, 8)
        times = list[float]()
        for _ in range(ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(REPLAYS):
                last[0].replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / REPLAYS)
        found[f"decode, {batch} after {length}"] = min(times)
    run(1, PROMPT, 1)
    found[f"prefill of {PROMPT}"] = min(run(1, PROMPT, 1) for _ in range(ROUNDS))
    llm.close()
    return found


def main() -> None:
    """Both trees in turns, and the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", nargs="?", help="a folder with the other tree's kvarn")
    parser.add_argument("--about", default="another tree", help="what the other tree is")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    if given.old is None:
        print(json.dumps(measure()))
        return
    from kvarn.bench import record

    seen: dict[str, list[dict[str, float]]] = {"old": [], "new": []}
    rest = os.environ.get("PYTHONPATH", "")
    for turn in range(TURNS):
        for name in ("old", "new") if turn % 2 == 0 else ("new", "old"):
            path = f"{given.old}:{rest}" if name == "old" else rest
            done = subprocess.run(
                [sys.executable, __file__], env=os.environ | {"PYTHONPATH": path},
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            seen[name].append(json.loads(done.stdout.splitlines()[-1]))
        about = {"old": given.about, "turns": turn + 1, "replays": REPLAYS, "rounds": ROUNDS}
        header = record.header("two_trees", about, OPTIONS)
        record.write(header | {"results": rows(**seen)}, given.json)


def rows(old: list[dict[str, float]], new: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Times of each kind of step in either tree, and their ratio."""
    found = list[dict[str, Any]]()
    for step in new[0]:
        before, after = ([one[step] for one in tree] for tree in (old, new))
        ratio = median(after) / median(before)
        found.append({"step": step, "old_ms": before, "new_ms": after, "ratio": ratio})
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    main()
