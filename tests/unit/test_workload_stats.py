"""Statistics of the public traces, to the digits that are published with them."""

import os
from pathlib import Path

import pytest

from kvarn.workload.load import open_trace
from kvarn.workload.reuse import full_blocks, lru_curve
from kvarn.workload.stats import describe
from kvarn.workload.trace import Trace
from kvarn.workload.transform import limit

TRACES = Path(os.environ.get("KVARN_TRACES", Path(__file__).parents[3] / "shared" / "traces"))

#: file: requests, mean/p50/p90/p99/max of prompts and of answers, block and token reuse [%]
PUBLISHED = {
    "mooncake_conversation_trace.jsonl.gz": (
        12031, (12035, 6909, 27367, 85401, 126195), (343, 350, 597, 1120, 2000), (36.6, 37.4)
    ),
    "mooncake_synthetic_trace.jsonl.gz": (
        3993, (15325, 11587, 38615, 66458, 191378), (149, 69, 389, 769, 893), (64.0, 65.1)
    ),
    "AzureLLMInferenceTrace_2023_code.csv.gz": (
        8819, (2048, 1469, 5194, 7436, 7437), (28, 13, 55, 252, 1899), None
    ),
    "AzureLLMInferenceTrace_2023_conv.csv.gz": (
        19366, (1155, 1020, 2735, 4142, 14050), (211, 129, 424, 601, 1000), None
    ),
}  # fmt: skip


def opened(name: str) -> Trace:
    if not (TRACES / name).is_file():
        pytest.skip(f"no {TRACES / name}")
    return open_trace(str(TRACES / name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name):
    requests, n_in, n_out, shares = PUBLISHED[name]
    found = describe(opened(name))
    assert found.requests == requests
    for one, figures in ((found.n_in, n_in), (found.n_out, n_out)):
        assert (round(one.mean), one.p50, one.p90, one.p99, one.max) == figures
    if shares is None:
        assert found.reuse is None
    else:
        got = (round(100 * found.reuse.blocks, 1), round(100 * found.reuse.tokens, 1))
        assert got == shares


def brute_force(trace: Trace, capacity: int) -> float:
    cache: list[int] = []  # the most recent last
    hits = 0
    for one in trace:
        blocks = full_blocks(one, trace.block_size)
        hits += sum(block in cache for block in blocks)
        for block in reversed(blocks):
            if block in cache:
                cache.remove(block)
            cache.append(block)
        cache = cache[-capacity:] if capacity else []
    return hits * trace.block_size / sum(one.n_in for one in trace)


def test_stack_distances_equal_an_lru_cache():
    trace = limit(opened("mooncake_conversation_trace.jsonl.gz"), 500)
    curve = lru_curve(trace)
    capacities = (0, 1, 50, 400, 2000, 1 << 20)
    rates = [curve.hit_rate(capacity) for capacity in capacities]
    assert rates == pytest.approx([brute_force(trace, capacity) for capacity in capacities])
    assert rates == sorted(rates) and rates[-1] == curve.unlimited > 0
    assert curve.unlimited == pytest.approx(describe(trace).reuse.full)


#: file: span [s], requests/s, CV of the gaps; all from the traces' own page
TIMES = {
    "mooncake_conversation_trace.jsonl.gz": (3537, 3.40, None),
    "mooncake_synthetic_trace.jsonl.gz": (1022, 3.91, None),
    "AzureLLMInferenceTrace_2023_code.csv.gz": (3436, 2.57, 13.2),
    "AzureLLMInferenceTrace_2023_conv.csv.gz": (3502, 5.53, 1.09),
}


@pytest.mark.parametrize("name", TIMES)
def test_published_spans_rates_and_bursts(name):
    span, rate, cv = TIMES[name]
    found = describe(opened(name))
    assert (round(found.span), round(found.rate, 2)) == (span, rate)
    if cv is not None:
        assert round(found.cv, 1 if cv > 10 else 2) == cv


def test_what_else_is_published():
    found = describe(opened("mooncake_conversation_trace.jsonl.gz"))
    assert round(100 * found.reuse.once, 1) == 75.8
    chats = describe(opened("sharegpt_llama-3.1-8b_300_sps10.jsonl.gz"))
    figures = (chats.requests, round(chats.n_in.mean), round(100 * chats.reuse.blocks, 1))
    assert figures == (300, 857, 7.7) and round(chats.n_out.mean) == 653
    lengths = describe(opened("vidur_arxiv_summarization_lengths.csv.gz"))
    shown = [(round(one.mean), one.p50, one.p90, one.max) for one in (lengths.n_in, lengths.n_out)]
    assert shown == [(2588, 2730, 3702, 4054), (291, 167, 372, 4056)]
    assert (lengths.requests, lengths.rate, lengths.reuse) == (28257, None, None)
