"""What a quantising tool wrote into `config.json`, and the matrices that it left in the files."""

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from torch import Tensor

from kvarn.core.errors import ModelError
from kvarn.kernels.linear.quantize import expanded
from kvarn.kernels.linear.stored import Stored
from kvarn.models.quantized.convert import Kind
from kvarn.models.safetensors_file import SafetensorsWeights
from kvarn.models.weights import Part


class Scheme(Protocol):
    """One way of storing quantised matrices."""

    label: str  #: for `explain`: "GPTQ int4 in groups of 128"
    kind: Kind  #: what its matrices are
    expands: str  #: why its matrices can only be expanded; "" where they can be used as they are

    def holds(self, files: SafetensorsWeights, stem: str) -> bool:
        """Whether module `stem` ("layers.0.mlp.up_proj") is quantised."""
        ...

    def matrix(self, files: SafetensorsWeights, stem: str, shape: tuple[int, int]) -> Stored:
        """Its matrix [N, K]; `ModelError` naming file and tensor where something does not agree."""
        ...


class QuantizedWeights:
    """`Weights` of a checkpoint in safetensors files some of whose matrices are quantised."""

    def __init__(self, files: SafetensorsWeights, scheme: Scheme) -> None:
        self.files, self.scheme = files, scheme

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`."""
        if not self._quantized(name):
            return self.files.read(name, shape, part)
        whole = expanded(self.stored(name, shape))
        return whole if part is None else whole[part]

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`."""
        if not self._quantized(name):
            return self.files.read(name, shape)
        n_out, n_in = shape
        return self.scheme.matrix(self.files, name.removesuffix(".weight"), (n_out, n_in))

    def _quantized(self, name: str) -> bool:
        return name.endswith(".weight") and self.scheme.holds(
            self.files, name.removesuffix(".weight")
        )


class Fields:
    """The fields of a `quantization_config`, with errors that name the model and the method."""

    def __init__(self, config: Mapping[str, Any], name: str, method: str) -> None:
        self.config, self.name, self.method = config, name, method

    def __call__(self, key: str, default: Any = None) -> Any:
        """A field's value; null counts as left out."""
        value = self.config.get(key)
        return default if value is None else value

    def one_of(self, key: str, supported: tuple[Any, ...], default: Any = None) -> Any:
        """A field with a closed list of values."""
        value = self(key, default)
        if value not in supported or isinstance(value, bool) is not isinstance(supported[0], bool):
            self.refuse(f"{key} {value!r}", ", ".join(map(str, supported)))
        return value

    def refuse(self, what: str, supported: str) -> NoReturn:
        """The error for something that this method can be and we do not read."""
        raise ModelError(
            f"{self.name}: {self.method} with {what} is not supported; supported: {supported}"
        )


def words_in_groups(bits: int, group: int) -> str:
    """ "int4 in groups of 128", "int8 with a scale a row" (group -1)."""
    return f"int{bits} " + ("with a scale a row" if group < 1 else f"in groups of {group}")
