"""How each kind of server is asked, and how its stream is read: bodies out, `Piece`s back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kvarn.bench.prompts import Turn
from kvarn.core.errors import ConfigError, nearest

#: words that stand for token ids where a server takes only text
WORDS = (
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group", "country", "problem", "hand", "part",
    "place", "case", "week", "company", "system", "program", "question", "work", "number",
    "night", "point", "home", "water", "room", "mother", "area", "money", "story", "fact",
    "month", "lot", "right", "study", "book", "eye", "job", "word",
)  # fmt: skip


@dataclass(slots=True)
class Piece:
    """What one event of a stream says."""

    text: str = ""
    tokens: bool = False  #: it carries generated tokens: it counts for TTFT and ITL
    n_prompt: int | None = None
    n_output: int | None = None
    n_cached: int | None = None
    error: str | None = None


@dataclass(slots=True)
class Asking:
    """What is the same in every request of a run."""

    model: str
    temperature: float | None = 0.0  #: None: the server's own default
    ignore_eos: bool = True


History = list[tuple[Turn, str]]  #: the turns so far, each with the text of its answer


class Backend(Protocol):
    """A server's dialect. One object serves one request: it may keep state between events."""

    path: str

    def body(self, asking: Asking, history: History, turn: Turn) -> dict[str, Any]:
        """The JSON of the request."""
        ...

    def read(self, event: bytes) -> Piece:
        """What one event of the answer says."""
        ...


def words(prompt: list[int] | str) -> str:
    """A text with about one token for each id, for servers that take only text."""
    return prompt if isinstance(prompt, str) else " ".join(WORDS[t % len(WORDS)] for t in prompt)


def joined(history: History, turn: Turn) -> list[int] | str:
    """The whole prompt of a turn: ids where all of it is ids, text otherwise."""
    if isinstance(turn.prompt, str):
        parts = [text for said, answer in history for text in (words(said.prompt), answer)]
        return "\n".join([*parts, turn.prompt])
    ids: list[int] = []
    for said, _ in history:
        ids += [*said.prompt, *said.reply]
    return ids + turn.prompt


def _usage(usage: dict[str, Any] | None, piece: Piece) -> Piece:
    """Fill the counts of a piece from an OpenAI `usage` object."""
    if usage:
        piece.n_prompt = usage.get("prompt_tokens")
        piece.n_output = usage.get("completion_tokens")
        piece.n_cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
    return piece


def _common(asking: Asking) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": asking.model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if asking.temperature is not None:
        body["temperature"] = asking.temperature
    if asking.ignore_eos:
        body["ignore_eos"] = True
    return body


def _error(data: dict[str, Any]) -> str | None:
    error = data.get("error")
    if error is None:
        return None
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


class Completions:
    """OpenAI `/v1/completions`, with token-id prompts."""

    path = "/v1/completions"

    def body(self, asking: Asking, history: History, turn: Turn) -> dict[str, Any]:
        """The JSON of the request."""
        return _common(asking) | {"prompt": joined(history, turn), "max_tokens": turn.n_output}

    def read(self, event: bytes) -> Piece:
        """What one event of the answer says; an event with a choice carries tokens."""
        data = json.loads(event)
        choices = data.get("choices") or []
        text = (choices[0].get("text") or "") if choices else ""
        return _usage(data.get("usage"), Piece(text, bool(choices), error=_error(data)))


class Chat:
    """OpenAI `/v1/chat/completions`. The chunk that only names the role is no token."""

    path = "/v1/chat/completions"

    def body(self, asking: Asking, history: History, turn: Turn) -> dict[str, Any]:
        """The JSON of the request: token ids are sent as words."""
        messages = []
        for said, answer in history:
            messages.append({"role": "user", "content": words(said.prompt)})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": words(turn.prompt)})
        return _common(asking) | {"messages": messages, "max_completion_tokens": turn.n_output}

    def read(self, event: bytes) -> Piece:
        """What one event of the answer says."""
        data = json.loads(event)
        choices = data.get("choices") or []
        if not choices:
            return _usage(data.get("usage"), Piece(error=_error(data)))
        delta = choices[0].get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or ""
        only_role = "role" in delta and not text and choices[0].get("finish_reason") is None
        return _usage(data.get("usage"), Piece(text, not only_role, error=_error(data)))


class SGLang:
    """SGLang's native `/generate`: every event holds the whole text so far."""

    path = "/generate"

    def __init__(self) -> None:
        self.text = ""
        self.n_output = 0

    def body(self, asking: Asking, history: History, turn: Turn) -> dict[str, Any]:
        """The JSON of the request."""
        whole = joined(history, turn)
        sampling: dict[str, Any] = {
            "max_new_tokens": turn.n_output,
            "ignore_eos": asking.ignore_eos,
        }
        if asking.temperature is not None:
            sampling["temperature"] = asking.temperature
        key = "text" if isinstance(whole, str) else "input_ids"
        return {key: whole, "sampling_params": sampling, "stream": True}

    def read(self, event: bytes) -> Piece:
        """What one event adds to those before it."""
        data = json.loads(event)
        text, meta = data.get("text") or "", data.get("meta_info") or {}
        n_output = meta.get("completion_tokens") or 0
        piece = Piece(text[len(self.text) :], n_output > self.n_output, error=_error(data))
        piece.n_prompt, piece.n_output = meta.get("prompt_tokens"), n_output or None
        piece.n_cached = meta.get("cached_tokens")
        self.text, self.n_output = text, n_output
        return piece


BACKENDS: dict[str, type[Completions] | type[Chat] | type[SGLang]] = {
    "openai": Completions,
    "openai-chat": Chat,
    "sglang": SGLang,
}


def find_backend(name: str, known: Sequence[str] = tuple(BACKENDS)) -> None:
    """Raise `ConfigError` for a name that is no backend."""
    if name not in known:
        raise ConfigError(f"unknown backend {name!r}{nearest(name, known)}")
