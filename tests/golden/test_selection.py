"""Rows that choose what they see: a dense pass with masks, made from the keys, agrees."""

from typing import Any

import pytest
import torch
from golden.naive import naive_generate
from golden.test_sparsity import PROMPT, generate, make_engine
from torch import Tensor

from kvarn.core.errors import ConfigError, RequestError
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.sparse.part import Pages
from kvarn.sparse.quest import Quest

SIZE = 4  #: positions of a page


def masked_logits(
    engine: Engine, tokens: list[int], n_prompt: int, budget: int, dense: int, reuse: int = 1
) -> Tensor:
    """One dense pass; rows from `n_prompt` on see the pages whose bounds are highest.

    In each page, groups of `reuse` rows ask with the query of the first of them that chooses.
    """
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    total, keep = len(tokens), budget // SIZE
    at = torch.arange(total, device=decoder.device)
    part = Quest()

    def visible(layer: int, q: Tensor, k: Tensor) -> Tensor:
        """[Hkv, T, T]."""
        seen = (at <= at.unsqueeze(1)).expand(spec.n_kv_heads, -1, -1).clone()
        window = spec.window(layer)
        if window is not None:
            seen &= at > at.unsqueeze(1) - window
        whole = k[: total // SIZE * SIZE].float().view(-1, SIZE, *k.shape[1:])
        sketch = torch.stack((whole.amin(1), whole.amax(1)), 2)
        since = max(n_prompt, keep * SIZE)
        for row in range(since, total):
            if layer < dense or window is not None:
                continue
            asks = max(since, row - row % SIZE % reuse)
            mine = q[asks].view(1, spec.n_kv_heads, -1, spec.head_dim)
            n = row // SIZE
            scores = part.select(Pages(mine, sketch, at[None, :n], layer, at[row : row + 1]))[0]
            scores[:, 0] = torch.inf
            best = scores.topk(keep - 1, dim=1).indices
            pages = torch.zeros(spec.n_kv_heads, n + 1, dtype=torch.bool, device=q.device)
            pages.scatter_(1, best, True)
            pages[:, n] = True
            seen[:, row, : row + 1] &= pages.repeat_interleave(SIZE, 1)[:, : row + 1]
        return seen

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = spec.n_heads // spec.n_kv_heads
        keys, values = (x.float().repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * spec.scale
        if spec.attn_softcap is not None:
            scores = torch.tanh(scores / spec.attn_softcap) * spec.attn_softcap
        hidden = ~visible(layer, q, k).repeat_interleave(group, 0)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)

    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(tokens, device=decoder.device), at, attend)
        logits: Tensor = decoder.logits(hidden)
    return logits


@pytest.mark.parametrize("attention", ["reference", "cpu", "auto"])
@pytest.mark.parametrize("dense", [0, 1])
def test_selection_is_a_mask(tiny_folder: Any, attention: str, dense: int) -> None:
    engine = make_engine(
        tiny_folder("llama"), sparsity=f"quest:budget=40,dense={dense}", attention=attention
    )
    tokens, _ = generate(engine, PROMPT, 60)
    logits = masked_logits(engine, PROMPT + tokens, len(PROMPT), 40, dense)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    assert tokens != naive_generate(decoder, engine.spec, PROMPT, 60), "nothing was left out"


@pytest.mark.parametrize("attention", ["reference", "auto"])
@pytest.mark.parametrize("reuse", [2, 3, 4])
@pytest.mark.parametrize("n_prompt", [10, 150])
def test_a_choice_serves_the_rows_after_it(
    tiny_folder: Any, attention: str, reuse: int, n_prompt: int
) -> None:
    """Rows of a page see what the first of so many has chosen; the first that chooses is one."""
    rule = f"quest:budget=24,dense=1,reuse={reuse}"
    engine = make_engine(tiny_folder("llama"), sparsity=rule, attention=attention)
    prompt = PROMPT[:n_prompt]
    tokens, _ = generate(engine, prompt, 60)
    logits = masked_logits(engine, prompt + tokens, n_prompt, 24, 1, reuse)
    assert logits[n_prompt - 1 : -1].argmax(-1).tolist() == tokens
    other = masked_logits(engine, prompt + tokens, n_prompt, 24, 1)
    assert (logits - other).abs().max() > 1e-4, "sharing changed nothing: the test sees nothing"


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_families(tiny_folder: Any, family: str) -> None:
    """Layers with windows go on as they are; scores are capped after the choice."""
    engine = make_engine(tiny_folder(family), sparsity="quest:budget=24,dense=0")
    tokens, _ = generate(engine, PROMPT, 40)
    logits = masked_logits(engine, PROMPT + tokens, len(PROMPT), 24, 0)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


