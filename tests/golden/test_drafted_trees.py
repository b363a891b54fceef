"""Trees that proposers draft: output is that of plain decoding, whoever is asked for what."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.test_drawn_drafts import PARAMS, Known, N, generate
from golden.test_engine import expected, make_engine, make_requests, run
from golden.test_speculation import AnyLength
from golden.test_speculation_trees import RULES
from unit.test_verify import p_value

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.core.plan import Draft
from kvarn.core.request import Grammar, Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.runner.trees import is_tree
from kvarn.runner.verify import Run
from kvarn.sim.replay import replay
from kvarn.speculate.propose.draft_tree import Candidates
from kvarn.speculate.records import Record

PROPOSERS = ["suffix", "draft", "mix"]
#: what the tiny model is asked repeats itself a little, so that suffix trees branch
REPEATING = [[7, 8, 9, 7, 8, 5, 7, 8, 9, 7, 8], [1, 2, 1, 3, 1, 2, 1, 3, 1]]


def growing(folder: str, proposer: str, drafter: str, **options: Any) -> Engine:
    """An engine whose drafts are trees, of any number of tokens up to 7."""
    if proposer != "suffix":
        options["draft_model"] = drafter
    engine = make_engine(
        folder, speculate=proposer, draft_shape="tree", draft_tokens=7, draft_length="fixed",
        **options,
    )  # fmt: skip
    assert engine.speculation is not None
    engine.speculation.length = AnyLength(7)
    return engine


def heard(engine: Engine) -> list[Record]:
    """Every draft that is judged from now on."""
    found = list[Record]()
    assert engine.speculation is not None
    engine.speculation.listeners.append(found.extend)
    return found


@pytest.fixture(scope="module")
def wanted(tiny_folder: Any) -> Any:
    requests = make_requests(12)
    requests += [
        Request(f"again{i}", REPEATING[i % 2] * 2, SamplingParams(temperature=0.0, max_tokens=24))
        for i in range(4)
    ]
    return requests, expected(make_engine(tiny_folder("llama")), requests)


@pytest.mark.parametrize(
    "options", [{}, {"budget": 7}, {"pages": 40}, {"overlap": "on"}, {"prefix": "radix"}], ids=str
)
@pytest.mark.parametrize("drafter", ["llama", "qwen3"])
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_tokens_equal_naive(
    tiny_folder: Any, wanted: Any, proposer: str, drafter: str, options: dict[str, Any]
) -> None:
    """Mixed batches, chunked prefill, preemption, prefix hits, siblings."""
    requests, answers = wanted
    engine = growing(tiny_folder("llama"), proposer, tiny_folder(drafter), **options)
    judged = heard(engine)
    for seed in (1, 2):  # the second time its prompts are known, and so are its answers
        again = [Request(f"{seed}{r.id}", r.prompt, r.sampling) for r in requests]
        told = {(f"{seed}{id_}", index): tokens for (id_, index), tokens in answers.items()}
        assert run(engine, again, seed) == told
    stats = engine.stats()
    assert engine.control.check_integrity() == [] and stats.kv_pages_used == 0
    assert (stats.preemptions > 0) == ("pages" in options)
    assert stats.cached_tokens > 0
    assert any(is_tree(one.draft) for one in judged)
    assert sum(len(one.draft.tokens) for one in judged) == stats.drafted_tokens
    assert sum(one.accepted for one in judged) == stats.accepted_tokens > 0
    assert all(one.accepted <= one.judged <= one.draft.depth for one in judged)
    if proposer != "suffix":
        own: Any = engine.speculation and engine.speculation.proposer
        kv = own.kv if proposer == "draft" else own.other.kv
        assert kv.check_integrity([]) == [] and kv.held(0) == 0
    engine.close()


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_sampled_tokens_equal_plain_decoding(tiny_folder: Any, proposer: str, rules: str) -> None:
    params = {"temperature": 0.8, "max_tokens": 24, "ignore_eos": True} | RULES[rules]
    requests = [
        Request(f"r{i}", REPEATING[i % 2] + [i % 3], SamplingParams(**params, n=1 + i % 3))
        for i in range(8)
    ]
    answers = run(make_engine(tiny_folder("llama")), requests, seed=1)
    engine = growing(tiny_folder("llama"), proposer, tiny_folder("llama"), pages=48)
    assert run(engine, requests, seed=2) == answers
    assert engine.control.check_integrity() == []
    assert engine.stats().accepted_tokens > 0


def test_a_drafter_that_is_the_target_drafts_the_answer(tiny_folder: Any, wanted: Any) -> None:
    """Its likeliest path is the greedy answer: as long as it is in the tree, it stands."""
    requests, answers = wanted
    engine = growing(tiny_folder("llama"), "draft", tiny_folder("llama"))
    judged = heard(engine)
    assert run(engine, requests, 3) == answers
    for one in judged:
        children = [i for i, at in enumerate(one.draft.parents or []) if at == -1]
        surest = max(children, key=lambda i: one.draft.confidence[i])
        assert one.committed[0] == one.draft.tokens[surest]
    assert all(one.accepted >= 1 for one in judged)


def p_of(folder: str, drafter: str, biased: bool = False) -> float:
    """Of the chi-square statistics of what is said after one prompt, without a seed.

    `biased`: the likeliest tokens are taken for tokens drawn from a q.
    """
    engine = make_engine(
        folder, speculate="draft", draft_model=drafter, draft_length="fixed", draft_tokens=5,
        draft_shape="tree", max_seqs=64, pages=400, budget=512, max_queue=N,
    )  # fmt: skip
    assert engine.speculation is not None
    if biased:
        proposer, vocab = engine.speculation.proposer, engine.spec.vocab
        honest = proposer.propose

        def lying(*args: Any) -> list[Draft]:
            drafts = honest(*args)
            for draft in drafts:
                assert draft.parents is not None
                draft.q = torch.zeros(len(draft.tokens), vocab)
                for i, at in enumerate(draft.parents):
                    siblings = [j for j, p in enumerate(draft.parents) if p == at]
                    draft.q[i, [draft.tokens[j] for j in siblings]] = 1 / len(siblings)
            return drafts

        proposer.propose = lying  # type: ignore[method-assign]
    answers = generate(engine, [PARAMS] * N)
    stats = engine.stats()
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    return p_value(Known(engine), PARAMS, [Run([], answer) for answer in answers])


def test_tokens_have_the_targets_distribution(tiny_folder: Any) -> None:
    assert p_of(tiny_folder("llama"), tiny_folder("llama")) > 0.01


def test_likeliest_tokens_taken_for_drawn_ones_are_found(tiny_folder: Any) -> None:
    assert p_of(tiny_folder("llama"), tiny_folder("llama"), biased=True) < 1e-6


@pytest.mark.parametrize("proposer", PROPOSERS)
def test_a_replayed_log_decides_as_it_did(
    tiny_folder: Any, wanted: Any, tmp_path: Path, proposer: str
) -> None:
    log = tmp_path / "steps.jsonl"
    folder = tiny_folder("llama")
    engine = growing(folder, proposer, tiny_folder("qwen3"), pages=40, step_log=str(log))
    judged = heard(engine)
    run(engine, wanted[0], 4)
    engine.close()
    assert any(is_tree(one.draft) for one in judged)
    report = replay(str(log))
    assert report.steps > 40 and report.differing == 0, report.shown
    assert report.stats is not None
    assert report.stats.drafted_tokens == engine.stats().drafted_tokens
    assert report.stats.accepted_tokens == engine.stats().accepted_tokens


@pytest.mark.parametrize(
    "options, word",
    [
        ({"speculate": "ngram"}, "speculate=ngram drafts no trees"),
        ({"speculate": "none"}, "speculate=none drafts no trees"),
        ({"speculate": "suffix", "deterministic": True}, "deterministic"),
        ({"speculate": "suffix", "sparsity": "quest:budget=16"}, "sparsity=quest"),
        ({"speculate": "suffix", "model": "gemma2"}, "sliding-window"),
        ({"speculate": "draft", "draft_model": "mistral"}, "sliding-window"),
        ({"speculate": "draft", "draft_model": "llama", "draft_choice": "drawn"}, "likeliest"),
    ],
)
def test_what_cannot_draft_or_verify_trees_is_refused(
    tiny_folder: Any, options: dict[str, Any], word: str
) -> None:
    for name in ("model", "draft_model"):
        if name in options:
            options = options | {name: tiny_folder(options[name])}
    with pytest.raises(ConfigError, match=word):
        make_engine(options.pop("model", tiny_folder("llama")), draft_shape="tree", **options)


# the real model: text, stop strings, structured output

TALKS: dict[str, SamplingParams] = {
    "stop strings": SamplingParams(temperature=0.0, max_tokens=20, stop=(" mill", "\n2", "Two")),
    # top_k: among tokens of a chance of 1e-6 each, last bits of the logits say which is drawn
    "stopped, sampled": SamplingParams(seed=4, top_k=20, max_tokens=20, stop=("the", "."), n=2),
    "json": SamplingParams(
        temperature=0.0, max_tokens=20,
        grammar=Grammar(
            "json_schema",
            '{"type": "array", "items": {"enum": ["the mill", "the mice"]}, "minItems": 4}',
        ),
    ),
    "regex": SamplingParams(seed=5, max_tokens=20, grammar=Grammar("regex", "((ab|ba)+, ){4}c")),
}  # fmt: skip
PROMPT = "Say it again and again: the mill by the river, the mill by the sea, the mill by the"


def told(options: dict[str, Any]) -> tuple[Any, Any]:
    """What everybody is told: tokens, text, how it ended, by what; and the engine's counters."""
    given = {"model": "smollm2-135m", "dtype": "float32", "max_len": 160, "pages": 90}
    engine = Engine(resolve(given | {"max_seqs": 8} | options))
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    for name, params in TALKS.items():
        engine.add(Request(name, tokenizer.encode(PROMPT), params))
    found: dict[Any, Any] = {}
    while engine.has_work:
        for one in engine.step():
            entry = found.setdefault((one.request_id, one.index), [[], "", None, None])
            entry[0] += one.tokens
            entry[1] += one.text
            entry[2:] = [one.finish, one.stop]
    stats = engine.stats()
    assert engine.control.check_integrity() == []
    engine.close()
    return found, stats


