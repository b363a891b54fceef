"""Mixture of experts: its shape, and how many experts a batch wakes."""

from dataclasses import dataclass

from kvarn.core.errors import ConfigError


@dataclass(slots=True, frozen=True)
class MoEShape:
    """Experts that stand in for the MLP of some layers."""

    n_experts: int  #: routed ones, a layer
    topk: int  #: of them, that a token goes to
    inter: int  #: width of an expert's gated MLP
    layers: int  #: that have experts; the others keep the model's own MLP
    shared: int = 0  #: experts that every token goes to, of the same width

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= self.n_experts:
            raise ConfigError(f"topk={self.topk} must lie between 1 and n_experts={self.n_experts}")

    def params(self, hidden: int) -> int:
        """Weights of all experts of all layers, the router's included."""
        one = 3 * hidden * self.inter
        return self.layers * ((self.n_experts + self.shared) * one + hidden * self.n_experts)


def active_experts(n_experts: int, topk: int, n_tokens: float) -> float:
    """Expected experts that at least one of `n_tokens` goes to, if routing is even and free.

    E (1 - (1 - k/E)^n). Real routers favour some experts, so they wake fewer.
    """
    missed: float = (1.0 - topk / n_experts) ** n_tokens
    return n_experts * (1.0 - missed)
