"""From tokens to text, token by token: whole characters, and stop strings wherever they fall."""

from dataclasses import dataclass, field
from typing import Protocol


class TokenStream(Protocol):
    """Incremental detokeniser of one sequence."""

    def step(self, token: int) -> str:
        """New whole characters that `token` completes; "" while one is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end of the sequence."""
        ...


@dataclass(slots=True)
class TextTap:
    """The text of one sequence as it grows; holds back what may turn out to begin a stop string."""

    stream: TokenStream
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    minimum: int = 0  #: no stop string before this many tokens
    taken: int = 0  #: tokens of the last push that were looked at: up to the stop string
    _count: int = 0
    _held: str = ""  #: text not handed out yet
    matched: str | None = None  #: the stop string that was met
    _longest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stops), default=0)

    def push(self, tokens: list[int]) -> str:
        """Text that may be shown after `tokens`; sets `matched` when a stop string is complete."""
        self.taken = len(tokens)
        if not self.stops:
            return "".join([self.stream.step(token) for token in tokens])
        shown = ""
        for i, token in enumerate(tokens):
            if self.matched is not None:
                self.taken = i
                break
            self._count += 1
            self._held += self.stream.step(token)
            shown += self._search()
        return shown

    def finish(self) -> str:
        """The rest of the text, when the sequence ended for another reason."""
        if self.matched is not None:
            return ""
        self._held += self.stream.flush()
        shown = self._search()
        if self.matched is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _search(self) -> str:
        """Look for the earliest stop string in the held text; the text that is safe to show."""
        if self._count >= self.minimum:
            found = [(at, stop) for stop in self.stops if (at := self._held.find(stop)) >= 0]
            if found:
                at, self.matched = min(found)
                end = at + len(self.matched) if self.include_stop else at
                shown, self._held = self._held[:end], ""
                return shown
        keep = self._possible_start()
        shown, self._held = (
            self._held[: len(self._held) - keep],
            self._held[len(self._held) - keep :],
        )
        return shown

    def _possible_start(self) -> int:
        """Length of the longest end of the held text that begins a stop string [characters]."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self.stops):
                return length
        return 0
