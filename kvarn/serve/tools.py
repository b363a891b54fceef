"""Tool calls in generated text: three ways of writing them, one incremental parser.

    json     {"name": ..., "arguments": {...}}, or a list of these, as the whole answer
    hermes   <tool_call>{"name": ..., "arguments": {...}}</tool_call> after any text (Qwen, Hermes)
    llama3   <|python_tag|>{"name": ..., "parameters": {...}}; ... as the whole answer (Llama 3)

The parser takes text as it comes and gives back what is content and what belongs to calls, holding
back only what could still become a call. What turns out not to be one is given back as content.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

_ARGUMENTS = ("arguments", "parameters")


@dataclass(slots=True, frozen=True)
class Format:
    """How a model writes calls: between tags anywhere, or bare as the whole answer."""

    open: str = ""  #: tag before a call
    close: str = ""  #: tag after a call
    bare: bool = False  #: an answer that starts with { or [ is a call too


FORMATS: dict[str, Format] = {
    "json": Format(bare=True),
    "hermes": Format("<tool_call>", "</tool_call>"),
    "llama3": Format("<|python_tag|>", bare=True),
}


def detect(rendered: str) -> str:
    """The format that a chat template asks for, from a prompt that it rendered with tools."""
    if "<tool_call>" in rendered:
        return "hermes"
    if '"parameters"' in rendered and '{"name": function name' in rendered:
        return "llama3"
    return "json"


@dataclass(slots=True)
class CallDelta:
    """A piece of a call: the first has the name, all have a piece of the arguments (JSON text)."""

    index: int
    name: str | None
    arguments: str


@dataclass(slots=True)
class Parsed:
    """What a piece of text turned out to be."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)


