"""How long the device waits for the host between two steps: plain ones, and ones that verify.

    PYTHONPATH=. python benchmarks/gpu/verify_gap.py [--model llama-3.1-8b] [--batches 1 8 32 64]
                                                     [--layers N] [--profile] [--json FILE]

Random weights, each draft accepted with probability 0.7. Events on the device stand before and
behind every replay of a captured step or chain of drafts; what lies between two replays is the gap:
the tokens' way to the host, all that the host decides, and the next step's inputs. A plain step is
handed over while the one before it runs. Drafts of four tokens come from the host first, for
nothing: the step that verifies them must know what stands. Then a drafter makes them, a layer of
the target's shape (`--layers`; 0: no drafter): once each waits for the other through the host, and
once as ever, the step behind its drafts and the next drafts behind the step.
"""

import argparse
import json
from collections.abc import Callable
from cProfile import Profile
from itertools import pairwise
from pathlib import Path
from pstats import Stats
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from kvarn.bench import record
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.llm import LLM
from kvarn.models.shapes import SHAPES

PROMPT, DRAFTS, ACCEPTANCE = 128, 4, 0.7
REPEATS, WARM, TIMED = 3, 12, 64  #: runs; steps before and under the clock
ROOM = (2 * WARM + TIMED) * (DRAFTS + 1)  #: tokens that a request may generate
Replay = Callable[[], torch.Tensor]


Marks = list[tuple[torch.cuda.Event, torch.cuda.Event]]


class Marked:
    """The capture of a runner's steps, whose replays leave events on the device from now on."""

    def __init__(self, graphs: Any, marks: Marks) -> None:
        self.capture = graphs.capture
        self.unmarked = graphs.found  # of the start: their memory is that of those to come
        graphs.capture, graphs.found = self, {}
        self.marks = marks

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


def run(llm: LLM, batch: int, marks: Marks, profile: Profile | None) -> dict[str, float]:
    """Means of a round of `batch` sequences: all of it, and of that between replays [s]."""
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
    torch.cuda.synchronize()
    marks.clear()
    if profile is not None:
        profile.enable()
    for _ in range(TIMED):
        assert len(engine.step()) == batch, "a sequence has ended"
    if profile is not None:
        profile.disable()
    torch.cuda.synchronize()
    found = list(marks)
    for i in range(batch):
        engine.abort(f"r{i}")
    while engine.has_work:
        engine.step()
    whole = found[0][0].elapsed_time(found[-1][0]) / 1e3
    idle = sum(a[1].elapsed_time(b[0]) for a, b in pairwise(found)) / 1e3
    return {"step_s": whole / TIMED, "gap_s": idle / TIMED, "share": idle / whole}


def measure(
    llm: LLM, batches: list[int], kinds: dict[str, Callable[[], None]], marks: Marks, profiled: bool
) -> list[dict[str, Any]]:
    """Every batch size, all kinds of rounds in turns; each is told how to begin."""
    rows = list[dict[str, Any]]()
    for batch in batches:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
        for turn in range(REPEATS + 1):
            for name, begin in kinds.items():
                begin()
                once = run(llm, batch, marks, None)
                if turn:  # the first captures
                    runs[name].append(once)
        for name, found in runs.items():
            row = {key: median(one[key] for one in found) for key in found[0]}
            rows.append({"step": name, "batch": batch, **row, "runs": found})
            print({key: value for key, value in rows[-1].items() if key != "runs"}, flush=True)
    for batch in (min(batches), 32) if profiled else ():
        profile = Profile()
        run(llm, batch, marks, profile)
        print(f"profile of {TIMED} rounds of {batch}", flush=True)
        Stats(profile).sort_stats("tottime").print_stats(45)
    return rows


def given_drafts(given: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """Plain steps, and drafts from the host."""
    options = {"speculate": "synthetic", "synthetic_acceptance": ACCEPTANCE}
    llm, marks = LLM(**common, **options), Marks()
    engine: Any = llm.engine
    speculation, _ = engine.speculation, Marked(engine.executor.graphs, marks)

    def use(chosen: Any) -> Callable[[], None]:
        return lambda: setattr(engine, "speculation", chosen)

    kinds = {"plain": use(None), "verify": use(speculation)}
    rows = measure(llm, given.batches, kinds, marks, given.profile)
    llm.close()
    return rows


def made_drafts(given: argparse.Namespace, common: dict[str, Any]) -> list[dict[str, Any]]:
    """A drafter of a few layers: through the host, and as ever."""
    with TemporaryDirectory() as folder:
        shape = SHAPES[given.model] | {"num_hidden_layers": given.layers}
        Path(folder, "config.json").write_text(json.dumps(shape))
        options = {"speculate": "draft", "draft_model": folder, "draft_choice": "likeliest"}
        llm, marks = LLM(**common, **options), Marks()
    engine: Any = llm.engine
    engine.executor.acceptance = ACCEPTANCE
    proposer = engine.speculation.proposer
    for graphs in (engine.executor.graphs, proposer.chains.graphs):
        Marked(graphs, marks)

    def use(target: Any) -> Callable[[], None]:
        return lambda: setattr(proposer, "target", target)

    kinds = {"drafter, by the host": use(None), "drafter": use(engine.executor)}
    rows = measure(llm, given.batches, kinds, marks, given.profile)
    llm.close()
    return rows


def main() -> None:
    """Every batch size, all kinds of rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b", choices=sorted(SHAPES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--layers", type=int, default=1, help="of the drafter; 0: none drafts")
    parser.add_argument("--profile", action="store_true", help="what the host does, by cProfile")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    common: dict[str, Any] = {
        "model": given.model, "load": "random", "max_len": PROMPT + 2 * ROOM,
        "max_seqs": max(given.batches), "draft_length": "fixed", "draft_tokens": DRAFTS,
    }  # fmt: skip
    rows = given_drafts(given, common)
    rows += made_drafts(given, common) if given.layers else []
    said = {
        "prompt": PROMPT, "drafts": DRAFTS, "acceptance": ACCEPTANCE, "steps": TIMED,
        "drafter_layers": given.layers,
    }  # fmt: skip
    header = record.header("verify_gap", said, common)
    record.write(header | {"results": rows}, given.json)


if __name__ == "__main__":
    main()
