"""Drafts that end where the acceptance head doubts them: the same tokens, at any threshold."""

import shutil
from typing import Any

import pytest
import torch
from golden.test_engine import expected, make_engine, make_requests, run

from kvarn.core.errors import ConfigError
from kvarn.engine.engine import Engine
from kvarn.speculate.length.specdec_pp import SpecDecPP
from kvarn.speculate.records import Record
from kvarn.speculate.train.head import AcceptanceHead, save_head


@pytest.fixture(scope="module")
def headed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Any) -> str:
    """A drafting model with a head that is sure of some tokens and not of others."""
    folder = tmp_path_factory.mktemp("headed")
    shutil.copytree(tiny_folder("llama"), folder, dirs_exist_ok=True)
    torch.manual_seed(3)
    head = AcceptanceHead(48, depth=2)
    torch.nn.init.normal_(head.out.weight, std=0.6)
    save_head(head, folder, {})
    return str(folder)


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    requests = make_requests(24, seed=3)
    return requests, expected(make_engine(tiny_folder("llama")), requests)


def stopping(folder: str, drafter: str, threshold: float, **options: Any) -> Engine:
    engine = make_engine(
        folder, speculate="draft", draft_length="specdec-pp", draft_tokens=8, draft_model=drafter,
        **options,
    )  # fmt: skip
    assert engine.speculation is not None
    engine.speculation.length = SpecDecPP(threshold)
    return engine


@pytest.mark.parametrize("threshold", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("options", [{}, {"budget": 7}, {"pages": 40}])
def test_tokens_are_those_of_plain_decoding(
    tiny_folder: Any, headed: str, wanted: Any, threshold: float, options: dict[str, Any]
) -> None:
    requests, answers = wanted
    engine = stopping(tiny_folder("llama"), headed, threshold, **options)
    assert run(engine, requests, seed=5) == answers
    assert engine.stats().drafted_tokens > 0
    assert engine.control.check_integrity() == []


def test_drafts_end_where_rejection_is_likely(tiny_folder: Any, headed: str, wanted: Any) -> None:
    """Every draft ends at the first place where the chance of a rejection reaches the threshold."""
    requests, _ = wanted
    engine = stopping(tiny_folder("llama"), headed, 0.9)
    assert engine.speculation is not None
    seen: list[Record] = []
    engine.speculation.listeners.append(seen.extend)
    run(engine, requests, seed=5)
    lengths = set()
    for record in seen:
        said, chance = record.draft.confidence, 1.0
        assert all(0.0 < one < 1.0 for one in said)
        for one in said[:-2]:  # the head had judged all but the newest when each more was drafted
            chance *= one
            assert 1 - chance < 0.9, "it should have ended earlier"
        lengths.add(len(said))
    assert len(lengths) > 2


def test_a_drafter_without_a_head_is_refused(tiny_folder: Any) -> None:
    with pytest.raises(ConfigError, match=r"acceptance\.safetensors"):
        stopping(tiny_folder("llama"), tiny_folder("mistral"), 0.5)
