"""The engine on the GPU against the naive decoder on the same GPU, in fp32: the same tokens."""

from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation import speculating

from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    """The naive decoder's answers, computed once a family."""
    known: dict[str, Any] = {}

    def answers(family: str) -> Any:
        if family not in known:
            engine = make_engine(tiny_folder(family), device="cuda")
            requests = make_requests(12)
            known[family] = (requests, expected(engine, requests))
        return known[family]

    return answers


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_tokens_equal_naive(
    tiny_folder: Any, wanted: Any, family: str, overlap: str, graphs: str
) -> None:
    requests, answers = wanted(family)
    options = {"device": "cuda", "overlap": overlap, "graphs": graphs}
    for budget in (7, 64, 512):
        engine = make_engine(tiny_folder(family), budget=budget, **options)
        assert run(engine, requests, seed=budget) == answers
        assert engine.control.check_integrity() == []
        assert engine.stats().kv_pages_used == 0
        engine.close()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("most", [3, 12])
def test_verify_steps_are_replayed(
    tiny_folder: Any, wanted: Any, family: str, overlap: str, most: int
) -> None:
    """From captured graphs, whatever is drafted for whom; the same tokens as one by one."""
    requests, answers = wanted(family)
    for errs, graphs in ((0.0, "on"), (0.4, "on"), (0.4, "off")):
        engine = make_engine(
            tiny_folder(family), device="cuda", overlap=overlap, graphs=graphs, speculate="ngram",
            draft_tokens=most,
        )  # fmt: skip
        speculating(engine, answers, errs, most)
        assert run(engine, requests, seed=most) == answers
        stats = engine.stats()
        assert stats.verify_steps > 5
        assert (stats.replayed_verify_steps > 0) == (graphs == "on")
        assert engine.control.check_integrity() == [] and stats.kv_pages_used == 0
        engine.close()


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(tiny_folder: Any, wanted: Any, page_size: int) -> None:
    requests, answers = wanted("gemma2")
    sizes = {"page_size": page_size, "pages": 240 // page_size + 2, "max_len": 60}
    engine = make_engine(tiny_folder("gemma2"), device="cuda", **sizes)
    assert run(engine, requests, seed=5) == answers


def test_preemption_and_hits(tiny_folder: Any, wanted: Any) -> None:
    requests, answers = wanted("llama")
    engine = make_engine(tiny_folder("llama"), device="cuda", pages=30)
    assert run(engine, requests, seed=1) == answers
    assert engine.stats().preemptions > 0
    assert engine.stats().cached_tokens > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs(tiny_folder: Any, dtype: str) -> None:
    engine = make_engine(tiny_folder("qwen3"), device="cuda", dtype=dtype)
    requests = make_requests(6)
    tokens = run(engine, requests, seed=1)
    assert len(tokens) == sum(request.sampling.n for request in requests)


def test_sampling_on_the_gpu_equals_the_cpu(tiny_folder: Any) -> None:
    """Seeded draws with filters, penalties and logprobs: the same tokens on both devices."""
    sampling = SamplingParams(
        temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3,
        max_tokens=20, logprobs=2, logit_bias={5: 1.0},
    )  # fmt: skip
    found = []
    for device in ("cpu", "cuda"):
        engine = make_engine(tiny_folder("llama"), device=device, attention="auto")
        tokens: list[int] = []
        logprobs: list[float] = []
        engine.add(Request("r", [3, 4, 5, 6], sampling))
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                tokens += output.tokens
                logprobs += [one.logprob for one in output.logprobs or []]
        found.append((tokens, logprobs))
    assert found[0][0] == found[1][0]
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3)


def test_auto_chooses_the_gpu_and_triton(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"), device="auto")
    assert engine.resolved.config.device == "cuda"
    assert engine.resolved.config.attention == "triton"
    assert engine.overlap
    assert engine.resolved.config.graphs == "on"


@pytest.mark.parametrize("prefix", ["hash", "none"])
def test_nothing_waits_for_the_device(tiny_folder: Any, prefix: str) -> None:
    """Prompts, decodes, starts and ends: no step makes the host wait but for its result."""
    engine = make_engine(tiny_folder("llama"), device="cuda", prefix=prefix)

    def serve(first: int) -> int:
        for i in range(first, first + 8):
            sampling = SamplingParams(
                temperature=0.7 * (i % 2), top_k=5 * (i % 4 == 3), max_tokens=5 + i, ignore_eos=True
            )
            engine.add(Request(f"r{i}", [3 + i] * (5 + 3 * i), sampling))
        count = 0
        while engine.has_work:
            count += sum(len(output.tokens) for output in engine.step())
        return count

    wanted = serve(0)  # compiles and captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert serve(0) == wanted
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("attention", ["cpu", "native", "reference", "invariant"])
def test_cpu_backends_are_refused(tiny_folder: Any, attention: str) -> None:
    with pytest.raises(ConfigError, match=r"runs on device=cpu only"):
        make_engine(tiny_folder("llama"), device="cuda", attention=attention)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits(tiny_folder: Any, dtype: str) -> None:
    """Logprobs are the same bits alone, in a batch, and under another chunking."""
    options = {"device": "cuda", "deterministic": True, "dtype": dtype}
    sampling = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True)
    requests = [Request(f"r{i}", [3 + i, 4, 5] * (1 + 5 * i), sampling) for i in range(4)]

    def answers(together: list[Request], budget: int) -> dict[str, list[float]]:
        engine = make_engine(tiny_folder("llama"), budget=budget, **options)
        for request in together:
            engine.add(request)
        found: dict[str, list[float]] = {}
        while engine.has_work:
            for output in engine.step():
                assert output.error is None
                scores = [one.logprob for one in output.logprobs or []]
                found.setdefault(output.request_id, []).extend(scores)
        return found

    together = answers(requests, 64)
    assert answers(requests, 7) == together
    for request in requests:
        assert answers([request], 64)[request.id] == together[request.id]
