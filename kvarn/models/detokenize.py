"""Text from tokens as they come, in whole characters only.

The pieces, `flush` included, add up to the decoding of all tokens; bytes that never become a
character show as U+FFFD there too.
"""

import codecs
from collections.abc import Callable
from typing import Protocol

BROKEN = "\ufffd"
LONGEST = 4  #: bytes of a UTF-8 character, so also the most byte tokens that it takes


class Stream(Protocol):
    """Incremental detokeniser of one sequence."""

    def step(self, token: int) -> str:
        """New whole characters that `token` completes; "" while one is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end of the sequence."""
        ...


class ByteStream:
    """For byte-level vocabularies, whose tokens are plain strings of bytes."""

    def __init__(self, token_bytes: Callable[[int], bytes], skipped: frozenset[int]) -> None:
        self.token_bytes, self.skipped = token_bytes, skipped
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, token: int) -> str:
        """See `Stream.step`."""
        return "" if token in self.skipped else self.decoder.decode(self.token_bytes(token))

    def flush(self) -> str:
        """See `Stream.flush`."""
        return self.decoder.decode(b"", final=True)


class WindowStream:
    """For every other vocabulary: decode a few tokens with and without the new one.

    The tokens before give the context that decides about leading spaces.
    """

    def __init__(self, decode: Callable[[list[int]], str], skipped: frozenset[int]) -> None:
        self.decode, self.skipped = decode, skipped
        self.window: list[int] = []
        self.shown = 0  #: tokens at the front of the window whose text is out
        self.text = ""  #: their decoding
        self.held = 0  #: tokens at the end that may be the first bytes of a character

    def step(self, token: int) -> str:
        """See `Stream.step`."""
        if token in self.skipped:
            return ""
        self.window.append(token)
        text = self.decode(self.window)
        if text.endswith(BROKEN) and self.held < LONGEST - 1:
            self.held += 1
            return ""
        self.held = 0
        return self._show(text)

    def flush(self) -> str:
        """See `Stream.flush`."""
        return self._show(self.decode(self.window))

    def _show(self, text: str) -> str:
        new = text[len(self.text) :]
        if new:
            self.window = self.window[self.shown :]
            self.shown, self.text = len(self.window), self.decode(self.window)
        return new
