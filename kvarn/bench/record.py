"""The header of every result: when, where and with what it was measured; and how it is written."""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError

#: packages whose version may change a number
PACKAGES = ("kvarn", "torch", "numpy", "tokenizers", "fastapi", "uvicorn")


def header(bench: str, workload: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The fields that every result begins with. `workload` is what must agree to compare two."""
    return {
        "bench": bench,
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "device": device(),
        "versions": versions(),
        "git_commit": commit(),
        "workload": workload,
        "config": config,
    }


def device() -> dict[str, Any]:
    """The machine: processor, cores that this process may use, memory, GPUs if torch sees any."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_gib": _memory_gib(),
        "platform": platform.platform(),
        "gpus": [],
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found["vectors"] = torch.backends.cpu.get_cpu_capability()  # names hide it: AVX2, AVX512
    if torch is not None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(count)]
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Commit of the source tree that runs ('+' when it has local changes).

    In a copy of the tree on another machine it is what `KVARN_COMMIT` says; None: nobody knows.
    """
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *words], cwd=folder, capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    said = os.environ.get("KVARN_COMMIT")
    head = None if said else git("rev-parse", "HEAD")
    if head is None:
        return said
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def write(result: dict[str, Any], path: str | None) -> None:
    """Write `result` as JSON to `path`; None: nowhere."""
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def read(path: str) -> dict[str, Any]:
    """Read a result; what is no JSON object is an error that names the file."""
    try:
        result = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict):
        raise ConfigError(f"{path} holds no benchmark result (a JSON object)")
    return result


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    return round(pages * size / 2**30, 1)
