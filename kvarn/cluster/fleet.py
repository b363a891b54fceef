"""`Fleet`: what a router knows of each instance, from what it sent there and what came back."""

from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush


@dataclass(slots=True)
class Open:
    """A request under way."""

    instance: int
    prompt: int  #: tokens still counted as to be computed; 0 once the first token is there


@dataclass(slots=True)
class Fleet:
    """Open requests and uncomputed prompt tokens by instance, and who has the least of both.

    Loads change through the methods below only: they keep a heap of (requests, tokens, instance),
    in which a load stays until it comes up and is found to be out of date.
    """

    size: int
    requests: list[int] = field(default_factory=list)  #: open requests
    tokens: list[int] = field(default_factory=list)  #: prompt tokens sent and not yet computed
    open: dict[str, Open] = field(default_factory=dict)
    _loads: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.requests = [0] * self.size
        self.tokens = [0] * self.size
        self._loads = [(0, 0, i) for i in range(self.size)]

    def least(self) -> int:
        """The instance with the fewest open requests; of equals, the fewest tokens, the first."""
        loads, requests, tokens = self._loads, self.requests, self.tokens
        while True:
            open_, prompt, instance = loads[0]
            if open_ == requests[instance] and prompt == tokens[instance]:
                return instance
            heappop(loads)

    def sent(self, request: str, instance: int, prompt: int) -> None:
        """`request` is on its way, with `prompt` tokens to compute."""
        self.open[request] = Open(instance, prompt)
        self.requests[instance] += 1
        self.tokens[instance] += prompt
        self._changed(instance)

    def started(self, request: str) -> None:
        """Its prompt is computed."""
        known = self.open.get(request)
        if known is not None and known.prompt:
            self.tokens[known.instance] -= known.prompt
            known.prompt = 0
            self._changed(known.instance)

    def finished(self, request: str) -> None:
        """It is gone."""
        self.started(request)
        known = self.open.pop(request, None)
        if known is not None:
            self.requests[known.instance] -= 1
            self._changed(known.instance)

    def _changed(self, instance: int) -> None:
        loads = self._loads
        if len(loads) < _OUTDATED * self.size:
            heappush(loads, (self.requests[instance], self.tokens[instance], instance))
        else:
            loads[:] = zip(self.requests, self.tokens, range(self.size))
            heapify(loads)


#: entries of the heap for each instance before it is made anew
_OUTDATED = 8
