"""The loop of every engine's driver: a load a line in, its seconds a line out.

A driver runs with its engine's own packages, so this file imports the standard library only. What
an engine prints goes to stderr; stdout belongs to the answers. `argv[1]` is the start as JSON; the
first line on stdin lets it begin, so that a process can wait until the device is free.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

#: (prompts, tokens to generate by prompt, temperature) -> tokens generated
Generate = Callable[[list[list[int]], list[int], float], int]
#: options of the start -> the engine, and what is known about it
Load = Callable[[dict[str, Any]], tuple[Generate, dict[str, Any]]]


def answers() -> Callable[[dict[str, Any]], None]:
    """Take stdout for the answers and give everybody else stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=out, flush=True)

    return answer


def run(load: Load) -> None:
    """Load the engine and its first token, say what it is, then time loads until stdin ends."""
    answer = answers()
    sys.stdin.readline()
    begin = time.perf_counter()
    generate, about = load(json.loads(sys.argv[1]))
    loaded = time.perf_counter()
    generate([[1, 2, 3, 4]], [1], 0.0)
    first = time.perf_counter()
    answer({
        "load_s": loaded - begin, "first_token_s": first - loaded, "start_s": first - begin,
        "about": about,
    })  # fmt: skip
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        n = generate(asked["prompts"], asked["outputs"], asked["temperature"])
        seconds = time.perf_counter() - begin
        wanted = sum(asked["outputs"])
        if n == wanted:
            answer({"seconds": seconds})
        else:
            answer({"error": f"{n} tokens generated instead of {wanted}"})
