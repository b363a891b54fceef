"""What stays is attended to exactly: compaction is a mask in a dense pass, pages the budget."""

from typing import Any

import pytest
import torch
from golden.naive import dense_attend, naive_generate
from torch import Tensor

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError, RequestError
from kvarn.core.keep import Keep
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.kernels.rope import turned
from kvarn.runner.keeping import Kept, chosen

ONE_SHOT = ["sage-kv", "snapkv", "h2o", "knorm", "random", "streamingllm"]
PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(150)]


TEXT = {"streamingllm": ",positions=text"}  #: masks alone say what is attended to


def make_engine(folder: str, **options: Any) -> Engine:
    given = {
        "model": folder, "load": "random", "dtype": "float32", "pages": 200, "page_size": 4,
        "max_len": 400, "budget": 64, "max_seqs": 8,
    }  # fmt: skip
    return Engine(resolve(given | options))


def generate(
    engine: Engine, prompt: list[int], n: int, **fields: Any
) -> tuple[list[int], Kept | None]:
    """Greedy tokens of one request, and what was kept of it."""
    params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
    engine.add(Request("r", prompt, params, **fields))
    tokens: list[int] = []
    kept = None
    while engine.has_work:
        for out in engine.step():
            tokens += out.tokens
        kept = next(iter(engine.executor.keeping.seqs.values()), kept)  # type: ignore[attr-defined]
    return tokens, kept


def masked_logits(engine: Engine, tokens: list[int], kept: Kept) -> Tensor:
    """A dense pass in which rows after the prompt see what was kept, by layer and KV head."""
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    n, total, keep = kept.prompt_len, len(tokens), kept.keep[0]
    at = torch.arange(total, device=decoder.device)
    causal = at <= at.unsqueeze(1)
    recent = causal & (at > at.unsqueeze(1) - keep.recent)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        chosen = torch.zeros(spec.n_kv_heads, total, dtype=torch.bool, device=q.device)
        chosen.scatter_(1, kept.positions[0, layer][:, : keep.budget - keep.recent], True)
        seen = recent | chosen.unsqueeze(1)  # [Hkv, T, T]
        seen[:, :n] = causal[:n]
        group = spec.n_heads // spec.n_kv_heads
        keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
        hidden = ~seen.repeat_interleave(group, 0)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(tokens, device=decoder.device), at, attend)
        logits: Tensor = decoder.logits(hidden)
    return logits


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("attention", ["reference", "cpu", "auto"])
def test_compaction_is_a_mask(tiny_folder: Any, name: str, attention: str) -> None:
    """Greedy tokens through two rounds of the ring are the arg max of the masked dense pass."""
    engine = make_engine(
        tiny_folder("llama"),
        sparsity=f"{name}:budget=41{TEXT.get(name, '')}",
        attention=attention,
        prefix="none",
    )
    tokens, kept = generate(engine, PROMPT, 60)
    assert kept is not None and kept.positions[0, 0].shape == (2, 41)
    logits = masked_logits(engine, PROMPT + tokens, kept)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


def test_logprobs_after_compaction(tiny_folder: Any) -> None:
    """To 1e-4 in fp32, not only in the arg max."""
    engine = make_engine(tiny_folder("llama"), sparsity="sage-kv:budget=40")
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, logprobs=1)
    engine.add(Request("r", PROMPT, params))
    tokens: list[int] = []
    said: list[float] = []
    kept = None
    while engine.has_work:
        for out in engine.step():
            tokens += out.tokens
            said += [entry.logprob for entry in out.logprobs or []]
        kept = next(iter(engine.executor.keeping.seqs.values()), kept)  # type: ignore[attr-defined]
    assert kept is not None
    logits = masked_logits(engine, PROMPT + tokens, kept)[len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(said), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [20, 150])
