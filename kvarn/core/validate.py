"""Is a request one that this engine can serve? Checked before it is queued, with no work done yet.

`validate` raises a `RequestError` that names the field, says what was wrong and what would work.
Whether a grammar compiles is asked of `kvarn.runner.grammar` (it needs the grammar library).
"""

import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any, NoReturn, get_args

from kvarn.core.errors import RequestError
from kvarn.core.request import (
    Grammar,
    LogprobsMode,
    PoolingKind,
    Request,
    SamplingParams,
)

GRAMMAR_KINDS = ("json", "json_schema", "regex", "ebnf")
INT64 = 2**63

#: inclusive ranges of the fields that are real numbers
FLOAT_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 100.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}

#: fields that mean something for an embedding request too; all others must be left out there
NOT_ABOUT_GENERATION = frozenset({"max_tokens", "skip_special_tokens", "temperature"})


@dataclass(slots=True, frozen=True)
class Limits:
    """What one engine can take in a request."""

    vocab: int  #: token ids are 0 .. vocab - 1
    max_len: int  #: prompt and output together [tokens]
    max_n: int = 128  #: sequences for one prompt
    max_logprobs: int = 20  #: alternatives reported at a position
    max_stop: int = 16  #: stop strings
    max_stop_chars: int = 256  #: length of one stop string or bad word [characters]
    max_bad_words: int = 256
    max_bias: int = 1024  #: entries of logit_bias
    max_grammar_chars: int = 200_000  #: length of a schema, regular expression or grammar
    has_tokenizer: bool = True  #: without one, nothing that concerns text can be honoured


def validate(request: Request, limits: Limits) -> None:
    """Raise `RequestError` for the first thing in `request` that cannot be honoured."""
    params = request.sampling
    _integer("priority", request.priority, -INT64, INT64 - 1)
    _token_ids("prompt", request.prompt, limits.vocab)
    _check_slo(request)
    if "\0" in request.cache_salt:
        _refuse("cache_salt", "cache_salt must not contain the character U+0000")
    if request.pooling is not None:
        _check_pooling(request)
        _check_length(len(request.prompt), 0, limits)
        return
    _check_switches(params)
    _check_counts(params, limits)
    _check_floats(params)
    _check_logprobs(params, limits)
    _check_tokens(params, limits)
    _check_texts(params, limits)
    _check_grammar(params, limits)
    outputs = params.max_tokens if params.max_tokens is not None else max(1, params.min_tokens)
    _check_length(len(request.prompt), outputs, limits)


def _refuse(param: str, message: str, code: str = "invalid_value") -> NoReturn:
    raise RequestError(message, param=param, code=code)


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int:
        _refuse(name, f"{name} must be an integer, not {_show(value)}", "invalid_type")
    if not low <= value <= high:
        top = f"and at most {high}" if high < INT64 - 1 else ""
        _refuse(name, f"{name} must be at least {low} {top}".rstrip() + f", not {value}")


def _real(name: str, value: Any, low: float, high: float) -> None:
    if type(value) not in (int, float):
        _refuse(name, f"{name} must be a number, not {_show(value)}", "invalid_type")
    if not low <= value <= high:  # NaN fails this as well
        _refuse(name, f"{name} must be between {low:g} and {high:g}, not {value}")


def _sequence(name: str, value: Any) -> None:
    if type(value) not in (list, tuple):
        _refuse(name, f"{name} must be a list, not {_show(value)}", "invalid_type")


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_length(prompt: int, outputs: int, limits: Limits) -> None:
    if prompt + outputs <= limits.max_len:
        return
    if prompt + min(outputs, 1) > limits.max_len:
        _refuse(
            "prompt",
            f"this model's maximum context length is {limits.max_len} tokens, but the prompt has "
            f"{prompt}; shorten it to at most {limits.max_len - min(outputs, 1)}",
            "context_length_exceeded",
        )
    _refuse(
        "max_tokens",
        f"this model's maximum context length is {limits.max_len} tokens, but {prompt + outputs} "
        f"were requested ({prompt} in the prompt, {outputs} for the output); shorten the prompt or "
        f"ask for at most {limits.max_len - prompt} output tokens",
        "context_length_exceeded",
    )


def _token_ids(name: str, ids: Any, vocab: int) -> None:
    """A non-empty list or tuple of ids of the vocabulary."""
    _sequence(name, ids)
    if not ids:
        _refuse(name, f"{name} is empty; at least one token is needed", "empty")
    kinds = set(map(type, ids))
    if kinds != {int}:
        odd = next(x for x in ids if type(x) is not int)
        _refuse(name, f"{name} must hold integer token ids, not {_show(odd)}", "invalid_type")
    low, high = min(ids), max(ids)
    if low < 0 or high >= vocab:
        _refuse(
            name,
            f"{name} holds token id {low if low < 0 else high}, outside the vocabulary of "
            f"{vocab} (ids 0 to {vocab - 1})",
            "token_out_of_range",
        )


def _check_slo(request: Request) -> None:
    if request.slo is None:
        return
    for name, value in (("slo.ttft", request.slo.ttft), ("slo.tpot", request.slo.tpot)):
        if value is not None and (type(value) not in (int, float) or not 0 < value < math.inf):
            _refuse(name, f"{name} must be a positive number of seconds, not {_show(value)}")


