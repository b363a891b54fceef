"""Time of a search among vectors with an inverted file of product-quantised codes (IVF-PQ)."""

from dataclasses import dataclass

from kvarn.core.errors import ConfigError
from kvarn.cost.devices import Device


@dataclass(slots=True, frozen=True)
class VectorIndex:
    """What is searched; defaults are our choice. `lists` = 1 is a scan of everything."""

    vectors: int = 100_000_000
    dim: int = 768
    lists: int = 16_384
    probes: int = 64  #: lists that a query looks into
    code: float = 64  #: of a vector in the lists [bytes]

    def __post_init__(self) -> None:
        if min(self.vectors, self.dim, self.lists, self.probes) < 1 or self.code <= 0:
            raise ConfigError(f"an index needs vectors, lists and probes of at least 1, got {self}")
        if self.probes > self.lists:
            raise ConfigError(f"{self.probes} lists of {self.lists} cannot be probed")

    def seconds(self, device: Device, queries: int) -> float:
        """Search of a batch: centroids once for all, the probed lists for each query [s].

        The centroids' distances are a product; the codes are read at the memory's speed.
        """
        flops = 2.0 * queries * self.lists * self.dim
        coarse = max(
            flops / (device.flops["fp32"] * device.mfu),
            4.0 * self.lists * self.dim / (device.bandwidth * device.mbu),
        )
        scanned = queries * self.probes * self.vectors / self.lists * self.code
        return coarse + scanned / (device.bandwidth * device.mbu) + 2 * device.launch
