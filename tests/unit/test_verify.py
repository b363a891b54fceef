"""Verification is exact: what it emits has the target's distribution, whatever is drafted.

Every case verifies one draft for each of `N` sequences, whose sampler keys are their numbers. The
first token emitted must be distributed as the target says at the root; the second, where there is
one, as the target says after the first, and so on: the chi-square statistics of all these tables
are added up. A verifier with a fault must fail the same test.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from golden.naive import naive_logits
from golden.test_engine import make_engine
from numpy.typing import NDArray

from kvarn.core.plan import Draft
from kvarn.core.request import SamplingParams
from kvarn.runner import sampler as sampling
from kvarn.runner.sampler import Sampler
from kvarn.runner.verify import Drafted, Run, SparseQ, drawn, standing, walk

N = 20_000
CPU = torch.device("cpu")
Floats = NDArray[np.float64]
Prefix = tuple[int, ...]
PARAMS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=1.0, top_p=0.9),
    SamplingParams(temperature=0.7, top_p=0.9),
]


def final(logits: Floats, params: SamplingParams) -> Floats:
    """The distribution that plain decoding draws from, by definition."""
    p = np.exp((logits - logits.max()) / params.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = int(np.searchsorted(np.cumsum(p[order]), params.top_p)) + 1
    out = np.zeros_like(p)
    out[order[:kept]] = p[order[:kept]]
    return out / out.sum()


@dataclass(frozen=True)
class Toy:
    """A target and a drafter over a small vocabulary, by prefix."""

    vocab: int
    seed: int

    @cache  # noqa: B019
    def logits(self, prefix: Prefix) -> Floats:
        return np.random.default_rng([self.seed, *prefix, 7]).normal(0.0, 1.5, self.vocab)

    @cache  # noqa: B019
    def q(self, prefix: Prefix) -> Floats:
        q = np.random.default_rng([self.seed, *prefix, 8]).random(self.vocab) + 0.05
        return q / q.sum()


def draw_tree(target: Any, widths: tuple[int, ...], chance: np.random.Generator) -> Draft:
    """Children of every node, drawn one after the other without replacement; `widths` by depth."""
    tokens, parents, rows = list[int](), list[int](), list[Floats]()
    level: list[tuple[int, Prefix]] = [(-1, ())]
    for width in widths:
        following = []
        for parent, prefix in level:
            q = target.q(prefix)
            race = chance.exponential(size=len(q)) / q  # the first to come in is drawn first
            for token in race.argsort()[:width].tolist():
                following.append((len(tokens), (*prefix, token)))
                tokens.append(token)
                parents.append(parent)
                rows.append(q)
        level = following
    return Draft(tokens, parents, [0.5] * len(tokens), torch.from_numpy(np.stack(rows)).float())


def as_chain(draft: Draft) -> Draft:
    return Draft(draft.tokens, None, draft.confidence, draft.q)


def as_delta(draft: Draft) -> Draft:
    return Draft(draft.tokens, draft.parents, draft.confidence)


def as_sparse(draft: Draft) -> Draft:
    found = draft.q.sort(-1, descending=True)
    return Draft(
        draft.tokens, draft.parents, draft.confidence, SparseQ(found.indices, found.values)
    )


def prefixes(draft: Draft) -> list[Prefix]:
    """What stands before each judged row: the root, then every draft."""
    found: list[Prefix] = [()]
    for i, token in enumerate(draft.tokens):
        parent = i if draft.parents is None else draft.parents[i] + 1
        found.append((*found[parent], token))
    return found


def verify(target: Any, drafts: list[Draft], params: SamplingParams) -> list[Run]:
    """One step of all sequences at once."""
    sampler = Sampler(target.vocab, CPU, 12, None)
    for row in range(len(drafts)):
        sampler.start(row, params, (), 0, row)
    before = [prefixes(draft) for draft in drafts]
    known = {prefix: target.logits(prefix) for every in before for prefix in every}
    logits = torch.from_numpy(np.stack([known[prefix] for each in before for prefix in each]))
    counts = np.array([len(each) for each in before])
    first = (np.cumsum(counts) - counts).tolist()
    lengths = np.array([5 + len(prefix) for each in before for prefix in each])
    rows = np.repeat(np.arange(len(drafts)), counts)
    drafted = Drafted(drawn(drafts, first, target.vocab))
    tokens = np.zeros((len(drafts), 1), np.int32)
    sampled = sampler.sample(logits.float(), rows, lengths, tokens, drafted)
    assert not sampled.errors
    return [
        walk(sampled.tokens[at : at + n], draft)
        for draft, at, n in zip(drafts, first, counts.tolist())
    ]


def grouped(seen: Floats, wanted: Floats) -> Floats:
    """Cells [2, n] of seen and wanted counts, at least 10 wanted in each: rare ones together."""
    order = np.argsort(wanted)
    seen, wanted = seen[order], wanted[order]
    edge = int(np.searchsorted(np.cumsum(wanted), 10.0)) + 1  # the first cell ends here
    cells = [(seen[:edge].sum(), wanted[:edge].sum())]
    return np.array([*cells, *zip(seen[edge:], wanted[edge:])]).T


def p_value(target: Any, params: SamplingParams, runs: list[Run]) -> float:
    """Of the chi-square statistics of every prefix's next token, added up."""
    counts: dict[Prefix, Floats] = defaultdict(lambda: np.zeros(target.vocab))
    for run in runs:
        for i, token in enumerate(run.tokens):
            counts[tuple(run.tokens[:i])][token] += 1
    statistic, freedom = 0.0, 0
    for prefix, seen in counts.items():
        wanted = final(target.logits(prefix), params) * seen.sum()
        if seen[wanted == 0].any():
            return 0.0
        cells = grouped(seen, wanted)
        statistic += float(((cells[0] - cells[1]) ** 2 / cells[1]).sum())
        freedom += cells.shape[1] - 1
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@cache
def trees(target: Any, widths: tuple[int, ...]) -> list[Draft]:
    chance = np.random.default_rng(5)
    return [draw_tree(target, widths, chance) for _ in range(N)]


