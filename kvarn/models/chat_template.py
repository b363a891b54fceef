"""Chat templates: jinja2 in a sandbox, with the helpers that templates on the hub rely on."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvarn.core.errors import ModelError, RequestError


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own contract)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements inside, as they are."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    """JSON as models were trained on it: not escaped for HTML, as jinja2's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """The templates of a model: "default", and sometimes others such as "tool_use"."""

    def __init__(self, sources: Mapping[str, str], variables: Mapping[str, str]) -> None:
        """`variables` are the names of special tokens (bos_token, ...) that templates use."""
        environment = _environment()
        self.variables = dict(variables)
        try:
            self.templates = {name: environment.from_string(s) for name, s in sources.items()}
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is broken: {error}") from None

    def render(self, messages: list[dict[str, Any]], tools: Any, **variables: Any) -> str:
        """The text of a conversation; `RequestError` in the template's words when it refuses."""
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError(
                "this model has no chat template: use completions, or give it a chat_template",
                param="messages",
                code="no_chat_template",
            )
        try:
            return self.templates[name].render(
                **(self.variables | {"messages": messages, "tools": tools} | variables)
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}",
                param="messages",
                code="chat_template",
            ) from None
