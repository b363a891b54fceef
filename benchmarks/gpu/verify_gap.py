"""How long the device waits for the host between two steps: plain ones, and ones that verify.

    PYTHONPATH=. python benchmarks/gpu/verify_gap.py [--model llama-3.1-8b] [--batches 1,8,32,64]
                                                     [--profile] [--json FILE]

Random weights, drafts of four tokens that cost nothing, each accepted with probability 0.7. Events
on the device stand before and behind every replay of a captured step; what lies between two replays
is the gap: the tokens' way to the host, all that the host decides, and the next step's inputs. A
plain step is handed over while the one before it runs; what verifies must know what stands.
"""

import argparse
from collections.abc import Callable
from cProfile import Profile
from itertools import pairwise
from pstats import Stats
from statistics import median
from typing import Any

import torch

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.llm import LLM

PROMPT, DRAFTS, ACCEPTANCE = 128, 4, 0.7
REPEATS, WARM, TIMED = 3, 12, 64  #: runs; steps before and under the clock
ROOM = (2 * WARM + TIMED) * (DRAFTS + 1)  #: tokens that a request may generate
Replay = Callable[[], torch.Tensor]


class Marked:
    """The capture of a runner's steps, whose replays leave events on the device from now on."""

    def __init__(self, graphs: Any) -> None:
        self.capture = graphs.capture
        self.unmarked = graphs.found  # of the start: their memory is that of those to come
        graphs.capture, graphs.found = self, {}
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, body: Replay) -> Replay:
        """As `Capture`."""
        replay = self.capture(body)

        def marked() -> torch.Tensor:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = replay()
            end.record()
            self.marks.append((begin, end))
            return out

        return marked


def run(llm: LLM, batch: int, marked: Marked, profile: Profile | None) -> dict[str, float]:
    """Means of a step of `batch` sequences: from replay to replay, and of that between them [s]."""
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=ROOM, ignore_eos=True)
    engine.reset_prefix_cache()
    for i in range(batch):
        prompt = [1 + (7 * i + 13 * j) % 1000 for j in range(PROMPT)]
        engine.add(Request(f"r{i}", prompt, params))
    started = set[str]()
    while len(started) < batch:
        started |= {out.request_id for out in engine.step()}
    for _ in range(WARM):
        engine.step()
    marked.marks.clear()
    if profile is not None:
        profile.enable()
    for _ in range(TIMED):
        assert len(engine.step()) == batch, "a sequence has ended"
    if profile is not None:
        profile.disable()
    torch.cuda.synchronize()
    marks = list(marked.marks)
    for i in range(batch):
        engine.abort(f"r{i}")
    while engine.has_work:
        engine.step()
    whole = marks[0][0].elapsed_time(marks[-1][0]) / 1e3
    idle = sum(a[1].elapsed_time(b[0]) for a, b in pairwise(marks)) / 1e3
    steps = len(marks) - 1
    return {"step_s": whole / steps, "gap_s": idle / steps, "share": idle / whole}


def main() -> None:
    """Every batch size, both kinds of steps in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--batches", default="1,8,32,64")
    parser.add_argument("--profile", action="store_true", help="what the host does, by cProfile")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    batches = [int(part) for part in given.batches.split(",")]
    options: dict[str, Any] = {
        "model": given.model, "load": "random", "max_len": PROMPT + 2 * ROOM,
        "max_seqs": max(batches), "speculate": "synthetic", "draft_length": "fixed",
        "draft_tokens": DRAFTS, "synthetic_acceptance": ACCEPTANCE,
    }  # fmt: skip
    llm = LLM(**options)
    engine: Any = llm.engine
    speculation = engine.speculation
    marked = Marked(engine.executor.graphs)
    kinds, rows = {"plain": None, "verify": speculation}, list[dict[str, Any]]()
    for batch in batches:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        for turn in range(REPEATS + 1):
            for name, chosen in kinds.items():
                engine.speculation = chosen
                once = run(llm, batch, marked, None)
                if turn:  # the first captures
                    runs[name].append(once)
        for name, found in runs.items():
            row = {key: median(one[key] for one in found) for key in found[0]}
            rows.append({"step": name, "batch": batch, **row, "runs": found})
            print({key: value for key, value in rows[-1].items() if key != "runs"}, flush=True)
    engine.speculation = speculation
    if given.profile:
        for batch in (min(batches), 32):
            profile = Profile()
            run(llm, batch, marked, profile)
            print(f"profile of {TIMED} verify steps of {batch}", flush=True)
            Stats(profile).sort_stats("tottime").print_stats(45)
    said = {"prompt": PROMPT, "drafts": DRAFTS, "acceptance": ACCEPTANCE, "steps": TIMED}
    header = record.header("verify_gap", said, options)
    record.write(header | {"results": rows}, given.json)
    llm.close()


if __name__ == "__main__":
    main()
