"""What the sampler promises beside its distribution: independence, logprobs, errors, rules."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from kvarn.core.request import Grammar, SamplingParams
from kvarn.kernels import native
from kvarn.runner.choose import argmax
from kvarn.runner.logprobs import logprobs
from kvarn.runner.sampler import Sampled, Sampler

VOCAB = 640
EOS = 2


def make(*requests: SamplingParams, prompt_len: int = 3, first_row: int = 0) -> Sampler:
    sampler = Sampler(VOCAB, torch.device("cpu"), 0, None)
    for i, params in enumerate(requests):
        sampler.start(first_row + i, params, (EOS,), prompt_len, i)
    return sampler


def noise(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (rows, VOCAB))).float()


def sample(
    sampler: Sampler, logits: torch.Tensor, history: list[int], row: int = 0, times: int = 1
) -> Sampled:
    """Sample row `row` after `history`, for each row of logits."""
    tokens = np.zeros((row + 1, 32), np.int32)
    tokens[row, : len(history)] = history
    count = len(logits)
    return sampler.sample(logits.clone(), np.full(count, row), np.full(count, len(history)), tokens)


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=5),
    SamplingParams(seed=5, top_k=20, temperature=0.7),
    SamplingParams(seed=5, top_p=0.9, repetition_penalty=1.2, logprobs=2),
    SamplingParams(seed=9, min_p=0.02, presence_penalty=0.5),
    SamplingParams(temperature=0, logit_bias={7: 5.0}, logprobs=1, logprobs_mode="processed"),
]


def test_tokens_do_not_depend_on_the_batch() -> None:
    n = len(MIXED)
    tokens = np.random.default_rng(1).integers(0, VOCAB, (n, 20)).astype(np.int32)
    logits = noise(n)
    lengths = np.arange(5, 5 + n)
    sampler = make(*MIXED)
    whole = sampler.sample(logits.clone(), np.arange(n), lengths, tokens)
    for order in ([5, 4, 3, 2, 1, 0], [3], [1, 4], [0, 5]):
        part = sampler.sample(logits[order], np.array(order), lengths[order], tokens)
        assert part.tokens == [whole.tokens[r] for r in order]
        for i, r in enumerate(order):
            assert (i in part.logprobs) == (r in whole.logprobs)
            if i in part.logprobs:
                assert part.logprobs[i].logprob == pytest.approx(whole.logprobs[r].logprob)


def test_same_seed_in_another_row_and_after_a_restart_gives_the_same_tokens() -> None:
    params = SamplingParams(seed=11, temperature=2.0)
    a, b = make(params), make(params, first_row=9)
    logits = noise(1)
    expected = [sample(a, logits, [1] * n).tokens for n in range(3, 20)]
    assert [sample(b, logits, [1] * n, row=9).tokens for n in range(3, 20)] == expected
    a.stop(0)
    a.start(0, params, (EOS,), 3, 0)
    assert [sample(a, logits, [1] * n).tokens for n in range(3, 20)] == expected
    assert len({t for tokens in expected for t in tokens}) > 5


def test_seeds_and_indexes_give_different_tokens() -> None:
    params = [SamplingParams(seed=s, temperature=5.0) for s in (1, 1, 2)]
    found = make(*params).sample(
        noise(1).repeat(3, 1), np.arange(3), np.full(3, 4), np.zeros((3, 8), np.int32)
    )
    assert len(set(found.tokens)) == 3


def test_positions_of_one_row_in_one_call_equal_one_at_a_time() -> None:
    params = SamplingParams(
        seed=1, top_p=0.95, repetition_penalty=1.3, frequency_penalty=0.4, bad_word_ids=((5, 6),)
    )
    sampler = make(params)
    logits = noise(6)
    tokens = np.array([[1, 2, 3, 4, 5, 9, 5, 5, 0]], np.int32)
    lengths = np.arange(3, 9)
    together = sampler.sample(logits.clone(), np.zeros(6, np.int64), lengths, tokens).tokens
    alone = [
        sampler.sample(logits[i : i + 1].clone(), np.zeros(1, np.int64), lengths[i : i + 1], tokens)
        for i in range(6)
    ]
    assert together == [one.tokens[0] for one in alone]


def test_a_row_forgets_its_last_sequence() -> None:
    sampler = make(SamplingParams(temperature=0, logit_bias={5: 100.0}))
    assert sample(sampler, noise(1), [1, 1, 1]).tokens == [5]
    sampler.stop(0)
    sampler.start(0, SamplingParams(temperature=0), (EOS,), 3, 0)
    assert sample(sampler, noise(1), [1, 1, 1]).tokens == noise(1).argmax(-1).tolist()


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [600, 30, 31]] = 1.0
    assert sample(make(SamplingParams(temperature=0)), logits, [1, 1, 1]).tokens == [30, 0]


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    found = sample(make(SamplingParams(temperature=temperature)), noise(50), [1, 1, 1])
    assert not found.errors
    assert found.tokens == noise(50).argmax(-1).tolist()


def test_a_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    plain, wide = (make(SamplingParams(seed=3, top_k=k)) for k in (0, 2**63))
    assert sample(plain, noise(40), [1, 1, 1]).tokens == sample(wide, noise(40), [1, 1, 1]).tokens


def test_raw_logprobs_are_of_the_models_logits() -> None:
    params = SamplingParams(temperature=0, logprobs=3, logit_bias={5: 100.0}, top_k=1)
    logits = noise(1)
    found = sample(make(params), logits, [1, 1, 1]).logprobs[0]
    exact = logits.double().log_softmax(-1)[0]
    assert found.token == 5
    assert found.logprob == pytest.approx(exact[5].item(), abs=1e-5)
    assert found.rank == int((exact > exact[5]).sum()) + 1
    best = exact.topk(3)
    assert [t for t, _ in found.top] == best.indices.tolist()
    assert [p for _, p in found.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_processed_logprobs_are_of_the_distribution_drawn_from() -> None:
    params = SamplingParams(temperature=0.5, top_k=4, logprobs=6, logprobs_mode="processed")
    logits = noise(1)
    found = sample(make(params), logits, [1, 1, 1]).logprobs[0]
    exact = (logits[0].double() / 0.5).topk(4)
    expected = exact.values.log_softmax(-1).tolist()
    assert [t for t, _ in found.top] == exact.indices.tolist()  # impossible tokens are left out
    assert [p for _, p in found.top] == pytest.approx(expected, abs=1e-4)
    assert (found.token, found.logprob) in found.top


def test_each_row_gets_the_number_of_alternatives_it_asked_for() -> None:
    sampler = make(*(SamplingParams(logprobs=k) for k in (0, 5, None, 2)))
    found = sampler.sample(noise(4), np.arange(4), np.full(4, 3), np.zeros((4, 8), np.int32))
    assert {r: len(one.top) for r, one in found.logprobs.items()} == {0: 0, 1: 5, 3: 2}


def test_equal_alternatives_come_lowest_id_first() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [40, 20, 30]] = 5.0
    found = logprobs(logits, [30], 2)[0]
    assert (found.rank, [t for t, _ in found.top]) == (1, [20, 30])


def test_prompt_logprobs_of_many_positions() -> None:
    logits, tokens = noise(150), np.random.default_rng(0).integers(0, VOCAB, 150)
    found = logprobs(logits, tokens.tolist(), 1)
    exact = logits.double().log_softmax(-1)
    assert [one.token for one in found] == tokens.tolist()
    assert [one.logprob for one in found] == pytest.approx(
        exact[torch.arange(150), torch.from_numpy(tokens)].tolist(), abs=1e-5
    )
    assert [one.top[0][0] for one in found] == exact.argmax(-1).tolist()


def favour(*ids: int) -> torch.Tensor:
    """Logits that fall from the first id on."""
    logits = torch.full((1, VOCAB), -5.0)
    for i, token in enumerate(ids):
        logits[0, token] = 10.0 - i
    return logits


RULES: list[tuple[dict[str, Any], list[int], int]] = [
    ({"min_tokens": 2}, [1, 1, 1], 9),  # eos is not allowed yet
    ({"min_tokens": 2}, [1, 1, 1, 4], 9),
    ({"min_tokens": 2}, [1, 1, 1, 4, 4], EOS),
    ({"min_tokens": 2, "stop_token_ids": (9,)}, [1, 1, 1], 5),
    ({"min_tokens": 2, "ignore_eos": True}, [1, 1, 1], EOS),
    ({"bad_word_ids": ((EOS,),)}, [1, 1, 1], 9),
    ({"bad_word_ids": ((7, 8, EOS),)}, [1, 1, 1, 7, 8], 9),
    ({"bad_word_ids": ((7, 8, EOS),)}, [1, 7, 8], 9),  # begun in the prompt
    ({"bad_word_ids": ((7, 8, EOS),)}, [1, 7, 8, 8], EOS),
    ({"bad_word_ids": ((7, 7, 7, 7, EOS),)}, [7, 7, 7], EOS),  # longer than what there is
    ({"allowed_token_ids": (5, 6)}, [1, 1, 1], 5),
    ({"logit_bias": {EOS: -100.0}}, [1, 1, 1], 9),
    ({"repetition_penalty": 2.0}, [1, EOS, 1], 9),  # the prompt counts
    ({"presence_penalty": 1.5}, [1, EOS, 1], EOS),  # the prompt does not
    ({"presence_penalty": 1.5}, [1, 1, 1, EOS], 9),
    ({"frequency_penalty": 0.6}, [1, 1, 1, EOS], EOS),
    ({"frequency_penalty": 0.6}, [1, 1, 1, EOS, EOS], 9),
]


@pytest.mark.parametrize(("given", "history", "expected"), RULES, ids=str)
def test_rules_on_single_tokens(given: dict[str, Any], history: list[int], expected: int) -> None:
    sampler = make(SamplingParams(temperature=0, **given))
    assert sample(sampler, favour(EOS, 9, 5), history).tokens == [expected]


def test_nothing_allowed_is_an_error_of_that_row_alone() -> None:
    dead = SamplingParams(
        temperature=0, allowed_token_ids=(EOS, 4), min_tokens=3, bad_word_ids=((4,),)
    )
    cold = SamplingParams(temperature=0)
    for temperature in (0.0, 1.0):
        requests = [cold, SamplingParams(**{**_fields(dead), "temperature": temperature})]
        found = make(*requests).sample(
            noise(2), np.arange(2), np.full(2, 3), np.zeros((2, 8), np.int32)
        )
        assert list(found.errors) == [1]
        for word in ("position 3", "allowed_token_ids", "bad_words", "min_tokens"):
            assert word in found.errors[1]
        assert found.tokens[0] == noise(2)[0].argmax().item()
        assert 0 <= found.tokens[1] < VOCAB


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in SamplingParams.__slots__}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fault", [math.nan, math.inf])
def test_broken_logits_are_an_error_of_that_row_alone(temperature: float, fault: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1, top_p=0.9)
    tokens = np.zeros((3, 8), np.int32)
    whole = make(params, params, params).sample(noise(3), np.arange(3), np.full(3, 3), tokens)
    logits = noise(3)
    logits[1, 77] = fault
    found = make(params, params, params).sample(logits, np.arange(3), np.full(3, 3), tokens)
    assert list(found.errors) == [1] and "not finite" in found.errors[1]
    assert [found.tokens[0], found.tokens[2]] == [whole.tokens[0], whole.tokens[2]]


def test_a_grammar_without_a_tokenizer_is_an_error_of_that_row() -> None:
    sampler = make(SamplingParams(grammar=Grammar("json")))
    assert "tokenizer" in sample(sampler, noise(1), [1, 1, 1]).errors[0]


def test_logits_made_under_inference_mode_can_be_changed() -> None:
    with torch.inference_mode():
        logits = noise(2)
    sampler = make(*MIXED[2:4])
    found = sampler.sample(logits, np.arange(2), np.full(2, 3), np.zeros((2, 8), np.int32))
    assert not found.errors


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 640, 5003])
def test_argmax_is_the_first_of_the_largest(n, dtype, compiled, monkeypatch):
    if compiled and not native.available():
        pytest.skip(native.reason())
    if not compiled:
        monkeypatch.setattr(native, "kernel", lambda *_: None)
    x = torch.from_numpy(np.random.default_rng(n).normal(0, 1, (4, n))).to(dtype)
    x[1] = x[1].mul(2).round()  # many equal ones
    x[2] = -torch.inf
    ids, best = argmax(x)
    want = [row.index(max(row)) for row in x.tolist()]
    assert ids.tolist() == want
    assert best.tolist() == [row[i] for row, i in zip(x.tolist(), want)]
    x[3, n // 2] = torch.nan
    assert argmax(x)[1][3].isnan()
