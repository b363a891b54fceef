"""Contexts of pairs: keys are unlike, answers are right, and equal seeds give equal contexts."""

import pytest

from kvarn.core.errors import ConfigError
from kvarn.workload.mqar import END, FILLER, KEYS, VALUES, VOCAB, questions, recall

SIZES = [(2, 1), (64, 32), (256, 16), (1024, 512), (4096, 1024), (32768, 1024)]


@pytest.mark.parametrize(("tokens", "pairs"), SIZES)
def test_every_key_stands_once_and_its_value_follows(tokens: int, pairs: int) -> None:
    made = recall(3, tokens, pairs)
    assert len(made.context) == tokens
    places = [at for at, token in enumerate(made.context) if token in KEYS]
    said = [(made.context[at], made.context[at + 1]) for at in places]
    assert len({key for key, _ in said}) == pairs
    assert said == list(made.pairs.items())
    assert all(value in VALUES for _, value in said)


def test_all_else_is_filler() -> None:
    made = recall(0, 512, 40)
    spoken = {*made.pairs, *made.pairs.values()}
    rest = [token for token in made.context if token not in spoken]
    assert len(rest) == 512 - 2 * 40
    assert all(token in FILLER for token in rest)


def test_ranges_are_apart_and_inside_the_vocabulary() -> None:
    ids = [END, *FILLER, *VALUES, *KEYS]
    assert len(set(ids)) == len(ids)
    assert max(ids) < VOCAB


def test_seeds() -> None:
    assert recall(1, 256, 16) == recall(1, 256, 16)
    assert recall(1, 256, 16) != recall(2, 256, 16)
    made = recall(1, 256, 16)
    assert questions(5, made, 8) == questions(5, made, 8)
    assert questions(5, made, 8) != questions(6, made, 8)


def test_pairs_are_everywhere_in_a_context() -> None:
    quarters = [0] * 4
    for seed in range(20):
        for at, token in enumerate(recall(seed, 1024, 32).context):
            quarters[at // 256] += token in KEYS
    assert all(abs(count - 160) < 48 for count in quarters)  # more than four deviations


def test_each_key_is_asked_at_most_once() -> None:
    made = recall(0, 256, 16)
    asked = questions(0, made, 16)
    assert sorted(asked) == sorted(made.pairs)
    assert asked != list(made.pairs)


@pytest.mark.parametrize("pairs", [0, len(KEYS) + 1])
def test_a_wrong_number_of_pairs_is_refused(pairs: int) -> None:
    with pytest.raises(ConfigError, match="1 to 1024 pairs"):
        recall(0, 8192, pairs)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="20 pairs take 40 tokens"):
        recall(0, 39, 20)
    with pytest.raises(ConfigError, match="17 questions about 16 pairs"):
        questions(0, recall(0, 256, 16), 17)