def test_a_short_prompt_that_grows(tiny_folder: Any) -> None:
    """Rows choose from the position on that has more pages than the budget."""
    engine = make_engine(tiny_folder("llama"), sparsity="quest:budget=40,dense=0")
    tokens, _ = generate(engine, PROMPT[:10], 90)
    logits = masked_logits(engine, PROMPT[:10] + tokens, 10, 40, 0)
    assert logits[9:-1].argmax(-1).tolist() == tokens


def test_logprobs(tiny_folder: Any) -> None:
    """To 1e-4 in fp32, not only in the arg max."""
    engine = make_engine(tiny_folder("llama"), sparsity="quest:budget=40,dense=1")
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, logprobs=1)
    engine.add(Request("r", PROMPT, params))
    tokens: list[int] = []
    said: list[float] = []
    while engine.has_work:
        for out in engine.step():
            tokens += out.tokens
            said += [entry.logprob for entry in out.logprobs or []]
    logits = masked_logits(engine, PROMPT + tokens, len(PROMPT), 40, 1)[len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(said), wanted, atol=1e-4, rtol=0)


def test_a_budget_that_holds_all_is_dense(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity="quest:budget=200")
    tokens, _ = generate(engine, PROMPT, 50)
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    assert tokens == naive_generate(decoder, engine.spec, PROMPT, 50)


@pytest.mark.parametrize("prefix", ["hash", "none"])
def test_bounds_are_those_of_the_keys(tiny_folder: Any, prefix: str) -> None:
    """After hits, forks and drafts: of every whole page of a sequence, in every layer."""
    engine = make_engine(
        tiny_folder("llama"), sparsity="quest:budget=40,dense=0", prefix=prefix, speculate="ngram"
    )
    params = SamplingParams(max_tokens=24, temperature=0.9, ignore_eos=True, n=2, seed=1)
    for i in range(3):
        engine.add(Request(f"r{i}", PROMPT[: 90 + 20 * i], params))
    runner: Any = engine.executor
    checked = 0
    while engine.has_work:
        engine.step()
        for seq in engine.control.queues.running:
            whole = seq.computed // SIZE
            row = runner.image.row(seq.id)
            if not whole or runner.selecting.sketched[row] < whole:
                continue
            pages = torch.tensor(seq.tables[0][:whole])
            slots = (pages.unsqueeze(1) * SIZE + torch.arange(SIZE)).flatten()
            for layer, book in runner.selecting.books.items():
                keys = runner.backend.keys(runner.pool.cache[layer], slots)
                low, high = keys.view(whole, SIZE, *keys.shape[1:]).aminmax(dim=1)
                assert torch.equal(book.sketch[pages], torch.stack((low, high), 2))
                checked += whole
    assert checked > 1000


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("llama", {"sparsity": "quest:budget=11"}, "below 3 pages"),
        ("llama", {"sparsity": "quest:dense=-1"}, "0 or more"),
        ("llama", {"sparsity": "quest", "page_size": 1}, "page_size of 8"),
        ("llama", {"sparsity": "quest:reuse=0"}, "from 1, every row chooses, to page_size=4"),
        ("llama", {"sparsity": "quest:reuse=5"}, "from 1, every row chooses, to page_size=4"),
        ("mistral", {"sparsity": "quest"}, "sliding windows"),
        ("llama", {"sparsity": "quest", "deterministic": True}, "deterministic"),
        ("llama", {"sparsity": "quest:sinks=4"}, "no option"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_folder: Any, family: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_engine(tiny_folder(family), **options)


@pytest.mark.parametrize(
    "own, asked, words",
    [
        ("quest:budget=40", "quest:budget=40,reuse=2", "start the engine with a reuse"),
        ("quest:budget=40,reuse=2", "quest:budget=44,reuse=2", "made for quest:budget=40,reuse=2"),
        ("quest:budget=40,reuse=2", "random-pages:budget=44", "do not fit"),
        ("quest:budget=40,reuse=4", "quest:budget=40,reuse=3", "reuse of 1 or no smaller one"),
    ],
)
def test_requests_stay_within_what_is_remembered(
    tiny_folder: Any, own: str, asked: str, words: str
) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity=own)
    with pytest.raises(RequestError, match=words):
        engine.add(Request("r", PROMPT, sparsity=asked))


def test_an_engine_without_bounds_refuses_requests_that_choose(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"))
    with pytest.raises(RequestError, match="start it with sparsity=quest"):
        engine.add(Request("r", PROMPT, sparsity="quest:budget=40"))
    assert len(generate(engine, PROMPT, 5)[0]) == 5
