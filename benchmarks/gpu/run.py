"""kvarn and its peers on one GPU, in one run: the yardstick.

    PYTHONPATH=. python benchmarks/gpu/run.py [--vllm-path FOLDER] [--plan kvarn:8b,vllm:8b]
                                              [--kvarn NAME:OPTION=VALUE,...] [--seconds 500]

Random weights: speed only. Every engine has its own process; a load's time is its whole `generate`
call. Ceilings (reading, matrix products) are measured first, and every load gets the floor that
follows from them. What does not fit into `--seconds` is left out and named in the result, which is
written after every engine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine import ROOT, Kind, Running
from benchmarks.gpu.workloads import Ceilings, Load, Setting, floor, settings, tiny_settings
from kvarn.bench import record
from kvarn.core.errors import KvarnError

RESULT = ROOT / "benchmarks" / "results" / "gpu_engines.json"
START_S = {"kvarn": 20.0, "vllm": 110.0}  #: what a start is taken to cost when time is short


class Yardstick:
    """The result as it grows; written after every engine."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.ends = time.monotonic() + options.seconds
        self.ceilings, gpu = measured_ceilings(options.device)
        said = {"repeats": options.repeats, "device": options.device, "y3": options.y3_requests}
        self.result = record.header("gpu_engines", said, {})
        self.result["device"]["gpus"] = [gpu] if gpu else []
        self.result |= {
            "ceilings": {name: getattr(self.ceilings, name) for name in Ceilings.__slots__},
            "starts": [], "results": [], "left_out": [],
        }  # fmt: skip

    @property
    def left(self) -> float:
        """Seconds until the run should end."""
        return self.ends - time.monotonic()

    def engine(self, running: Running) -> None:
        """Let an engine start, run its loads, keep what came of it."""
        kind, setting = running.kind, running.setting
        if self.left < START_S[kind.driver]:
            self.leave_out(running, "no time left")
            return
        taken: dict[str, list[float]] = {}
        try:
            found = running.start(self.left)
            self.result["starts"].append(
                {"engine": kind.name, "setting": setting.name, "model": setting.model} | found
            )
            self.repeats(running, taken)
        except KvarnError as error:
            self.leave_out(running, str(error))
        self.result["results"] += [
            self.row(kind, setting, load, taken[load.name])
            for load in setting.loads
            if load.name in taken
        ]
        record.write(self.result, self.options.json)

    def repeats(self, running: Running, taken: dict[str, list[float]]) -> None:
        """Seconds by load into `taken`: all loads once to warm up, then again and again in turn;
        no more than the time allows."""
        setting = running.setting
        asked = [(load, load.make()) for load in setting.loads]
        n = max(1, self.options.repeats // 4) if setting.fp8 else self.options.repeats
        for repeat in range(n + 1):
            for load, requests in asked:
                expected = max(taken.get(load.name, [0.0]))
                if taken and self.left < 1.5 * expected:
                    return
                moved = requests.moved(repeat)
                if repeat == 0 and setting.fp8:  # its load is long: the first tokens warm it up
                    moved.outputs = [min(8, length) for length in moved.outputs]
                seconds = running.seconds(moved, self.left)
                print(
                    f"  {running.kind.name} {setting.model} {load.name}: {seconds:.4f} s "
                    f"({repeat or 'warm-up'})",
                    file=sys.stderr,
                )
                if repeat > 0:
                    taken.setdefault(load.name, []).append(seconds)

    def row(self, kind: Kind, setting: Setting, load: Load, runs: list[float]) -> dict[str, Any]:
        """A load's figures, beside what the device could do."""
        requests = load.make()
        least = floor(setting.model, load, self.ceilings, setting.fp8)
        seconds = statistics.median(runs)
        values = {
            "input_tok_s": requests.n_input / seconds,
            "output_tok_s": sum(requests.outputs) / seconds,
            "seconds": seconds,
        }
        return {
            "engine": kind.name, "setting": setting.name, "model": setting.model,
            "load": load.name, "title": load.title, "metric": load.metric,
            "value": values[load.metric], **values, "runs": runs,
            "floor_s": least.seconds, "share": least.seconds / seconds,
            "read_gb_s": least.read_bytes / seconds / 1e9,
            "tflop_s": least.flops / seconds / 1e12,
        }  # fmt: skip

    def leave_out(self, running: Running, why: str) -> None:
        """Say what was not measured."""
        kind, setting = running.kind.name, running.setting.name
        print(f"left out: {kind} {setting}: {why}", file=sys.stderr)
        self.result["left_out"].append({"engine": kind, "setting": setting, "why": why})
        record.write(self.result, self.options.json)


def measured_ceilings(device: str) -> tuple[Ceilings, str | None]:
    """Ceilings of the device and its name, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.limits", *(["cpu"] * (device == "cpu"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KvarnError(f"the ceilings could not be measured: {done.stderr.strip()[-500:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    gpu = found.pop("gpu")
    return Ceilings(**found), gpu


def kinds(options: argparse.Namespace) -> list[Kind]:
    """kvarn in the variants asked for, then every peer that is there."""
    found = []
    for variant in options.kvarn:
        name, _, pairs = variant.partition(":")
        given = dict(pair.split("=", 1) for pair in pairs.split(",") if pair)
        found.append(Kind(name, "kvarn", given))
    vllm = Kind("vllm", "vllm", path=[options.vllm_path] if options.vllm_path else [])
    if options.vllm_path or vllm.importable():
        found.append(vllm)
    return found


def planned(options: argparse.Namespace) -> list[tuple[Kind, Setting]]:
    """Which engine starts how, in order."""
    known = tiny_settings() if options.tiny else settings(options.y3_requests)
    pairs = {f"{kind.name}:{one.name}": (kind, one) for kind in kinds(options) for one in known}
    wanted = options.plan.split(",") if options.plan else list(pairs)
    unknown = [name for name in wanted if name not in pairs]
    if unknown:
        raise KvarnError(f"unknown starts {unknown}; known: {', '.join(pairs)}")
    return [pairs[name] for name in wanted]


def show(result: dict[str, Any]) -> None:
    """The table of all loads."""
    names = list(dict.fromkeys(row["engine"] for row in result["results"]))
    print(f"{'load':32}" + "".join(f"{name:>24}" for name in names) + f"{'floor':>12}")
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["results"]:
        groups.setdefault((row["model"], row["load"]), {})[row["engine"]] = row
    for (model, load), rows in groups.items():
        any_row = next(iter(rows.values()))
        cells = [
            f"{rows[name]['value']:14.4g} ({100 * rows[name]['share']:3.0f} %)"
            if name in rows
            else "-"
            for name in names
        ]
        best = any_row["value"] * (
            any_row["share"] if any_row["metric"] == "seconds" else 1 / any_row["share"]
        )
        print(f"{model + ' ' + load:32}" + "".join(f"{c:>24}" for c in cells) + f"{best:12.4g}")
    print("(tokens a second, seconds for a first token; in brackets: the floor's time over ours)")
    for start in result["starts"]:
        print(f"{start['engine']} {start['setting']}: first token after {start['start_s']:.1f} s")


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvarn", action="append", help="NAME:OPTION=VALUE,...; may be repeated")
    parser.add_argument("--vllm-path", help="folder of vLLM's packages")
    parser.add_argument("--plan", help="ENGINE:SETTING,... in order; default: all")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1e5, help="time for everything")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small loads, to try the script out")
    parser.add_argument("--y3-requests", type=int, default=256)
    parser.add_argument("--json", default=str(RESULT))
    options = parser.parse_args(words)
    options.kvarn = options.kvarn or ["kvarn"]
    return options


def main(words: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parse(words)
    try:
        plan = planned(options)
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        yardstick = Yardstick(options)
    except KvarnError as error:
        print(error, file=sys.stderr)
        return 2
    # a peer takes long to import: that happens beside the start of the engine before it
    waiting = [Running(*pair, options.device) for pair in plan[:1]]
    for following in [*plan[1:], None]:
        if following is not None:
            waiting.append(Running(*following, options.device))
        with waiting.pop(0) as running:
            yardstick.engine(running)
    show(yardstick.result)
    return 0 if yardstick.result["results"] else 1


if __name__ == "__main__":
    sys.exit(main())
