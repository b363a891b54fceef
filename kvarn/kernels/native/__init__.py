"""Compiled kernels for the CPU: built with the machine's own C++ compiler at first use, and kept.

`library()` is the loaded library, or None where there is no compiler, the build fails or
`KVARN_NATIVE=off` is set; `reason()` says which and `status()` what is in force. Every caller has a
form in plain torch for that case. The sources next to this file use the compiler's vector types, so
that they run on any CPU; AVX-512 and its bf16 products are used where the machine has them.

The library is called through its C interface with addresses and sizes. It shares torch's OpenMP
runtime, and so `torch.set_num_threads` holds for it too.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = (
    "-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-w",
)  # fmt: skip
SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
BUILD_LIMIT = 300  #: a build that takes longer is given up [s]

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

    path: Path
    compiler: str
    seconds: float  #: taken by the build; 0 where an earlier one was found
    functions: dict[str, dict[torch.dtype, Any]]  #: C functions by name and dtype
    pack_codes: Any  #: lays out a quantised matrix


class BuildError(Exception):
    """The library cannot be had; says why."""


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
    choice = os.environ.get("KVARN_NATIVE", "auto")
    if choice == "off":
        return None, "turned off by KVARN_NATIVE=off"
    try:
        found = _load()
    except (BuildError, OSError) as error:
        return None, str(error)
    return found, f"built with {found.compiler}"


def _load() -> Library:
    compiler = _compiler()
    sources = Path(__file__).parent
    path = _cache() / f"kernels-{_key(sources, compiler)}.so"
    began = time.perf_counter()
    built = not path.exists()
    if built:
        _build(sources, compiler, path)
    code = ctypes.CDLL(str(path))
    functions: dict[str, dict[torch.dtype, Any]] = {}
    for name, arguments in SIGNATURES.items():
        functions[name] = {}
        for dtype, suffix in SUFFIXES.items():
            function = getattr(code, f"kvarn_{name}_{suffix}")
            function.argtypes, function.restype = arguments, RESULTS.get(name)
            functions[name][dtype] = function
    seconds = time.perf_counter() - began if built else 0.0
    pack_codes = code.kvarn_pack_codes
    pack_codes.argtypes, pack_codes.restype = [_P] * 5, None
    return Library(path, compiler, seconds, functions, pack_codes)


def _compiler() -> str:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in wanted:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(f"no C++ compiler ({', '.join(wanted)}); install one or set CXX")


def _cache() -> Path:
    root = os.environ.get("KVARN_CACHE") or Path.home() / ".cache" / "kvarn"
    folder = Path(root) / "native"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(sources: Path, compiler: str) -> str:
    """Changes with the sources, the flags, the compiler and the CPU."""
    state = hashlib.sha256()
    for path in sorted([*sources.glob("*.cpp"), *sources.glob("*.h")]):
        state.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    state.update(repr((FLAGS, compiler, version.stdout, platform.machine(), _cpu())).encode())
    return state.hexdigest()[:16]


def _cpu() -> str:
    """What tells CPUs with other instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(sources: Path, compiler: str, path: Path) -> None:
    """Compile beside the target and rename, so that processes building at once do no harm."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *FLAGS, "-o", str(made), *map(str, sorted(sources.glob("*.cpp")))]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT)
        except subprocess.TimeoutExpired:
            raise BuildError(f"{compiler} took more than {BUILD_LIMIT} s") from None
        if done.returncode != 0:
            raise BuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        os.replace(made, path)
