"""Whole drafts in one replay: those of single passes, whatever the batch, and the naive tokens.

Under TRITON_INTERPRET=1 it runs on the CPU, too (see `test_captured_steps`).
"""

from typing import Any

import pytest
import torch
from golden.test_drafted_trees import heard
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation import AnyLength

pytest.importorskip("triton")

from gpu.test_captured_steps import DEVICE, INTERPRETED, Counting

from kvarn.engine.engine import Engine
from kvarn.kernels.attention.triton import TritonAttention
from kvarn.runner.chain import Chains
from kvarn.runner.executor import Runner
from kvarn.runner.graphs import Graphs, buckets
from kvarn.runner.pool import KVPool
from kvarn.runner.state import DeviceState
from kvarn.speculate.length.specdec_pp import SpecDecPP
from kvarn.speculate.propose import making
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.train.head import AcceptanceHead

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]
COUNT = 4 if INTERPRETED else 12


class Sure(AnyLength):
    """Any length, and in a round no token after a doubtful one."""

    looks = True

    def goes_on(self, confidence: Any) -> bool:
        return bool(confidence[-1] > 0.02)


def blurred(folder: str, **options: Any) -> Engine:
    """An engine whose drafter is its target, with an embedding a little off."""
    engine = make_engine(
        folder, device=DEVICE.type, speculate="draft", draft_model=folder, draft_tokens=5,
        draft_length="fixed", **options,
    )  # fmt: skip
    proposer_of(engine).chains = None  # on a GPU it comes with some, and with captured steps
    proposer_of(engine).target = None
    embed = proposer_of(engine).runner.decoder.embed
    noise = torch.randn(embed.shape, generator=torch.Generator().manual_seed(1))
    embed += 0.25 * embed.std() * noise.to(DEVICE)
    assert engine.speculation is not None
    engine.speculation.length = Sure(5)
    return engine


def proposer_of(engine: Engine) -> DraftModel:
    assert engine.speculation is not None
    assert isinstance(engine.speculation.proposer, DraftModel)
    return engine.speculation.proposer


def chained(engine: Engine) -> Counting:
    """Let the drafter's passes be captured; its pages are those that it had."""
    proposer, config, capture = proposer_of(engine), engine.resolved.config, Counting()
    old, backend, size = proposer.runner, TritonAttention(), engine.resolved.config.page_size
    pool = KVPool(backend, old.groups, proposer.kv.pages, size, torch.float32, DEVICE)
    state = DeviceState(config.max_seqs, len(old.groups), -(-config.max_len // size) + 1, DEVICE)
    graphs = Graphs(
        old.decoder, old.groups, pool, backend, state, buckets(config.max_seqs), capture
    )
    proposer.runner = Runner(
        old.decoder, old.groups, pool, backend, old.sampler, size, config.max_seqs, state, graphs
    )
    head = proposer.head
    judge = None if head is None else head.captured(torch.float32)
    proposer.chains = Chains(graphs, proposer.runner.image, judge)
    return capture


def judged(engine: Engine) -> None:
    """Give the drafter a head of some opinion, and the length control its stops."""
    proposer = proposer_of(engine)
    torch.manual_seed(3)
    head = AcceptanceHead(proposer.runner.spec.hidden, depth=1)
    torch.nn.init.normal_(head.out.weight, std=0.4)
    proposer.head = head.to(DEVICE).eval()
    proposer.runner.watcher = proposer._judge
    assert engine.speculation is not None
    engine.speculation.length = SpecDecPP(0.95)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("options", [{}, {"budget": 16, "pages": 40}, {"overlap": "on"}], ids=str)
def test_chains_are_the_drafts_of_single_passes(
    tiny_folder: Any, family: str, options: dict[str, Any]
) -> None:
    """Ragged lengths, prompts in chunks, preemption, and prompts that begin in the cache."""
    requests = make_requests(COUNT)
    answers = expected(make_engine(tiny_folder(family), device=DEVICE.type), requests)
    drafts = []
    for together in (False, True):
        engine = blurred(tiny_folder(family), **options)
        capture = chained(engine) if together else None
        records = heard(engine)
        for seed in (3, 4):
            assert run(engine, requests, seed=seed) == answers
        proposer = proposer_of(engine)
        assert engine.control.check_integrity() == [] and proposer.kv.check_integrity([]) == []
        drafts.append([(one.seq, one.draft.tokens, one.accepted) for one in records])
        if capture is not None:
            assert capture.replays > 5 and engine.stats().accepted_tokens > 0
    assert drafts[0] == drafts[1] and len(drafts[0]) > 10


@pytest.mark.parametrize("with_head", [False, True])
def test_replays_of_a_few_passes_are_one_draft(
    tiny_folder: Any, monkeypatch: pytest.MonkeyPatch, with_head: bool
) -> None:
    """Longer drafts than one replay makes, and stops by a head that judges within: the tokens, and
    what is said of each, are those of single passes."""
    monkeypatch.setattr(making, "AT_ONCE", 2)
    monkeypatch.setattr(making, "JUDGED_AT_ONCE", 2)
    requests = make_requests(COUNT)
    answers = expected(make_engine(tiny_folder("llama"), device=DEVICE.type), requests)
    drafts = []
    for together in (False, True):
        engine = blurred(tiny_folder("llama"))
        if with_head:
            judged(engine)
        capture = chained(engine) if together else None
        records = heard(engine)
        assert run(engine, requests, seed=3) == answers
        drafts.append(
            [(one.seq, one.draft.tokens, one.accepted, one.draft.confidence) for one in records]
        )
        if capture is not None:
            assert capture.replays > 5
    assert max(len(tokens) for _, tokens, *_ in drafts[0]) > 2
    assert len({len(tokens) for _, tokens, *_ in drafts[0]}) > 2
    assert [one[:3] for one in drafts[0]] == [one[:3] for one in drafts[1]]
    for single, chain in zip(*drafts, strict=True):
        assert chain[3] == pytest.approx(single[3], abs=2e-3)


def test_a_draft_ends_where_logits_are_no_numbers(tiny_folder: Any) -> None:
    """A drafter that breaks costs drafts, not answers."""
    requests = make_requests(COUNT)
    answers = expected(make_engine(tiny_folder("llama"), device=DEVICE.type), requests)
    engine = blurred(tiny_folder("llama"))
    chained(engine)
    proposer_of(engine).runner.decoder.norm.fill_(float("nan"))
    assert run(engine, requests, seed=3) == answers
    assert engine.stats().drafted_tokens == 0
