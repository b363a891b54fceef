"""Statistics, arrivals, workloads, metrics, costs and comparison of the benchmarks."""

import gzip
import json
import math
from collections import Counter
from dataclasses import asdict
from itertools import accumulate
from random import Random

import numpy as np
import pytest

from kvarn.bench import compare, cost, metrics, record
from kvarn.bench.arrivals import arrival_times
from kvarn.bench.client import Sample
from kvarn.bench.options import Workload
from kvarn.bench.presets import PRESETS, bursts, find_preset
from kvarn.bench.prompts import make_jobs
from kvarn.bench.stats import percentile, summary
from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec

SPEC = ModelSpec(
    family="llama", name="tiny", n_layers=2, hidden=8, ffn=16, n_heads=2, n_kv_heads=1,
    head_dim=4, vocab=32, max_len=64, tie_embeddings=True,
)  # fmt: skip


def test_percentiles_are_numpy_s():
    values = sorted(Random(0).random() for _ in range(101))
    for share in (0, 12.5, 50, 99, 99.9, 100):
        assert percentile(values, share) == pytest.approx(np.percentile(values, share))


def test_summary_has_the_names_of_vllm_bench_in_milliseconds():
    found = summary("ttft", [0.1, 0.2, 0.6], (50, 99.9))
    assert set(found) == {
        "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p50_ttft_ms", "p99.9_ttft_ms"
    }  # fmt: skip
    assert found["mean_ttft_ms"] == pytest.approx(300)
    assert found["std_ttft_ms"] == pytest.approx(np.std([100, 200, 600]))
    assert summary("itl", [], (99,))["p99_itl_ms"] == 0


def test_arrivals_keep_the_rate_and_their_shape():
    n = 4000
    spread = {}
    for burstiness in (0.25, 1.0, 4.0):
        times = arrival_times(n, 10.0, burstiness, Random(1))
        assert times[-1] == pytest.approx(n / 10)
        assert times == sorted(times)
        gaps = np.diff([0.0, *times])
        spread[burstiness] = gaps.std() / gaps.mean()
    for burstiness, cv in spread.items():
        assert cv == pytest.approx(1 / math.sqrt(burstiness), rel=0.15)


def test_fixed_interval_and_all_at_once():
    assert arrival_times(3, 2.0, math.inf, Random(0)) == [0.5, 1.0, 1.5]
    assert arrival_times(3, math.inf, 1.0, Random(0)) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("rate", "burstiness"), [(0, 1), (-1, 1), (1, 0), (math.nan, 1)])
def test_impossible_arrivals_are_refused(rate, burstiness):
    with pytest.raises(ConfigError, match="above 0"):
        arrival_times(3, rate, burstiness, Random(0))


def test_random_prompts_have_lengths_in_the_range_and_repeat_by_seed():
    work = Workload(num_prompts=50, input_len=100, output_len=10, range_ratio=0.5, prefix_len=7)
    jobs = make_jobs(work)
    lengths = [len(job.turns[0].prompt) - 7 for job in jobs]
    assert 50 <= min(lengths) < max(lengths) <= 150
    assert all(5 <= job.turns[0].n_output <= 15 for job in jobs)
    assert len({tuple(job.turns[0].prompt[:7]) for job in jobs}) == 1
    assert all(256 <= token < 32000 for job in jobs for token in job.turns[0].prompt)
    assert make_jobs(work) == jobs
    assert make_jobs(Workload(**(asdict(work) | {"seed": 1}))) != jobs


def test_shared_prefixes_are_shared_by_equal_groups():
    work = Workload("shared-prefix", num_prompts=12, input_len=4, prefix_len=8, prefixes=3)
    groups = [tuple(job.turns[0].prompt[:8]) for job in make_jobs(work)]
    assert sorted(groups.count(group) for group in set(groups)) == [4, 4, 4]


def test_conversations_hold_all_requests():
    jobs = make_jobs(Workload("multi-turn", num_prompts=10, turns=4, input_len=5, output_len=3))
    assert [len(job.turns) for job in jobs] == [4, 4, 2]
    assert all(len(turn.reply) == turn.n_output for job in jobs for turn in job.turns)


def test_sharegpt_takes_the_first_exchange(tmp_path):
    path = tmp_path / "chats.json"
    said = [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "one two " * 5}]
    path.write_text(json.dumps([{"conversations": said}, {"conversations": said[:1]}]))
    work = Workload("sharegpt", num_prompts=5, output_len=0, dataset_path=str(path))
    (job,) = make_jobs(work)
    assert (job.turns[0].prompt, job.turns[0].n_output) == ("Hi there", 13)


