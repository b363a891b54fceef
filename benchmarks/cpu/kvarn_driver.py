"""Driver of kvarn: kvarn_driver.py MODEL THREADS [OPTION=VALUE ...]"""

import sys
from typing import Any

from driver import Burst, run


def load() -> tuple[Burst, dict[str, Any]]:
    """The engine with the options of the command line."""
    import kvarn
    from kvarn import LLM, SamplingParams

    model, threads, *options = sys.argv[1:]
    given = dict(pair.split("=", 1) for pair in options)
    llm = LLM(model, threads=int(threads), **given)

    def burst(prompts: list[list[int]], n: int) -> int:
        params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
        return sum(len(done.outputs[0].tokens) for done in llm.generate(prompts, params))

    config = {row["option"]: row["value"] for row in llm.engine.explain()["options"]}
    return burst, {"version": kvarn.__version__, "options": config}


if __name__ == "__main__":
    run(load)
