"""Layouts of captured steps by compiled code (small_layout.cpp), built at first use.

What `layout.is_split` and `layout.lay_out_small` say, number for number, in microseconds where they
take a tenth of a millisecond. Where there is no compiler, these do it.
"""

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvarn.kernels.attention import Ints, PagedRows
from kvarn.kernels.attention import layout as by
from kvarn.kernels.attention.layout import Heads
from kvarn.kernels.compile import BuildError, shared_library

FLAGS = ("-O3", "-std=c++17", "-fPIC")

_P, _I = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, list[Any]] = {
    "key": [_I, _P, _P, _P, *[_I] * 5, _P],
    "fill": [_I, _P, _P, _P, _P, _P, _I, _P, _P, _P, _P, _P, _P],
}


def available() -> bool:
    """Whether the compiled layout can be had (see `reason`)."""
    return _outcome()[0] is not None


def reason() -> str:
    """Why the compiled layout is, or is not, in force."""
    return _outcome()[1]


def told() -> dict[str, str]:
    """For `explain`: which form is in force, and why."""
    how = "compiled" if available() else "in Python, slower"
    return {"what": "layouts of captured steps", "how": how, "why": reason()}


@functools.cache
def _outcome() -> tuple[dict[str, Any] | None, str]:
    """C functions by name."""
    try:
        built = shared_library("layout", [Path(__file__).with_name("small_layout.cpp")], FLAGS)
        code = ctypes.CDLL(str(built.path))
    except (BuildError, OSError) as error:
        return None, str(error)
    functions = {}
    for name, arguments in SIGNATURES.items():
        functions[name] = function = getattr(code, f"kvarn_layout_{name}")
        function.argtypes, function.restype = arguments, _I
    return functions, f"built with {built.compiler}"


def key(rows: PagedRows, heads: Heads) -> tuple[int, bool]:
    """Rows of the longest span, and whether a span is split where none shares a prefix."""
    functions = _outcome()[0]
    if functions is None:
        return by.longest(rows), by.is_split(rows, heads)
    kept = _kept(rows.indptr, rows.start, rows.base)
    split = ctypes.c_int64()
    most = functions["key"](
        len(rows.start), *(x.ctypes.data for x in kept), rows.page_size, rows.window or 0,
        heads.kv_heads, by.DECODE_WAVES * heads.multiprocessors, by.DECODE_LEAST,
        ctypes.addressof(split),
    )  # fmt: skip
    return most, bool(split.value)


def how(rows: PagedRows, heads: Heads) -> "ctypes.Array[ctypes.c_int64]":
    """What `fill` must know of all steps of one key; `rows` are of one of them."""
    (_, whole), (_, few) = heads.shared(), heads.decode(by.longest(rows))
    return (ctypes.c_int64 * 10)(
        rows.page_size, rows.window or 0, rows.sinks, heads.kv_heads,
        whole.height, whole.programs, whole.least, few.height, few.programs, few.least,
    )  # fmt: skip


def fill(
    rows: PagedRows, said: "ctypes.Array[ctypes.c_int64]", runs: Ints, room: list[int],
    arrays: Mapping[str, NDArray[np.int32]],
) -> list[int]:  # fmt: skip
    """Write shared items, items, merges and entries, as far as there is `room` for each; what they
    take. Nothing is written where that is more. `said` is of `how`; `runs` are those that pay."""
    functions = _outcome()[0]
    assert functions is not None
    kept = _kept(rows.indptr, rows.start, rows.page_indptr, rows.base, runs)
    takes = (ctypes.c_int64 * 4)(*room)
    there = [arrays[name].ctypes.data for name in ("shared", "items", "merges", "entries")]
    functions["fill"](
        len(rows.start), *(x.ctypes.data for x in kept), len(runs), said, takes, *there
    )
    return list(takes)


def _kept(*lists: Ints) -> list[Ints]:
    """Arrays as C reads them; to be kept while it does."""
    return [np.ascontiguousarray(one, np.int64) for one in lists]