class _Object:
    """Reads one JSON object as it comes: its "name", and the raw text of its arguments."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.arguments = ""  #: raw text so far
        self.done = False
        self.failed = False
        self._depth = 0
        self._in_string = self._escaped = False
        self._key: str | None = None  #: of the value being read; None while a key is read
        self._part: list[str] = []  #: raw text of the key or value being read

    def feed(self, text: str) -> int:
        """Read on; returns how many characters belonged to the object."""
        for at, c in enumerate(text):
            self._read(c)
            if self.done or self.failed:
                return at + 1
        return len(text)

    def _read(self, c: str) -> None:
        if self._in_string:
            self._keep(c)
            if self._escaped:
                self._escaped = False
            elif c == "\\":
                self._escaped = True
            elif c == '"':
                self._in_string = False
        elif c == '"':
            self._in_string = True
            self._keep(c)
        elif self._depth == 1 and c in ":,}":
            self._boundary(c)
        elif c in "{[":
            self._depth += 1
            if self._depth > 1:
                self._keep(c)
        elif c in "]}":
            self._depth -= 1
            self._keep(c)
            self.failed = self._depth < 1
        elif self._depth > 1 or not c.isspace():
            self._keep(c)

    def _keep(self, c: str) -> None:
        self._part.append(c)
        if self._key in _ARGUMENTS:
            self.arguments += c

    def _boundary(self, c: str) -> None:
        """A colon, comma or closing brace of the object itself."""
        raw = "".join(self._part)
        self._part = []
        if c == ":" and self._key is None:
            self._key = self._string(raw)
            return
        if self._key == "name":
            self.name = self._string(raw)
        elif self._key is None and (raw or c == ","):
            self.failed = True
        self._key = None
        self.done = c == "}"

    def _string(self, raw: str) -> str:
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, str):
            self.failed = True
            return ""
        return value


class ToolParser:
    """Splits one answer into content and calls."""

    def __init__(self, format: Format, names: Iterable[str]) -> None:
        self._format = format
        self._names = frozenset(names)
        self._buffer = ""
        self._mode = self._start if format.bare else self._text
        self._object = _Object()
        self._raw = ""  #: text of the object that may still turn out to be content
        self._sent = 0  #: characters of its arguments given out
        self._named = False  #: its name has been given out
        self.n_calls = 0

    def feed(self, text: str, final: bool = False) -> Parsed:
        """What `text` adds; `final` says that nothing follows."""
        self._buffer += text
        parsed = Parsed()
        while self._mode(parsed, final):
            pass
        return parsed

    def _start(self, parsed: Parsed, final: bool) -> bool:
        """Bare formats, before anything was said: is this a call?"""
        text = self._buffer.lstrip()
        for opening in ("```json", self._format.open):
            if opening and text.startswith(opening):
                text = text.removeprefix(opening).lstrip()
            elif opening and opening.startswith(text) and not final:
                return False
        if not text:
            return self._give_rest(parsed) if final else False
        if text[0] not in "{[":
            self._mode = self._text
            return True
        self._raw = self._buffer[: len(self._buffer) - len(text)]
        self._buffer = text
        self._mode = self._call
        if text[0] == "[":
            self._raw += "["
            self._buffer = text[1:]
            self._mode = self._between
        return True

    def _text(self, parsed: Parsed, final: bool) -> bool:
        """Content; with tags, up to the next opening one."""
        tag = self._format.open
        before, found, after = self._buffer.partition(tag) if tag else (self._buffer, "", "")
        if found:
            parsed.content += before
            self._raw, self._buffer = tag, after
            self._mode = self._between
            return True
        held = 0 if final or not tag else _overlap(self._buffer, tag)
        parsed.content += self._buffer[: len(self._buffer) - held]
        self._buffer = self._buffer[len(self._buffer) - held :]
        return False

    def _between(self, parsed: Parsed, final: bool) -> bool:
        """Around and between calls: separators, closing marks, or the next call."""
        close = self._format.close
        text = self._buffer.lstrip(" \n\r\t,;]" if self._format.bare else " \n\r\t")
        if text.startswith("{"):
            self._raw += self._buffer[: len(self._buffer) - len(text)]
            self._buffer = text
            self._object, self._sent, self._named = _Object(), 0, False
            self._mode = self._call
            return True
        if close and text.startswith(close):
            self._raw, self._buffer = "", text.removeprefix(close)
            self._mode = self._text
            return True
        ends = [end for end in (close, "```") if end]
        if text in ends or not text or (not final and any(e.startswith(text) for e in ends)):
            if final:
                self._give_raw(parsed)
            return False
        return self._give_rest(parsed)

    def _call(self, parsed: Parsed, final: bool) -> bool:
        """Inside a call."""
        obj = self._object
        used = obj.feed(self._buffer)
        self._raw += self._buffer[:used]
        self._buffer = self._buffer[used:]
        unknown = obj.name is not None and obj.name not in self._names
        if obj.failed or unknown or (obj.done and obj.name is None):
            return self._give_rest(parsed)
        if obj.name is not None:
            self._give_call(parsed)
        if obj.done:
            self._raw = ""
            self._mode = self._between
            return True
        if final:
            self._give_raw(parsed)
        return False

    def _give_call(self, parsed: Parsed) -> None:
        """Give out the name once, and the arguments as far as they are known."""
        obj = self._object
        name = None
        if not self._named:
            name, self._named = obj.name, True
            self._raw = ""
            self.n_calls += 1
        arguments = obj.arguments
        if obj.done:
            arguments = _whole(arguments)
        elif arguments.startswith('"'):
            arguments = ""  # JSON inside a string: unpacked when it is whole
        piece = arguments[self._sent :]
        self._sent += len(piece)
        if name or piece:
            parsed.calls.append(CallDelta(self.n_calls - 1, name, piece))

    def _give_raw(self, parsed: Parsed) -> None:
        if not self._named:
            parsed.content += self._raw
        self._raw = ""

    def _give_rest(self, parsed: Parsed) -> bool:
        """This was no call (or no further one): give it back and go on with text."""
        if not self._named or not self._object.done:
            parsed.content += self._raw
        self._raw = ""
        self._mode = self._text
        return True


def _whole(arguments: str) -> str:
    """Complete arguments as JSON text; some models write them as a string that holds JSON."""
    if not arguments:
        return "{}"
    if arguments.startswith('"'):
        inner = json.loads(arguments)
        return str(inner)
    return arguments


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if tag.startswith(text[-n:])), 0)