@pytest.mark.parametrize("attention", ["reference", "cpu", "auto"])
def test_choosing_again_every_few_steps(tiny_folder: Any, prompt: int, attention: str) -> None:
    """Through four choices among what is held: the arg max of a dense pass with masks."""
    engine = make_engine(
        tiny_folder("llama"), sparsity="knorm:budget=40,sinks=3,every=12", attention=attention
    )
    text = PROMPT[:prompt]
    tokens, _ = generate(engine, text, 60)
    assert generate(engine, text, 60)[0] == tokens, "with the prefix of the first time"
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    everything = text + tokens
    total, since = len(everything), max(prompt, 40)
    causal = torch.arange(total) <= torch.arange(total).unsqueeze(1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = causal.expand(2, -1, -1).clone()
        scores = -k.norm(dim=-1).T
        held = torch.arange(since).expand(2, -1)
        if prompt > 40:
            held = chosen(scores[:, :prompt], Keep(40, 12), 3)
        for row in range(since, total):
            if (row - since) % 12 == 0:
                held = held.gather(1, chosen(scores.gather(1, held), Keep(28, 7), 3))
            held = torch.cat([held, torch.full((2, 1), row)], 1)
            seen[:, row] = torch.zeros(2, total, dtype=torch.bool).scatter(1, held, True)
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        weights = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
        weights = weights.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(everything), torch.arange(total), attend)
        logits = decoder.logits(hidden)
    assert logits[prompt - 1 : -1].argmax(-1).tolist() == tokens
    assert engine.control.check_integrity() == []


@pytest.mark.parametrize(("prompt", "every"), [(20, 12), (150, 12), (20, 1), (150, 1)])
@pytest.mark.parametrize("attention", ["reference", "auto"])
def test_sums_go_on_while_it_generates(
    tiny_folder: Any, prompt: int, every: int, attention: str
) -> None:
    """H2O: every row adds what it looks at, and each few choose by it; a dense pass agrees."""
    budget, held = 40, 40 - every
    engine = make_engine(
        tiny_folder("llama"),
        sparsity=f"h2o:budget=40,every={every}",
        attention=attention,
        budget=32,
    )
    text = PROMPT[:prompt]
    tokens, _ = generate(engine, text, 60)
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    everything = text + tokens
    total, since = len(everything), max(prompt, budget)
    causal = torch.arange(total) <= torch.arange(total).unsqueeze(1)
    changed = 0  # choices in which sums of rows that were generated matter

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        nonlocal changed
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
        seen = causal.expand(2, -1, -1).clone()
        sums, before = torch.zeros(2, total), torch.zeros(2, total)
        there = torch.arange(since).expand(2, -1)

        def look(row: int) -> None:
            hidden = ~seen[:, row].repeat_interleave(2, 0)
            weights = scores[:, row].masked_fill(hidden, -torch.inf).softmax(-1)
            sums.add_(weights.view(2, 2, total).mean(1))

        for row in range(since):
            look(row)
            before = sums.clone()
        if prompt > budget:
            some = Keep(budget, max(every, budget // 2))
            there = there.gather(1, chosen(sums[:, :prompt], some, 0))
        for row in range(since, total):
            if (row - since) % every == 0:
                some = Keep(held, held // 2)
                stays = chosen(sums.gather(1, there), some, 0)
                changed += not torch.equal(stays, chosen(before.gather(1, there), some, 0))
                there = there.gather(1, stays)
            there = torch.cat([there, torch.full((2, 1), row)], 1)
            assert there.shape[1] <= budget
            seen[:, row] = torch.zeros(2, total, dtype=torch.bool).scatter(1, there, True)
            look(row)
        weights = scores.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(everything), torch.arange(total), attend)
        logits = decoder.logits(hidden)
    assert logits[prompt - 1 : -1].argmax(-1).tolist() == tokens
    if prompt == 20:  # the sums of a long prompt outweigh what comes after
        assert changed > 0, "as if chosen by the prompt alone: the test sees nothing"


@pytest.mark.parametrize("name", ONE_SHOT)
def test_a_budget_that_holds_all_is_dense(tiny_folder: Any, name: str) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity=f"{name}:budget=200")
    tokens, _ = generate(engine, PROMPT, 50)
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    assert tokens == naive_generate(decoder, engine.spec, PROMPT, 50)


@pytest.mark.parametrize("rule", ["sage-kv:budget=40", "h2o:budget=40,every=8"])
@pytest.mark.parametrize("prompt", [20, 150])
def test_pages_are_the_budget(tiny_folder: Any, prompt: int, rule: str) -> None:
    """Through 360 tokens: 40 positions in 10 pages, once the prompt is whole."""
    engine = make_engine(tiny_folder("llama"), sparsity=rule, max_len=512, prefix="none")
    params = SamplingParams(max_tokens=360, temperature=0.0, ignore_eos=True)
    engine.add(Request("r", PROMPT[:prompt], params))
    held = []
    while engine.has_work:
        engine.step()
        if engine.control.queues.running and engine.control.queues.running[0].computed > max(
            prompt, 40
        ):
            held.append(engine.control.kv.held(0))
    assert len(held) > 300 and set(held) == {10}


@pytest.mark.parametrize("positions", ["text", "cache"])
@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("attention", ["reference", "cpu", "auto"])
def test_sinks_and_window(tiny_folder: Any, positions: str, streamed: bool, attention: str) -> None:
    """Rows after the budget (or the prompt) see a window, and the sinks at their place."""
    engine = make_engine(
        tiny_folder("llama"), attention=attention,
        sparsity=f"streamingllm:budget=24,streamed={streamed},positions={positions}",
    )  # fmt: skip
    tokens, _ = generate(engine, PROMPT, 30)
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    everything = PROMPT + tokens
    at = torch.arange(len(everything))
    since = 24 if streamed else len(PROMPT)
    causal = at <= at.unsqueeze(1)
    seen = causal & ((at > at.unsqueeze(1) - 20) | (at < 4) | (at < since).unsqueeze(1))
    ahead = torch.where(at < since, 0, at - 23) if positions == "cache" else torch.zeros_like(at)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys)
        sinks = turned(keys[:4].expand(len(at), -1, -1, -1), decoder.rotary(layer), ahead)
        scores[:, :, :4] = torch.einsum("qhd,qkhd->hqk", q, sinks)
        weights = (scores * spec.scale).masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(everything), at, attend)
        logits = decoder.logits(hidden)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


