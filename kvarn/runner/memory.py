"""The memory ledger: where the bytes are, printed at start and in every error about room."""

from dataclasses import dataclass

from kvarn.models.fit import GIB

#: kept free for captured graphs: their shared memory is that of the largest decode step, and each
#: graph's nodes take some megabytes of the driver
GRAPHS_BYTES = 1 << 29


@dataclass(slots=True)
class Ledger:
    """Memory of one device. [bytes]"""

    device: str
    total: int
    weights: int
    kv: int
    workspace: int  #: logits and activations of the largest step
    free: int  #: after everything above

    def rows(self) -> list[dict[str, object]]:
        """For `explain`: what, bytes, and the same in GiB."""
        parts = {
            "weights": self.weights,
            "kv cache": self.kv,
            "workspace": self.workspace,
            "free": self.free,
            "total": self.total,
        }
        return [
            {"what": what, "bytes": count, "gib": round(count / GIB, 3), "device": self.device}
            for what, count in parts.items()
        ]


def workspace_bytes(budget: int, hidden: int, ffn: int, vocab: int, logits: int) -> int:
    """A step's largest tensors: activations of `budget` rows, and `logits` rows of fp32 logits."""
    return budget * (4 * hidden + 3 * ffn) * 4 + logits * vocab * 4 * 2
