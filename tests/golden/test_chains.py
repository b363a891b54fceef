"""Rules played over chains do what the engine does: the same drafts, and as much of them stands."""

import shutil
from typing import Any

import pytest
import torch
from golden.test_engine import make_engine, run

from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.speculate.chains import Chain, Counts, chains_of, known, play
from kvarn.speculate.length.specdec_pp import SpecDecPP
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.records import Record
from kvarn.speculate.train.head import AcceptanceHead, save_head

MOST = 6
ASKED = [[3, 14, 15, 92, 65], [27, 18, 28], [1, 2, 3, 4, 5, 6, 7, 8]]


def always(said: object) -> bool:
    return True


@pytest.fixture(scope="module")
def drafting(tiny_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """From a length rule to an engine whose drafter is its target, a little blurred."""
    target, folder = tiny_folder("llama"), tmp_path_factory.mktemp("blurred")
    shutil.copytree(target, folder, dirs_exist_ok=True)
    torch.manual_seed(5)
    head = AcceptanceHead(48, depth=1)
    torch.nn.init.normal_(head.out.weight, std=0.4)
    save_head(head, folder, {})

    def make(rule: str, threshold: float = 0.5, most: int = MOST) -> Engine:
        engine = make_engine(
            target, speculate="draft", draft_length=rule, draft_tokens=most,
            draft_model=str(folder), pages=200,
        )  # fmt: skip
        drafter = drafter_of(engine)
        generator = torch.Generator().manual_seed(1)
        embed = drafter.runner.decoder.embed
        embed += 0.25 * embed.std() * torch.randn(embed.shape, generator=generator)
        if rule == "specdec-pp":
            assert engine.speculation is not None
            engine.speculation.length = SpecDecPP(threshold)
        return engine

    return make


def drafter_of(engine: Engine) -> DraftModel:
    assert engine.speculation is not None
    assert isinstance(engine.speculation.proposer, DraftModel)
    return engine.speculation.proposer


def served(engine: Engine) -> tuple[list[list[int]], list[Record]]:
    """Greedy texts, one request after the other, and every draft that was judged."""
    assert engine.speculation is not None
    seen = list[Record]()
    engine.speculation.listeners.append(seen.extend)
    texts = []
    for i, prompt in enumerate(ASKED):
        sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        texts.append(prompt + run(engine, [Request(f"r{i}", prompt, sampling)], 0)[f"r{i}", 0])
    return texts, seen


@pytest.mark.parametrize("length", [1, 3, MOST])
def test_fixed_lengths_are_played_as_they_run(drafting: Any, length: int) -> None:
    texts, seen = served(drafting("fixed", most=length))
    chains = [
        chains_of(drafter_of(drafting("fixed")), text, len(prompt), MOST)
        for text, prompt in zip(texts, ASKED, strict=True)
    ]
    made = sum((play(one, always, length) for one in chains), Counts())
    assert made.tokens == 39 * len(ASKED)
    assert made.drafted == sum(len(one.draft.tokens) for one in seen)
    assert made.accepted == sum(one.accepted for one in seen)
    assert 0.1 < made.accepted / made.drafted < 0.95  # the blur must not decide everything
    assert sum((known(one, MOST) for one in chains), Counts()).discarded == 0


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_stops_of_the_head_are_played_as_they_run(drafting: Any, threshold: float) -> None:
    texts, seen = served(drafting("specdec-pp", threshold))
    headed, bare = (drafter_of(drafting(length)) for length in ("specdec-pp", "fixed"))
    rule, made = SpecDecPP(threshold), Counts()
    for text, prompt in zip(texts, ASKED, strict=True):
        chains, own = (chains_of(one, text, len(prompt), MOST) for one in (headed, bare))
        for chain, plain in zip(chains, own, strict=True):
            chain.own = plain.said
        made += play(chains, rule.goes_on, MOST)
    assert made.drafted == sum(len(one.draft.tokens) for one in seen)
    assert made.accepted == sum(one.accepted for one in seen)


def test_counts_cost_what_the_identity_says() -> None:
    """t_d tokens + c1 discarded + c2 verifications is the time of all drafts and verifications."""
    made = Counts(tokens=100, verifications=40, drafted=90, accepted=60)
    ratio = 3.7
    time = made.drafted + (1 + ratio) * made.verifications  # in drafted tokens
    assert made.tokens * (1 + made.excess(ratio)) == pytest.approx(time)
    assert made.speed(ratio) == pytest.approx(made.tokens * (1 + ratio) / time)


def test_a_late_word_stops_one_token_later() -> None:
    said, own = [0.9, 0.1, 0.9, 0.9, 0.9], [0.9] * 5
    rule = SpecDecPP(0.5).goes_on
    known = [Chain(said, 0, said)] * 7
    assert play(known, rule, 5).drafted == 2 * 6 - 1  # no draft where one token is left
    late = [Chain(said, 0, own)] + [Chain(said, 5, own)] * 9
    assert play(late, rule, 5).drafted == 3 + 3 + 3 + 0
