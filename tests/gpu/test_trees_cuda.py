"""Draft trees on the GPU, between captured steps: the naive decoder's tokens, in fp32.

The first tests run on the CPU, too, under TRITON_INTERPRET=1 (see `test_captured_steps`).
"""

from typing import Any

import pytest
import torch
from golden.test_drafted_trees import PROPOSERS, REPEATING, growing, heard
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation_trees import RULES, branching, checked

pytest.importorskip("triton")

from gpu.test_captured_steps import DEVICE, INTERPRETED, Counting, captured

from kvarn.core.request import Request, SamplingParams
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.runner.executor import Runner
from kvarn.runner.graphs import Graphs, buckets
from kvarn.runner.pool import KVPool
from kvarn.runner.state import DeviceState
from kvarn.runner.trees import is_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    """Greedy requests and the naive decoder's answers on this device, by family."""
    known: dict[str, Any] = {}

    def answers(family: str) -> Any:
        if family not in known:
            engine = make_engine(tiny_folder(family), device=DEVICE.type)
            requests = make_requests(4 if INTERPRETED else 12)
            known[family] = requests, expected(engine, requests)
        return known[family]

    return answers


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_trees_between_captured_steps(tiny_folder: Any, wanted: Any, overlap: str) -> None:
    """Page tables and last tokens on the device agree with the host's after every tree."""
    requests, answers = wanted("llama")
    engine, capture = captured(tiny_folder("llama"), overlap=overlap)
    proposer = branching(engine, answers, 0.7, 9)
    checked(engine, requests, answers, seed=3)
    assert proposer.trees > 0 and capture.replays > 0


def test_the_drafter_grows_its_trees_on_the_device(tiny_folder: Any, wanted: Any) -> None:
    requests, answers = wanted("llama")
    engine = growing(
        tiny_folder("llama"), "draft", tiny_folder("llama"), device=DEVICE.type, pages=40
    )
    proposer: Any = engine.speculation and engine.speculation.proposer
    old, config, capture = proposer.runner, engine.resolved.config, Counting()
    backend = TritonAttention()
    pool = KVPool(backend, old.groups, proposer.kv.pages, 4, torch.float32, DEVICE)
    state = DeviceState(config.max_seqs, len(old.groups), -(-config.max_len // 4) + 1, DEVICE)
    graphs = Graphs(
        old.decoder, old.groups, pool, backend, state, buckets(config.max_seqs), capture
    )
    proposer.runner = Runner(
        old.decoder, old.groups, pool, backend, old.sampler, 4, config.max_seqs, state, graphs
    )
    judged = heard(engine)
    assert run(engine, requests, seed=3) == answers
    assert engine.control.check_integrity() == [] and proposer.kv.check_integrity([]) == []
    assert any(is_tree(one.draft) for one in judged)
    assert engine.stats().accepted_tokens > 0


@ON_GPU
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tokens_equal_naive(
    tiny_folder: Any, wanted: Any, family: str, graphs: str, overlap: str
) -> None:
    """Trees of random shapes around the answer; those of Gemma 2 are verified as chains."""
    requests, answers = wanted(family)
    for options in ({}, {"budget": 17}, {"pages": 36}):
        engine = make_engine(
            tiny_folder(family), device="cuda", graphs=graphs, overlap=overlap, **options
        )
        proposer = branching(engine, answers, 0.7, 12)
        checked(engine, requests, answers, seed=3)
        assert proposer.trees > 20


@ON_GPU
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(tiny_folder: Any, wanted: Any, page_size: int) -> None:
    requests, answers = wanted("llama")
    sizes = {"page_size": page_size, "pages": 240 // page_size + 2, "max_len": 60}
    engine = make_engine(tiny_folder("llama"), device="cuda", **sizes)
    branching(engine, answers, 0.7, 9)
    checked(engine, requests, answers, seed=4)


@ON_GPU
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("drafter", ["llama", "qwen3"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_proposers_of_trees(
    tiny_folder: Any, wanted: Any, proposer: str, drafter: str, graphs: str
) -> None:
    requests, answers = wanted("llama")
    engine = growing(
        tiny_folder("llama"), proposer, tiny_folder(drafter),
        device="cuda", graphs=graphs, pages=40,
    )  # fmt: skip
    judged = heard(engine)
    assert run(engine, requests, seed=1) == answers
    again = [Request(f"again{r.id}", r.prompt, r.sampling) for r in requests]
    told = {(f"again{id_}", index): tokens for (id_, index), tokens in answers.items()}
    assert run(engine, again, seed=2) == told
    assert engine.control.check_integrity() == []
    assert any(is_tree(one.draft) for one in judged)
    assert 0 < engine.stats().accepted_tokens < engine.stats().drafted_tokens
    engine.close()


@ON_GPU
@pytest.mark.parametrize("rules", RULES)
def test_sampled_tokens_equal_plain_decoding(tiny_folder: Any, rules: str) -> None:
    params: dict[str, Any] = {"temperature": 0.8, "max_tokens": 24, "ignore_eos": True}
    params |= RULES[rules]
    requests = [
        Request(f"r{i}", REPEATING[i % 2] + [i % 3], SamplingParams(**params, n=1 + i % 3))
        for i in range(8)
    ]
    answers = run(make_engine(tiny_folder("llama"), device="cuda"), requests, seed=1)
    for proposer in PROPOSERS:
        engine = growing(
            tiny_folder("llama"), proposer, tiny_folder("llama"), device="cuda", pages=48
        )
        assert run(engine, requests, seed=2) == answers
        assert engine.control.check_integrity() == []
        assert engine.stats().accepted_tokens > 0
        engine.close()


@ON_GPU
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_half_precision_runs(tiny_folder: Any, kv_dtype: str) -> None:
    """K and V of a tree's rows pass through the cache's kind of number before they are moved."""
    engine = growing(
        tiny_folder("llama"), "draft", tiny_folder("llama"),
        device="cuda", dtype="bfloat16", kv_dtype=kv_dtype,
    )  # fmt: skip
    requests = make_requests(8)
    tokens = run(engine, requests, seed=1)
    assert len(tokens) == sum(request.sampling.n for request in requests)
    stats = engine.stats()
    assert stats.accepted_tokens > 0.15 * stats.drafted_tokens  # its own likeliest path stands
    assert engine.control.check_integrity() == []