def test_mooncake_trace_shares_blocks_and_keeps_times(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    rows = [
        {"timestamp": 1000, "input_length": 700, "output_length": 5, "hash_ids": [1, 2]},
        {"timestamp": 3000, "input_length": 600, "output_length": 6, "hash_ids": [1, 3]},
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    a, b = make_jobs(Workload("trace", num_prompts=9, dataset_path=str(path), speed=2.0))
    assert (a.at, b.at) == (0.0, 1.0)
    assert (len(a.turns[0].prompt), len(b.turns[0].prompt)) == (700, 600)
    assert a.turns[0].prompt[:512] == b.turns[0].prompt[:512]
    assert a.turns[0].prompt[512:600] != b.turns[0].prompt[512:600]


def test_azure_trace_is_read(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,30,4\n2023-11-16 18:15:48.1805900,7,1\n"
    )
    a, b = make_jobs(Workload("trace", num_prompts=9, dataset_path=str(path)))
    assert (len(a.turns[0].prompt), b.turns[0].n_output) == (30, 1)
    assert b.at == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (Workload("randm"), "did you mean 'random'"),
        (Workload(num_prompts=0), "at least 1"),
        (Workload(range_ratio=1.0), r"\[0, 1\)"),
        (Workload("trace"), "--dataset-path"),
        (Workload("trace", dataset_path="missing.jsonl"), "missing.jsonl"),
        (Workload("shared-prefix"), "--prefix-len"),
    ],
)
def test_wrong_workloads_say_what_is_wrong(work, message):
    with pytest.raises(ConfigError, match=message):
        make_jobs(work)


def test_presets_are_the_published_loads():
    assert find_preset("W16").n == 16
    cold, warm = bursts(PRESETS["P16"], 32000, Random(0))
    assert [len(cold[1]), len(warm[1])] == [16, 16]
    assert cold[1][0].prompt[:512] == warm[1][15].prompt[:512]
    assert cold[1][0].prompt[512:] != warm[1][0].prompt[512:]
    with pytest.raises(ConfigError, match="did you mean 'W8'"):
        find_preset("W88")


def sample(index, start, ttft, itl, n_output=None, error="", n_prompt=10):
    n = 1 + len(itl) if n_output is None else n_output
    return Sample(
        index, start=start, n_prompt=n_prompt, n_output=n, ttft=ttft, itl=itl,
        latency=ttft + sum(itl), error=error,
    )  # fmt: skip


def test_whole_run_follows_the_definitions_of_vllm_bench():
    samples = [
        sample(0, 0.0, 0.2, [0.1, 0.3]),
        sample(1, 1.0, 0.4, []),
        sample(2, 1.5, 0.0, [], n_output=0, error="connection refused"),
    ]
    found = metrics.whole_run(samples, 2.0, (99,), {"ttft": 300.0, "tpot": 250.0})
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 4)
    assert found["output_throughput"] == 2.0
    assert found["total_token_throughput"] == 12.0
    assert found["mean_tpot_ms"] == pytest.approx(200)  # the single token has none
    assert found["mean_itl_ms"] == pytest.approx(200)
    assert found["mean_e2el_ms"] == pytest.approx(500)
    assert found["request_goodput"] == 0.5  # the second misses its first token
    assert found["max_concurrent_requests"] == 1


def test_events_are_those_that_clients_saw():
    rng = Random(3)
    samples = [
        sample(i, rng.random() * 5, rng.random(), [rng.random() for _ in range(rng.randrange(9))])
        for i in range(50)
    ]
    events = metrics.Events.of(samples)
    at, tokens, gaps = [], [], []
    for one in samples:
        times = list(accumulate(one.itl, initial=one.start + one.ttft))
        at += times
        tokens += [one.n_output / len(times)] * len(times)
        gaps += [(time, gap) for time, gap in zip(times[1:], one.itl, strict=True)]
    assert events.at.tolist() == at and events.tokens.tolist() == tokens
    assert events.gaps.tolist() == [gap for _, gap in gaps]
    seconds = Counter(map(int, at))
    assert events.peak_second() == max(seconds.values())  # every event has one token
    inside = events.between(2.0, 3.5)
    assert inside.gaps.tolist() == [gap for time, gap in gaps if 2.0 <= time < 3.5]
    assert len(metrics.Events.of([]).gaps) == metrics.Events.of([]).peak_second() == 0


