"""Which number format and which form of the linear layers pay on a device."""

import time
from typing import cast

import torch

from kvarn.core.config import EngineConfig, Resolved
from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.kernels import native
from kvarn.kernels.linear import Mode, make_linear
from kvarn.models.quantized.convert import KINDS, Kind, form_on, usable
from kvarn.models.quantized.scheme import Scheme

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(resolved: Resolved) -> torch.device:
    """The device of the config; "auto" is the GPU where there is one."""
    if resolved.config.device == "auto":
        found = torch.cuda.is_available()
        why = "a CUDA device is there" if found else "no CUDA device is there"
        resolved.choose("device", "cuda" if found else "cpu", "device", why)
    name = resolved.config.device
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(resolved: Resolved, device: torch.device) -> torch.dtype:
    """The dtype of the config; "auto" is bfloat16 where the hardware multiplies it fast."""
    if resolved.config.dtype == "auto":
        if device.type == "cuda":
            name, source, why = _dtype_of_gpu(device)
        else:
            name, source, why = _dtype_of_cpu()
        resolved.choose("dtype", name, source, why)
    return DTYPES[resolved.config.dtype]


def choose_quantization(resolved: Resolved, device: torch.device, scheme: Scheme | None) -> Kind:
    """The quantisation of the config; "auto" is the checkpoint's own, where it can be used as is.

    Raises `ConfigError` for what nothing on the device multiplies by, or not batch-invariantly.
    """
    config = resolved.config
    if config.quantization == "auto":
        resolved.choose("quantization", *_own_quantization(device, scheme, config.deterministic))
    kind = cast(Kind, config.quantization)
    if kind == "none":
        return kind
    form = form_on(device, kind)
    if form is None:
        offered = ", ".join(other for other in KINDS if usable(other, device))
        raise ConfigError(
            f"quantization={kind} does not run on device={device.type}; what does: {offered}"
        )
    if device.type == "cpu" and config.dtype == "float16":
        raise ConfigError(
            f"quantization={kind} on a CPU takes dtype=float32 or bfloat16, not float16"
        )
    if config.deterministic and not form.batch_invariant:
        raise ConfigError(
            f"quantization={kind} multiplies in ways that depend on what else is in the batch, so "
            f"it cannot run with deterministic=true; leave out one of the two"
        )
    return kind


def _own_quantization(
    device: torch.device, scheme: Scheme | None, deterministic: bool
) -> tuple[Kind, str, str]:
    """Value, source and reason where the user left the quantisation to the checkpoint."""
    if scheme is None:
        return "none", "model", "the checkpoint is none of a quantising tool's"
    if scheme.expands:
        return "none", "model", f"{scheme.label} is expanded: {scheme.expands}"
    form = form_on(device, scheme.kind)
    if form is None:
        why = f"nothing multiplies by {scheme.kind} on {device.type}"
        return "none", "device", f"{scheme.label} is expanded: {why}"
    if deterministic and not form.batch_invariant:
        return "none", "derived", f"{scheme.label} is expanded, to be batch-invariant"
    return scheme.kind, "model", f"{scheme.label}, as it is"


def _dtype_of_gpu(device: torch.device) -> tuple[str, str, str]:
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bfloat16", "device", "the GPU computes in bfloat16"
    return "float16", "device", "the GPU is too old for bfloat16"


def _dtype_of_cpu() -> tuple[str, str, str]:
    if torch.cpu._is_avx512_bf16_supported():
        return "bfloat16", "device", "the CPU has AVX512_BF16"
    if torch.cpu._is_amx_tile_supported():
        return "bfloat16", "device", "the CPU has AMX"
    fp32, bf16 = _seconds(torch.float32), _seconds(torch.bfloat16)
    name = "bfloat16" if bf16 < fp32 else "float32"
    why = f"4 x 1024 x 4096 took {bf16 * 1e3:.2f} ms in bf16, {fp32 * 1e3:.2f} ms in fp32"
    return name, "measured", why


def _seconds(dtype: torch.dtype) -> float:
    """The best time of a linear layer on the CPU, for the few rows of decodes: weights come from
    memory, so that there are more of them than a cache holds."""
    form: Mode = "native" if _compiled(dtype) else _cpu_form(dtype)
    layers = [make_linear(torch.ones(4096, 1024, dtype=dtype), None, form) for _ in range(6)]
    x = torch.ones(4, 1024, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        for layer in layers:
            layer(x)
        times.append((time.perf_counter() - start) / len(layers))
    return min(times)


def linear_mode(
    config: EngineConfig, device: torch.device, dtype: torch.dtype, spec: ModelSpec
) -> Mode:
    """The form of the dense matrices that the options ask for."""
    inputs = (spec.hidden, spec.ffn, spec.n_heads * spec.head_dim)
    if device.type == "cpu" and _compiled(dtype) and all(size % 2 == 0 for size in inputs):
        return "native"  # fastest, and batch-invariant as it is
    if config.deterministic:
        return "invariant"
    if device.type == "cuda":
        return "small_m" if dtype.itemsize == 2 else "plain"
    return _cpu_form(dtype)


def _compiled(dtype: torch.dtype) -> bool:
    """Whether the compiled linear layer is there for this dtype."""
    return native.kernel("linear", torch.empty(0, dtype=dtype)) is not None


def _cpu_form(dtype: torch.dtype) -> Mode:
    """Packed by oneDNN where this build and CPU can: always fp32, bf16 with AVX-512 at least."""
    if not torch._C._has_mkldnn:
        return "plain"
    if dtype == torch.float32:
        return "packed"
    bf16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "packed" if bf16 else "plain"
