"""Bad input is refused with the field's name and a message that says what would work."""

import dataclasses
import math
from typing import Any

import pytest

from kvarn.core.bad_words import encode_bad_words
from kvarn.core.errors import RequestError
from kvarn.core.request import SLO, Grammar, Request, SamplingParams
from kvarn.core.validate import Limits, validate

LIMITS = Limits(vocab=100, max_len=50)
NO_TEXT = Limits(vocab=100, max_len=50, has_tokenizer=False)


def request(prompt: Any = (1, 2, 3), *, about: dict[str, Any] | None = None, **sampling: Any):
    if type(prompt) is tuple:
        prompt = list(prompt)
    return Request("r", prompt, SamplingParams(**sampling), **(about or {}))


def refusal(asked: Request, limits: Limits = LIMITS) -> RequestError:
    with pytest.raises(RequestError) as caught:
        validate(asked, limits)
    assert caught.value.status == 400
    assert caught.value.message
    return caught.value


GOOD: list[dict[str, Any]] = [
    {},
    {"max_tokens": None},
    {"max_tokens": 47},
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"temperature": 0, "top_k": -1, "top_p": 1, "min_p": 1},
    {"n": 128, "seed": -(2**63)},
    {"seed": 2**64 - 1},
    {"min_tokens": 16},
    {"frequency_penalty": -2, "presence_penalty": 2.0, "repetition_penalty": 1.3},
    {"logit_bias": {0: -100, 99: 100.0}},
    {"stop": ("a", "\n\n"), "stop_token_ids": (0, 99)},
    {"allowed_token_ids": (5,)},
    {"bad_words": ("x",), "bad_word_ids": ((4, 5),)},
    {"stop": [], "stop_token_ids": [], "bad_words": []},
    {"logprobs": 0, "logprobs_mode": "processed"},
    {"logprobs": 20},
    {"grammar": Grammar("json")},
    {"grammar": Grammar("regex", "a+")},
]


@pytest.mark.parametrize("sampling", GOOD)
def test_good_requests_pass(sampling: dict[str, Any]) -> None:
    validate(request(**sampling), LIMITS)


BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 129),
    ("n", 10**30),
    ("n", 1.0),
    ("n", True),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "16"),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("min_tokens", None),
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "hot"),
    ("temperature", None),
    ("temperature", 1e300),
    ("top_k", -2),
    ("top_k", 1.5),
    ("top_p", 0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0),
    ("repetition_penalty", math.inf),
    ("frequency_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("presence_penalty", math.nan),
    ("logit_bias", {100: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"5": 1.0}),
    ("logit_bias", {5: 101}),
    ("logit_bias", {5: math.nan}),
    ("logit_bias", [5]),
    ("seed", "1"),
    ("seed", 1.0),
    ("seed", 2**64),
    ("stop", ("",)),
    ("stop", ("a",) * 17),
    ("stop", ("a" * 257,)),
    ("stop", "abc"),
    ("stop", (5,)),
    ("stop_token_ids", (100,)),
    ("stop_token_ids", (-1,)),
    ("allowed_token_ids", ()),
    ("allowed_token_ids", (100,)),
    ("bad_words", ("",)),
    ("bad_word_ids", ((),)),
    ("bad_word_ids", ((100,),)),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logprobs", True),
    ("prompt_logprobs", 21),
    ("logprobs_mode", "cooked"),
    ("grammar", Grammar("regex", "")),
    ("grammar", Grammar("poem", "x")),  # type: ignore[arg-type]
    ("grammar", Grammar("ebnf", "x" * 200_001)),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_values_name_their_field(name: str, value: Any) -> None:
    error = refusal(request(**{name: value}))
    assert error.param == name
    assert name in error.message or "grammar" in error.message or name == "grammar"


def test_empty_prompt() -> None:
    error = refusal(request([]))
    assert (error.param, error.code) == ("prompt", "empty")


@pytest.mark.parametrize(
    "prompt", [[1, 100], [-1], [10**30], [1, "2"], [1.0], [True], [None], "hi"]
)
def test_bad_prompt_tokens(prompt: Any) -> None:
    assert refusal(request(prompt)).param == "prompt"


def test_token_out_of_range_is_named_with_the_vocabulary() -> None:
    error = refusal(request([1, 123]))
    assert "123" in error.message and "0 to 99" in error.message
    assert error.code == "token_out_of_range"


def test_over_long_prompt_says_limit_and_length() -> None:
    error = refusal(request([1] * 50))
    assert error.code == "context_length_exceeded" and error.param == "prompt"
    assert "maximum context length is 50 tokens" in error.message and "49" in error.message
    validate(request([1] * 49, max_tokens=1), LIMITS)
    validate(request([1] * 49, max_tokens=None), LIMITS)


def test_prompt_and_output_together_must_fit() -> None:
    error = refusal(request([1] * 40, max_tokens=11))
    assert error.code == "context_length_exceeded" and error.param == "max_tokens"
    assert "40 in the prompt" in error.message and "at most 10 output tokens" in error.message
    validate(request([1] * 40, max_tokens=10), LIMITS)
    assert refusal(request([1] * 40, max_tokens=None, min_tokens=11)).code == error.code


def test_a_prompt_that_is_only_scored_may_fill_the_context() -> None:
    validate(request([1] * 50, max_tokens=0, prompt_logprobs=1), LIMITS)


def test_too_many_biases() -> None:
    limits = Limits(vocab=5000, max_len=50)
    assert refusal(request(logit_bias=dict.fromkeys(range(1025), 0.0)), limits).code == "too_many"


@pytest.mark.parametrize(
    "sampling", [{"stop": ("a",)}, {"bad_words": ("a",)}, {"grammar": Grammar("json")}]
)
def test_texts_need_a_tokenizer(sampling: dict[str, Any]) -> None:
    error = refusal(request(**sampling), NO_TEXT)
    assert error.code == "no_tokenizer" and error.param in sampling


def test_token_ids_work_without_a_tokenizer() -> None:
    validate(request(stop_token_ids=(5,), bad_word_ids=((4,),), logprobs=2), NO_TEXT)


@pytest.mark.parametrize("value", [1.5, "high", True, 2**63])
def test_priority_is_an_integer(value: Any) -> None:
    assert refusal(request(about={"priority": value})).param == "priority"


@pytest.mark.parametrize("slo", [SLO(ttft=-1.0), SLO(tpot=math.nan), SLO(ttft=math.inf)])
def test_slo_is_positive(slo: SLO) -> None:
    assert str(refusal(request(about={"slo": slo})).param).startswith("slo.")


def test_embedding_requests() -> None:
    for kind in ("mean", "last"):
        validate(request([1] * 50, about={"pooling": kind}), LIMITS)
    assert refusal(request(about={"pooling": "max"})).param == "pooling"
    assert refusal(request([1] * 51, about={"pooling": "mean"})).code == "context_length_exceeded"


@pytest.mark.parametrize(
    "sampling",
    [{"n": 2}, {"logprobs": 1}, {"stop": ("a",)}, {"grammar": Grammar("json")}, {"min_tokens": 3}],
)
def test_embedding_requests_refuse_what_concerns_generation(sampling: dict[str, Any]) -> None:
    error = refusal(request(about={"pooling": "mean"}, **sampling))
    assert error.param in sampling and "embedding" in error.message


def test_every_sampling_field_with_rubbish_gives_a_request_error_or_passes() -> None:
    rubbish = [
        None,
        -1,
        0,
        1,
        math.nan,
        -math.inf,
        "",
        "x",
        [],
        [None],
        {},
        {"a": 1},
        object(),
        b"",
    ]
    for field in dataclasses.fields(SamplingParams):
        for value in rubbish:
            try:
                validate(request(**{field.name: value}), LIMITS)
            except RequestError as error:
                assert error.param == field.name, (field.name, value)


def test_bad_words_with_and_without_a_space() -> None:
    ids = {"bad": [1], " bad": [2], "very bad": [3, 2], " very bad": [4, 2]}
    assert encode_bad_words(["bad", "very bad"], ids.__getitem__) == ((1,), (2,), (3, 2), (4, 2))
    assert encode_bad_words([" bad"], ids.__getitem__) == ((2,),)
    assert encode_bad_words([], ids.__getitem__) == ()
