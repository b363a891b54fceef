"""The real model through the whole engine: the naive decoder's tokens, alone and mixed."""

import random
from typing import Any

import pytest
from golden.naive import naive_generate

from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine

QUESTIONS = [
    "What is the capital of France?",
    "Name three primary colours.",
    "Write one sentence about a mill.",
    "What is 2 + 2?",
]


@pytest.fixture(scope="module")
def engines() -> Any:
    """fp32 engines over one loaded model would share nothing; two are enough here."""
    made: dict[int, Engine] = {}

    def make(budget: int) -> Engine:
        if budget not in made:
            options = {"dtype": "float32", "budget": budget, "max_seqs": 6, "pages": 60}
            made[budget] = Engine(resolve(options | {"max_len": 160, "model": "smollm2-135m"}))
        return made[budget]

    yield make
    for engine in made.values():
        engine.close()


def test_chat_answers_equal_naive(engines: Any) -> None:
    """Questions share the template's system prompt, so this also crosses prefix hits."""
    whole, small = engines(512), engines(16)
    tokenizer = whole.tokenizer
    prompts = [
        tokenizer.encode(tokenizer.chat([{"role": "user", "content": q}]), False) for q in QUESTIONS
    ]
    wanted = [
        naive_generate(whole.assembly.model.decoder, whole.spec, p, 8, whole.spec.eos_ids)
        for p in prompts
    ]
    assert "Paris" in tokenizer.decode(wanted[0])
    for engine in (whole, small):
        chance = random.Random(0)
        sampling = SamplingParams(temperature=0.0, max_tokens=8)
        todo = [Request(str(i), p, sampling) for i, p in enumerate(prompts)]
        got: dict[str, list[int]] = {}
        while todo or engine.has_work:
            while todo and chance.random() < 0.5:
                engine.add(todo.pop())
            for output in engine.step():
                got.setdefault(output.request_id, []).extend(output.tokens)
        assert [got[str(i)] for i in range(len(prompts))] == wanted
        assert engine.stats().cached_tokens > 0


def test_text_streams_whole(engines: Any) -> None:
    """The pieces of text put together are the decoded tokens."""
    engine = engines(512)
    prompt = engine.tokenizer.encode("Count in emoji and in words: 1️⃣ one, 2️⃣ two,")
    engine.add(Request("text", prompt, SamplingParams(temperature=0.0, max_tokens=12)))
    text, tokens = "", []
    while engine.has_work:
        for output in engine.step():
            text += output.text
            tokens += output.tokens
    if tokens[-1] in engine.spec.eos_ids:
        tokens.pop()
    assert text == engine.tokenizer.decode(tokens)


def test_stop_string_ends_the_text_before_it(engines: Any) -> None:
    engine = engines(512)
    prompt = engine.tokenizer.encode("The history of the Roman Empire began")
    engine.add(
        Request("free", prompt, SamplingParams(temperature=0.0, max_tokens=16)),
    )
    engine.add(
        Request("stop", prompt, SamplingParams(temperature=0.0, max_tokens=16, stop=("of Rom",)))
    )
    texts = {"free": "", "stop": ""}
    ends: dict[str, Any] = {}
    while engine.has_work:
        for output in engine.step():
            texts[output.request_id] += output.text
            if output.finish:
                ends[output.request_id] = (output.finish, output.stop)
    assert texts["free"].index("of Rom") == len(texts["stop"])
    assert texts["free"].startswith(texts["stop"])
    assert ends["stop"] == ("stop", "of Rom")