def drafts_of(target: Any, widths: list[int], form: Callable[[Draft], Draft]) -> list[Draft]:
    return [form(draft) for draft in trees(target, tuple(widths))]


CASES = {
    "chain": ([1, 1], as_chain),
    "sparse chain": ([1, 1], as_sparse),
    "chain by parents": ([1, 1], lambda draft: draft),
    "delta chain": ([1, 1], lambda draft: as_delta(as_chain(draft))),
    "tree": ([2, 2], lambda draft: draft),
    "wide tree": ([3, 1], lambda draft: draft),
    "delta tree": ([2, 2], as_delta),
}


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"t{p.temperature} p{p.top_p}")
@pytest.mark.parametrize("case", CASES)
def test_emitted_tokens_have_the_targets_distribution(case: str, params: SamplingParams) -> None:
    widths, form = CASES[case]
    target = Toy(3, 1)
    runs = verify(target, drafts_of(target, widths, form), params)
    assert p_value(target, params, runs) > 0.01
    accepted = np.mean([len(run.tokens) - 1 for run in runs])
    assert 0.2 < accepted < 2


def test_a_known_q_is_accepted_more_often() -> None:
    """Share of first drafts accepted: the overlap of p and q; of DELTA, sum of p * q."""
    target = Toy(3, 1)
    p, q = final(target.logits(()), PARAMS[1]), target.q(())
    wanted = {"chain": np.minimum(p, q).sum(), "delta chain": (p * q).sum()}
    for case, share in wanted.items():
        runs = verify(target, drafts_of(target, *CASES[case]), PARAMS[1])
        assert np.mean([len(run.tokens) > 1 for run in runs]) == pytest.approx(share, abs=0.015)


def test_greedy_rows_accept_the_largest_alone() -> None:
    target = Toy(3, 1)
    runs = verify(target, drafts_of(target, *CASES["tree"])[:200], SamplingParams(temperature=0.0))
    for run in runs:
        for i, token in enumerate(run.tokens):
            assert token == int(target.logits(tuple(run.tokens[:i])).argmax())


