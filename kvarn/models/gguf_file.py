"""A GGUF file: metadata and tensors, memory-mapped, with errors that name what is broken.

The header is parsed here, because start-up time counts (the `gguf` package makes an array object
for every vocabulary entry: seconds); blocks are dequantised by that package, tensor by tensor.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarn.core.errors import ModelError
from kvarn.kernels.linear.stored import Affine
from kvarn.models.gguf_blocks import READERS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: value type -> code of `struct`
SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9
BLOCKS_PER_ROW = 4096


@dataclass(slots=True)
class TensorInfo:
    """Where a tensor lies in the file."""

    name: str
    shape: tuple[int, ...]  #: slowest dimension first, as in torch
    kind: int  #: a `GGMLQuantizationType`
    start: int  #: from the beginning of the file [bytes]


class GGUFFile:
    """An open file; `metadata` by key, tensors read on demand."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # a plain array over the map: numpy's memmap class slows down every slice
            self.data = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from None
        cursor = _Cursor(self.data.data, path)
        if cursor.take(4) != MAGIC:
            raise ModelError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        version = cursor.scalar("I")
        if version not in VERSIONS:
            raise ModelError(f"{path} is GGUF version {version}; versions 2 and 3 can be read")
        n_tensors, n_keys = cursor.scalar("Q"), cursor.scalar("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            cursor.where = f"metadata after {next(reversed(self.metadata), 'the start')!r}"
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        infos = [cursor.tensor(i) for i in range(n_tensors)]
        align = self.metadata.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ModelError(f"{path} is corrupt: general.alignment is {align!r}")
        self.header_bytes = cursor.at
        base = -(-cursor.at // align) * align
        self.tensors = {t.name: TensorInfo(t.name, t.shape, t.kind, base + t.start) for t in infos}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor of any supported type: F32, F16 and BF16 as they are, the others as fp32.

        With `rows`, only those.
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        raw, kind, block, block_bytes = self._bytes(name)
        shape = self.tensors[name].shape
        if rows is not None:
            raw = raw.reshape(shape[0], -1)[rows].reshape(-1)
            shape = (rows.stop - rows.start, *shape[1:])
        plain = {
            GGMLQuantizationType.F32: torch.float32,
            GGMLQuantizationType.F16: torch.float16,
            GGMLQuantizationType.BF16: torch.bfloat16,
        }
        if kind in plain:
            return torch.from_numpy(raw.copy()).view(plain[kind]).view(shape)
        # blocks stand alone, so rows may be cut anew: the package works on 16 rows at a time
        per_row = math.gcd(math.prod(shape) // block, BLOCKS_PER_ROW)
        try:
            values = dequantize(raw.reshape(-1, per_row * block_bytes), kind)
        except NotImplementedError:
            raise self.broken(name, f"cannot be dequantised from {kind.name}") from None
        return torch.from_numpy(values.astype(np.float32, copy=False)).view(shape)

    def read_affine(self, name: str) -> Affine | None:
        """Codes and scales of a quantised matrix; None for types that are not codes and scales."""
        raw, kind, _, block_bytes = self._bytes(name)
        if kind.name not in READERS:
            return None
        blocks = torch.from_numpy(raw.reshape(-1, block_bytes).copy())
        return READERS[kind.name](blocks, self.tensors[name].shape[0])

    def _bytes(self, name: str) -> tuple[Any, Any, int, int]:
        """(bytes, type, weights of a block, bytes of a block) of a tensor."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        info = self.tensors[name]
        try:
            kind = GGMLQuantizationType(info.kind)
        except ValueError:
            raise self.broken(name, f"is of unknown type {info.kind}") from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if info.shape[-1] % block:
            raise self.broken(name, f"of type {kind.name} has rows of {info.shape[-1]}")
        n_bytes = math.prod(info.shape) // block * block_bytes
        if info.start + n_bytes > len(self.data):
            missing = info.start + n_bytes - len(self.data)
            raise self.broken(name, f"is cut off: the file is {missing} bytes too short")
        return self.data[info.start : info.start + n_bytes], kind, block, block_bytes

    def broken(self, name: str, why: str) -> ModelError:
        """The error for a tensor that cannot be used."""
        return ModelError(f"{self.path}: tensor {name!r} {why}")


class _Cursor:
    """Reads the header front to back; running past the end is a `ModelError`."""

    def __init__(self, data: memoryview, path: Path) -> None:
        self.data, self.path, self.at, self.where = data, path, 0, "the start"

    def take(self, n: int) -> bytes:
        if self.at + n > len(self.data):
            raise ModelError(f"{self.path} is truncated or corrupt in its header ({self.where})")
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ModelError(f"{self.path} is corrupt: unknown value type {kind} in {self.where}")
        inner, n = self.scalar("I"), self.scalar("Q")
        if inner == ARRAY:
            raise ModelError(f"{self.path}: arrays in arrays are not supported ({self.where})")
        if inner in SCALARS:
            width = struct.calcsize(f"<{SCALARS[inner]}")
            return list(struct.unpack(f"<{n}{SCALARS[inner]}", self.take(n * width)))
        return [self.value(inner) for _ in range(n)]

    def tensor(self, i: int) -> TensorInfo:
        self.where = f"entry of tensor {i}"
        name = self.string()
        self.where = f"entry of tensor {name!r}"
        n_dims = self.scalar("I")
        if n_dims > 4:
            raise ModelError(f"{self.path} is corrupt: tensor {name!r} has {n_dims} dimensions")
        dims = [self.scalar("Q") for _ in range(n_dims)]
        return TensorInfo(name, tuple(reversed(dims)), self.scalar("I"), self.scalar("Q"))
