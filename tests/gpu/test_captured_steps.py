"""The GPU's way through a step (device tables, token feed, captured plans), against the naive one.

Under TRITON_INTERPRET=1 all of it runs on the CPU: capturing then means running the body again.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run
from torch import Tensor

pytest.importorskip("triton")

from kvarn.core.request import Request, SamplingParams
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.runner.executor import Runner
from kvarn.runner.graphs import CudaCapture, Graphs, buckets
from kvarn.runner.pool import KVPool
from kvarn.runner.state import DeviceState

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
    config, old = engine.resolved.config, engine.executor
    backend = TritonAttention()
    pages = engine.control.kv.pages
    pool = KVPool(backend, old.groups, pages, config.page_size, torch.float32, DEVICE)
    width = -(-config.max_len // config.page_size) + 1
    state = DeviceState(config.max_seqs, len(old.groups), width, DEVICE)
    capture = Counting()
    graphs = Graphs(
        old.decoder, old.groups, pool, backend, state, buckets(config.max_seqs), capture
    )
    engine.executor = Runner(
        old.decoder, old.groups, pool, backend, old.sampler, config.page_size, config.max_seqs,
        state, graphs, rules=old.keeping.rules,
    )  # fmt: skip
    engine.overlap = options.get("overlap") == "on"
    return engine, capture


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tokens_equal_naive(tiny_folder: Any, family: str, overlap: str) -> None:
    engine, capture = captured(tiny_folder(family), overlap=overlap, budget=16, pages=40)
    requests = make_requests(5)
    assert run(engine, requests, seed=3) == expected(engine, requests)
    assert capture.replays > 5
    assert engine.control.check_integrity() == []
    assert engine.stats().kv_pages_used == 0


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
