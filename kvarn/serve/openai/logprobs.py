"""Logprobs in the three shapes that clients know: completions, chat, and prompt logprobs."""

from typing import Any

from kvarn.core.plan import TokenLogprobs
from kvarn.serve.service import Tokenizer
from kvarn.serve.text import token_text

#: what JSON can carry in place of minus infinity
LOWEST = -9999.0


class CompletionLogprobs:
    """OpenAI's completions form; keeps the running text offset of one choice."""

    def __init__(self, tokenizer: Tokenizer | None, by_id: bool) -> None:
        self._tokenizer = tokenizer
        self._by_id = by_id
        self._offset = 0

    def of(self, items: list[TokenLogprobs | None], tokens: list[int]) -> dict[str, Any]:
        """The four parallel lists for some tokens (an item is None for the first of a prompt)."""
        texts = [self._text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [None if i is None else _finite(i.logprob) for i in items],
            "top_logprobs": [
                None if i is None else {self._text(t): _finite(p) for t, p in i.top} for i in items
            ],
            "text_offset": offsets,
        }

    def _text(self, token: int) -> str:
        return token_text(self._tokenizer, token, self._by_id)


def join(pieces: list[dict[str, Any]]) -> dict[str, Any]:
    """Several pieces of completion logprobs as one."""
    return {
        key: [value for piece in pieces for value in piece[key]]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    }


def chat_logprobs(
    items: list[TokenLogprobs], tokenizer: Tokenizer | None, top: int, by_id: bool
) -> list[dict[str, Any]]:
    """The `content` list of OpenAI's chat form."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token, by_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}

    return [
        {**entry(i.token, i.logprob), "top_logprobs": [entry(t, p) for t, p in i.top[:top]]}
        for i in items
    ]


def prompt_logprobs(
    items: list[TokenLogprobs | None], tokenizer: Tokenizer | None
) -> list[dict[str, Any] | None]:
    """vLLM's form: for each position a map from token id to logprob, rank and text."""
    return [None if i is None else _position(i, tokenizer) for i in items]


def _position(item: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[str, Any]:
    ranked = {token: (p, rank) for rank, (token, p) in enumerate(item.top, 1)}
    ranked[item.token] = (item.logprob, item.rank)
    return {
        str(token): {
            "logprob": _finite(p),
            "rank": rank,
            "decoded_token": token_text(tokenizer, token),
        }
        for token, (p, rank) in ranked.items()
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST)
