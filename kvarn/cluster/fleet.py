"""`Fleet`: what a router knows of each instance, from what it sent there and what came back."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Open:
    """A request under way."""

    instance: int
    prompt: int  #: tokens still counted as to be computed; 0 once the first token is there


@dataclass(slots=True)
class Fleet:
    """Open requests and uncomputed prompt tokens by instance: numbers in lists, cheap to scan."""

    size: int
    requests: list[int] = field(default_factory=list)  #: open requests
    tokens: list[int] = field(default_factory=list)  #: prompt tokens sent and not yet computed
    open: dict[str, Open] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.requests = [0] * self.size
        self.tokens = [0] * self.size

    def sent(self, request: str, instance: int, prompt: int) -> None:
        """`request` is on its way, with `prompt` tokens to compute."""
        self.open[request] = Open(instance, prompt)
        self.requests[instance] += 1
        self.tokens[instance] += prompt

    def started(self, request: str) -> None:
        """Its prompt is computed."""
        known = self.open.get(request)
        if known is not None:
            self.tokens[known.instance] -= known.prompt
            known.prompt = 0

    def finished(self, request: str) -> None:
        """It is gone."""
        self.started(request)
        known = self.open.pop(request, None)
        if known is not None:
            self.requests[known.instance] -= 1
