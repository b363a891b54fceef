"""A folder of safetensors files, memory-mapped, with errors that name the file and the tensor."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvarn.core.errors import ModelError
from kvarn.kernels.linear.stored import Stored
from kvarn.models.weights import Part

INDEX = "model.safetensors.index.json"
#: what checkpoints put before the names of `Weights`; the longest match counts
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsWeights:
    """`Weights` of a checkpoint in one file or in shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {path: _open(path) for path in _shards(folder)}
        self.places: dict[str, tuple[Path, str]] = {}
        for path, file in self.files.items():
            for stored in file.keys():  # noqa: SIM118 (not a dict)
                self.places[_canonical(stored)] = (path, stored)

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`; `part` alone is read where it is given."""
        return self.tensor(name, shape, FLOATS, part)

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`: dense."""
        return self.read(name, shape)

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...] | None,
        kinds: tuple[str, ...],
        part: Part | None = None,
    ) -> Tensor:
        """A tensor of one of the safetensors types `kinds`; of any shape where that is None."""
        if name not in self.places:
            raise ModelError(f"{self.folder}: no safetensors file here holds tensor {name!r}")
        path, stored = self.places[name]
        about = self.files[path].get_slice(stored)
        found, kind = tuple(about.get_shape()), about.get_dtype()
        if shape is not None and found != shape:
            raise _broken(path, stored, f"has shape {list(found)}, expected {list(shape)}")
        if kind not in kinds:
            raise _broken(path, stored, f"is of type {kind}; supported: {', '.join(kinds)}")
        try:
            whole = part is None
            tensor: Tensor = self.files[path].get_tensor(stored) if whole else about[part]
        except (SafetensorError, RuntimeError) as error:
            raise _broken(path, stored, f"cannot be read: {error}") from None
        return tensor

    def kind(self, name: str) -> str:
        """The safetensors type of a tensor that is there."""
        path, stored = self.places[name]
        kind: str = self.files[path].get_slice(stored).get_dtype()
        return kind

    def broken(self, name: str, why: str) -> ModelError:
        """The error for a tensor that is there and cannot be used."""
        return _broken(*self.places[name], why)


def _shards(folder: Path) -> list[Path]:
    """The files of the checkpoint: one, those of the index, or every one in the folder."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is corrupt: {error!r}") from None
        paths = [folder / name for name in sorted(names)]
        for path in paths:
            if not path.is_file():
                raise ModelError(f"{path} is missing, but {index.name} names it")
        return paths
    paths = sorted(p for p in folder.glob("*.safetensors") if p.name != "consolidated.safetensors")
    if not paths:
        raise ModelError(f"{folder} holds no .safetensors file and no single .gguf file")
    return paths


def _canonical(stored: str) -> str:
    prefix = next(p for p in PREFIXES if stored.startswith(p))
    return stored.removeprefix(prefix)


def _broken(path: Path, tensor: str, why: str) -> ModelError:
    return ModelError(f"{path}: tensor {tensor!r} {why}")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _diagnose(path, error) from None


def _diagnose(path: Path, error: Exception) -> ModelError:
    """Why the library refused the file: the first tensor that is cut off, or its own words."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + n_header > size:
            return ModelError(f"{path} is truncated or corrupt: its header needs {n_header} bytes")
        try:
            header: dict[str, Any] = json.loads(file.read(n_header))
            ends = {k: v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return ModelError(f"{path} is corrupt: its header is not readable ({error})")
    for name, end in sorted(ends.items(), key=lambda item: item[1]):
        if 8 + n_header + end > size:
            short = 8 + n_header + end - size
            return _broken(path, name, f"is cut off: the file is at least {short} bytes too short")
    return ModelError(f"{path} is corrupt: {error}")
