"""`kvarn bench startup`: what a fresh process spends until its first token, stage by stage."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from kvarn.bench import record
from kvarn.bench.options import Startup
from kvarn.core.errors import ConfigError, KvarnError

#: what the fresh process runs: options as JSON on stdin, stages as JSON on its last line
PROGRAM = """
import json, sys, time
begin = time.perf_counter()
given = json.load(sys.stdin)
import torch
imported = time.perf_counter()
from kvarn import LLM, SamplingParams
llm = LLM(**given)
ready = time.perf_counter()
llm.generate([[1, 2, 3, 4]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
token = time.perf_counter()
found = llm.engine.explain()
llm.close()
print(json.dumps({
    "import_torch": imported - begin, "engine": ready - imported, "first_token": token - ready,
    "stages": found["startup"],
    "options": {row["option"]: row["value"] for row in found["options"]},
}))
"""


def run(given: Mapping[str, Any], how: Startup) -> dict[str, Any]:
    """Start the engine with the options `given` in fresh processes and record each stage."""
    if how.repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {how.repeats}")
    runs = [_once(given, how.timeout) for _ in range(how.repeats)]
    names = ("process", "import_torch", "engine", "first_token", "total")
    result = record.header("startup", asdict(how), runs[0].pop("options"))
    result["model_id"] = result["config"]["model"]
    result |= {f"{name}_s": statistics.median(one[name] for one in runs) for name in names}
    for one in runs[1:]:
        one.pop("options")
    return result | {"runs": runs}


def _once(given: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """Stages of one fresh process [s]; `process` is Python's own start and end."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps(dict(given)), capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise KvarnError(f"the engine did not answer within {timeout:g} s") from None
    total = time.perf_counter() - begin
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        said = last[0].partition("Error: ")  # the exception's class says nothing to a user
        raise KvarnError(f"the engine did not start: {said[2] or said[0]}")
    stages: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    inside = stages["import_torch"] + stages["engine"] + stages["first_token"]
    return {"process": total - inside, **stages, "total": total}
