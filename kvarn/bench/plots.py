"""Drawings of a simulation (`kvarn sim --plots FOLDER`): SVG files, made with matplotlib.

Every curve carries an id in the file (`cdf-ttft`, `attainment`, `pages-NAME`), so that programs and
style sheets find it. The same run draws the same file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvarn.bench import metrics
from kvarn.bench.sim import Simulated
from kvarn.bench.sim_report import sample_of
from kvarn.core.errors import ConfigError
from kvarn.sim.run import Outcome, PageUse

MOST_POINTS = 1000  #: of a CDF: more cannot be told apart on a page
MOST_NAMED = 10  #: instances that the legend names
SIZE = (6.4, 4.0)  #: of a drawing [inches]
TARGETS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E latency"}


def ready(folder: str) -> None:
    """Make the folder; `ConfigError` if nothing can be drawn: before a long run, not after."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plots needs matplotlib: pip install kvarn[plots]") from None
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot draw into {folder}: {error.strerror}") from None


def write(done: Simulated, folder: str) -> list[Path]:
    """Draw the run into `folder`; the files. Latencies are those of completed requests."""
    ready(folder)
    path, capacity = Path(folder), done.result.get("capacity", {})
    files = [_drawn(path / "latency_cdf.svg", _cdfs, done, columns=3)]
    if done.outcome.page_use is not None:
        files.append(_drawn(path / "kv_use.svg", _kv_use, done.outcome))
    if capacity.get("find") == "rate":
        files.append(_drawn(path / "goodput.svg", _goodput, capacity, columns=2))
    return files


def _drawn(
    path: Path, draw: Callable[[Sequence[Any], Any], None], data: Any, columns: int = 1
) -> Path:
    """One file: `draw(axes, data)` on `columns` axes side by side."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    width = SIZE[0] if columns == 1 else SIZE[0] * 0.75 * columns
    with rc_context({"svg.hashsalt": "kvarn", "svg.fonttype": "none"}):
        figure = Figure(figsize=(width, SIZE[1]), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.subplots(1, columns, squeeze=False)[0], data)
        try:
            figure.savefig(path, format="svg", metadata={"Date": None})
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    return path


def latencies(outcome: Outcome) -> dict[str, list[float]]:
    """TTFT, TPOT and E2E latency of completed requests [ms], each ascending."""
    good = [sample for sample in map(sample_of, outcome.records) if sample.ok]
    return {
        "ttft": sorted(sample.ttft * 1000 for sample in good),
        "tpot": sorted(metrics.tpot(sample) * 1000 for sample in good if sample.n_output > 1),
        "e2el": sorted(sample.latency * 1000 for sample in good),
    }


def cdf(ordered: Sequence[float]) -> tuple[list[float], list[float]]:
    """(values, share of all at most that value), thinned to `MOST_POINTS`; the last stays."""
    n = len(ordered)
    step = max(1, -(-n // MOST_POINTS))
    ranks = sorted({*range(0, n, step), n - 1}) if n else []
    return [ordered[i] for i in ranks], [(i + 1) / n for i in ranks]


def _cdfs(axes: Sequence[Any], done: Simulated) -> None:
    result, targets = done.result, done.result["targets_ms"]
    for ax, (name, values) in zip(axes, latencies(done.outcome).items()):
        x, y = cdf(values)
        ax.plot(x, y, drawstyle="steps-post", gid=f"cdf-{name}")
        if name in targets:
            ax.axvline(targets[name], color="grey", linestyle="--", gid=f"target-{name}")
        ax.set(xlabel=f"{TARGETS[name]} [ms]", ylabel="share of completed requests", ylim=(0, 1.02))
        ax.grid(alpha=0.3)
    axes[1].set_title(f"{result['completed']} completed, {result['failed']} failed")


def _kv_use(axes: Sequence[Any], outcome: Outcome) -> None:
    (ax,) = axes
    use = outcome.page_use or {}
    for i, one in enumerate(outcome.instances):
        x, y = shares(use.get(one.name, PageUse()), one.control.kv.pages[0], outcome.seconds)
        label = one.name if i < MOST_NAMED else None
        ax.plot(x, y, drawstyle="steps-post", linewidth=0.8, label=label, gid=f"pages-{one.name}")
    ax.set(xlabel="virtual time [s]", ylabel="share of KV pages held by sequences", ylim=(0, 1.02))
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")


def shares(use: PageUse, pages: int, end: float) -> tuple[list[float], list[float]]:
    """(seconds, share of `pages` held) from 0 to `end` [s]."""
    x, y = [0.0], [0.0]
    for at, held in use.curve():
        x.append(min(at, end))
        y.append(held / pages)
    return [*x, end], [*y, y[-1]]


def _goodput(axes: Sequence[Any], capacity: dict[str, Any]) -> None:
    curve = capacity["curve"]
    rates = [row["rate"] for row in curve]
    left, right = axes
    for key, label in (("request_goodput", "goodput"), ("request_throughput", "throughput")):
        left.plot(rates, [row[key] for row in curve], marker="o", label=label, gid=label)
    left.set(ylabel="requests/s")
    left.legend()
    shares_ = [row["attainment"] for row in curve]
    right.plot(rates, shares_, marker="o", label="attainment", gid="attainment")
    right.axhline(capacity["attain"], color="grey", linestyle="--", gid="attain")
    right.set(ylabel="share of requests that met every target", ylim=(0, 1.02))
    for ax in axes:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("{x:g}")
        ax.set_xlabel(f"rate [{capacity['unit']}]")
        ax.grid(alpha=0.3)
        if capacity["rate"] is not None:
            ax.axvline(capacity["rate"], color="grey", linestyle=":", gid="found")
