"""Copies between host and device that nobody waits for."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGN = 16  #: bytes: every array starts at a multiple, as compiled kernels like it


def upload(arrays: Sequence[NDArray[Any]], kind: torch.dtype, device: torch.device) -> list[Tensor]:
    """The arrays as tensors of dtype `kind` on `device`, packed into one transfer.

    To a GPU the copy goes from pinned memory, ordered on the current stream; the host goes on at
    once. On the CPU the tensors share one fresh buffer.
    """
    step = ALIGN // kind.itemsize
    sizes = [array.size for array in arrays]
    starts = np.cumsum([0, *(-(-size // step) * step for size in sizes)]).tolist()
    on_gpu = device.type == "cuda"
    buffer = torch.empty(starts[-1], dtype=kind, pin_memory=on_gpu)
    host = buffer.numpy()
    for array, start, size in zip(arrays, starts, sizes):
        host[start : start + size] = array.reshape(-1)
    there = buffer.to(device, non_blocking=True) if on_gpu else buffer
    return [
        there[start : start + array.size].view(array.shape) for array, start in zip(arrays, starts)
    ]


def download(x: Tensor) -> tuple[Tensor, Any]:
    """A copy of `x` on the host, which is there once the event has happened; None: it is there."""
    if not x.is_cuda:
        return x, None
    there = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    there.copy_(x, non_blocking=True)
    done: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    done.record()
    return there, done
