"""Every proposer and every length control, by name: the same tokens, lengths within the room."""

import itertools
import shutil
from random import Random
from typing import Any

import pytest
from golden.test_engine import expected, make_engine, make_requests, run

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.core.part import find, known
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.build import build_speculation
from kvarn.speculate.costs import Measured
from kvarn.speculate.part import Round, Verified
from kvarn.speculate.train.head import AcceptanceHead, save_head

CONTROLS = sorted(name for kind, name in known() if kind == "draft-length")
PROPOSERS = sorted(name for kind, name in known() if kind == "proposer" and name != "synthetic")
DRAFTS = [f"{name}, trees" for name in ("suffix", "draft", "mix")]  #: with draft_shape=tree


@pytest.mark.parametrize("name", CONTROLS)
def test_lengths_stay_within_the_room(name: str) -> None:
    control: Any = find("draft-length", name)()
    chance, costs = Random(0), Measured()
    for round_ in range(400):
        n = chance.randint(1, 12)
        running = [Seq(i, Request(str(i), [1]), 0, [1], 1 << 30, (0, i)) for i in range(n)]
        room = [chance.randint(1, 9) for _ in running]
        lengths = [0] * n
        if not control.rests():
            lengths = control.plan(Round(running, room, chance.randint(0, 5), costs))
        assert len(lengths) == n
        assert all(0 <= k <= most for k, most in zip(lengths, room, strict=True))
        rows = n + sum(lengths)
        costs.saw_verifying(rows, 0.01 + 0.0001 * rows)
        if sum(lengths):
            costs.saw_draft(n, max(lengths), 0.001, chance.randint(0, 99))
            records = [
                Verified(i, k, chance.randint(0, k), [0.5] * k) for i, k in enumerate(lengths)
            ]
            control.observe(records, 0.01, 0.001)
        assert control.goes_on([]) in (True, False)
        control.forget(round_ % 12)


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    requests = make_requests(10, seed=4)
    return requests, expected(make_engine(tiny_folder("llama")), requests)


@pytest.fixture(scope="module")
def drafter_folder(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A drafting model with an acceptance head, which `specdec-pp` asks for."""
    folder = tmp_path_factory.mktemp("drafter")
    shutil.copytree(tiny_folder("llama"), folder, dirs_exist_ok=True)
    save_head(AcceptanceHead(48), folder, {})
    return str(folder)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("proposer", PROPOSERS + DRAFTS)
def test_every_pair_gives_the_same_tokens(
    tiny_folder: Any, drafter_folder: str, wanted: Any, proposer: str, control: str
) -> None:
    requests, answers = wanted
    proposer, _, trees = proposer.partition(", ")
    drafter = {"draft_model": drafter_folder} if proposer in ("draft", "mix") else {}
    engine = make_engine(
        tiny_folder("llama"), speculate=proposer, draft_length=control, draft_tokens=5, pages=40,
        draft_shape="tree" if trees else "chain", **drafter,
    )  # fmt: skip
    assert engine.speculation is not None
    engine.clock = engine.speculation.clock = itertools.count().__next__  # no machine's noise
    assert run(engine, requests, seed=9) == answers
    assert engine.control.check_integrity() == []
    assert engine.stats().drafted_tokens > 0
    engine.close()


def test_a_factor_is_that_of_suffix_trees() -> None:
    config = resolve({"speculate": "suffix", "draft_factor": 2.0}).config
    proposer: Any = build_speculation(config, None).proposer
    assert proposer.how.factor == 2.0
    with pytest.raises(ConfigError, match="speculate=suffix"):
        resolve({"speculate": "ngram", "draft_factor": 2.0})
    with pytest.raises(ConfigError, match="above 0"):
        resolve({"speculate": "suffix", "draft_factor": 0.0})


def test_synthetic_acceptance_needs_random_weights() -> None:
    with pytest.raises(ConfigError, match="load=random"):
        resolve({"synthetic_acceptance": 0.5})


def test_synthetic_acceptance_is_what_was_asked(tiny_folder: Any) -> None:
    engine = make_engine(
        tiny_folder("llama"), speculate="synthetic", draft_length="fixed", draft_tokens=1,
        synthetic_acceptance=0.75,
    )  # fmt: skip
    run(engine, make_requests(40, seed=2), seed=1)
    stats = engine.stats()
    assert stats.accepted_tokens / stats.drafted_tokens == pytest.approx(0.75, abs=0.08)


def test_a_drafter_must_share_the_vocabulary(tiny_folder: Any) -> None:
    from kvarn.core.errors import ConfigError

    with pytest.raises(ConfigError, match="draft_model"):
        make_engine(tiny_folder("llama"), speculate="draft")
