"""Draft trees on the GPU, between captured steps: the naive decoder's tokens, in fp32."""

from typing import Any

import pytest
import torch
from golden.test_drafted_trees import PROPOSERS, REPEATING, growing, heard
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation_trees import RULES, branching, checked

from kvarn.core.request import Request, SamplingParams
from kvarn.runner.trees import is_tree

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    """Greedy requests and the naive decoder's answers on this GPU, by family."""
    known: dict[str, Any] = {}

    def answers(family: str) -> Any:
        if family not in known:
            engine = make_engine(tiny_folder(family), device="cuda")
            requests = make_requests(12)
            known[family] = requests, expected(engine, requests)
        return known[family]

    return answers


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


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_page_sizes(tiny_folder: Any, wanted: Any, page_size: int) -> None:
    requests, answers = wanted("llama")
    sizes = {"page_size": page_size, "pages": 240 // page_size + 2, "max_len": 60}
    engine = make_engine(tiny_folder("llama"), device="cuda", **sizes)
    branching(engine, answers, 0.7, 9)
    checked(engine, requests, answers, seed=4)


@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("drafter", ["llama", "qwen3"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_proposers_of_trees(
    tiny_folder: Any, wanted: Any, proposer: str, drafter: str, graphs: str
) -> None:
    """The drafter's trees grow on the device as well, in steps of their own."""
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
