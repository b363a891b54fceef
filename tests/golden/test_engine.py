"""The engine against the naive decoder: the same tokens, however the work is cut and mixed."""

import random
from typing import Any

import pytest
from golden.naive import naive_generate

from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine

WHOLE = 512
PREFIXES = [[5] * 20, [5] * 12 + [7] * 16, []]


def make_engine(folder: str, **options: Any) -> Engine:
    """A tiny fp32 engine with few, small pages: preemption and eviction happen all the time."""
    defaults = {
        "model": folder,
        "load": "random",
        "dtype": "float32",
        "page_size": 4,
        "pages": 60,
        "max_len": 120,
        "max_seqs": 6,
        "budget": 64,
        "threads": 1,
    }
    return Engine(resolve(defaults | options))


def make_requests(count: int, seed: int = 0) -> list[Request]:
    """Greedy requests with shared prefixes, several lengths, and now and then two samples."""
    chance = random.Random(seed)
    requests = []
    for i in range(count):
        own = [chance.randrange(97) for _ in range(chance.randint(1, 24))]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=chance.randint(1, 24), n=chance.choice([1, 1, 3])
        )
        prompt = chance.choice(PREFIXES) + own
        requests.append(Request(f"r{i}", prompt, sampling, priority=chance.choice([0, 0, 1])))
    return requests


def run(engine: Engine, requests: list[Request], seed: int) -> dict[tuple[str, int], list[int]]:
    """Add requests at random moments; the tokens of every sequence."""
    chance = random.Random(seed)
    todo = list(requests)
    chance.shuffle(todo)
    tokens: dict[tuple[str, int], list[int]] = {}
    while todo or engine.has_work:
        while todo and chance.random() < 0.4:
            engine.add(todo.pop())
        for output in engine.step():
            assert output.error is None
            tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
    return tokens


def expected(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    decoder = engine.assembly.model.decoder
    found = {}
    for request in requests:
        tokens = naive_generate(
            decoder,
            engine.spec,
            request.prompt,
            request.sampling.max_tokens or 0,
            engine.spec.eos_ids,
        )
        for index in range(request.sampling.n):
            found[request.id, index] = tokens
    return found


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    """The naive decoder's answers, computed once a family."""
    known: dict[str, Any] = {}

    def answers(family: str) -> Any:
        if family not in known:
            engine = make_engine(tiny_folder(family))
            requests = make_requests(14)
            known[family] = (requests, expected(engine, requests))
        return known[family]

    return answers


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
@pytest.mark.parametrize("prefix", ["hash", "radix", "none"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tokens_equal_naive(
    tiny_folder: Any, wanted: Any, family: str, prefix: str, overlap: str
) -> None:
    requests, answers = wanted(family)
    for budget in (6, 7, 64, WHOLE):
        engine = make_engine(tiny_folder(family), prefix=prefix, overlap=overlap, budget=budget)
        assert run(engine, requests, seed=budget) == answers
        assert engine.control.check_integrity() == []
        assert engine.stats().kv_pages_used == 0
        engine.close()


def test_budget_of_one(tiny_folder: Any, wanted: Any) -> None:
    requests, answers = wanted("gemma2")
    engine = make_engine(tiny_folder("gemma2"), budget=1, max_seqs=1)
    assert run(engine, requests, seed=1) == answers


@pytest.mark.parametrize("scheduler", ["continuous", "prefill-first", "orca", "static"])
@pytest.mark.parametrize("evict", ["lru", "lfu"])
def test_schedulers_agree(tiny_folder: Any, wanted: Any, scheduler: str, evict: str) -> None:
    requests, answers = wanted("gemma2")
    engine = make_engine(tiny_folder("gemma2"), scheduler=scheduler, evict=evict)
    assert run(engine, requests, seed=3) == answers


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("attention", ["reference", "cpu", "invariant"])
def test_page_sizes_and_backends(
    tiny_folder: Any, wanted: Any, page_size: int, attention: str
) -> None:
    requests, answers = wanted("gemma2")
    engine = make_engine(
        tiny_folder("gemma2"),
        page_size=page_size,
        pages=240 // page_size + 2,
        max_len=60,
        attention=attention,
    )
    assert run(engine, requests, seed=5) == answers


def test_preemption_and_hits_happen(tiny_folder: Any, wanted: Any) -> None:
    """The golden runs mean something only if pages run short and prefixes are shared."""
    requests, answers = wanted("llama")
    engine = make_engine(tiny_folder("llama"), pages=30)
    assert run(engine, requests, seed=1) == answers
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.cached_tokens > 0


def test_requests_that_arrive_together_share_a_prefix(tiny_folder: Any) -> None:
    """A prefix is computed once even when everybody who wants it comes in the same step."""
    engine = make_engine(tiny_folder("llama"), budget=16, pages=100)
    for i in range(4):
        prompt = [3] * 40 + [10 + i] * 3
        engine.add(Request(f"r{i}", prompt, SamplingParams(temperature=0.0, max_tokens=2)))
    computed = 0
    while engine.has_work:
        plan = engine.control.plan(0.0)
        computed += plan.n_tokens
        engine.control.apply(plan, engine.executor.run(plan), 0.0)
    # 43 for the first, 3 own tokens for each other, one decode each
    assert computed == 43 + 3 * 3 + 4


def test_aborts_free_pages_at_once(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("gemma2"), overlap="on")
    for request in make_requests(5):
        engine.add(request)
    engine.step()
    engine.step()
    for i in range(5):
        engine.abort(f"r{i}")
    engine.step()
    engine.step()
    assert engine.stats().kv_pages_used == 0
    assert not engine.has_work
    engine.close()


def test_two_engines_side_by_side(tiny_folder: Any, wanted: Any) -> None:
    requests, answers = wanted("llama")
    one, two = make_engine(tiny_folder("llama")), make_engine(tiny_folder("llama"), prefix="radix")
    for request in requests:
        one.add(request)
        two.add(request)
    found: dict[str, dict[tuple[str, int], list[int]]] = {"one": {}, "two": {}}
    while one.has_work or two.has_work:
        for name, engine in (("one", one), ("two", two)):
            for output in engine.step():
                key = (output.request_id, output.index)
                found[name].setdefault(key, []).extend(output.tokens)
    assert found == {"one": answers, "two": answers}
