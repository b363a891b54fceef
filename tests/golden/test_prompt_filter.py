"""What goes on of a prompt is what its early layers say, and is then a prompt like any other."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.naive import dense_attend, naive_generate
from torch import Tensor

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError, RequestError
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.sim.replay import replay

PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(150)]
RULE = "gemfilter:budget=40,sinks=2,recent=6,layer=1"


def make_engine(folder: str, **options: Any) -> Engine:
    given = {
        "model": folder, "load": "random", "dtype": "float32", "pages": 200, "page_size": 4,
        "max_len": 400, "budget": 64, "max_seqs": 8,
    }  # fmt: skip
    return Engine(resolve(given | options))


def add(engine: Engine, name: str, prompt: list[int], n: int = 20, **fields: Any) -> None:
    params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
    engine.add(Request(name, prompt, params, **fields))


def run(engine: Engine) -> dict[str, list[int]]:
    """Tokens by sequence; the books must be in order at the end."""
    found: dict[str, list[int]] = {}
    while engine.has_work:
        for out in engine.step():
            found.setdefault(out.request_id, []).extend(out.tokens)
    assert engine.control.check_integrity() == []
    assert all(engine.control.kv.held(g) == 0 for g in range(len(engine.control.kv.groups)))
    return found


def dense_choice(engine: Engine, prompt: list[int], layer: int) -> list[int]:
    """The rule by hand, from the rotated queries and keys of a dense pass through all layers."""
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    seen: dict[str, Tensor] = {}

    def tap(point: str, at: int, x: Tensor) -> Tensor:
        if at == layer and point in ("q_rot", "k_rot"):
            seen[point] = x
        return x

    with torch.inference_mode():
        at = torch.arange(len(prompt), device=decoder.device)
        decoder.forward(torch.tensor(prompt, device=decoder.device), at, dense_attend(spec), tap)
    keys = seen["k_rot"].repeat_interleave(spec.n_heads // spec.n_kv_heads, 1)
    raw = torch.einsum("hd,nhd->n", seen["q_rot"][-1], keys)
    pooled = torch.nn.functional.avg_pool1d(raw.view(1, 1, -1), 5, 1, 2).flatten()
    n = len(prompt)
    middle = pooled[2 : n - 6].topk(40 - 8).indices + 2
    return [0, 1, *sorted(middle.tolist()), *range(n - 6, n)]


@pytest.mark.parametrize("chunk", [9, 64, 256])
@pytest.mark.parametrize("attention", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_choice_is_that_of_a_dense_pass(
    tiny_folder: Any, layer: int, attention: str, chunk: int
) -> None:
    """And the tokens are those of a plain prompt of the chosen ones."""
    rule = RULE.replace("layer=1", f"layer={layer}")
    engine = make_engine(tiny_folder("llama"), attention=attention, budget=chunk)
    add(engine, "r", PROMPT, sparsity=rule)
    chosen = None
    tokens: list[int] = []
    while engine.has_work:
        for out in engine.step():
            tokens += out.tokens
            assert out.n_prompt == len(PROMPT) and out.n_output == len(tokens)
        running = engine.control.queues.running
        chosen = running[0].chosen if running and running[0].chosen else chosen
    assert chosen == dense_choice(engine, PROMPT, layer)
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    assert tokens == naive_generate(decoder, engine.spec, [PROMPT[at] for at in chosen], 20)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_budget_that_holds_all_is_dense(tiny_folder: Any, family: str) -> None:
    engine = make_engine(tiny_folder(family), sparsity="gemfilter:budget=150,recent=6")
    add(engine, "r", PROMPT)
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    assert run(engine)["r"] == naive_generate(decoder, engine.spec, PROMPT, 20)


@pytest.mark.parametrize("own", [True, False])
def test_whoever_else_is_in_the_batch(tiny_folder: Any, own: bool) -> None:
    """Rows that leave at three depths, beside dense, evicting and selecting ones."""
    folder = tiny_folder("llama")
    prompts = {f"r{i}": [(x + i) % 97 for x in PROMPT[: 80 + 14 * i]] for i in range(5)}
    rules = {
        "r0": RULE,
        "r1": "none",
        "r2": RULE.replace("layer=1", "layer=0"),
        "r3": "snapkv:budget=32,sinks=4",
        "r4": RULE.replace("layer=1", "layer=2"),
    }
    alone = {}
    for name, prompt in prompts.items():
        engine = make_engine(folder, prefix="none")
        add(engine, name, prompt, sparsity=rules[name])
        alone |= run(engine)
    options = {"sparsity": RULE} if own else {}
    for budget in (48, 400):
        engine = make_engine(folder, budget=budget, pages=400, **options)
        for name, prompt in prompts.items():
            add(engine, name, prompt, sparsity=rules[name])
        assert run(engine) == alone
        for name, prompt in prompts.items():
            add(engine, name, prompt, sparsity=rules[name])
        assert run(engine) == alone, "with the prefixes of the first time"


def test_beside_rows_that_choose_pages(tiny_folder: Any) -> None:
    folder = tiny_folder("llama")
    quest = "quest:budget=48,dense=1"
    engine = make_engine(folder, sparsity=quest, budget=48)
    add(engine, "q", PROMPT)
    wanted = run(engine)["q"]
    engine = make_engine(folder, sparsity=quest, budget=48, pages=400)
    add(engine, "a", PROMPT[:100], sparsity=RULE)
    add(engine, "q", PROMPT)
    add(engine, "b", PROMPT[5:], sparsity=RULE)
    assert run(engine)["q"] == wanted


def test_pages_of_the_first_layers_only(tiny_folder: Any) -> None:
    """An engine's own part: upper layers hold what goes on, and their pool can be smaller."""
    engine = make_engine(
        tiny_folder("llama"), sparsity=RULE + ",upper=0.3", pages=60, max_len=200, budget=64
    )
    assert [g.layers for g in engine.control.kv.groups] == [(0, 1), (2,)]
    assert engine.control.kv.pages == [60, 18]
    add(engine, "r", PROMPT)
    held = []
    while engine.has_work:
        engine.step()
        held.append((engine.control.kv.held(0), engine.control.kv.held(1)))
    assert held[0] == (38, 0) and max(upper for _, upper in held) == 15
    assert max(first for first, upper in held if upper) == 15


