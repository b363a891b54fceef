"""Tokens made for a trace's contents: a real engine finds in its cache what the trace computes."""

from typing import Any

import pytest
from golden.test_engine import make_engine

from kvarn.core.request import Request, SamplingParams
from kvarn.workload.generate import by_name
from kvarn.workload.reuse import reuse
from kvarn.workload.tokens import prompt_tokens
from kvarn.workload.trace import Trace

SIZE = 4  #: positions of a page of the engine and of a block of the trace


@pytest.mark.parametrize("index", ["hash", "radix"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("shared-prefix", {"n": 50, "prompts": 5, "prefix": 30.0, "n_in": 12.0}),
        ("multi-turn", {"sessions": 14, "prefix": 20, "n_in": 8.0, "n_out": 4.0, "max_len": 110}),
    ],
)
def test_hits_of_an_engine_are_those_of_the_trace(
    tiny_folder: Any, name: str, options: dict[str, Any], index: str
) -> None:
    made = by_name(name, block_size=SIZE, **options)
    trace = Trace(made.name, tuple(one for one in made if one.n_in < 110)[:50], SIZE, made.chain)
    engine = make_engine(tiny_folder("llama"), prefix=index, pages=3000)
    cached = 0
    for one in trace:
        prompt = prompt_tokens(one, SIZE, engine.spec.vocab, seed=1)
        engine.add(Request(one.id, prompt, SamplingParams(temperature=0.0, max_tokens=1)))
        while engine.has_work:
            for output in engine.step():
                if output.finish is not None:
                    cached += output.n_cached
    known = reuse(trace)
    assert known is not None and 0.2 < known.full < 0.95 and len(trace) >= 40
    assert cached == round(known.full * sum(one.n_in for one in trace))