def test_most_requests_at_once():
    samples = [sample(0, 0.0, 1.0, []), sample(1, 1.0, 1.0, []), sample(2, 1.5, 3.0, [])]
    found = metrics.whole_run(samples, 5.0, (), {})
    assert found["max_concurrent_requests"] == 2  # who leaves at 1 s makes way for who comes then


def test_goodput_targets_are_parsed_and_checked():
    assert metrics.parse_goodput(["ttft:200 tpot:50", "e2el:1e3"]) == {
        "ttft": 200, "tpot": 50, "e2el": 1000
    }  # fmt: skip
    with pytest.raises(ConfigError, match="unknown goodput target 'itl'"):
        metrics.parse_goodput(["itl:3"])
    with pytest.raises(ConfigError, match="NAME:MILLISECONDS"):
        metrics.parse_goodput(["ttft:soon"])


def test_steady_window_runs_from_first_completion_to_last_send():
    samples = [sample(i, float(i), 0.5, [0.5] * 3) for i in range(10)]
    steady = metrics.steady_window(samples, 11.0, (50,))
    assert (steady["start"], steady["end"]) == (2.0, 9.0)
    assert steady["output_throughput"] == pytest.approx(4.0, rel=0.15)
    assert steady["request_throughput"] == pytest.approx(1.0, rel=0.15)
    assert steady["median_itl_ms"] == pytest.approx(500)


def test_all_at_once_has_no_steady_window_and_says_why():
    steady = metrics.steady_window([sample(i, 0.0, 0.5, [0.5]) for i in range(4)], 1.0, ())
    assert steady["start"] is None
    assert "send more requests" in steady["why_empty"]


def test_costs_count_weights_kv_and_operations():
    attention = 8 * 4 * (2 * 2 + 2 * 1)
    body, head = 2 * (attention + 3 * 8 * 16), 32 * 8
    assert cost.weight_bytes(SPEC, "bfloat16", "none") == 2 * (body + head)
    assert cost.weight_bytes(SPEC, "float32", "int8") == body + head
    work = cost.requests_of([(4, 0, 3)], steps=3)
    kv_per_position = 2 * 2 * 1 * 4 * 2  # k and v, layers, heads, width, bf16
    read = cost.bytes_read(SPEC, work, "bfloat16", "none")
    assert read == 3 * 2 * (body + head) + (5 + 6) * kv_per_position
    seen = 1 + 2 + 3 + 4 + 5 + 6
    dense = 6 * 2 * body + 3 * 2 * head
    assert cost.operations(SPEC, work) == dense + 2 * 4 * 2 * 4 * seen


def test_windows_bound_what_attention_sees():
    assert cost._seen(0, 4, None) == 10
    assert cost._seen(0, 6, 3) == 1 + 2 + 3 + 3 + 3 + 3
    assert cost._seen(5, 7, 3) == 6


def result(**changes):
    found = record.header("serve", asdict(Workload()), {}) | {
        "model_id": "m", "output_throughput": 10.0, "duration": 2.0, "failed": 0,
        "steady": {"start": 1.0, "end": 2.0, "output_throughput": 11.0},
    }  # fmt: skip
    return found | changes


def test_compare_gives_ratios_of_what_both_measure():
    rows = {row.name: row.ratio for row in compare.rows(result(), result(output_throughput=15.0))}
    assert rows["output_throughput"] == 1.5
    assert rows["steady output_throughput"] == 1.0
    assert rows["failed"] is None
    assert "steady start" not in rows


def test_compare_names_what_differs():
    a, b = result(), result(workload=asdict(Workload(num_prompts=7)))
    assert compare.mismatches(a, result()) == []
    assert compare.mismatches(a, b) == ["num_prompts: 100 and 7"]
    other = result(device={"cpu": "another"}, failed=3)
    said = compare.warnings(a, other)
    assert any("devices differ" in line for line in said)
    assert "3 requests of b failed" in said


def test_results_of_other_tools_are_compared_by_their_load():
    foreign = {"num_prompts": 10, "request_rate": "inf", "mean_ttft_ms": 5.0}
    assert compare.mismatches(foreign, foreign | {"mean_ttft_ms": 6.0}) == []
    assert compare.mismatches(foreign, foreign | {"num_prompts": 11}) == ["num_prompts: 10 and 11"]


def test_header_says_when_where_and_with_what():
    found = record.header("offline", {"n": 1}, {"dtype": "float32"})
    assert found["device"]["cpu"]
    assert found["versions"]["python"]
    assert len(found["date"]) == len("20260101-000000")


def test_broken_results_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="no benchmark result"):
        record.read(str(path))
    path.write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        record.read(str(path))
