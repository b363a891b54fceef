"""Will a model fit? Free memory of a device, and the bytes of a model's weights before loading."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch

from kvarn.core.errors import ModelError
from kvarn.core.model import ModelSpec
from kvarn.models.quantized.convert import HEADS, KINDS, Kind, usable

GIB = 1 << 30
#: bytes of a weight, by dtype or quantisation; int4: with scale and minimum in two bytes each
BYTES: Mapping[str, float] = {
    "float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1, "int4": 0.625,
}  # fmt: skip


def weight_bytes(spec: ModelSpec, dtype: str, quantization: str, packed: bool) -> int:
    """Memory that the loaded weights take. [bytes]

    Quantisation covers the matrices; the embedding stays in `dtype`. A tied output matrix is a
    second copy where the linear layers keep their weights in another form (`packed`).
    """
    embedding = spec.vocab * spec.hidden
    heads = 0 if spec.tie_embeddings else 1
    matrices = spec.n_params() - embedding * (1 + heads)
    head = HEADS[cast(Kind, quantization)]
    if spec.tie_embeddings and (packed or head != "none"):
        heads = 1
    of_matrix = BYTES[dtype if quantization == "none" else quantization]
    of_head = BYTES[dtype if head == "none" else head]
    return int(embedding * (BYTES[dtype] + heads * of_head) + matrices * of_matrix)


def free_memory(device: torch.device, ranks: int = 1) -> tuple[int, int]:
    """(free, total) memory of a device [bytes]; on the CPU within the control group's limit.

    Ranks on the CPU share its memory: each has an equal part of what is free.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    fields = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    total = fields.get("MemTotal", 1 << 62)
    free = fields.get("MemAvailable", total)
    limit, used = _number("memory.max"), _number("memory.current")
    if limit is not None and used is not None:
        total, free = min(total, limit), min(free, limit - used)
    return free // ranks, total


def _number(name: str) -> int | None:
    """A value of the process's control group (version 2), None where there is none or no limit."""
    try:
        text = (Path("/sys/fs/cgroup") / name).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def check_fits(
    spec: ModelSpec,
    dtype: str,
    quantization: str,
    packed: bool,
    device: torch.device,
    free: int,
    total: int,
) -> None:
    """Raise `ModelError` when the weights exceed the free memory: needed, there, and what fits."""
    needed = weight_bytes(spec, dtype, quantization, packed)
    if needed <= free:
        return
    form = dtype if quantization == "none" else quantization
    options = [("dtype=bfloat16", "none")]
    options += [(f"quantization={kind}", kind) for kind in KINDS[1:] if usable(kind, device)]
    sizes = {option: weight_bytes(spec, "bfloat16", kind, packed) for option, kind in options}
    smaller = [
        f"{option} ({_gib(size)})"
        for option, size in sizes.items()
        if size <= free and size < needed
    ]
    largest = f"a model of at most {free / BYTES[form] / 1e9:.1f} billion weights in {form}"
    fitting = " or ".join(smaller or [largest])
    raise ModelError(
        f"{spec.name} does not fit on {device}: its weights need {_gib(needed)} in {form}, and "
        f"{_gib(free)} of {_gib(total)} are free; what would fit: {fitting}"
    )


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:.2f} GiB"