@pytest.mark.parametrize("prefix", ["hash", "radix"])
@pytest.mark.parametrize("own", [True, False])
def test_a_second_question_finds_the_document(tiny_folder: Any, prefix: str, own: bool) -> None:
    """Pages of pass 1 serve requests that filter by the same layer, and nobody else."""
    folder, options = tiny_folder("llama"), {"sparsity": RULE} if own else {}
    other = [*PROMPT[:120], 5, 3, 8, 1, 2, 7, 7, 4, 6]
    wanted = {}
    for rule in (RULE, RULE.replace("layer=1", "layer=0"), "none"):
        engine = make_engine(folder, prefix="none", **options)
        add(engine, rule, other, sparsity=rule)
        wanted |= run(engine)
    engine = make_engine(folder, prefix=prefix, pages=300, **options)
    add(engine, "first", PROMPT, sparsity=RULE)
    run(engine)
    found, cached = {}, []
    for rule in (*wanted, *wanted):
        add(engine, rule, other, sparsity=rule)
        seq = engine.control.queues.waiting[0]
        found |= run(engine)
        cached.append(seq.cached)
    assert found == wanted
    assert cached[:2] == [120, 0] and cached[3] == 128
    assert cached[2] <= 40, "what went on may be a prefix, what was filtered is none"


@pytest.mark.parametrize("overlap", ["on", "off"])
def test_replay(tiny_folder: Any, tmp_path: Path, overlap: str) -> None:
    """Also with an abort in each pass; the log says what went on and what scores lacked."""
    path = str(tmp_path / "steps.jsonl")
    engine = make_engine(
        tiny_folder("llama"), sparsity=RULE, step_log=path, overlap=overlap, pages=80, max_len=184
    )
    for i in range(6):
        add(engine, f"r{i}", PROMPT[i : 150 - 9 * i])
    engine.step()
    engine.abort("r0")
    for _ in range(12):
        engine.step()
    engine.abort("r2")
    run(engine)
    engine.close()
    report = replay(path)
    assert report.steps > 10 and report.differing == 0
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    choices = [c for r in records if r["call"] == "apply" for c in r.get("choices", {}).values()]
    assert len(choices) >= 4
    assert all(len(c["positions"]) == 40 and 0 <= c["lacking"] <= 8 for c in choices)


