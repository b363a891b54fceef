"""Proposers and controls played over texts: the counts are those of an engine that serves them."""

from random import Random

import pytest

from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.speculate.chains import Chain
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.gammatune import GammaTune, GammaTunePlus, Rates
from kvarn.speculate.part import LengthControl
from kvarn.speculate.propose.ngram import NGram
from kvarn.speculate.propose.suffix import Suffix
from kvarn.speculate.texts import Recorded, Told, tell
from kvarn.speculate.trial import Roofline

TEXT = [Random(0).randrange(90) for _ in range(40)]


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_counts_are_those_of_the_engine(tiny_folder, proposer):
    """A model with random weights soon repeats itself; two requests, the second as the first."""
    llm = LLM(
        tiny_folder("llama"), load="random", dtype="float32", speculate=proposer,
        draft_length="fixed", draft_tokens=5,
    )  # fmt: skip
    alone = NGram() if proposer == "ngram" else Suffix()
    params = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    for _ in range(2):
        before = llm.engine.stats()
        (done,) = llm.generate([TEXT], params)
        after, told = llm.engine.stats(), tell(alone, Fixed(), TEXT, done.outputs[0].tokens, 5)
        assert told.drafted == after.drafted_tokens - before.drafted_tokens
        assert told.accepted == after.accepted_tokens - before.accepted_tokens > 0
        assert told.tokens == 59
    llm.close()


def chains(stands: list[int], sure: float = 0.9, longest: int = 6) -> list[Chain]:
    """Chains that stand so far; the token that fails is doubted."""
    return [
        Chain(said := [sure] * count + [0.2] * (longest - count), count, said) for count in stands
    ]


def told(control: LengthControl, most: int, knows: bool = False) -> Told:
    """A text of ten tokens of which every third place fails: 2, 1 and 0 tokens stand, in turn."""
    text = TEXT[:14]
    stands = [2, 1, 0] * 3
    who = Recorded(chains(stands), 5, text)
    return tell(who, control, text[:4], text[4:], most, knows=knows)


def test_rounds_follow_what_stands():
    two = told(Fixed(), 2)
    assert dict(two.drafts) == {2: 3}  # each brings two and the target's own
    assert (two.tokens, two.rounds, two.drafted, two.accepted) == (9, 3, 6, 6)
    long = told(Fixed(), 6)
    assert long.rounds == 3 and long.drafted == 6 + 5 + 2  # no more than there is room for
    assert told(GammaTunePlus(), 6).drafted == 3 + 3 + 2  # the doubted token is the last
    assert told(Fixed(), 6, knows=True).drafted == 6


def test_time_is_that_of_the_rounds():
    times = Roofline(read=1.0, row=0.0, fixed=0.0, token=0.1)
    assert told(Fixed(), 2).seconds(times) == pytest.approx(3 * 1.2)
    assert told(Fixed(), 2).speedup(times) == pytest.approx(9 / 3.6)
    both = told(Fixed(), 2) + told(Fixed(), 6)
    assert both.tokens == 18 and both.rounds == 6


def test_a_control_is_told_of_every_draft():
    control = GammaTune(Rates(delta=2, above=0, first=1))
    # 1 of 1 stands, 0 of the 3 that follow, and so on; there is no room behind the last token
    assert dict(told(control, 6).drafts) == {1: 3, 3: 2, 0: 1}
    assert not control._states  # the request has ended
