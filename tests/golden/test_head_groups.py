"""KV heads in table groups of their own: a masked dense pass, in pages of sinks and window."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from golden.naive import naive_generate
from golden.test_sparsity import PROMPT, generate, make_engine
from torch import Tensor

from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.runner.keeping import Kept

RULE = "duoattention:by=random,sinks=6,window=30,seed={}"


def masked_logits(engine: Engine, tokens: list[int], kept: Kept | None = None) -> Tensor:
    """A dense pass in which every head sees what its group's window and sinks leave.

    Where something was `kept` of the prompt, rows after it see that and the recent ones.
    """
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    at = torch.arange(len(tokens), device=decoder.device)
    per_kv = spec.n_heads // spec.n_kv_heads

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = (at <= at.unsqueeze(1)).repeat(spec.n_kv_heads, 1, 1)  # [Hkv, T, T]
        for group in engine.control.kv.groups:
            if group.window is not None and layer in group.layers:
                near = (at > at.unsqueeze(1) - group.window) | (at < group.sinks)
                seen[list(group.heads_of(layer))] &= near
        if kept is not None and (0, layer) in kept.positions:
            keep, n = kept.keep[0], kept.prompt_len
            recent = at > at.unsqueeze(1) - keep.recent
            stays = kept.positions[0, layer][:, : keep.budget - keep.recent]
            for head, mine in zip(engine.control.kv.groups[0].heads_of(layer), stays):
                chosen = torch.zeros(len(tokens), dtype=torch.bool, device=q.device)
                chosen[mine] = True
                seen[head, n:] &= (recent | chosen)[n:]
        keys, values = (x.repeat_interleave(per_kv, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
        hidden = ~seen.repeat_interleave(per_kv, 0)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, values)

    with torch.inference_mode():
        hidden = decoder.forward(torch.tensor(tokens, device=decoder.device), at, attend)
        logits: Tensor = decoder.logits(hidden)
    return logits


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("attention", ["reference", "invariant", "cpu", "auto"])
def test_heads_see_what_their_group_leaves(tiny_folder: Any, seed: int, attention: str) -> None:
    """Prompts in chunks, and what is generated; the second time with the first one's pages."""
    engine = make_engine(tiny_folder("llama"), sparsity=RULE.format(seed), attention=attention)
    for _ in range(2):
        tokens, _ = generate(engine, PROMPT, 60)
        logits = masked_logits(engine, PROMPT + tokens)
        assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    assert engine.control.stats().cached_tokens > 100
    assert engine.control.check_integrity() == []


@pytest.mark.parametrize("of", ["sage-kv", "snapkv", "knorm"])
@pytest.mark.parametrize("attention", ["cpu", "auto"])
def test_another_part_chooses_what_stays(tiny_folder: Any, of: str, attention: str) -> None:
    """In the heads that retrieve, through two rounds of their ring; the others stream."""
    engine = make_engine(
        tiny_folder("llama"), sparsity=RULE.format(0) + f",of={of},budget=41", attention=attention
    )
    tokens, kept = generate(engine, PROMPT, 60)
    assert kept is not None and {group for group, _ in kept.positions} == {0}
    assert engine.control.kv.groups[0].n_heads == 3
    logits = masked_logits(engine, PROMPT + tokens, kept)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    assert engine.control.check_integrity() == []


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_logprobs(tiny_folder: Any, share: float) -> None:
    """To 1e-4 in fp32, where no head, some, or every head retrieves."""
    engine = make_engine(tiny_folder("llama"), sparsity=RULE.format(0) + f",share={share}")
    params = SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True, logprobs=1)
    engine.add(Request("r", PROMPT, params))
    tokens: list[int] = []
    said: list[float] = []
    while engine.has_work:
        for out in engine.step():
            tokens += out.tokens
            said += [entry.logprob for entry in out.logprobs or []]
    logits = masked_logits(engine, PROMPT + tokens)[len(PROMPT) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(said), wanted, atol=1e-4, rtol=0)


def test_a_window_that_holds_all_is_dense(tiny_folder: Any) -> None:
    engine = make_engine(tiny_folder("llama"), sparsity="duoattention:by=random,window=200")
    tokens, _ = generate(engine, PROMPT, 50)
    decoder = engine.executor.decoder  # type: ignore[attr-defined]
    assert tokens == naive_generate(decoder, engine.spec, PROMPT, 50)