def _check_pooling(request: Request) -> None:
    if request.pooling not in get_args(PoolingKind):
        _refuse("pooling", f"pooling must be 'mean' or 'last', not {_show(request.pooling)}")
    plain = SamplingParams()
    for field in fields(SamplingParams):
        given = getattr(request.sampling, field.name)
        if field.name not in NOT_ABOUT_GENERATION and given != getattr(plain, field.name):
            _refuse(field.name, f"{field.name} has no meaning for an embedding; leave it out")


def _check_switches(params: SamplingParams) -> None:
    for name in ("include_stop", "ignore_eos", "skip_special_tokens"):
        value = getattr(params, name)
        if type(value) is not bool:
            _refuse(name, f"{name} must be true or false, not {_show(value)}", "invalid_type")


def _check_counts(params: SamplingParams, limits: Limits) -> None:
    _integer("n", params.n, 1, limits.max_n)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 0, INT64)
        if params.max_tokens == 0 and params.prompt_logprobs is None:
            _refuse(
                "max_tokens",
                "max_tokens must be at least 1; 0 makes sense only together with prompt_logprobs",
            )
    _integer("min_tokens", params.min_tokens, 0, INT64)
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        _refuse(
            "min_tokens",
            f"min_tokens={params.min_tokens} is above max_tokens={params.max_tokens}; lower "
            f"min_tokens or raise max_tokens",
        )
    _integer("top_k", params.top_k, -1, INT64)
    if params.seed is not None:
        _integer("seed", params.seed, -INT64, 2 * INT64 - 1)


def _check_floats(params: SamplingParams) -> None:
    for name, (low, high) in FLOAT_RANGES.items():
        _real(name, getattr(params, name), low, high)
    _real("top_p", params.top_p, 0.0, 1.0)
    if params.top_p == 0:
        _refuse("top_p", "top_p must be above 0 and at most 1, not 0; for greedy use temperature=0")


def _check_logprobs(params: SamplingParams, limits: Limits) -> None:
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(params, name) is not None:
            _integer(name, getattr(params, name), 0, limits.max_logprobs)
    if params.logprobs_mode not in get_args(LogprobsMode):
        _refuse(
            "logprobs_mode",
            f"logprobs_mode must be 'raw' or 'processed', not {_show(params.logprobs_mode)}",
        )


def _check_tokens(params: SamplingParams, limits: Limits) -> None:
    _sequence("stop_token_ids", params.stop_token_ids)
    if params.stop_token_ids:
        _token_ids("stop_token_ids", params.stop_token_ids, limits.vocab)
    if params.allowed_token_ids is not None:
        _token_ids("allowed_token_ids", params.allowed_token_ids, limits.vocab)
    _sequence("bad_word_ids", params.bad_word_ids)
    for ids in params.bad_word_ids:
        _token_ids("bad_word_ids", ids, limits.vocab)
    if type(params.logit_bias) is not dict:
        _refuse("logit_bias", "logit_bias must map token ids to numbers", "invalid_type")
    if params.logit_bias:
        _at_most("logit_bias", params.logit_bias, limits.max_bias, "entries")
        _token_ids("logit_bias", list(params.logit_bias), limits.vocab)
        for value in params.logit_bias.values():
            _real("logit_bias", value, -100.0, 100.0)


def _at_most(name: str, values: Sized, most: int, what: str) -> None:
    if len(values) > most:
        _refuse(name, f"{name} has {len(values)} {what}; at most {most} are allowed", "too_many")


def _check_texts(params: SamplingParams, limits: Limits) -> None:
    _texts("stop", params.stop, limits.max_stop, limits)
    _texts("bad_words", params.bad_words, limits.max_bad_words, limits)


def _texts(name: str, values: Sequence[Any], most: int, limits: Limits) -> None:
    _sequence(name, values)
    if not values:
        return
    if not limits.has_tokenizer:
        _needs_tokenizer(name)
    _at_most(name, values, most, "texts")
    for value in values:
        if type(value) is not str:
            _refuse(name, f"{name} must hold texts, not {_show(value)}", "invalid_type")
        if not value:
            _refuse(name, f"{name} holds an empty text; leave it out", "empty")
        if len(value) > limits.max_stop_chars:
            _refuse(
                name,
                f"{name} holds a text of {len(value)} characters; at most "
                f"{limits.max_stop_chars} are allowed",
                "too_long",
            )


def _needs_tokenizer(name: str) -> NoReturn:
    _refuse(
        name,
        f"{name} needs a tokenizer, and this model was loaded without one; use token ids instead",
        "no_tokenizer",
    )


def _check_grammar(params: SamplingParams, limits: Limits) -> None:
    grammar = params.grammar
    if grammar is None:
        return
    if type(grammar) is not Grammar or type(grammar.source) is not str:
        _refuse("grammar", f"grammar must be a Grammar, not {_show(grammar)}", "invalid_type")
    if grammar.kind not in GRAMMAR_KINDS:
        known = ", ".join(GRAMMAR_KINDS)
        _refuse("grammar", f"a grammar's kind must be one of {known}, not {_show(grammar.kind)}")
    if not limits.has_tokenizer:
        _needs_tokenizer("grammar")
    if grammar.kind != "json" and not grammar.source.strip():
        _refuse("grammar", f"the {grammar.kind} of the grammar is empty", "empty")
    if len(grammar.source) > limits.max_grammar_chars:
        _refuse(
            "grammar",
            f"the {grammar.kind} has {len(grammar.source)} characters; at most "
            f"{limits.max_grammar_chars} are allowed",
            "too_long",
        )
