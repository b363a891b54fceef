"""`Rounded`: decode steps priced at rounded contexts, each once. For simulations of whole fleets.

A decode step differs from the one before it by one position a sequence, so most of its price is
known already. Contexts are rounded to the middle of an interval of `grain` positions, the mean and
the longest each; what that costs is at most the KV of half a grain a sequence (0.1 % of a step of
an 8B model at a grain of 32). Steps with prompts are priced exactly.
"""

from kvarn.cost.shape import CostModel, Estimate, StepShape

MOST = 1 << 18  #: prices kept


class Rounded:
    """A `CostModel` that asks another one, and remembers."""

    def __init__(self, model: CostModel, grain: int) -> None:
        """`grain`: positions that count as the same context [tokens]."""
        self.name = f"{model.name}, contexts rounded to {grain}"
        self._model = model
        self._grain = grain
        self._known: dict[tuple[int, int, int, int], Estimate] = {}

    def idle_watts(self) -> float:
        """Power of the instance while it waits [W]."""
        return self._model.idle_watts()

    def decodes(self, n: int, total: int, longest: int) -> tuple[Estimate, int]:
        """The price of `n` decodes that attend to `total`, and how many such steps have it.

        Every step adds a position to each sequence; `longest` is the longest context [tokens].
        """
        grain = self._grain
        mean, inside = divmod(total // n, grain)
        most, beyond = divmod(longest, grain)
        steps = grain - (inside if inside > beyond else beyond)
        return self._known.get((n, mean, most, n)) or self._price(n, mean, most, n), steps

    def step(self, shape: StepShape) -> Estimate:
        """The price of `shape`, or of the decodes that count as the same."""
        n = shape.n_decode
        if shape.chunks or n == 0:
            return self._model.step(shape)
        grain = self._grain
        mean, longest = shape.decode_sum // (n * grain), shape.decode_max // grain
        key = (n, mean, longest, shape.n_logits)
        return self._known.get(key) or self._price(*key)

    def _price(self, n: int, mean: int, longest: int, n_logits: int) -> Estimate:
        """Ask for `n` decodes of these contexts [grains], and remember."""
        grain = self._grain
        if len(self._known) >= MOST:
            self._known.clear()
        middle = mean * grain + grain // 2
        most = max(longest * grain + grain // 2, middle)
        found = self._model.step(StepShape((), n, n * middle, most, n_logits))
        self._known[n, mean, longest, n_logits] = found
        return found
