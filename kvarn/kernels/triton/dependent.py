"""Programmatic dependent launch: a kernel starts while the one before it on the stream ends.

A kernel launched with `options(x)` calls `follow` before it touches anything that an earlier kernel
may write, or may still read. That the kernel before has ended implies that all before it have, as
long as every kernel so launched waits.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next kernel start, then wait for the end of the one before."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def _can(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def can_follow(x: Tensor) -> bool:
    """Whether kernels on the device of `x` can be launched so: NVIDIA GPUs since Hopper."""
    return x.is_cuda and _can(x.device)


def options(pdl: bool) -> dict[str, bool]:
    """What the launch of a kernel takes; the interpreter knows no such launches."""
    return {"launch_pdl": True} if pdl else {}
