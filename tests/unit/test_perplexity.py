"""The quality benchmark: every token scored once, ratios of equal runs, what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from kvarn.bench.options import Perplexity
from kvarn.bench.perplexity import Scored, forms, read_text, result, score, windows
from kvarn.core.errors import ConfigError
from kvarn.engine.llm import LLM


@pytest.mark.parametrize(("n", "window", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 4), (97, 8, 3)])
def test_every_token_but_the_first_is_scored_once(n: int, window: int, stride: int) -> None:
    spans = windows(n, window, stride)
    scored = [at for _, first, end in spans for at in range(first, end)]
    assert scored == list(range(1, n))
    for start, first, end in spans:
        assert end - start <= window
        assert first - start >= (window - stride if start else 1)


class Engine:
    """As much of an LLM as scoring uses: token t after t - 1 has logprob -t / 100."""

    tokenizer: Any
    engine: Any

    def __init__(self) -> None:
        self.tokenizer = self.engine = self

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [0] * add_special + [ord(letter) for letter in text]

    def explain(self) -> dict[str, Any]:
        names = ("dtype", "quantization")
        return {"options": [{"option": name, "value": "none"} for name in names]}

    def generate(self, prompts: list[list[int]], params: Any) -> list[Any]:
        assert params.max_tokens == 0 and params.prompt_logprobs == 0
        return [Answer([None, *(Entry(-t / 100) for t in ids[1:])]) for ids in prompts]


class Entry:
    def __init__(self, logprob: float) -> None:
        self.logprob = logprob


class Answer:
    def __init__(self, prompt_logprobs: list[Any]) -> None:
        self.prompt_logprobs = prompt_logprobs


def test_logprobs_come_in_the_order_of_the_text() -> None:
    text = "abcdefghijklmnopqrstuvwxyz"
    scored = score(Engine(), text, Perplexity(window=8, stride=3))
    assert scored.logprobs == [-ord(letter) / 100 for letter in text[1:]]


def test_ratio_to_the_last_run() -> None:
    how = Perplexity(against="float32")
    config = {"dtype": "float32", "quantization": "none"}
    runs = [Scored(config, [-2.0, -1.0, -3.0], 1.0), Scored(config, [-1.9, -0.9, -2.9], 1.0)]
    worse, base = result(runs, "abcd", how)["results"]
    assert math.isclose(worse["perplexity"], math.exp(2.0))
    assert math.isclose(worse["ratio"], math.exp(0.1)) and worse["ratio_error"] < 1e-9
    assert base["ratio"] == 1.0
    assert result(runs[:1], "abcd", Perplexity())["results"][0]["ratio"] is None


def test_formats_become_options() -> None:
    how = Perplexity(form=("bfloat16", "int4"), against="float32")
    assert forms({"threads": 1}, how) == [
        {"threads": 1, "dtype": "bfloat16", "quantization": "none"},
        {"threads": 1, "quantization": "int4"},
        {"threads": 1, "dtype": "float32", "quantization": "none"},
    ]
    assert forms({"dtype": "bfloat16"}, Perplexity()) == [{"dtype": "bfloat16"}]
    with pytest.raises(ConfigError, match="did you mean 'float32'"):
        forms({}, Perplexity(against="flaot32"))
    with pytest.raises(ConfigError, match="stride=512 must be at least 1 and below window=512"):
        forms({}, Perplexity(stride=512))


def test_text(tmp_path: Path) -> None:
    assert read_text(Perplexity()).startswith("CHAPTER I. Down the Rabbit-Hole\n\nAlice was")
    (tmp_path / "x.txt").write_text("héllo")
    assert read_text(Perplexity(text=str(tmp_path / "x.txt"))) == "héllo"
    with pytest.raises(ConfigError, match="cannot read"):
        read_text(Perplexity(text=str(tmp_path / "y.txt")))
    with pytest.raises(ConfigError, match="nothing to score"):
        windows(1, 8, 4)


def test_random_weights_are_refused(tiny_folder: Any) -> None:
    llm = LLM(tiny_folder("llama"), load="random", max_seqs=2, pages=40, device="cpu")
    try:
        with pytest.raises(ConfigError, match="no quality"):
            score(llm, "text", Perplexity())
    finally:
        llm.close()
