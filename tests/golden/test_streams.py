"""Streams that never end: positions in the cache, for far more tokens than the model knows."""

from typing import Any

import pytest
import torch
from golden.test_sparsity import PROMPT, generate, make_engine
from torch import Tensor

from kvarn.core.errors import ConfigError, RequestError
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine
from kvarn.kernels.rope import Rope

KNOWN = 512  #: positions of the tiny models
RULE = "streamingllm:budget=24,streamed=true"


def ranked_logits(engine: Engine, tokens: list[int], budget: int, sinks: int, since: int) -> Tensor:
    """Keys as they are before any rotation, rotated by their rank in the cache at every row.

    The paper's own form: rows before `since` see all that is before them.
    """
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    total = len(tokens)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rope, o = decoder.rotary(layer), torch.empty_like(q)
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        for row in range(total):
            held = list(range(row + 1))
            if row >= since:
                held = held[:sinks] + held[row + 1 - (budget - sinks) :]
            ranked = _at(keys[held], rope, torch.arange(len(held)))
            asks = _at(q[row : row + 1], rope, torch.tensor([len(held) - 1]))
            weights = torch.einsum("qhd,khd->hqk", asks, ranked) * spec.scale
            o[row] = torch.einsum("hqk,khd->qhd", weights.softmax(-1), values[held])[0]
        return o

    with torch.inference_mode():
        nowhere = torch.zeros(total, dtype=torch.int64)  # q and k come unrotated
        hidden = decoder.forward(torch.tensor(tokens), nowhere, attend)
        logits: Tensor = decoder.logits(hidden)
    return logits


def _at(x: Tensor, rope: Rope, ranks: Tensor) -> Tensor:
    """x [n, H, d] rotated by `ranks` [n]."""
    cos, sin = rope.cos[ranks].unsqueeze(1), rope.sin[ranks].unsqueeze(1)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


@pytest.mark.parametrize("attention", ["reference", "auto"])
@pytest.mark.parametrize(("length", "streamed"), [(150, False), (150, True), (10, True)])
def test_rotated_by_rank(tiny_folder: Any, attention: str, length: int, streamed: bool) -> None:
    """Turning what is stored gives the logits of keys that are rotated by rank, to 1e-4."""
    engine = make_engine(
        tiny_folder("llama"), attention=attention,
        sparsity=f"streamingllm:budget=24,streamed={streamed}",
    )  # fmt: skip
    prompt = PROMPT[:length]
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, logprobs=1)
    engine.add(Request("r", prompt, params))
    tokens: list[int] = []
    said: list[float] = []
    while engine.has_work:
        for out in engine.step():
            tokens += out.tokens
            said += [entry.logprob for entry in out.logprobs or []]
    since = 24 if streamed else max(24, length)
    logits = ranked_logits(engine, prompt + tokens, 24, 4, since)[length - 1 : -1]
    wanted = logits.log_softmax(-1).gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(said), wanted, atol=1e-4, rtol=0)


def test_a_hundred_thousand_tokens(tiny_folder: Any) -> None:
    """Memory is flat, and no row is rotated by a position beyond the cache."""
    each, seqs = 800, 128
    engine = make_engine(
        tiny_folder("llama"), sparsity=RULE, max_len=1 << 20, max_seqs=seqs, prefix="none",
        pages=800, budget=256,
    )  # fmt: skip
    runner: Any = engine.executor
    angles, image = set[int](), runner.image
    plain = image.angles

    def watched(rows: Any, positions: Any) -> Any:
        found = plain(rows, positions)
        angles.update(found.tolist())
        return found

    image.angles = watched
    params = SamplingParams(max_tokens=each, temperature=0.0, ignore_eos=True)
    for i in range(seqs):
        engine.add(Request(f"r{i}", PROMPT[i : i + 30], params))
    count, held = 0, set[int]()
    while engine.has_work:
        count += sum(len(out.tokens) for out in engine.step())
        if count > 4000 and len(engine.control.queues.running) == seqs:
            held.add(engine.control.kv.held(0))
    assert count == each * seqs > 100_000
    assert held == {seqs * 24 // 4} and angles == set(range(24))
    assert all(len(rope.cos) == KNOWN for rope in runner.decoder.ropes.values())
    assert image.tables[0].shape[1] <= 64
    assert engine.control.check_integrity() == []


def test_a_stream_does_not_feel_the_limit(tiny_folder: Any) -> None:
    """Beyond the 512 positions that the model knows: still the arg max by rank."""
    engine = make_engine(tiny_folder("llama"), sparsity=RULE, max_len=4096)
    text = [PROMPT[i % 150] for i in range(KNOWN - 20)]
    tokens, _ = generate(engine, text, 60)
    logits = ranked_logits(engine, text + tokens, 24, 4, 24)
    assert logits[len(text) - 1 : -1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_len": 513}, "only streams whose positions count in the cache"),
        ({"max_len": 513, "sparsity": "sage-kv"}, "sparsity=streamingllm"),
        ({"max_len": 513, "sparsity": f"{RULE},positions=text"}, "only streams"),
        ({"max_len": 4096, "sparsity": "streamingllm:budget=600"}, "budget of at most 512"),
        ({"max_len": 4096, "sparsity": RULE, "pages": 100}, "KV pages"),
    ],
)
def test_what_cannot_be_endless(tiny_folder: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_engine(tiny_folder("llama"), **options)


def test_an_endless_engine_serves_streams(tiny_folder: Any) -> None:
    """Nothing else; and a prompt beyond what the model sees at once only through the window."""
    engine = make_engine(tiny_folder("llama"), sparsity=RULE, max_len=4096)
    for rule in ("none", "snapkv:budget=40", "streamingllm:budget=24,positions=text"):
        with pytest.raises(RequestError, match="serves nothing but streams"):
            engine.add(Request("r", PROMPT, sparsity=rule))
    long = PROMPT * 4
    with pytest.raises(RequestError, match="streamed=true"):
        engine.add(Request("r", long, sparsity="streamingllm:budget=24"))
    assert len(generate(engine, long, 5)[0]) == 5
    assert len(generate(engine, PROMPT, 5, sparsity="streamingllm:budget=24")[0]) == 5
