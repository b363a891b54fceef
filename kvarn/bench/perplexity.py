"""Perplexity of a fixed text: what a number format costs in quality, on the path that serves.

The text is cut into windows of `window` tokens, a new one every `stride` tokens; a window scores
the tokens that none before it scored, so every token (but the first) counts once, with at least
window - stride tokens before it. Scores are the engine's own prompt logprobs: the same steps,
kernels and cache as any request's.
"""

import hashlib
import math
import statistics
import time
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvarn.bench import record
from kvarn.bench.options import Perplexity
from kvarn.core.config import CHOICES
from kvarn.core.errors import ConfigError, nearest
from kvarn.core.request import SamplingParams

TEXT = "alice.txt"  #: the text that comes with kvarn: see texts/README.md


@dataclass(slots=True)
class Scored:
    """What one engine says of the text."""

    config: dict[str, Any]  #: options in force
    logprobs: list[float]  #: of each token, natural logarithm
    seconds: float

    @property
    def perplexity(self) -> float:
        """exp of the mean negative logprob."""
        return math.exp(-statistics.fmean(self.logprobs))


def forms(given: dict[str, Any], how: Perplexity) -> list[dict[str, Any]]:
    """The engine's options of each run; the one to compare with comes last."""
    if how.window < 2 or not 0 < how.stride < how.window:
        raise ConfigError(
            f"stride={how.stride} must be at least 1 and below window={how.window} (at least 2)"
        )
    runs = [given | _form(word) for word in how.form] or [dict(given)]
    return runs + ([given | _form(how.against)] if how.against else [])


def _form(word: str) -> dict[str, Any]:
    """Options of "float32" (a dtype, not quantised) or "int4" (a quantisation)."""
    if word in CHOICES["dtype"] and word != "auto":
        return {"dtype": word, "quantization": "none"}
    if word in CHOICES["quantization"] and word not in ("auto", "none"):
        return {"quantization": word}
    known = set(CHOICES["dtype"]) | set(CHOICES["quantization"]) - {"none"}
    raise ConfigError(f"no number format is called {word!r}{nearest(word, known - {'auto'})}")


def read_text(how: Perplexity) -> str:
    """The text to score."""
    if not how.text:
        return (files("kvarn.bench") / "texts" / TEXT).read_text(encoding="utf-8")
    try:
        return Path(how.text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {how.text}: {error}") from None


def score(llm: Any, text: str, how: Perplexity) -> Scored:
    """Logprobs of every token of the text but the first."""
    if llm.tokenizer is None:
        raise ConfigError("random weights have no tokenizer and no quality: give a real model")
    begin: list[int] = llm.tokenizer.encode("")  # what the model expects before any text
    ids: list[int] = llm.tokenizer.encode(text, add_special=False)
    spans = windows(len(ids), how.window, how.stride)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, temperature=0.0)
    began = time.perf_counter()
    done = llm.generate([begin + ids[start:end] for start, _, end in spans], params)
    seconds = time.perf_counter() - began
    logprobs: list[float] = []
    for (start, first, _), completion in zip(spans, done, strict=True):
        scores = completion.prompt_logprobs or []
        logprobs += [entry.logprob for entry in scores[len(begin) + first - start :]]
    return Scored(_config(llm), logprobs, seconds)


def windows(n: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(first token of the window, first token that it scores, its end) of each window."""
    if n < 2:
        raise ConfigError(f"a text of {n} tokens has nothing to score")
    spans = [(0, 1, min(n, window))]
    while spans[-1][2] < n:
        start, _, end = spans[-1]
        spans.append((start + stride, end, min(n, start + stride + window)))
    return spans


def result(runs: list[Scored], text: str, how: Perplexity) -> dict[str, Any]:
    """The record: one row a run, with its ratio to the last one where that was asked for."""
    base = runs[-1] if how.against else None
    workload = {
        "text": how.text or TEXT,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tokens": len(runs[0].logprobs),
        "window": how.window,
        "stride": how.stride,
    }
    rows = [_row(run, base) for run in runs]
    return record.header("perplexity", workload, runs[0].config) | {"results": rows}


def _row(run: Scored, base: Scored | None) -> dict[str, Any]:
    row = {
        "dtype": run.config["dtype"],
        "quantization": run.config["quantization"],
        "perplexity": run.perplexity,
        "seconds": run.seconds,
        "ratio": None,
        "ratio_error": None,
    }
    if base is not None:
        # token by token: the text's own spread cancels
        more = [b - a for a, b in zip(run.logprobs, base.logprobs, strict=True)]
        row["ratio"] = math.exp(statistics.fmean(more))
        row["ratio_error"] = row["ratio"] * statistics.stdev(more) / math.sqrt(len(more))
    return row


def _config(llm: Any) -> dict[str, Any]:
    return {row["option"]: row["value"] for row in llm.engine.explain()["options"]}
