"""Speculation against batch size, with synthetic acceptance on random weights: speed only.

    python benchmarks/speculation_batches.py [--model llama-3.1-8b] [--json FILE]

Every kind of speculation serves the same requests as no speculation in the same run; the ratio of
their output rates is the result. The drafts cost nothing, so this is what verification allows, not
what a real drafter brings.
"""

import argparse
from statistics import median
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM

BATCHES = (1, 4, 16, 64, 128, 256)
PROMPT, OUTPUT, REPEATS = 128, 128, 3
#: name: (length control, longest draft, acceptance of each token)
KINDS: dict[str, tuple[str, int, float] | None] = {
    "none": None,
    "fixed 3, 0.8": ("fixed", 3, 0.8),
    "survival, 0.8": ("survival", 5, 0.8),
    "survival, 0.3": ("survival", 5, 0.3),
    "fixed 5, 0.9": ("fixed", 5, 0.9),
}


def options(model: str, kind: tuple[str, int, float] | None) -> dict[str, Any]:
    """Of an engine."""
    found: dict[str, Any] = {"model": model, "load": "random", "max_len": 512, "max_seqs": 256}
    if kind is not None:
        control, most, share = kind
        found |= {
            "speculate": "synthetic", "draft_length": control, "draft_tokens": most,
            "synthetic_acceptance": share,
        }  # fmt: skip
    return found


def rates(llm: LLM, batch: int) -> list[float]:
    """Output tokens a second of several runs [tokens/s]."""
    params, found = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=True), []
    for repeat in range(REPEATS + 1):
        prompts = [
            [1 + (7 * i + 13 * j + repeat) % 1000 for j in range(PROMPT)] for i in range(batch)
        ]
        began = perf_counter()
        llm.generate(prompts, params)
        found.append(batch * OUTPUT / (perf_counter() - began))
    return found[1:]  # the first compiles and captures


def main() -> None:
    """All kinds at all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--batches", type=int, nargs="*", default=BATCHES)
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    rows, plain = list[dict[str, Any]](), dict[int, float]()
    for name, kind in KINDS.items():
        llm = LLM(**options(given.model, kind))
        for batch in given.batches:
            before = llm.engine.stats()
            found = rates(llm, batch)
            after = llm.engine.stats()
            plain.setdefault(batch, median(found))
            drafted = after.drafted_tokens - before.drafted_tokens
            rows.append(
                {
                    "kind": name, "batch": batch, "tokens_per_s": median(found), "runs": found,
                    "ratio": median(found) / plain[batch], "drafted": drafted,
                    "accepted": after.accepted_tokens - before.accepted_tokens,
                    "steps": after.steps - before.steps,
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
        llm.close()
        del llm
        said = {"prompt": PROMPT, "output": OUTPUT, "repeats": REPEATS, "synthetic": True}
        header = record.header("speculation_batches", said, options(given.model, None))
        record.write(header | {"results": rows}, given.json)


if __name__ == "__main__":
    main()
