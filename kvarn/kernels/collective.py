"""The two collectives of tensor parallelism, and the linear layers that end in one.

Ranks on GPUs speak NCCL on the current stream, without waiting on the host, so that a forward pass
can be captured in a CUDA graph. Ranks on CPUs speak gloo over the loopback interface; there the sum
is a gather and an addition in the order of the ranks: one round of messages instead of two, and a
result that does not depend on what else is in the batch. No group is global: one process may have
several.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    ProcessGroupGloo,
    Store,
    TCPStore,
)
from torch.nn.functional import pad

from kvarn.kernels.linear.base import Linear

LOOPBACK = "127.0.0.1"


class Collective:
    """Ranks that compute one model together; this is the only one, and everything a no-op."""

    rank, ranks = 0, 1
    calls = 0  #: collectives begun so far: ranks that are in step have the same number

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, the same bits on every rank; x may be overwritten."""
        return x

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """Every rank's columns side by side: x [T, widths[rank]] -> [T, sum(widths)]."""
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers; the host waits for it."""
        return number

    def close(self) -> None:
        """Let go of the connections."""


ALONE = Collective()


class Group(Collective):
    """Several ranks, by torch.distributed."""

    def __init__(self, backend: Any, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self.rank, self.ranks = backend.rank(), backend.size()
        self.on_gpu = device.type == "cuda"
        self.calls = 0

    def sum(self, x: Tensor) -> Tensor:
        """See `Collective.sum`."""
        if not self.on_gpu:
            parts = self._gather(x).view(self.ranks, *x.shape)
            total = parts[0]
            for part in parts[1:]:
                total += part
            return total
        self.calls += 1
        options = AllreduceOptions()
        options.asyncOp = False
        x = x.contiguous()
        _wait(self.backend.allreduce([x], options))
        return x

    def join(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """See `Collective.join`; narrower shares are padded on the way."""
        widest = max(widths)
        if x.shape[1] < widest:
            x = pad(x, (0, widest - x.shape[1]))
        parts = self._gather(x).view(self.ranks, -1, widest)
        return torch.cat([part[:, :width] for part, width in zip(parts, widths)], dim=1)

    def least(self, number: int) -> int:
        """See `Collective.least`."""
        mine = torch.tensor([number], dtype=torch.int64, device=self.device)
        return int(self._gather(mine).min())

    def _gather(self, x: Tensor) -> Tensor:
        """Every rank's x, one after the other along the first dimension."""
        self.calls += 1
        out = x.new_empty(self.ranks * x.shape[0], *x.shape[1:])
        options = AllgatherOptions()
        options.asyncOp = False
        _wait(self.backend._allgather_base(out, x.contiguous(), options))
        return out

    def limit(self, seconds: float) -> None:
        """From now on, whoever keeps the others waiting for longer is lost."""
        self.backend._set_default_timeout(timedelta(seconds=seconds))

    def close(self) -> None:
        """Close every connection; whoever still waits for this rank fails at once."""
        self.backend.abort()


def _wait(work: Any) -> None:
    """On a GPU the stream waits, not the host; there may be nothing to wait for."""
    if work is not None:
        work.wait()


def open_store(ranks: int, port: int = 0) -> TCPStore:
    """Where ranks meet; port 0: be the host, on a free port (`store.port`)."""
    return TCPStore(LOOPBACK, port, ranks, is_master=port == 0, wait_for_workers=False)


def make_group(store: Store, rank: int, ranks: int, device: torch.device, limit: float) -> Group:
    """Join the others; `limit` [s] holds for this and for every wait, until `Group.limit`."""
    patience = timedelta(seconds=limit)
    if device.type == "cuda":
        from torch._C._distributed_c10d import ProcessGroupNCCL  # builds for GPUs alone have it

        torch.cuda.set_device(device)
        nccl: Any = ProcessGroupNCCL.Options()
        nccl._timeout = patience
        return Group(ProcessGroupNCCL(store, rank, ranks, nccl), device)
    options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
    options._timeout = patience
    return Group(ProcessGroupGloo(store, rank, ranks, options), device)


class Summed(Linear):
    """A matrix cut by its inputs: the product is summed over the ranks."""

    mode = "summed"

    def __init__(self, inner: Linear, group: Collective) -> None:
        self.inner, self.group = inner, group
        self.n_out, self.n_in, self.weight_bytes = inner.n_out, inner.n_in, inner.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.sum(self.inner(x))


class Joined(Linear):
    """The output matrix, cut by vocabulary: every rank's logits come together."""

    mode = "joined"

    def __init__(self, inner: Linear, group: Collective, widths: Sequence[int]) -> None:
        self.inner, self.group, self.widths = inner, group, list(widths)
        self.n_out, self.n_in, self.weight_bytes = sum(widths), inner.n_in, inner.weight_bytes

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.join(self.inner(x), self.widths)

    def wide(self, x: Tensor) -> Tensor:
        """See `Linear.wide`."""
        return self.group.join(self.inner.wide(x), self.widths)
