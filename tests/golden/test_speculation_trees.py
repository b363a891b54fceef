"""Drafts that branch, and drafts drawn from a known q, change nothing but the time."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden.naive import dense_attention
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation import AnyLength

from kvarn.core.plan import Draft
from kvarn.core.request import Request, SamplingParams
from kvarn.core.seq import Seq
from kvarn.engine.engine import Engine
from kvarn.kernels.attention.tree import Forest, TreePlan
from kvarn.runner.trees import ancestry, is_tree, likeliest
from kvarn.speculate.part import Ask, LengthControl, Verified
from kvarn.speculate.speculation import Speculation

VOCAB = 97


class Branches:
    """Trees of random shapes around the known answers, errors on every level."""

    def __init__(self, answers: dict[tuple[str, int], list[int]], knows: float) -> None:
        self.answers, self.knows, self.chance = answers, knows, random.Random(1)
        self.trees = 0

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        return [self._draft(ask.seq, ask.most) for ask in asks]

    def _draft(self, seq: Seq, most: int) -> Draft:
        coming = self.answers[seq.request.id, seq.index][seq.n_output :]
        draft = Draft([], [], [])
        right: dict[int, int] = {-1: 0}  #: depth of the nodes that agree with the answer
        assert draft.parents is not None
        while len(draft.tokens) < most:
            # deep trees: parents are mostly late nodes, and right ones where there is a choice
            options = [*right, *range(-1, len(draft.tokens))]
            parent = max(self.chance.choices(options, k=2))
            depth = right.get(parent)
            token = self.chance.randrange(VOCAB)
            if depth is not None and depth < len(coming) and self.chance.random() < self.knows:
                token = coming[depth]
            node = len(draft.tokens)
            siblings = [t for t, p in zip(draft.tokens, draft.parents) if p == parent]
            if depth is not None and coming[depth : depth + 1] == [token] and token not in siblings:
                right[node] = depth + 1
            draft.tokens.append(token)
            draft.parents.append(parent)
            draft.confidence.append(0.5)
        self.trees += is_tree(draft)
        return draft

    def behind(self, seq: Seq) -> int:
        return 0

    def observe(self, records: Sequence[Verified]) -> None:
        pass

    def forget(self, seq: Seq) -> None:
        pass


def branching(engine: Engine, answers: Any, knows: float, most: int) -> Branches:
    proposer = Branches(answers, knows)
    engine.speculation = Speculation(proposer, AnyLength(most), most, engine.clock)
    return proposer


def checked(engine: Engine, requests: list[Request], answers: Any, seed: int) -> None:
    """The tokens are the answers, and the books are in order."""
    assert run(engine, requests, seed) == answers
    assert engine.control.check_integrity() == []
    stats = engine.stats()
    assert stats.kv_pages_used == 0
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    engine.close()


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    """Greedy requests and the naive decoder's answers, by family."""
    known: dict[str, Any] = {}

    def answers(family: str) -> Any:
        if family not in known:
            requests = make_requests(12)
            known[family] = requests, expected(make_engine(tiny_folder(family)), requests)
        return known[family]

    return answers


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_tokens_equal_naive(tiny_folder: Any, wanted: Any, family: str, overlap: str) -> None:
    """Gemma 2 has windows: its trees are verified as chains."""
    requests, answers = wanted(family)
    for options in ({}, {"budget": 17}, {"pages": 36}):
        engine = make_engine(tiny_folder(family), overlap=overlap, **options)
        proposer = branching(engine, answers, 0.7, 12)
        checked(engine, requests, answers, seed=3)
        assert proposer.trees > 20


