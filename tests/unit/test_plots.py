"""`kvarn sim --plots`: SVG files with the curves that the run gave, and pages in use over time."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from kvarn.bench import plots, sim
from kvarn.bench.options import Fleet, Traffic, Workload
from kvarn.cli import main
from kvarn.sim import run
from kvarn.sim.run import PageUse

SVG = "{http://www.w3.org/2000/svg}"
WORDS = ["sim", "--num-prompts", "40", "--input-len", "512", "--request-rate", "20"]


def simulated(**options) -> sim.Simulated:
    work = Workload(num_prompts=40, input_len=512, output_len=40)
    return sim.run(Fleet(instances=2), work, Traffic(request_rate=20.0, **options))


def curves(path: Path) -> dict[str, ET.Element]:
    """Drawn elements by id; the file must be well-formed."""
    return {g.get("id", ""): g for g in ET.parse(path).iter(f"{SVG}g") if g.get("id")}


def texts(path: Path) -> str:
    return " ".join(t.text or "" for t in ET.parse(path).iter(f"{SVG}text"))


def test_a_run_draws_latencies_and_kv_use(tmp_path):
    folder = tmp_path / "made" / "plots"
    assert main([*WORDS, "--instances", "2", "--goodput", "ttft:90", "--plots", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"latency_cdf.svg", "kv_use.svg"}
    found = curves(folder / "latency_cdf.svg")
    assert {"cdf-ttft", "cdf-tpot", "cdf-e2el", "target-ttft"} <= found.keys()
    assert "target-tpot" not in found
    assert found["cdf-ttft"].find(f"{SVG}path").get("d").count("L") >= 40
    said = texts(folder / "latency_cdf.svg")
    assert "TTFT [ms]" in said and "40 completed, 0 failed" in said
    assert {"pages-llama-3.1-8b-0", "pages-llama-3.1-8b-1"} <= curves(folder / "kv_use.svg").keys()


def test_a_search_draws_goodput_and_attainment_against_the_rate(tmp_path):
    out = tmp_path / "result.json"
    words = [*WORDS, "--find", "rate", "--tolerance", "0.3", "--goodput", "ttft:100", "tpot:8"]
    assert main([*words, "--plots", str(tmp_path), "--json", str(out)]) == 0
    found = curves(tmp_path / "goodput.svg")
    assert {"goodput", "throughput", "attainment", "attain", "found"} <= found.keys()
    points = len(json.loads(out.read_text())["capacity"]["curve"])
    assert len(list(found["attainment"].iter(f"{SVG}use"))) == points, "a mark for each rate"


def test_the_same_run_draws_the_same_file(tmp_path):
    done = simulated(plots="yes")
    first, second = (plots.write(done, str(tmp_path / name)) for name in "ab")
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


def test_a_run_without_completions_is_drawn_too(tmp_path):
    done = sim.run(
        Fleet(pages=2), Workload(num_prompts=3, input_len=512), Traffic(plots=str(tmp_path))
    )
    assert done.result["completed"] == 0
    assert len(plots.write(done, str(tmp_path))) == 2


def test_a_cdf_ends_at_one_and_is_thinned():
    assert plots.cdf([]) == ([], [])
    assert plots.cdf([3.0, 5.0]) == ([3.0, 5.0], [0.5, 1.0])
    values = [float(i) for i in range(12_345)]
    x, y = plots.cdf(values)
    assert len(x) <= plots.MOST_POINTS + 1 and (x[-1], y[-1]) == (12_344.0, 1.0)
    assert all(share == (value + 1) / 12_345 for value, share in zip(x, y, strict=True))


# pages in use


def test_pages_rise_while_requests_run_and_are_all_given_back():
    done = simulated(plots="yes")
    for one in done.outcome.instances:
        use, pages = done.outcome.page_use[one.name], one.control.kv.pages[0]
        x, y = plots.shares(use, pages, done.outcome.seconds)
        assert x == sorted(x) and x[-1] == done.outcome.seconds
        assert y[0] == y[-1] == 0.0
        whole = -(-(512 + 40) // 16) / pages  # of one request
        assert whole * 0.9 < max(y) < 1


def test_nothing_is_sampled_unless_asked_and_sampling_changes_nothing():
    plain, drawn = simulated(), simulated(plots="yes")
    assert plain.outcome.page_use is None
    times = [[(one.first, one.end) for one in done.outcome.records] for done in (plain, drawn)]
    assert times[0] == times[1]


def test_memory_stays_bounded_and_the_peak_is_kept(monkeypatch):
    monkeypatch.setattr(run, "MOST_SLOTS", 16)
    use = PageUse(width=10)
    for i in range(1000):
        use.saw(7 * i, 99 if i == 500 else i % 7)
    assert len(use.slots) <= 16 and use.width > 10
    points = list(use.curve())
    assert max(held for _, held in points) == 99
    assert points[-1][1] == 999 % 7
    peak = next(at for at, held in points if held == 99)
    assert abs(peak * 1e9 - 3500) <= use.width


# errors


def no_run(monkeypatch) -> None:
    """Let a simulation fail the test."""
    monkeypatch.setattr(sim, "run", lambda *_: pytest.fail("simulated first"))


def test_missing_matplotlib_is_said_before_the_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    no_run(monkeypatch)
    assert main([*WORDS, "--plots", str(tmp_path)]) == 2
    assert "pip install kvarn[plots]" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_an_error(monkeypatch, tmp_path, capsys):
    no_run(monkeypatch)
    (tmp_path / "file").write_text("")
    assert main([*WORDS, "--plots", str(tmp_path / "file" / "x")]) == 2
    assert "cannot draw into" in capsys.readouterr().err


def test_matplotlib_is_not_imported_unless_asked():
    code = """
import sys
from kvarn.bench import capacity, plots, sim
from kvarn.bench.options import Fleet, Traffic, Workload
sim.run(Fleet(), Workload(num_prompts=2), Traffic())
sys.exit("matplotlib" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
