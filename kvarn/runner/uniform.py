"""The random numbers of sampling: one uniform per position, from a counter-based hash.

The number depends on the sequence's key and on the position alone: not on the batch, the row, the
step, or how many numbers were drawn before. A request with a seed therefore gives the same tokens
alone, in any batch, after preemption, and when several positions are sampled in one step.

The hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): position p of key k is output p of the
generator whose initial state is a hash of k.
"""

import numpy as np
from numpy.typing import NDArray

UInts = NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MASK = 0xFFFF_FFFF_FFFF_FFFF


def _mix(x: UInts) -> UInts:
    """SplitMix64's finaliser: a bijection of 64-bit words. Arithmetic is modulo 2**64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def sequence_key(*parts: int) -> int:
    """A 64-bit key from integers of any size and sign: (seed, index), say. Order matters."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = _mix((key ^ np.array([part & _MASK], np.uint64)) + _GAMMA)
    return int(key[0])


def stream(keys: UInts, number: int) -> UInts:
    """Keys [R] of other numbers for the same sequences; `number` 1 or more says which others."""
    return _mix((keys ^ np.uint64(number)) + _GAMMA)


def uniform(keys: UInts, positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (key, position); 53 random bits. Both arrays are [R]."""
    state = _mix(keys + _GAMMA)
    bits = _mix(state + _GAMMA * (positions.astype(np.uint64) + np.uint64(1)))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