@pytest.mark.parametrize("attention", ["reference", "cpu", "invariant", "native"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_backends(tiny_folder: Any, wanted: Any, attention: str, page_size: int) -> None:
    requests, answers = wanted("llama")
    pages = {"page_size": page_size, "pages": 240 // page_size + 2, "max_len": 60}
    engine = make_engine(tiny_folder("llama"), attention=attention, **pages)
    branching(engine, answers, 0.7, 9)
    checked(engine, requests, answers, seed=4)


@pytest.mark.parametrize("prefix", ["hash", "radix"])
def test_preemption_and_prefix_hits(tiny_folder: Any, wanted: Any, prefix: str) -> None:
    """What a tree leaves behind serves others only where it was committed."""
    requests, answers = wanted("llama")
    engine = make_engine(tiny_folder("llama"), pages=32, prefix=prefix)
    branching(engine, answers, 0.8, 8)
    again = [replace(request, id=f"again-{request.id}") for request in requests]
    more = {(f"again-{id_}", index): tokens for (id_, index), tokens in answers.items()}
    proposer: Any = engine.speculation
    proposer.proposer.answers = answers | more
    assert run(engine, requests, seed=5) == answers
    stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.cached_tokens > 0
    assert run(engine, again, seed=6) == more
    assert engine.control.check_integrity() == []


RULES: dict[str, dict[str, Any]] = {
    "seeded": {"seed": 7},
    "top-p": {"seed": 7, "top_p": 0.8, "top_k": 30},
    "penalties": {"seed": 7, "repetition_penalty": 1.6, "frequency_penalty": 0.4},
    "greedy penalties": {"temperature": 0.0, "repetition_penalty": 1.8, "presence_penalty": 0.5},
    "bad words": {"seed": 7, "bad_word_ids": tuple((i, j) for i in range(40) for j in range(9))},
    "logprobs": {"seed": 7, "logprobs": 2, "logprobs_mode": "processed"},
}


@pytest.mark.parametrize("rules", RULES)
def test_sampled_tokens_equal_plain_decoding(tiny_folder: Any, rules: str) -> None:
    chance = random.Random(2)
    params = SamplingParams(**{"temperature": 0.8, "max_tokens": 24, "ignore_eos": True}
                            | RULES[rules])  # fmt: skip
    requests = [
        Request(
            f"r{i}",
            [5] * 20 + [chance.randrange(VOCAB) for _ in range(chance.randint(1, 9))],
            replace(params, n=1 + i % 3),
        )
        for i in range(8)
    ]
    answers = run(make_engine(tiny_folder("llama")), requests, seed=1)
    for options in ({}, {"pages": 40}):
        engine = make_engine(tiny_folder("llama"), **options)
        branching(engine, answers, 0.8, 10)
        checked(engine, requests, answers, seed=2)


def test_logprobs_are_those_of_the_tokens(tiny_folder: Any) -> None:
    requests = [
        Request(f"r{i}", [3, i], SamplingParams(seed=1, max_tokens=20, logprobs=1, ignore_eos=True))
        for i in range(4)
    ]

    def said(engine: Engine) -> dict[str, list[tuple[int, float]]]:
        found: dict[str, list[tuple[int, float]]] = {request.id: [] for request in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                assert output.logprobs is not None
                assert [one.token for one in output.logprobs] == output.tokens
                found[output.request_id] += [(o.token, o.logprob) for o in output.logprobs]
        return found

    plain = said(make_engine(tiny_folder("llama")))
    answers = {(id_, 0): [token for token, _ in pairs] for id_, pairs in plain.items()}
    engine = make_engine(tiny_folder("llama"))
    branching(engine, answers, 0.8, 8)
    for id_, pairs in said(engine).items():
        assert [token for token, _ in pairs] == answers[id_, 0]
        assert [p for _, p in pairs] == pytest.approx([p for _, p in plain[id_]], abs=1e-4)


class Drawing:
    """Trees or chains drawn from a q that has little to do with the target."""

    def __init__(self, width: int) -> None:
        self.width = width

    def propose(self, asks: Sequence[Ask], control: LengthControl) -> list[Draft]:
        return [self._draft(ask.seq, ask.most) for ask in asks]

    def _draft(self, seq: Seq, most: int) -> Draft:
        chance = torch.Generator().manual_seed(len(seq.tokens))
        tokens, parents, rows = list[int](), list[int](), list[Any]()
        parent = -1
        while len(tokens) < most:
            q = torch.rand(VOCAB, generator=chance) ** 8
            q /= q.sum()
            mine = torch.multinomial(q, min(self.width, most - len(tokens)), generator=chance)
            first = len(tokens)
            tokens += mine.tolist()
            parents += [parent] * len(mine)
            rows += [q] * len(mine)
            parent = first
        return Draft(tokens, None if self.width == 1 else parents, [0.5] * most, torch.stack(rows))

    def behind(self, seq: Seq) -> int:
        return 0

    def observe(self, records: Sequence[Verified]) -> None:
        pass

    def forget(self, seq: Seq) -> None:
        pass


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_known_q_is_greedy_where_the_request_is(
    tiny_folder: Any, wanted: Any, family: str, width: int
) -> None:
    requests, answers = wanted(family)
    engine = make_engine(tiny_folder(family))
    engine.speculation = Speculation(Drawing(width), AnyLength(6), 6, engine.clock)
    assert run(engine, requests, seed=5) == answers
    assert engine.stats().drafted_tokens > 0


@pytest.mark.parametrize("width", [1, 3])
def test_a_seed_repeats_itself_in_any_batch(tiny_folder: Any, width: int) -> None:
    """The same drafts of a known q for the same prefix: the same tokens, alone or with others."""

    class Always(AnyLength):
        def plan(self, round_: Any) -> list[int]:
            return [min(5, room) for room in round_.room]

    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True, min_p=0.01)
    requests = [Request(f"r{i}", [i] * (4 + i), params) for i in range(5)]

    def answers(some: list[Request]) -> Any:
        engine = make_engine(tiny_folder("llama"))
        engine.speculation = Speculation(Drawing(width), Always(5), 5, engine.clock)
        found = run(engine, some, seed=1)
        assert engine.stats().drafted_tokens > 0
        assert engine.control.check_integrity() == []
        return found

    together = answers(requests)
    for request in requests[:2]:
        assert answers([request])[request.id, 0] == together[request.id, 0]


class Committed:
    """Stands in for paged attention: every row over the same committed keys and values."""

    def __init__(self, spec: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.spec, self.k, self.v = spec, k, v

    def run(self, cache: Any, q: torch.Tensor, k: Any, v: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("thd,lhd->thl", q, keys) * self.spec.scale
        values = self.v.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return torch.einsum("thl,lhd->thd", scores.softmax(-1), values), scores.logsumexp(-1)


def test_attention_of_a_tree_is_that_of_its_paths(tiny_folder: Any) -> None:
    torch.manual_seed(0)
    spec = make_engine(tiny_folder("llama")).spec
    parents = [[-1, 0, 0, 1, -1, 4, 3], [-1, -1, 1]]
    shape = (spec.n_kv_heads, spec.head_dim)
    old_k, old_v = torch.randn(2, 9, *shape)
    k, v = torch.randn(2, 10, *shape)
    q = torch.randn(10, spec.n_heads, spec.head_dim)
    rows = torch.full((2, 7), -1).numpy()
    seen = torch.zeros(2, 7, 7, dtype=torch.bool).numpy()
    first = 0
    for b, mine in enumerate(parents):
        rows[b, : len(mine)] = range(first, first + len(mine))
        seen[b, : len(mine), : len(mine)] = ancestry(mine)
        first += len(mine)
    plan = TreePlan(
        Committed(spec, old_k, old_v), Forest(rows, seen), spec.scale, None,
        torch.float32, torch.device("cpu"),
    )  # fmt: skip
    o, _ = plan.run(None, q, k, v)
    for b, mine in enumerate(parents):
        for i in range(len(mine)):
            on_path = [int(rows[b, j]) for j in range(len(mine)) if seen[b, i, j]]
            one = dense_attention(
                q[[int(rows[b, i])]],
                torch.cat((old_k, k[on_path])), torch.cat((old_v, v[on_path])), spec, 0,
            )  # fmt: skip
            assert torch.allclose(o[int(rows[b, i])], one[0], atol=1e-5)


def test_the_likeliest_chain() -> None:
    tree = Draft([1, 2, 3, 4, 5], [-1, -1, 0, 1, 3], [0.6, 0.5, 0.1, 0.9, 0.9])
    assert likeliest(tree) == Draft([2, 4, 5], None, [0.5, 0.9, 0.9])
    q = torch.eye(5)
    drawn = likeliest(replace(tree, q=q))
    assert drawn.tokens == [1, 3]  # the first drawn, whatever the others promise
    assert torch.equal(drawn.q, q[[0, 2]])
    assert not is_tree(Draft([1, 2], [-1, 0], [1.0, 1.0]))
