"""`Link`: what it takes to move bytes between two memories, alone on the link."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvarn.core.errors import ConfigError, nearest


@dataclass(slots=True, frozen=True)
class Link:
    """A path between two memories; shared use is `kvarn.sim.links.SharedLink`."""

    name: str
    latency: float  #: from the last byte sent to its arrival, set-up included [s]
    bandwidth: float  #: one direction, as reached by long transfers [bytes/s]
    per_call: float  #: that every piece costs on its own; pieces follow each other [s]
    source: str = ""  #: where the figures come from

    def __post_init__(self) -> None:
        if self.bandwidth <= 0 or self.latency < 0 or self.per_call < 0:
            raise ConfigError(
                f"link {self.name!r} needs a positive bandwidth, and latency and per_call that "
                f"are not negative; got {self.bandwidth}, {self.latency}, {self.per_call}"
            )

    def occupied(self, n_bytes: float, calls: int = 1) -> float:
        """Time that a transfer of `calls` pieces keeps the link from others [s]."""
        return calls * self.per_call + n_bytes / self.bandwidth

    def seconds(self, n_bytes: float, calls: int = 1) -> float:
        """Time from the start of a transfer to its arrival, alone on the link [s]."""
        return self.latency + self.occupied(n_bytes, calls)


_REACHED = "90 % reached (our choice)"
_SHARED = "75 % reached, in collectives too (our choice)"

#: presets by name. Bandwidths are of one direction; latencies and costs a piece are our choice
#: where the source names none.
LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link("nvlink3", 5e-6, 0.75 * 300e9, 2e-6, f"A100: NVLink 600 GB/s both ways; {_SHARED}"),
        Link("nvlink4", 5e-6, 0.75 * 450e9, 2e-6, f"H100: NVLink 900 GB/s both ways; {_SHARED}"),
        Link("nvlink5", 5e-6, 0.75 * 900e9, 2e-6, f"B200: NVLink 1.8 TB/s both ways; {_SHARED}"),
        Link("pcie3", 10e-6, 0.8 * 15.75e9, 5e-6, "PCI-SIG: 16 lanes of 8 GT/s; 80 % reached"),
        Link("pcie4", 10e-6, 0.8 * 31.5e9, 5e-6, "PCI-SIG: 16 lanes of 16 GT/s; 80 % reached"),
        Link("pcie5", 10e-6, 0.875 * 63e9, 5e-6, "PCI-SIG: 16 lanes of 32 GT/s; 87.5 % reached"),
        Link("rdma100", 5e-6, 0.9 * 12.5e9, 2e-6, f"100 Gb/s NIC line rate; {_REACHED}"),
        Link("rdma200", 5e-6, 0.9 * 25e9, 2e-6, f"200 Gb/s NIC line rate; {_REACHED}"),
        Link("rdma400", 5e-6, 0.9 * 50e9, 2e-6, f"400 Gb/s NIC line rate; {_REACHED}"),
        Link("ethernet25", 30e-6, 0.8 * 3.125e9, 20e-6, "25 Gb/s line rate over TCP; 80 % reached"),
        Link("shm", 2e-6, 5e9, 1e-6, "copy through shared memory by one core; our choice"),
    )
}


def find_link(name: str) -> Link:
    """The preset of that name; an unknown name is an error that names the nearest."""
    if name not in LINKS:
        raise ConfigError(f"unknown link {name!r}{nearest(name, LINKS)}")
    return LINKS[name]