@pytest.mark.parametrize("prompt", [20, 150])
def test_pages_are_sinks_and_window(tiny_folder: Any, tmp_path: Path, prompt: int) -> None:
    """Through 512 tokens: pages of 4 with the 6 sinks, and those with the last 30 positions."""
    shape = json.loads((Path(tiny_folder("llama")) / "config.json").read_text())
    longer = shape | {"max_position_embeddings": 1024}
    (tmp_path / "config.json").write_text(json.dumps(longer))
    engine = make_engine(
        str(tmp_path), sparsity=RULE.format(0), max_len=700, budget=24, prefix="none"
    )
    params = SamplingParams(max_tokens=512, temperature=0.0, ignore_eos=True)
    engine.add(Request("r", [*PROMPT, *PROMPT][:prompt], params))
    kv, steps, before = engine.control.kv, 0, 0
    while engine.has_work:
        engine.step()
        for seq in engine.control.queues.running:  # the step's first row saw 30 from here on
            first = max(0, before - 29) // 4
            assert kv.held(1) == min(2, first) + -(-seq.computed // 4) - first
            if seq.computed >= prompt:
                assert kv.held(0) == -(-len(seq.tokens[: seq.computed]) // 4)
            before, steps = seq.computed, steps + 1
    assert steps > 500


def test_storage_is_that_of_the_heads(tiny_folder: Any) -> None:
    """A group's layers hold its heads' K and V, and no more."""
    engine = make_engine(tiny_folder("llama"), sparsity=RULE.format(0), attention="reference")
    kv, pool = engine.control.kv, engine.executor.pool  # type: ignore[attr-defined]
    for group, pages, caches in zip(kv.groups, kv.pages, pool.by_group, strict=True):
        n_bytes = sum(part.nbytes for cache in caches.values() for part in cache)
        assert n_bytes == pages * 4 * group.bytes_per_token(4)
    assert sum(group.n_heads for group in kv.groups) == 6


def test_more_run_at_once(tiny_folder: Any) -> None:
    """In the same memory, where prompts are long beside the windows that are set aside for all."""
    most = {}
    for rule in ("none", RULE.format(0)):
        engine = make_engine(
            tiny_folder("llama"), sparsity=rule, pages=0, kv_memory=1 / 2048, prefix="none",
            max_seqs=8,
        )  # fmt: skip
        for i in range(16):
            params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
            engine.add(Request(f"r{i}", [*PROMPT, *PROMPT[i:]], params))
        most[rule] = 0
        while engine.has_work:
            engine.step()
            most[rule] = max(most[rule], engine.stats().running)
    assert most[RULE.format(0)] > 1.3 * most["none"]


def test_a_profile_says_who_retrieves(tiny_folder: Any, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"scores": [[0.1, 0.9], [0.8, 0.2], [0.3, 0.4]]}))
    engine = make_engine(tiny_folder("llama"), sparsity=f"duoattention:profile={file}")
    retrieve, stream = engine.control.kv.groups
    assert (retrieve.layers, retrieve.heads) == ((0, 1, 2), ((1,), (0,), (1,)))
    assert (stream.layers, stream.heads) == ((0, 1, 2), ((0,), (1,), (0,)))
    engine = make_engine(tiny_folder("llama"), sparsity=f"duoattention:profile={file},share=0.34")
    retrieve, stream = engine.control.kv.groups
    assert (retrieve.layers, retrieve.heads) == ((0, 1), ((1,), (0,)))
    assert (stream.layers, stream.heads) == ((0, 1, 2), ((0,), (1,), (0, 1)))
    tokens, _ = generate(engine, PROMPT, 40)
    logits = masked_logits(engine, PROMPT + tokens)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize(
    ("family", "rule", "options", "words"),
    [
        ("llama", "", {}, "benchmarks/profile_heads.py"),
        ("llama", ":profile=nobody", {}, "known are .*smollm2-135m"),
        ("llama", ":by=lot", {}, "profile or random"),
        ("llama", ":by=random,budget=64", {}, "of=snapkv"),
        ("llama", ":by=random,of=quest,budget=64", {}, "scores nothing"),
        ("llama", ":by=random,of=streamingllm,budget=64", {}, "of its own"),
        ("llama", ":by=random,of=snapkv", {}, "raise budget"),
        ("llama", ":by=random,of=snapkv,budget=64", {"speculate": "ngram"}, "speculate=none"),
        ("llama", ":by=random,share=1.5", {}, "0 to 1"),
        ("llama", ":by=random,window=0", {}, "at least 1"),
        ("mistral", ":by=random", {}, "sliding-window"),
        ("gemma2", ":by=random", {}, "sliding-window"),
        ("llama", ":by=random", {"deterministic": True}, "deterministic"),
        ("llama", ":by=random", {"tp": 2}, "tp=1"),
    ],
)
def test_what_cannot_be_is_refused(
    tiny_folder: Any, family: str, rule: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        make_engine(tiny_folder(family), sparsity=f"duoattention{rule}", **options)
