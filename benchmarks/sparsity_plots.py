"""Draw quality against bytes from the results of `kvarn reproduce sage-kv` and `quest`.

    python benchmarks/sparsity_plots.py    # writes docs/img/kept_bytes.svg and read_bytes.svg

Needs matplotlib (the extra `plots`). The same results draw the same files.
"""

import json
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS, IMAGES = ROOT / "benchmarks/results", ROOT / "docs/img"
#: file -> (result, the field along x, its factor, label)
DRAWINGS = {
    "kept_bytes.svg": ("reproduce_kept.json", "stored_bytes", 2**-20, "KV stored [MiB]"),
    "read_bytes.svg": ("reproduce_quest.json", "read", 1.0, "positions read a step"),
}


def curves(result: dict[str, Any], field: str) -> dict[str, list[tuple[float, float]]]:
    """(x, KL) by part, ascending; what is equal to the full cache has no place on a log axis."""
    found: dict[str, dict[float, float]] = {}
    for row in result["results"]:
        name, _, options = row["sparsity"].partition(":")
        name += ", by lot" * ("by=random" in options)
        if name != "none" and row["kl"] > 0:
            found.setdefault(name, {})[row[field]] = row["kl"]
    return {name: sorted(points.items()) for name, points in found.items()}


def draw(name: str) -> Path:
    """One file."""
    source, field, factor, label = DRAWINGS[name]
    result = json.loads((RESULTS / source).read_text())
    with rc_context({"svg.hashsalt": "kvarn", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for part, points in curves(result, field).items():
            axes.plot([x * factor for x, _ in points], [y for _, y in points], "o-", label=part)
        axes.set(xlabel=label, ylabel="KL from the full cache [nats]", xscale="log", yscale="log")
        axes.legend()
        path = IMAGES / name
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def main() -> None:
    """All of them."""
    for name in DRAWINGS:
        print(draw(name).relative_to(ROOT))


if __name__ == "__main__":
    main()
