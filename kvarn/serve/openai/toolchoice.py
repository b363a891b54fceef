"""What `tools` and `tool_choice` mean for one request: the tools offered, a grammar, a splitter."""

from dataclasses import dataclass
from typing import Any, Protocol

from kvarn.core.errors import RequestError, nearest
from kvarn.core.request import Grammar
from kvarn.serve.openai.protocol import ChatMessage, ChatRequest, NamedChoice, Tool
from kvarn.serve.openai.sampling import asked_grammar, json_schema
from kvarn.serve.service import Service
from kvarn.serve.text import need_tokenizer, render_chat
from kvarn.serve.tools import FORMATS, CallDelta, Format, Parsed, ToolParser, detect


class Splitter(Protocol):
    """Splits an answer into content and calls as it comes."""

    @property
    def ends_with_calls(self) -> bool:
        """True when the answer ended because of its calls (finish_reason "tool_calls")."""
        ...

    def feed(self, text: str, final: bool) -> Parsed: ...


class OneCall:
    """The whole answer is the arguments of one function (`tool_choice` names it)."""

    ends_with_calls = False  #: OpenAI says "stop" here

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str, final: bool) -> Parsed:
        """All text is arguments."""
        name, self._name = self._name, None
        return Parsed(calls=[CallDelta(0, name, text)] if name or text else [])


class ParsedCalls:
    """Calls found by a parser; without `parallel` only the first one counts."""

    def __init__(self, parser: ToolParser, parallel: bool) -> None:
        self._parser, self._parallel = parser, parallel

    @property
    def ends_with_calls(self) -> bool:
        """True when there was a call."""
        return self._parser.n_calls > 0

    def feed(self, text: str, final: bool) -> Parsed:
        """What the parser made of it."""
        parsed = self._parser.feed(text, final)
        if not self._parallel:
            parsed.calls = [call for call in parsed.calls if call.index == 0]
        return parsed


@dataclass(slots=True)
class ToolUse:
    """How one request uses tools."""

    offered: list[Tool]
    format: Format
    parallel: bool
    grammar: Grammar | None = None  #: forces a call
    only: str | None = None  #: the function that must be called

    def splitter(self) -> Splitter:
        """A fresh splitter for one choice."""
        if self.only is not None:
            return OneCall(self.only)
        names = [tool.function.name for tool in self.offered]
        return ParsedCalls(ToolParser(self.format, names), self.parallel)


def tool_use(service: Service, body: ChatRequest) -> ToolUse | None:
    """What the body asks for; None without tools."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise RequestError("tool_choice needs tools", param="tool_choice")
        return None
    if choice == "none":
        return None
    if choice is None or choice == "auto":
        return ToolUse(body.tools, _format(service, body), body.parallel_tool_calls)
    if asked_grammar(body) is not None:
        raise RequestError(
            "a forced tool call and structured output cannot be honoured together; "
            "use tool_choice 'auto' or leave out the other",
            param="tool_choice",
        )
    if isinstance(choice, NamedChoice):
        return _named(body, choice.function.name)
    grammar = json_schema(_calls_schema(body.tools, body.parallel_tool_calls))
    return ToolUse(body.tools, FORMATS["json"], body.parallel_tool_calls, grammar)


def _named(body: ChatRequest, name: str) -> ToolUse:
    for tool in body.tools:
        if tool.function.name == name:
            grammar = json_schema(_parameters(tool))
            return ToolUse(body.tools, FORMATS["json"], False, grammar, name)
    known = [tool.function.name for tool in body.tools]
    raise RequestError(
        f"tool_choice names {name!r}, which is not among the tools{nearest(name, known)}",
        param="tool_choice",
    )


def _format(service: Service, body: ChatRequest) -> Format:
    """The format option, or what the model's template asks for when it is given a tool."""
    if service.options.tool_format != "auto":
        return FORMATS[service.options.tool_format]
    if service.tool_format is None:
        hello = [ChatMessage(role="user", content="hello")]
        rendered = render_chat(need_tokenizer(service, "tools"), hello, body.tools[:1])
        service.tool_format = detect(rendered)
    return FORMATS[service.tool_format]


def _parameters(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}


def _calls_schema(tools: list[Tool], parallel: bool) -> dict[str, Any]:
    """A list of at least one call."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": _parameters(tool),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
    if not parallel:
        schema["maxItems"] = 1
    return schema
