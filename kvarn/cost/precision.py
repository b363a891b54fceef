"""Bytes and arithmetic formats of weights, activations and KV, from the engine's option words."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvarn.core.errors import ConfigError, nearest
from kvarn.core.model import ModelSpec
from kvarn.cost.devices import Device
from kvarn.cost.moe import MoEShape

_DTYPES: Mapping[str, tuple[float, str]] = {
    "float32": (4, "fp32"), "bfloat16": (2, "bf16"), "float16": (2, "fp16"),
}  # fmt: skip
#: bytes of a weight, its arithmetic ("": as the activations), and whether the output head too.
#: int4: groups of 32 with scale and minimum of two bytes each; its output head is int8.
_KINDS: Mapping[str, tuple[float, str, float | None]] = {
    "int8": (1, "int8", 1), "fp8": (1, "fp8", None), "int4": (0.625, "", 1),
}  # fmt: skip


@dataclass(slots=True, frozen=True)
class Precision:
    """What the numbers of a model are held and multiplied in."""

    weight: float = 2.0  #: bytes of a weight of the layers
    head: float = 2.0  #: bytes of a weight of the output head
    act: float = 2.0  #: bytes of an activation, and of a weight of the embedding
    kv: float = 2.0  #: bytes of a number in the KV cache
    compute: str = "bf16"  #: format in which the layers' products are computed
    attention: str = "bf16"  #: format of attention and of the output head

    def weight_bytes(self, spec: ModelSpec, moe: MoEShape | None = None) -> float:
        """Memory of all weights of the model [bytes]; a tied head is counted once."""
        table = spec.vocab * spec.hidden
        tables = 1 if spec.tie_embeddings else 2
        matrices = spec.n_params() - tables * table
        if moe:
            matrices += moe.params(spec.hidden) - moe.layers * 3 * spec.hidden * spec.ffn
        head = self.head if tables == 2 else 0.0
        return table * (self.act + head) + matrices * self.weight


def precision(device: Device, dtype: str, quantization: str, kv_dtype: str) -> Precision:
    """The option words of the engine as bytes and formats.

    Raises `ConfigError` for unknown words, and for formats that `device` cannot multiply in.
    """
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, _DTYPES)}")
    if quantization not in ("none", *_KINDS):
        raise ConfigError(
            f"unknown quantization {quantization!r}{nearest(quantization, ('none', *_KINDS))}"
        )
    if kv_dtype not in ("auto", "fp8"):
        raise ConfigError(f"unknown kv_dtype {kv_dtype!r}{nearest(kv_dtype, ('auto', 'fp8'))}")
    act, form = _DTYPES[dtype]
    weight, compute, head = _KINDS.get(quantization, (act, form, None))
    for needed in {form, compute or form}:
        if needed not in device.flops:
            raise ConfigError(
                f"device {device.name!r} does not multiply in {needed}; it does in "
                f"{', '.join(device.flops)}: choose another dtype or quantization"
            )
    kv = 1.0 if kv_dtype == "fp8" else act
    return Precision(weight, act if head is None else head, act, kv, compute or form, form)
