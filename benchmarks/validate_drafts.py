"""Does the simulator predict what drafts bring? Ratios of output rates beside those of an H200.

    python benchmarks/validate_drafts.py [--json FILE]

The measured ratios are in `benchmarks/results`: requests that come together, random weights, what
stands of the drafts drawn with a probability. The same is simulated, priced by the roofline; of
this GPU's times it knows only how long the device waits for the host between two steps that verify.
Every measured ratio of a fixed length is there.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from cells import RESULTS

from kvarn.bench import record, sim
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.models.shapes import SHAPES

FREE, PRICED = "speculation_h200.json", "speculation_one_layer_h200.json"
MODEL, DEVICE = "llama-3.1-8b", "H200"
DRAWS = 8  #: seeds of what stands, whose times are summed up where few sequences run
FEW = 16


def measured(name: str, key: str) -> list[tuple[int, float, int, float]]:
    """(tokens a draft, share that stands, batch, rate over plain decoding) of fixed lengths."""
    found = []
    for row in json.loads((RESULTS / name).read_text())[key]:
        words = row["kind"].removeprefix("fixed ").split(", ")
        if row["kind"].startswith("fixed") and len(words) == 2:
            found.append((int(words[0]), float(words[1]), row["batch"], row["ratio"]))
    return found


def seconds(fleet: Fleet, batch: int, tokens: int) -> float:
    """Of requests that come together, over some draws."""
    work = Workload(num_prompts=batch, input_len=tokens, output_len=tokens)
    draws = DRAWS if batch <= FEW else 1
    runs = [sim.run(replace(fleet, draft_seed=i), work, Traffic()) for i in range(draws)]
    return fmean(run.result["duration"] for run in runs)


def rows(name: str, key: str, drafter: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measured and simulated, by kind of drafting and batch."""
    tokens = json.loads((RESULTS / name).read_text())["workload"]["output"]
    plain = Fleet(model=MODEL, device=DEVICE, max_len=512)
    base = {
        batch: seconds(plain, batch, tokens) for batch in {one[2] for one in measured(name, key)}
    }
    for length, share, batch, ratio in measured(name, key):
        fleet = replace(
            plain, draft_length="fixed", draft_tokens=length, acceptance=str(share), **drafter
        )
        found = base[batch] / seconds(fleet, batch, tokens)
        yield {
            "file": name, "tokens": length, "acceptance": share, "batch": batch,
            "measured": ratio, "simulated": found, "over": found / ratio,
        }  # fmt: skip


def main() -> None:
    """Print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the result")
    path = parser.parse_args().json
    header = record.header("sim_drafts", {"draws": DRAWS}, {"model": MODEL, "device": DEVICE})
    with tempfile.TemporaryDirectory() as folder:
        layer = Path(folder) / "config.json"
        layer.write_text(json.dumps(SHAPES[MODEL] | {"num_hidden_layers": 1}))
        priced = {"speculate": "draft", "draft_model": str(layer)}
        found = [
            *rows(FREE, "results", {"speculate": "synthetic"}),
            *rows(PRICED, "priced_results", priced),
        ]
    for row in found:
        print(*(f"{x:.3g}" if isinstance(x, float) else x for x in row.values()))
    print("median of simulated over measured:", median(row["over"] for row in found))
    record.write(header | {"results": found}, path)


if __name__ == "__main__":
    main()
