"""Sampled tokens follow the exact distribution, and equal a slow, obvious sampler."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvarn.core.request import SamplingParams
from kvarn.runner.choose import argmax, draw, lowest_kept
from kvarn.runner.sampler import Sampler
from kvarn.runner.uniform import sequence_key, uniform

CPU = torch.device("cpu")


def sampler(vocab: int, *requests: SamplingParams, prompt_len: int = 1, seed: int = 0) -> Sampler:
    """A sampler with the requests in rows 0, 1, ..."""
    made = Sampler(vocab, CPU, seed, None)
    for row, params in enumerate(requests):
        made.start(row, params, (0,), prompt_len, row)
    return made


def naive_probs(logits: np.ndarray, params: SamplingParams, history: list[int], prompt: int) -> Any:
    """The distribution of the next token, step by step, in fp64; None where rounding decides it."""
    x = logits.astype(np.float64).copy()
    output = history[prompt:]
    if params.allowed_token_ids is not None:
        for token in range(len(x)):
            if token not in params.allowed_token_ids:
                x[token] = -math.inf
    for word in params.bad_word_ids:
        prefix = list(word[:-1])
        if history[len(history) - len(prefix) :] == prefix or not prefix:
            x[word[-1]] = -math.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        for token in {0, *params.stop_token_ids}:
            x[token] = -math.inf
    for token in set(history):
        penalty = params.repetition_penalty
        x[token] = x[token] / penalty if x[token] > 0 else x[token] * penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.temperature == 0:
        return (np.arange(len(x)) == np.argmax(x)).astype(float)
    p = np.exp((x - x.max()) / params.temperature)
    p[p < params.min_p * p.max()] = 0
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    p /= p.sum()
    if params.top_p < 1:
        mass, edge = 0.0, 0.0
        for edge in sorted(p, reverse=True):
            mass += edge
            if abs(mass - params.top_p) < 1e-6:
                return None
            if mass >= params.top_p:
                break
        p[p < edge] = 0
    return p / p.sum()


def naive_draw(p: np.ndarray, u: float) -> int | None:
    """The token that a uniform number stands for; None where rounding decides it."""
    bounds = np.cumsum(p)
    return None if np.abs(bounds - u).min() < 1e-6 else int(np.argmax(bounds > u))


def chi_squared(counts: np.ndarray, p: np.ndarray) -> None:
    """Assert that counts could come from p, at about one false alarm in a million."""
    assert not counts[p == 0].any()
    expected = counts.sum() * p
    rare = expected < 5  # the statistic needs a few in each cell: the rare ones share one
    if expected[rare].sum() >= 5:
        expected = np.append(expected[~rare], expected[rare].sum())
        counts = np.append(counts[~rare], counts[rare].sum())
    else:
        assert counts[rare].sum() < 25
        expected, counts = expected[~rare], counts[~rare]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    if freedom == 0:
        return
    # Wilson-Hilferty: the cube root of chi2 / freedom is nearly normal
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert z < 4.8, f"chi2 = {statistic:.1f} with {freedom} degrees of freedom"


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.6},
    {"top_p": 0.05},
    {"min_p": 0.2},
    {"top_k": 8, "top_p": 0.7},
    {"temperature": 1.7, "top_k": 12, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 2.0, "logit_bias": {1: 4.0, 2: -100.0}},
    {"allowed_token_ids": (3, 4, 5, 6)},
]


@pytest.mark.parametrize("given_params", FILTERS, ids=str)
@pytest.mark.parametrize("vocab", [16, 21])
def test_distribution_is_exact(given_params: dict[str, Any], vocab: int) -> None:
    params = SamplingParams(**given_params)
    row = np.random.default_rng(3).normal(0, 1, vocab).astype(np.float32)
    count = 20_000
    found = sampler(vocab, params).sample(
        torch.from_numpy(row).repeat(count, 1),
        np.zeros(count, np.int64),
        np.arange(1, count + 1),
        np.zeros((1, count), np.int32),
    )
    assert not found.errors
    counts = np.bincount(found.tokens, minlength=vocab)
    chi_squared(counts, naive_probs(row, params, [0], 1))


def test_uniform_numbers_fill_the_unit_interval_by_key_and_by_position() -> None:
    for keys, positions in (
        (np.arange(40_000, dtype=np.uint64), np.zeros(40_000, np.int64)),
        (np.full(40_000, 7, np.uint64), np.arange(40_000)),
    ):
        u = uniform(keys, positions)
        assert u.min() >= 0 and u.max() < 1
        chi_squared(np.bincount((u * 100).astype(int), minlength=100), np.full(100, 0.01))
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.02


def test_keys_differ_by_every_part() -> None:
    keys = {sequence_key(seed, index) for seed in range(-50, 50) for index in range(50)}
    assert len(keys) == 5000
    assert sequence_key(1, 2) != sequence_key(2, 1)
    assert sequence_key(2**64 + 5) == sequence_key(5)


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.5, 20.0]),
    top_k=st.sampled_from([0, -1, 1, 3, 40, 130, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.0, 0.1, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5, -1.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.0]),
    logit_bias=st.dictionaries(st.integers(0, 20), st.floats(-5, 5, width=32), max_size=3),
    bad_word_ids=st.sampled_from([(), ((3,),), ((2, 4), (5,))]),
    allowed_token_ids=st.sampled_from([None, None, tuple(range(1, 30))]),
    min_tokens=st.sampled_from([0, 0, 5]),
    stop_token_ids=st.sampled_from([(), (7,)]),
    seed=st.one_of(st.none(), st.integers(-(2**63), 2**64 - 1)),
)


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(params_strategy, min_size=1, max_size=5),
    vocab=st.sampled_from([31, 64, 160, 704]),
    noise=st.integers(0, 2**32 - 1),
)
def test_any_batch_equals_the_naive_sampler(
    requests: list[SamplingParams], vocab: int, noise: int
) -> None:
    rng = np.random.default_rng(noise)
    n, prompt = len(requests), 4
    tokens = rng.integers(0, min(vocab, 12), (n, 12)).astype(np.int32)
    # several positions of each row, in no order: the shape of verification in speculation
    rows = rng.integers(0, n, 2 * n)
    lengths = rng.integers(prompt, 12, 2 * n)
    logits = rng.normal(0, 2, (2 * n, vocab)).astype(np.float32)
    expected = []
    for r, (row, length) in enumerate(zip(rows, lengths)):
        params = requests[row]
        p = naive_probs(logits[r], params, tokens[row, :length].tolist(), prompt)
        seed = 0 if params.seed is None else params.seed
        u = uniform(np.array([sequence_key(seed, int(row))], np.uint64), np.array([length]))[0]
        assume(p is not None)
        expected.append(int(p.argmax()) if params.temperature == 0 else naive_draw(p, u))
    assume(None not in expected)
    many = sampler(vocab, *requests, prompt_len=prompt)
    found = many.sample(torch.from_numpy(logits.copy()), rows, lengths, tokens)
    assert not found.errors
    assert found.tokens == expected
    for r in range(len(rows)):
        alone = many.sample(
            torch.from_numpy(logits[r : r + 1].copy()), rows[r : r + 1], lengths[r : r + 1], tokens
        )
        assert alone.tokens == [expected[r]]


def shapes() -> Iterator[tuple[int, int]]:
    yield from ((rows, vocab) for rows in (1, 3) for vocab in (1, 7, 64, 96, 1000, 4096))


@pytest.mark.parametrize(("rows", "vocab"), shapes())
def test_argmax_is_the_lowest_of_equals(rows: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    coarse = torch.from_numpy(rng.integers(-3, 3, (rows, vocab)).astype(np.float32))
    ids, values = argmax(coarse)
    assert ids.tolist() == coarse.numpy().argmax(-1).tolist()
    assert values.tolist() == coarse.amax(-1).tolist()


@pytest.mark.parametrize(("rows", "vocab"), shapes())
def test_draw_never_takes_a_weight_of_zero(rows: int, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    weights = torch.from_numpy((rng.random((rows, vocab)) < 0.1).astype(np.float32) * 1e-30)
    weights[:, vocab // 2] = 1e-30
    for u in (0.0, 1e-300, 0.5, 1 - 2**-53):
        ids = draw(weights, torch.full((rows,), u, dtype=torch.float64))
        assert (weights.gather(1, ids[:, None]) > 0).all()
    first = draw(weights, torch.zeros(rows, dtype=torch.float64))
    assert first.tolist() == (weights > 0).int().numpy().argmax(-1).tolist()


def test_ties_at_the_edge_are_kept_whole() -> None:
    weights = torch.tensor([[4.0, 2, 2, 2, 1, 1] + [0.0] * 10])
    on, off = torch.tensor([2]), torch.tensor([0])
    share = torch.tensor([0.5], dtype=torch.float64)
    assert lowest_kept(weights, on, torch.ones(1, dtype=torch.float64)).item() == 2
    assert lowest_kept(weights, off, share).item() == 2
    equal = torch.full((1, 2048), 0.25)
    assert lowest_kept(equal, on, share).item() == 0.25


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 1 - 1e-9])
@pytest.mark.parametrize("top_k", [0, 700, 5000])
def test_wide_nucleus_needs_many_candidates(top_k: int, top_p: float) -> None:
    vocab = 8192
    rng = np.random.default_rng(5)
    weights = torch.from_numpy(rng.exponential(1, (2, vocab)).astype(np.float32))
    found = lowest_kept(
        weights, torch.tensor([top_k, top_k]), torch.full((2,), top_p, dtype=torch.float64)
    )
    for row, lowest in zip(weights.double(), found.tolist()):
        order = row.sort(descending=True).values[: top_k or vocab]
        needed = int((order.cumsum(0) < top_p * order.sum()).sum()) + 1
        kept = int((row >= lowest).sum())
        assert abs(kept - min(needed, len(order))) <= 1
