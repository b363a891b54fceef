"""`SessionSteps`: the closed forms of a `SessionModel` as prices of an engine's steps.

So that the engine's own scheduler and prefix cache can be simulated at the very prices at which
the formulas are evaluated.
"""

from kvarn.cost.session import SessionModel
from kvarn.cost.shape import Estimate, StepShape


class SessionSteps:
    """A `CostModel`: prompts bound by arithmetic, single positions by memory; no energy."""

    def __init__(self, model: SessionModel) -> None:
        self.name = "closed forms of sessions"
        self.model = model

    def step(self, shape: StepShape) -> Estimate:
        """`prefill` of a prompt's rows is the difference of the whole prompts at both its ends."""
        model, found = self.model, Estimate()
        for rows, context in shape.chunks:
            found.prefill += model.prefill(context) - model.prefill(context - rows)
        if shape.n_decode:
            read = model.read + model.read_kv * model.kv_per_token * shape.decode_sum
            found.decode = read / model.bandwidth
        return found

    def idle_watts(self) -> float:
        """Power is not modelled."""
        return 0.0
