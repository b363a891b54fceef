"""The quantising tools whose checkpoints are read, by the name in `quantization_config`."""

from collections.abc import Callable, Mapping
from typing import Any

from kvarn.core.errors import ModelError
from kvarn.models.quantized.awq import AWQ
from kvarn.models.quantized.compressed import CompressedTensors
from kvarn.models.quantized.fp8 import FP8
from kvarn.models.quantized.gptq import GPTQ
from kvarn.models.quantized.scheme import Scheme

METHODS: Mapping[str, Callable[[Mapping[str, Any], str], Scheme]] = {
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "fp8": FP8,
    "fbgemm_fp8": FP8,
}


def find_scheme(config: Mapping[str, Any], name: str) -> Scheme | None:
    """How the checkpoint of this `config.json` is quantised; None: not at all.

    Raises `ModelError` for a method, or an option of one, that cannot be read.
    """
    inner = config.get("text_config") or {}
    said = config.get("quantization_config") or inner.get("quantization_config")
    said = said or config.get("compression_config")
    if not said:
        return None
    method = str(said.get("quant_method") or said.get("quantization_method") or "(none)")
    if method not in METHODS:
        raise ModelError(
            f"{name}: checkpoints quantised by {method!r} cannot be read; supported: "
            f"{', '.join(METHODS)}, GGUF files, and unquantised checkpoints (quantization=int8 or "
            f"int4 converts those when they are loaded)"
        )
    return METHODS[method](said, name)
