"""The loop of every engine's driver: a burst of prompts a line in, its seconds a line out.

A driver runs under its engine's own interpreter, so this file imports the standard library only.
What an engine prints goes to stderr; stdout belongs to the answers.
"""

import json
import os
import sys
import time
from collections.abc import Callable

Burst = Callable[[list[list[int]], int], int]  #: (prompts, new tokens each) -> tokens generated


def answers() -> "Callable[[dict], None]":
    """Take stdout for the answers and give everybody else stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict) -> None:
        print(json.dumps(value), file=out, flush=True)

    return answer


def run(load: "Callable[[], tuple[Burst, dict]]") -> None:
    """Load the engine, say what it is, then time bursts until stdin ends."""
    answer = answers()
    begin = time.perf_counter()
    burst, about = load()
    answer({"ready": time.perf_counter() - begin, "about": about})
    for line in sys.stdin:
        asked = json.loads(line)
        begin = time.perf_counter()
        n_tokens = burst(asked["prompts"], asked["n"])
        seconds = time.perf_counter() - begin
        wanted = len(asked["prompts"]) * asked["n"]
        if n_tokens != wanted:
            answer({"error": f"{n_tokens} tokens generated instead of {wanted}"})
        else:
            answer({"seconds": seconds})
