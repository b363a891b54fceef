"""Shared libraries from C++ sources: built with the machine's own compiler at first use, and kept.

Sources are compiled side by side, one a core, so a library is built in about the time of its
slowest source. No torch here: what is not a kernel may be compiled too.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

BUILD_LIMIT = 300  #: a source that takes longer to compile is given up [s]

log = logging.getLogger("kvarn.compile")


@dataclass(slots=True)
class Built:
    """A shared library on disk."""

    path: Path
    compiler: str
    seconds: float  #: taken by the build; 0 where an earlier one was found


class BuildError(Exception):
    """The library cannot be had; says why."""


def shared_library(
    name: str, sources: Sequence[Path], flags: Sequence[str], headers: Sequence[Path] = ()
) -> Built:
    """The library `name` of these sources. BuildError where there is no compiler, the build fails
    or `KVARN_NATIVE=off` is set.

    It lies in `KVARN_CACHE` (else ~/.cache/kvarn), under a key of all that could change it.
    """
    if os.environ.get("KVARN_NATIVE", "auto") == "off":
        raise BuildError("turned off by KVARN_NATIVE=off")
    compiler = _compiler()
    path = _cache() / f"{name}-{_key([*sources, *headers], flags, compiler)}.so"
    began = time.perf_counter()
    if path.exists():
        return Built(path, compiler, 0.0)
    log.warning("compiling %s (C++, once; kept in %s)", name, path.parent)
    _build(sources, flags, compiler, path)
    return Built(path, compiler, time.perf_counter() - began)


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


def _key(files: Sequence[Path], flags: Sequence[str], compiler: str) -> str:
    """Changes with the sources, the flags, the compiler and the CPU."""
    state = hashlib.sha256()
    for path in sorted(files):
        state.update(path.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    about = (tuple(flags), compiler, version.stdout, platform.machine(), _cpu())
    state.update(repr(about).encode())
    return state.hexdigest()[:16]


def _cpu() -> str:
    """What tells CPUs with other instructions apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _build(sources: Sequence[Path], flags: Sequence[str], compiler: str, path: Path) -> None:
    """Compile beside the target and rename, so that processes building at once do no harm."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        largest_first = sorted(sources, key=lambda source: source.stat().st_size, reverse=True)
        objects = [Path(folder) / f"{source.stem}.o" for source in largest_first]

        def compile_one(source: Path, to: Path) -> None:
            _run([compiler, *flags, "-c", "-o", str(to), str(source)])

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, largest_first, objects))
        _run([compiler, *flags, "-shared", "-o", str(made), *map(str, objects)])
        os.replace(made, path)


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {BUILD_LIMIT} s") from None
    if done.returncode != 0:
        raise BuildError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
