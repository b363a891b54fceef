"""From the fields of a body to `SamplingParams` and `Grammar`."""

import json
from typing import Any

from kvarn.core.errors import RequestError
from kvarn.core.request import Grammar, SamplingParams
from kvarn.serve.openai.protocol import Sampling

_SPECIAL = frozenset(r"\.+*?()|[]{}^$#&-~/")


def sampling_params(
    body: Sampling,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """The body's sampling fields; the arguments are those that differ between endpoints."""
    if body.prompt_logprobs is not None:
        prompt_logprobs = body.prompt_logprobs
    if body.prompt_logprobs is not None:
        prompt_logprobs = body.prompt_logprobs
    return SamplingParams(
        n=body.n,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        logit_bias=body.logit_bias,
        bad_words=tuple(body.bad_words),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        seed=body.seed,
        stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop),
        stop_token_ids=tuple(body.stop_token_ids),
        include_stop=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
        skip_special_tokens=body.skip_special_tokens,
    )


def asked_grammar(body: Sampling) -> Grammar | None:
    """The one constraint that the body asks for; two are an error that names both."""
    asked: list[tuple[str, Grammar]] = []
    if body.response_format is not None and body.response_format.type != "text":
        asked.append(("response_format", _of_response_format(body)))
    fields: dict[str, Any] = {
        "json": body.guided_json,
        "regex": body.guided_regex,
        "choice": body.guided_choice,
        "grammar": body.guided_grammar,
    }
    asked += [(f"guided_{k}", _of(k, v)) for k, v in fields.items() if v is not None]
    if body.structured_outputs is not None:
        inside = body.structured_outputs
        fields = {
            "json": inside.json_,
            "regex": inside.regex,
            "choice": inside.choice,
            "grammar": inside.grammar,
            "json_object": inside.json_object or None,
        }
        asked += [
            (f"structured_outputs.{k}", _of(k, v)) for k, v in fields.items() if v is not None
        ]
    if len(asked) > 1:
        names = " and ".join(name for name, _ in asked)
        raise RequestError(f"{names} cannot be honoured together; send one", param=asked[1][0])
    return asked[0][1] if asked else None


def _of_response_format(body: Sampling) -> Grammar:
    assert body.response_format is not None
    if body.response_format.type == "json_object":
        return Grammar("json")
    if body.response_format.json_schema is None:
        raise RequestError(
            "response_format of type 'json_schema' needs the field 'json_schema'",
            param="response_format",
            code="missing_field",
        )
    return json_schema(body.response_format.json_schema.schema_)


def _of(kind: str, value: Any) -> Grammar:
    if kind == "json":
        return json_schema(value)
    if kind == "regex":
        return Grammar("regex", value)
    if kind == "choice":
        return _choice(value)
    if kind == "json_object":
        return Grammar("json")
    return Grammar("ebnf", value)


def json_schema(schema: dict[str, Any] | str) -> Grammar:
    """A grammar for a schema given as an object or as JSON text."""
    if isinstance(schema, str):
        try:
            json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the JSON schema is not valid JSON: {error}") from None
        return Grammar("json_schema", schema)
    return Grammar("json_schema", json.dumps(schema))


def _choice(texts: list[str]) -> Grammar:
    if not texts:
        raise RequestError("a choice needs at least one text", param="choice")
    return Grammar("regex", "|".join(f"({_escape(text)})" for text in texts))


def _escape(text: str) -> str:
    """`text` as a regular expression that matches only itself."""
    return "".join("\\" + c if c in _SPECIAL else c for c in text)
