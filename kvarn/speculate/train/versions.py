"""Which weights of a drafter stay: each version is on trial until enough of its drafts are judged.

Acceptance is of judged tokens: those accepted, and the first one refused of each draft. What comes
behind a refused token was never judged.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from kvarn.core.errors import ConfigError

Verdict = Literal["open", "keep", "roll back"]


@dataclass(slots=True)
class Share:
    """Accepted of judged, of the last `window` tokens judged (whole rounds, so a few more)."""

    window: int
    judged: int = 0
    accepted: int = 0
    _rounds: deque[tuple[int, int]] = field(default_factory=deque)

    def saw(self, judged: int, accepted: int) -> None:
        """One more round; the oldest go while the window is full without them."""
        self._rounds.append((judged, accepted))
        self.judged += judged
        self.accepted += accepted
        while self.judged - self._rounds[0][0] >= self.window:
            oldest = self._rounds.popleft()
            self.judged -= oldest[0]
            self.accepted -= oldest[1]

    @property
    def full(self) -> bool:
        """Whether it speaks for `window` tokens."""
        return self.judged >= self.window

    @property
    def rate(self) -> float:
        """Share accepted; 0 while nothing is known."""
        return self.accepted / self.judged if self.judged else 0.0


@dataclass(slots=True)
class Versions:
    """The version in force, on trial against the one before it.

    A version goes back when its acceptance over `window` judged tokens is below that of the version
    before it, over the last `window` tokens that this one drafted, by more than `margin` of that.
    Texts differ, and tokens of one text are alike: with less than half as a limit, weights that are
    merely unlucky go back all the time, and nothing is learnt.
    """

    window: int = 256  #: tokens judged
    margin: float = 0.5  #: share of the acceptance before
    version: int = 0  #: counts publications; 0: what the engine began with
    previous: int = 0  #: the version to go back to
    published: int = 0
    rolled_back: int = 0
    before: float = 0.0  #: acceptance of the version before, when this one came
    now: Share = field(init=False)
    on_trial: bool = False

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 < self.margin < 1:
            raise ConfigError(
                f"versions need a window of at least 1 token and a margin in (0, 1), not "
                f"{self.window} and {self.margin}"
            )
        self.now = Share(self.window)

    def saw(self, judged: int, accepted: int) -> None:
        """Drafts of the version in force were judged at so many places, and stood at some."""
        self.now.saw(judged, accepted)

    @property
    def ready(self) -> bool:
        """Whether the next version may come: this one is known well enough to compare with."""
        return not self.on_trial and self.now.full

    def publish(self) -> int:
        """The next version is in force from now on; its number."""
        self.before, self.now = self.now.rate, Share(self.window)
        self.published += 1
        self.previous, self.version = self.version, self.published
        self.on_trial = True
        return self.version

    def verdict(self) -> Verdict:
        """What to do with the version in force; "keep" is said once."""
        if not self.on_trial or not self.now.full:
            return "open"
        self.on_trial = False
        return "roll back" if self.now.rate < self.before * (1.0 - self.margin) else "keep"

    def roll_back(self) -> int:
        """The version before is in force again, and is judged anew: traffic may have changed."""
        self.version, self.now = self.previous, Share(self.window)
        self.rolled_back += 1
        return self.version
