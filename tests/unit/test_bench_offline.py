"""Offline and latency benchmarks on a made-up engine: what they ask and what they report."""

import types

import pytest

from kvarn.bench import latency, offline
from kvarn.bench.options import Latency, Offline, Workload
from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.core.output import EngineStats, Timings

SPEC = ModelSpec(
    family="llama", name="tiny", n_layers=2, hidden=8, ffn=16, n_heads=2, n_kv_heads=1,
    head_dim=4, vocab=300, max_len=4096, tie_embeddings=True,
)  # fmt: skip


class FakeLLM:
    """Generates what is asked at once: first token after 10 ms, the last after 110 ms."""

    spec = SPEC

    def __init__(self):
        self.engine = self
        self.bursts = []
        self.steps = 0

    def stats(self):
        return EngineStats(steps=self.steps)

    def explain(self):
        chosen = {"device": "cpu", "dtype": "bfloat16", "quantization": "none"}
        return {"options": resolve(chosen, {}).rows()}

    def generate(self, prompts, params):
        self.bursts.append((prompts, params))
        self.steps += max(each.max_tokens for each in params)
        return [
            types.SimpleNamespace(
                prompt_tokens=prompt, n_cached=0, timings=Timings(0.0, 0.01, 0.11),
                outputs=[types.SimpleNamespace(tokens=[1] * each.max_tokens)],
            )
            for prompt, each in zip(prompts, params, strict=True)
        ]  # fmt: skip


def test_presets_are_run_and_reported_by_phase():
    llm = FakeLLM()
    result = offline.run(llm, Workload(), Offline(preset=("W1", "P16"), repeats=2))
    assert [row["workload"] for row in result["results"]] == ["W1", "P16 cold", "P16 warm"]
    one, cold, _ = result["results"]
    assert (one["steps"], one["total_output_tokens"], one["total_prompt_tokens"]) == (128, 128, 128)
    assert one["prefill_tokens_per_second"] == pytest.approx(12800)
    assert one["decode_tokens_per_second_per_request"] == pytest.approx(1270)
    assert cold["total_prompt_tokens"] == 16 * 544
    assert result["workload"] == {"presets": ["P16", "W1"]}
    prompts, params = llm.bursts[-1]
    assert all(token < SPEC.vocab for prompt in prompts for token in prompt)
    assert params[0].ignore_eos and params[0].temperature == 0


def test_a_data_set_gets_the_names_of_vllm_bench_throughput():
    work = Workload(num_prompts=3, input_len=10, output_len=5)
    result = offline.run(FakeLLM(), work, Offline(repeats=1))
    assert result["num_requests"] == 3
    assert result["total_num_tokens"] == 45
    assert result["requests_per_second"] == pytest.approx(3 / result["elapsed_time"])
    assert result["tokens_per_second"] == pytest.approx(45 / result["elapsed_time"])


def test_every_repeat_asks_for_other_prompts():
    llm = FakeLLM()
    offline.run(llm, Workload(num_prompts=1), Offline(repeats=2))
    (first, _), (second, _) = llm.bursts[-2:]
    assert first != second


def test_what_needs_a_server_is_refused():
    with pytest.raises(ConfigError, match="bench serve"):
        offline.run(FakeLLM(), Workload("multi-turn"), Offline())


def test_latency_by_batch_size():
    how = Latency(batch_sizes=(1, 4), input_len=8, output_len=11, warmups=1, iterations=3)
    llm = FakeLLM()
    result = latency.run(llm, how)
    assert [row["batch_size"] for row in result["results"]] == [1, 4]
    row = result["results"][1]
    assert len(row["latencies"]) == 3
    assert row["median_ttft_ms"] == pytest.approx(10)
    assert row["median_tpot_ms"] == pytest.approx(10)
    assert set(row["percentiles"]) == {"10", "25", "50", "75", "90", "99"}
    assert len(llm.bursts) == 8