@pytest.fixture(scope="module")
def plain_talk() -> Any:
    return told({})[0]


@pytest.mark.parametrize(
    "proposer, shape", [("suffix", "chain"), ("suffix", "tree"), ("draft", "tree"), ("mix", "tree")]
)
def test_stops_and_structure_are_those_of_plain_decoding(
    plain_talk: Any, proposer: str, shape: str
) -> None:
    options = {"draft_length": "fixed", "draft_tokens": 6, "draft_choice": "likeliest"}
    found, stats = told(options | {"speculate": proposer, "draft_shape": shape})
    assert found == plain_talk
    assert {entry[2] for entry in found.values()} >= {"stop"}
    assert any(isinstance(entry[3], str) for entry in found.values())
    assert stats.accepted_tokens > 0


# the tree itself


def test_the_tree_is_the_farthest_reaching_of_all_paths() -> None:
    """Against every path of a toy drafter, whatever was asked about on the way."""
    generator = torch.Generator().manual_seed(0)
    table = (3 * torch.rand(4, 4, generator=generator)).softmax(-1)

    def children(last: int) -> list[tuple[int, float]]:
        probs, ids = table[last].sort(descending=True)
        return list(zip(ids.tolist(), probs.tolist()))

    class Always:
        def goes_on(self, confidence: list[float]) -> bool:
            return True

    for most in range(1, 12):
        tree, control = Candidates(), Always()
        tree.add(-1, children(0))
        while some := tree.ask(most, control, 99):  # type: ignore[arg-type]
            for i in some:
                if i not in tree.asked:
                    tree.add(i, children(tree.tokens[i]))
        draft = tree.draft(tree.best(most))
        level, every = [((), 0, 1.0)], list[tuple[float, tuple[int, ...]]]()
        for _ in range(most):
            level = [
                ((*way, token), token, reach * sure)
                for way, last, reach in level
                for token, sure in children(last)
            ]
            level = sorted(level, key=lambda one: -one[2])[: 4 * most]
            every += [(reach, way) for way, _, reach in level]
        wanted = {way for _, way in sorted(every, reverse=True)[:most]}
        ways: list[tuple[int, ...]] = []
        assert draft.parents is not None
        for token, parent in zip(draft.tokens, draft.parents, strict=True):
            ways.append((*(ways[parent] if parent >= 0 else ()), token))
        assert set(ways) == wanted and len(ways) == most