def test_a_row_does_not_depend_on_its_batch() -> None:
    target = Toy(3, 1)
    drafts = drafts_of(target, *CASES["tree"])[:40]
    wide = drafts_of(target, *CASES["wide tree"])[:40]  # whose nodes have more children
    mixed = [(as_delta(as_chain(d)), d, wide[i])[i % 3] for i, d in enumerate(drafts)]
    mixed[:4] = [as_delta(as_chain(draft)) for draft in drafts[:2]] + drafts[2:4]
    together = verify(target, mixed, PARAMS[2])
    for count in (1, 4, 7, 20):
        assert verify(target, mixed[:count], PARAMS[2]) == together[:count]


def redraw_from_p(weights: Any, drawn: Any, keys: Any, lengths: Any) -> Any:
    """A fault: after a refusal, a token of p itself, not of what the draft left of it."""
    tokens = right(weights, drawn, keys, lengths)
    taken = (tokens[:, None] == torch.from_numpy(drawn.children)).any(-1)
    u = torch.rand(len(tokens), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return torch.where(taken, tokens, sampling.draw(weights, u))


right = sampling.accept


@pytest.mark.parametrize("case", ["chain", "tree"])
def test_a_residual_that_is_not_subtracted_is_found(
    monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    target = Toy(3, 1)
    monkeypatch.setattr(sampling, "accept", redraw_from_p)
    runs = verify(target, drafts_of(target, *CASES[case]), PARAMS[1])
    assert p_value(target, PARAMS[1], runs) < 1e-6


def test_a_bonus_from_q_is_found() -> None:
    target, chance = Toy(3, 1), np.random.default_rng(9)
    runs = verify(target, drafts_of(target, *CASES["chain"]), PARAMS[1])
    for run in runs:
        if len(run.tokens) == 3:
            run.tokens[-1] = int(chance.choice(3, p=target.q(tuple(run.tokens[:2]))))
    assert p_value(target, PARAMS[1], runs) < 1e-6


class TinyModel:
    """The logits of a tiny random model after a prompt; a drafter that is the same, flattened."""

    def __init__(self, folder: str) -> None:
        self.engine = make_engine(folder)
        self.vocab = self.engine.spec.vocab

    @cache  # noqa: B019
    def logits(self, prefix: Prefix) -> Floats:
        decoder = self.engine.assembly.model.decoder
        found = naive_logits(decoder, self.engine.spec, [3, 14, 15, *prefix])[-1]
        return 3.0 * (found / found.std()).double().numpy()

    @cache  # noqa: B019
    def q(self, prefix: Prefix) -> Floats:
        return final(0.7 * self.logits(prefix), SamplingParams(temperature=1.0))


@pytest.mark.parametrize("case", ["chain", "delta chain", "tree"])
@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[2]], ids=lambda p: f"t{p.temperature}")
def test_a_models_logits(tiny_folder: Any, case: str, params: SamplingParams) -> None:
    target = TinyModel(tiny_folder("llama"))
    widths = [3] if case == "tree" else [1]
    runs = verify(target, drafts_of(target, widths, CASES[case][1]), params)
    assert p_value(target, params, runs) > 0.01


def test_chains_judged_together_as_one_by_one() -> None:
    """`standing` finds where `walk` ends, for many chains of any length."""
    chance = np.random.default_rng(0)
    for _ in range(50):
        lengths = chance.integers(0, 6, 7)
        drafts = [Draft(chance.integers(0, 3, n).tolist()) for n in lengths]
        chosen = [chance.integers(0, 3, n + 1).tolist() for n in lengths]
        first = np.cumsum(lengths + 1) - (lengths + 1)
        stands = [
            [a == b for a, b in zip(draft.tokens, mine)] + [False]
            for draft, mine in zip(drafts, chosen)
        ]
        last = standing(np.concatenate([np.array(one, np.bool_) for one in stands]), first)
        ends = [len(walk(mine, draft).tokens) - 1 for mine, draft in zip(chosen, drafts)]
        assert (last - first).tolist() == ends
