"""`kvarn reproduce streamingllm`: perplexity of a stream far longer than the cache.

A text of `TIMES` times the cache goes through sinks and window position by position; beside it the
window that is computed anew for every few tokens (the card's baseline: dear, and never out of
range), a window without sinks, more and fewer sinks, and sinks at their place in the text.
"""

import math
from collections.abc import Iterator
from importlib.resources import files
from statistics import fmean
from typing import Any

from kvarn.bench import record
from kvarn.bench.perplexity import windows
from kvarn.core.errors import ConfigError
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM

BUDGET, TIMES = 128, 8  #: positions of the cache; texts are so many times longer
ANEW = 16  #: tokens scored by one recomputed window
SINKS = (0, 1, 2, 4, 8)


def run(model: str) -> dict[str, Any]:
    """The rows, as a result."""
    length = BUDGET * TIMES
    llm = LLM(model, max_len=length + 8, max_seqs=16, dtype="float32", prefix="none")
    if llm.tokenizer is None:
        raise ConfigError("streamingllm is judged on a text, and this model has no tokenizer")
    text = (files("kvarn.bench") / "texts" / "alice.txt").read_text(encoding="utf-8")
    ids: list[int] = llm.tokenizer.encode(text, add_special=False)[:length]
    part = f"streamingllm:budget={BUDGET},streamed=true"
    rules = {"full cache": "none"} | {f"sinks={n}": f"{part},sinks={n}" for n in SINKS}
    rules["sinks=4 at their place in the text"] = f"{part},sinks=4,positions=text"
    rows = [_row("window computed anew", _anew(llm, ids))]
    rows += map(_row, rules, _scores(llm, ids, list(rules.values())))
    said = {"budget": BUDGET, "tokens": length, "anew": ANEW}
    header = record.header("reproduce-streaming", said, {"model": model, "dtype": "float32"})
    return header | {"experiment": "streamingllm", "results": rows}


def _row(name: str, scores: list[float]) -> dict[str, Any]:
    """Perplexity of what lies beyond the first cache-full."""
    return {"setting": name, "perplexity": math.exp(-fmean(scores)), "tokens": len(scores)}


def _scores(llm: LLM, ids: list[int], rules: list[str]) -> Iterator[list[float]]:
    """Logprobs of the tokens beyond the cache, the same text under each rule at once."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    for one in llm.generate([ids] * len(rules), params, sparsity=rules):
        said = one.prompt_logprobs or []
        yield [entry.logprob for entry in said[BUDGET:] if entry is not None]


def _anew(llm: LLM, ids: list[int]) -> list[float]:
    """The same, each few tokens at the end of a window of their own."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    spans = windows(len(ids), BUDGET, ANEW)[1:]
    done = llm.generate([ids[start:end] for start, _, end in spans], params)
    scores = list[float]()
    for (start, first, _), one in zip(spans, done, strict=True):
        said = one.prompt_logprobs or []
        scores += [entry.logprob for entry in said[first - start :] if entry is not None]
    return scores


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    best = result["results"][0]["perplexity"]
    return [
        f"{row['setting']:40}{row['perplexity']:>10.2f}{row['perplexity'] / best:>8.3f}x"
        for row in result["results"]
    ]
