"""Feature x feature: every pair of engine settings gives every kind of request the same tokens.

The mode is batch-invariant, so logprobs are compared to the bit, not to a tolerance.
"""

from dataclasses import fields
from itertools import combinations
from typing import Any

import pytest
from golden.test_engine import make_engine

from kvarn.core.request import Request, SamplingParams

SETTINGS: dict[str, dict[str, Any]] = {
    "radix index": {"prefix": "radix"},
    "no prefix cache": {"prefix": "none"},
    "overlapped loop": {"overlap": "on"},
    "preemption": {"pages": 26, "max_len": 100},
    "small chunks": {"budget": 7},
    "pages of 1": {"page_size": 1, "pages": 240},
    "prefill first": {"scheduler": "prefill-first"},
    "lfu eviction": {"evict": "lfu"},
    "n-gram drafts": {"speculate": "ngram", "draft_length": "fixed", "draft_tokens": 3},
    "suffix drafts": {"speculate": "suffix", "draft_length": "gammatune"},
    "drafting model": {"speculate": "draft", "draft_length": "fixed", "draft_tokens": 2},
}
SHARED = {"pages", "draft_length", "draft_tokens"}  #: options that two settings may both name

KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=12),
    "seeded": SamplingParams(seed=7, max_tokens=12),
    "filtered": SamplingParams(seed=8, top_k=20, top_p=0.8, min_p=0.01, max_tokens=12),
    "penalised": SamplingParams(
        temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.5,
        max_tokens=12,
    ),
    "biased": SamplingParams(temperature=0.0, logit_bias={5: 3.0, 6: -100.0}, max_tokens=12),
    "allowed": SamplingParams(seed=9, allowed_token_ids=(1, 2, 3), max_tokens=6),
    "stopped": SamplingParams(
        seed=10, stop_token_ids=tuple(range(40)), min_tokens=3, max_tokens=12
    ),
    "many": SamplingParams(seed=11, n=3, max_tokens=8),
    "scored": SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=4),
}  # fmt: skip


def said(sampling: SamplingParams) -> dict[str, Any]:
    """What a kind of request asks for beside the defaults."""
    usual = {field.name: getattr(SamplingParams(), field.name) for field in fields(SamplingParams)}
    return {
        name: getattr(sampling, name)
        for name, value in usual.items()
        if getattr(sampling, name) != value
    }


def outcome(folder: str, options: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Tokens, logprobs and end of every sequence; two prompts of each kind share a prefix."""
    if options.get("speculate") == "draft":
        options["draft_model"] = folder
    engine = make_engine(folder, deterministic=True, **options)
    for name, sampling in KINDS.items():
        for which in range(2):
            prompt = [3] * 21 + [10 + which, 50 - which, 7]
            engine.add(Request(f"{name} {which}", prompt, sampling))
    engine.add(Request("embedded", [3] * 21 + [4], pooling="last"))
    found: dict[tuple[str, int], Any] = {}
    while engine.has_work:
        for output in engine.step():
            entry = found.setdefault((output.request_id, output.index), [[], [], None, None, None])
            entry[0] += output.tokens
            entry[1] += output.logprobs or []
            entry[2] = entry[2] or output.prompt_logprobs
            entry[3] = entry[3] or output.finish
            entry[4] = entry[4] or output.embedding
    assert engine.control.check_integrity() == []
    engine.close()
    return found


@pytest.fixture(scope="module")
def plain(tiny_folder: Any) -> Any:
    """What the default settings give, by family."""
    return {family: outcome(tiny_folder(family), {}) for family in ("llama", "gemma2")}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("pair", list(combinations(SETTINGS, 2)), ids=" + ".join)
def test_pair(tiny_folder: Any, plain: Any, family: str, pair: tuple[str, str]) -> None:
    options: dict[str, Any] = {}
    for name in pair:
        options |= {key: value for key, value in SETTINGS[name].items() if key not in options}
    if "preemption" in pair and "pages of 1" in pair:
        options["pages"] = 104  # as much room as 26 pages of 4
    got, want = outcome(tiny_folder(family), options), plain[family]
    assert got.keys() == want.keys()
    for key in want:
        assert got[key] == want[key], key
