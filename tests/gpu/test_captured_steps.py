"""The GPU's way through a step (device tables, token feed, captured plans), against the naive one.

Under TRITON_INTERPRET=1 all of it runs on the CPU: capturing then means running the body again.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation import speculating
from torch import Tensor

pytest.importorskip("triton")

from kvarn.core.request import Request, SamplingParams
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.runner.executor import Runner
from kvarn.runner.graphs import CudaCapture, Graphs, buckets, verify_buckets
from kvarn.runner.pool import KVPool
from kvarn.runner.state import DeviceState
from kvarn.runner.warm import every_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]


class Counting:
    """Captures, and counts what is replayed."""

    def __init__(self) -> None:
        self.replays = 0
        self.cuda = None if INTERPRETED else CudaCapture(DEVICE)

    def __call__(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        body()
        again = body if self.cuda is None else self.cuda(body)

        def replay() -> Tensor:
            self.replays += 1
            return again()

        return replay


def captured(folder: str, **options: Any) -> tuple[Any, Counting]:
    """A tiny engine whose runner keeps its state on the device and replays decode steps."""
    engine = make_engine(folder, device=DEVICE.type, **options)
    capture = capture_steps(engine)
    engine.overlap = options.get("overlap") == "on"
    return engine, capture


def capture_steps(engine: Any) -> Counting:
    """Let the target's steps be captured; its pages are those that it had."""
    config, old = engine.resolved.config, engine.executor
    backend = TritonAttention()
    pages = engine.control.kv.pages
    pool = KVPool(backend, old.groups, pages, config.page_size, torch.float32, DEVICE)
    width = -(-config.max_len // config.page_size) + 1
    state = DeviceState(config.max_seqs, len(old.groups), width, DEVICE)
    capture = Counting()
    verified = verify_buckets(config.max_seqs * (config.draft_tokens + 1))
    graphs = Graphs(
        old.decoder, old.groups, pool, backend, state, buckets(config.max_seqs), capture, verified
    )
    engine.executor = Runner(
        old.decoder, old.groups, pool, backend, old.sampler, config.page_size, config.max_seqs,
        state, graphs, rules=old.keeping.rules,
    )  # fmt: skip
    return capture


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tokens_equal_naive(tiny_folder: Any, family: str, overlap: str) -> None:
    engine, capture = captured(tiny_folder(family), overlap=overlap, budget=16, pages=40)
    requests = make_requests(5)
    assert run(engine, requests, seed=3) == expected(engine, requests)
    assert capture.replays > 5
    assert engine.control.check_integrity() == []
    assert engine.stats().kv_pages_used == 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize(("errs", "most", "pages"), [(0.0, 3, 60), (0.4, 3, 36), (0.4, 12, 60)])
def test_verify_steps_are_replayed(
    tiny_folder: Any, family: str, overlap: str, errs: float, most: int, pages: int
) -> None:
    """Drafts of every length and fate, in batches of every mixture; plain steps in between."""
    requests = make_requests(5)
    answers = expected(make_engine(tiny_folder(family)), requests)
    engine, capture = captured(tiny_folder(family), overlap=overlap, pages=pages)
    speculating(engine, answers, errs, most)
    assert run(engine, requests, seed=most) == answers
    replayed = engine.executor.replayed
    assert replayed["verify"] > 2 and replayed["decode"] > 0
    assert sum(replayed.values()) == capture.replays
    assert engine.control.check_integrity() == []


def test_drafts_of_any_length_share_a_few_graphs(tiny_folder: Any) -> None:
    """The bucket counts rows; how they are spread over sequences makes no other graph."""
    plain = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    requests = [Request(f"r{i}", [3 + i, 4, 5], plain) for i in range(6)]
    engine, _ = captured(tiny_folder("llama"))
    answers = expected(engine, requests)
    speculating(engine, answers, 0.3, 3)
    assert run(engine, requests, seed=1) == answers
    graphs = engine.executor.graphs
    verify = [graph for graph in graphs.found.values() if not graph.single]
    assert 0 < len(verify) <= len(graphs.verified)


def test_graphs_give_way_to_newer_ones(tiny_folder: Any, monkeypatch: Any) -> None:
    """No more are kept than `MOST_GRAPHS`; what was dropped is captured anew."""
    monkeypatch.setattr("kvarn.runner.graphs.MOST_GRAPHS", 2)
    requests = make_requests(6)
    engine, _ = captured(tiny_folder("llama"))
    answers = expected(engine, requests)
    speculating(engine, answers, 0.3, 3)
    assert run(engine, requests, seed=2) == answers
    assert len(engine.executor.graphs.found) == 2


def test_verified_rows_with_rules_and_logprobs(tiny_folder: Any) -> None:
    """Their logits are looked at, out of a captured step too."""
    ruled = SamplingParams(
        temperature=0.0, max_tokens=10, repetition_penalty=3.0, logprobs=1, ignore_eos=True
    )
    requests = [Request(f"r{i}", [3 + i, 4, 5], ruled) for i in range(3)]
    wanted = run(make_engine(tiny_folder("llama")), requests, seed=1)
    engine, _ = captured(tiny_folder("llama"))
    speculating(engine, wanted, 0.3, 3)
    assert run(engine, requests, seed=1) == wanted
    assert engine.executor.replayed["verify"] > 0


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_heads_in_groups_of_their_own(tiny_folder: Any, overlap: str) -> None:
    """Two page tables in a layer, one of them sinks and a window: as without captured steps."""
    folder = tiny_folder("llama")
    options = {"sparsity": "duoattention:by=random,sinks=6,window=18", "budget": 16}
    engine, capture = captured(folder, overlap=overlap, **options)
    requests = make_requests(5)
    plain = make_engine(folder, attention="reference", device="cpu", **options)
    assert run(engine, requests, seed=3) == run(plain, requests, seed=3)
    assert capture.replays > 5
    assert engine.control.check_integrity() == []


def test_rules_and_logprobs_between_plain_requests(tiny_folder: Any) -> None:
    """A step with a penalised row looks at the tokens before; the others are as without it."""
    plain = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    ruled = SamplingParams(
        temperature=0.0, max_tokens=8, repetition_penalty=3.0, logprobs=1, ignore_eos=True
    )
    requests = [Request("a", [3, 4, 5], plain), Request("b", [3, 4, 5], ruled)]
    found = []
    for overlap in ("off", "on"):
        engine, _ = captured(tiny_folder("llama"), overlap=overlap)
        found.append(run(engine, requests, seed=1))
    engine = make_engine(tiny_folder("llama"))
    wanted = run(engine, requests, seed=1)
    assert found == [wanted, wanted]


def test_shared_prefixes(tiny_folder: Any) -> None:
    """Warm requests with a common prefix decode together, however they came in."""
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    prefix = [(7 * i) % 97 for i in range(64)]
    requests = [
        Request(f"r{i}", (prefix if i % 3 else [5] * 10) + [i, 2 * i], sampling) for i in range(6)
    ]
    engine, _ = captured(tiny_folder("llama"), overlap="on", pages=100)
    wanted = expected(engine, requests)
    for request in requests:
        engine.add(request)
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
    assert tokens == wanted


def test_a_watcher_sees_the_hidden_states_of_captured_steps(tiny_folder: Any) -> None:
    """As it sees those of steps that are not captured."""
    sampling = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    requests = [Request(f"r{i}", [3 + i, 4, 5], sampling) for i in range(3)]
    found = []
    replaying, capture = captured(tiny_folder("llama"))
    for engine in (replaying, make_engine(tiny_folder("llama"))):
        seen: dict[int, list[Tensor]] = {}
        owners = engine.executor.image.owner  # rows are as those before left them

        def watch(rows: Any, hidden: Tensor, seen: Any = seen, owners: Any = owners) -> None:
            for row, x in zip(rows.tolist(), hidden.detach().cpu().clone()):
                seen.setdefault(int(owners[row]), []).append(x)

        engine.executor.watcher = watch
        run(engine, requests, seed=1)
        found.append(seen)
    assert capture.replays > 5
    assert sorted(found[0]) == sorted(found[1])
    for seq, mine in found[0].items():
        theirs = torch.stack(found[1][seq])
        torch.testing.assert_close(torch.stack(mine), theirs, atol=2e-4, rtol=2e-4)


def test_steps_that_compile_leave_nothing_behind(tiny_folder: Any) -> None:
    """Warm-up steps replay nothing, and what is served after them is the naive decoder's."""
    engine, capture = captured(tiny_folder("gemma2"), budget=16, pages=40)
    config, runner = engine.resolved.config, engine.executor
    assert every_kernel(runner, engine.control.kv.pages, config.budget, config.max_len)
    assert capture.replays == 0 and runner.graphs is not None and not runner.graphs.found
    requests = make_requests(5)
    assert run(engine, requests, seed=3) == expected(engine, requests)
    assert capture.replays > 5


CHOICES = ["quest:budget=24,dense=1", "quest:budget=24,dense=1,reuse=3"]


@pytest.mark.parametrize("rule", [*CHOICES, "random-pages:budget=24,dense=1,reuse=2"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_rows_that_choose(tiny_folder: Any, rule: str, overlap: str) -> None:
    """The tokens of an engine without a GPU: beside chunks, and alone from captured steps."""
    sampling = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    prompts = [[(5 * i * j + 3 * i) % 97 for i in range(30 + 9 * j)] for j in range(1, 4)]
    requests = [Request(f"r{i}", prompt, sampling) for i, prompt in enumerate(prompts)]
    options = {"sparsity": rule, "budget": 40, "pages": 100, "page_size": 4, "max_len": 128}
    wanted = tokens_of(make_engine(tiny_folder("llama"), **options), requests)
    engine, capture = captured(tiny_folder("llama"), overlap=overlap, **options)
    assert tokens_of(engine, requests) == wanted
    assert capture.replays > 5 or rule not in CHOICES
    assert engine.control.check_integrity() == []


def test_a_stream(tiny_folder: Any) -> None:
    """A captured row is rotated by its slot; what is held turns before it."""
    sampling = SamplingParams(temperature=0.0, max_tokens=14, ignore_eos=True)
    requests = [Request("r", [(5 * i * i + 3 * i) % 97 for i in range(10)], sampling)]
    options = {"sparsity": "streamingllm:budget=8,sinks=2", "pages": 40, "page_size": 4}
    wanted = tokens_of(make_engine(tiny_folder("llama"), **options), requests)
    engine, capture = captured(tiny_folder("llama"), **options)
    assert tokens_of(engine, requests) == wanted
    assert capture.replays > 10


def tokens_of(engine: Any, requests: list[Request]) -> dict[str, list[int]]:
    """Tokens by request, all of which come at once."""
    for request in requests:
        engine.add(request)
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for out in engine.step():
            found.setdefault(out.request_id, []).extend(out.tokens)
    return found