def test_dense_attend_is_what_the_masks_replace(tiny_folder: Any) -> None:
    """The masked pass with everything kept is the dense pass."""
    engine = make_engine(tiny_folder("llama"), sparsity="knorm:budget=149")
    _, kept = generate(engine, PROMPT, 1)
    assert kept is not None
    kept.positions = {at: torch.arange(150).expand(2, -1) for at in kept.positions}
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(PROMPT), torch.arange(150), dense_attend(engine.spec))
    torch.testing.assert_close(masked_logits(engine, PROMPT, kept), decoder.logits(hidden))


@pytest.mark.parametrize(
    "family, options, words",
    [
        ("llama", {"sparsity": "sage-kv:budget=3"}, "raise budget"),
        ("llama", {"sparsity": "sage-kv:budgets=300"}, "did you mean"),
        ("llama", {"sparsity": "sagekv"}, "sage-kv"),
        ("llama", {"sparsity": "knorm:budget=40,every=38"}, "at least 4 below"),
        ("llama", {"sparsity": "knorm:budget=40,every=30"}, "leaves no more"),
        ("llama", {"sparsity": "h2o:budget=40,every=20,sinks=11"}, "leaves no more"),
        ("llama", {"sparsity": "h2o:budget=40,every=8,recent=9"}, "without recent=9"),
        ("llama", {"sparsity": "sage-kv:budget=many"}, "type int"),
        ("llama", {"sparsity": "streamingllm:recent=4"}, "must be 0"),
        ("mistral", {"sparsity": "sage-kv"}, "sliding-window"),
        ("llama", {"sparsity": "sage-kv", "speculate": "ngram"}, "speculate=none"),
        ("llama", {"sparsity": "sage-kv", "deterministic": True}, "deterministic"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_folder: Any, family: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_engine(tiny_folder(family), **options)


def test_a_request_that_asks_for_nonsense_is_refused(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"))
    with pytest.raises(RequestError, match="known") as caught:
        engine.add(Request("r", PROMPT, sparsity="nearest-neighbour"))
    assert caught.value.param == "sparsity"
    tokens, _ = generate(engine, PROMPT, 5)
    assert len(tokens) == 5
