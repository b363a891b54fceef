"""What the offline benchmarks use of the engine: token-id prompts in, lengths and times out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvarn.core.request import SamplingParams


@dataclass(slots=True)
class Burst:
    """Requests that were given to the engine together."""

    seconds: float  #: from the first request to the last token
    steps: int  #: of the engine
    lengths: list[tuple[int, int, int]]  #: (prompt, cached, generated) tokens a request
    first_token: list[float]  #: arrival to first token [s]
    total: list[float]  #: arrival to last token [s]

    @property
    def n_output(self) -> int:
        """Tokens generated."""
        return sum(n for _, _, n in self.lengths)

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(n for n, _, _ in self.lengths)


def burst(llm: Any, prompts: Sequence[list[int]], n_outputs: Sequence[int]) -> Burst:
    """Generate greedily, past end-of-sequence tokens, exactly `n_outputs` tokens."""
    params = [
        SamplingParams(max_tokens=n, min_tokens=n, temperature=0.0, ignore_eos=True)
        for n in n_outputs
    ]
    steps = llm.engine.stats().steps
    begin = time.perf_counter()
    completions = llm.generate(list(prompts), params)
    seconds = time.perf_counter() - begin
    return Burst(
        seconds,
        llm.engine.stats().steps - steps,
        [(len(c.prompt_tokens), c.n_cached, len(c.outputs[0].tokens)) for c in completions],
        [c.timings.first_token for c in completions],
        [c.timings.total for c in completions],
    )
