"""Compiled kernels for the CPU: built with the machine's own C++ compiler at first use, and kept.

`library()` is the loaded library, or None where there is no compiler, the build fails or
`KVARN_NATIVE=off` is set; `reason()` says which and `status()` what is in force. Every caller has a
form in plain torch for that case. The sources next to this file use the compiler's vector types, as
wide as a register, so that they run on any CPU; instructions of AVX-512 for products of bf16 and of
bytes, or of AVX2, are used where the machine has them.

The library is called through its C interface with addresses and sizes. It shares torch's OpenMP
runtime, and so `torch.set_num_threads` holds for it too.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvarn.kernels.compile import BuildError, Built, shared_library

FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-w",
    "-Wno-psabi",
)  # fmt: skip
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
#: C functions, each in a form for every dtype of `SUFFIXES`
SIGNATURES: dict[str, list[Any]] = {
    "pack": [_P, _I, _I, _P],
    "linear": [_P, _I, _I, _I, _P, _P, _I, _P],
    "linear_wide": [_P, _I, _I, _I, _P, _P, _I, _P],
    "rms_norm": [_P, _I, _I, _I, _I, _I, _P, _P, _I, _F, _P, _P],
    "rope": [_P, _I, _I, _I, _I, _P, _P, _P],
    "gated": [_P, _I, _I, _I, _I, _P],
    "argmax": [_P, _I, _I, _P, _P],
    "attention": [_P, _P, _P, _P, _P, _I, _I, _I, _P, _P],
    "forward": [_P, _P],
    "space": [_P, _I],
    "quantised": [_P, _P, _I, _I, _P, _P, _P],
    "quantised_wide": [_P, _P, _I, _I, _P, _P, _P],
}
RESULTS: dict[str, Any] = {"space": _I}  #: of those that return something


@dataclass(slots=True)
class Library:
    """The loaded kernels."""

    built: Built
    functions: dict[str, dict[torch.dtype, Any]]  #: C functions by name and dtype
    pack_codes: Any  #: lays out a quantised matrix


def library() -> Library | None:
    """The kernels, built if need be; None where they cannot be had (see `reason`)."""
    return _outcome()[0]


def available() -> bool:
    """Whether the compiled kernels are in force."""
    return library() is not None


def reason() -> str:
    """Why the compiled kernels are, or are not, in force."""
    return _outcome()[1]


def kernel(name: str, x: Tensor) -> Any:
    """The C function `name` for x; None where it is not in force or cannot take x.

    It takes tensors on the CPU, of a dtype it knows, that want no gradient.
    """
    found = _outcome()[0]
    if found is None or not x.is_cpu or x.requires_grad:
        return None
    return found.functions[name].get(x.dtype)


@functools.cache
def _outcome() -> tuple[Library | None, str]:
    try:
        found = _load()
    except (BuildError, OSError) as error:
        return None, str(error)
    return found, f"built with {found.built.compiler}"


def _load() -> Library:
    folder = Path(__file__).parent
    built = shared_library(
        "kernels", sorted(folder.glob("*.cpp")), FLAGS, sorted(folder.glob("*.h"))
    )
    code = ctypes.CDLL(str(built.path))
    functions: dict[str, dict[torch.dtype, Any]] = {}
    for name, arguments in SIGNATURES.items():
        functions[name] = {}
        for dtype, suffix in SUFFIXES.items():
            function = getattr(code, f"kvarn_{name}_{suffix}")
            function.argtypes, function.restype = arguments, RESULTS.get(name)
            functions[name][dtype] = function
    pack_codes = code.kvarn_pack_codes
    pack_codes.argtypes, pack_codes.restype = [_P] * 5, None
    return Library(built, functions, pack_codes)