def test_siblings_share_one_choice(tiny_folder: Any) -> None:
    """The prompt is filtered once, and computed once, for all of them."""
    engine = make_engine(tiny_folder("llama"), sparsity=RULE)
    params = SamplingParams(max_tokens=10, temperature=0.8, ignore_eos=True, n=4, seed=5)
    engine.add(Request("r", PROMPT, params))
    spans = []
    plan = engine.control.plan

    def logged(now: float) -> Any:
        made = plan(now)
        spans.extend(made.spans)
        return made

    engine.control.plan = logged  # type: ignore[method-assign]
    run(engine)
    assert sum(span.length for span in spans if span.layers) == len(PROMPT)
    assert sum(span.length for span in spans if not span.layers) == 40 + 3 + 4 * 9


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("part", ["snapkv", "sage-kv", "streamingllm", "h2o"])
def test_what_goes_on_is_evicted_from(tiny_folder: Any, part: str, own: bool) -> None:
    """The tokens, and the pages, of a prompt of the chosen ones under that part alone."""
    rule, folder = f"{RULE},then={part},stays=24", tiny_folder("llama")
    engine = make_engine(folder, prefix="none", **({"sparsity": rule} if own else {}))
    add(engine, "r", PROMPT, n=60, sparsity=None if own else rule)
    tokens, held = list[int](), list[list[int]]()
    while engine.has_work:
        tokens += [token for out in engine.step() for token in out.tokens]
        running = engine.control.queues.running
        if running and running[0].filter is None and running[0].computed > 45:
            held.append([engine.control.kv.held(g) for g in range(len(engine.control.kv.groups))])
    assert held and all(pages == [6] * len(pages) for pages in held)
    assert engine.control.check_integrity() == []
    going = [PROMPT[at] for at in dense_choice(engine, PROMPT, 1)]
    plain = make_engine(folder, prefix="none")
    add(plain, "p", going, n=60, sparsity=f"{part}:budget=24")
    assert run(plain)["p"] == tokens
    add(plain, "w", going, n=60, sparsity="none")
    assert run(plain)["w"] != tokens, "nothing was evicted"


@pytest.mark.parametrize("proposer", ["ngram", "suffix"])
def test_drafts_beside_prompts_that_are_filtered(tiny_folder: Any, proposer: str) -> None:
    """In one step some rows leave early and others are judged; drafts follow what went on."""
    folder = tiny_folder("llama")
    plain = make_engine(folder, budget=24)
    engine = make_engine(folder, budget=24, speculate=proposer, draft_length="fixed")
    found, both = [], 0
    for one in (plain, engine):
        add(one, "d", [5, 6, 7, 8] * 6, n=60, sparsity="none")
        for _ in range(12):  # it is drafted for by now
            one.step()
        add(one, "r", PROMPT, n=40, sparsity=RULE)
        add(one, "s", PROMPT[20:], n=40, sparsity=RULE)
        control, tokens = one.control, dict[str, list[int]]()
        real = control.plan

        def plan(now: float, real: Any = real) -> Any:
            nonlocal both
            made = real(now)
            both += made.partial and bool(made.drafts)
            return made

        control.plan = plan  # type: ignore[method-assign]
        while one.has_work:
            for out in one.step():
                tokens.setdefault(out.request_id, []).extend(out.tokens)
        found.append({name: said[-40:] for name, said in tokens.items()})
        assert control.check_integrity() == []
    assert found[0] == found[1]
    assert both > 0, "no step had both"


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("llama", {"sparsity": "gemfilter:budget=33"}, "raise budget"),
        ("llama", {"sparsity": "gemfilter:layer=3"}, "outside the model's layers, 0 to 2"),
        ("llama", {"sparsity": "gemfilter:recent=0"}, "last token"),
        ("llama", {"sparsity": "gemfilter:upper=0"}, "upper"),
        ("mistral", {"sparsity": "gemfilter"}, "sliding window"),
        ("llama", {"sparsity": "gemfilter", "deterministic": True}, "deterministic"),
        ("llama", {"sparsity": f"{RULE},then=quest"}, "must be a part that evicts"),
        ("llama", {"sparsity": f"{RULE},then=snapkv,stays=9"}, "raise budget"),
        ("llama", {"sparsity": f"{RULE},stays=9"}, "name one, as then=snapkv"),
        (
            "llama",
            {"sparsity": f"{RULE},then=snapkv,stays=32", "speculate": "ngram"},
            "speculate=none",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_folder: Any, family: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_engine(tiny_folder(family), **options)


def test_scores_of_a_filtered_prompt_are_refused(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity=RULE)
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    with pytest.raises(RequestError, match="sparsity=none") as caught:
        engine.add(Request("r", PROMPT, params))
    assert caught.value.param == "prompt_logprobs"
    engine.add(Request("short", PROMPT[:40], params))
    engine.add(Request("whole", PROMPT, params, sparsity="none"))
    assert len(run(engine)) == 2
