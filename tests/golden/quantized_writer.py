"""Checkpoints as quantising tools write them, packed number by number from their descriptions.

Nothing here is shared with the reader: words are made of Python integers, one code at a time.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(slots=True)
class Drawn:
    """One matrix: w = (codes - zero) * scale by group, all unsigned."""

    codes: Tensor  #: [N, K] int64
    zero: Tensor  #: [N, groups] int64
    scale: Tensor  #: [N, groups] fp16

    def dense(self, order: Tensor | None = None) -> Tensor:
        """The weights in fp32; `order`: the group of each input."""
        k, groups = self.codes.shape[1], self.scale.shape[1]
        order = torch.arange(k) // (k // groups) if order is None else order
        return (self.codes - self.zero[:, order]).float() * self.scale.float()[:, order]


def draw(n: int, k: int, group: int, bits: int, seed: int, symmetric: bool = False) -> Drawn:
    """Random codes, zero points and scales."""
    chance = torch.Generator().manual_seed(seed)
    groups = 1 if group < 1 else k // group
    top = 1 << bits
    codes = torch.randint(0, top, (n, k), generator=chance)
    zero = torch.randint(0, top, (n, groups), generator=chance)
    if symmetric:
        zero = torch.full_like(zero, top // 2)
    scale = (torch.rand(n, groups, generator=chance) + 0.5) * 8 / top / 8
    return Drawn(codes, zero, scale.half())


def word(codes: Sequence[int], bits: int) -> int:
    """A signed 32-bit word of codes, the first in the lowest bits."""
    value = 0
    for i, code in enumerate(codes):
        value |= int(code) << (bits * i)
    return value - (1 << 32) if value >= 1 << 31 else value


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """[A, B] -> int32 [A, ceil(B * bits / 32)]: codes of a row one after the other."""
    per = 32 // bits
    rows = [
        [word(row[i : i + per], bits) for i in range(0, len(row), per)] for row in codes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """[A, B] -> int32 [A * bits / 32, B]: codes of a column one below the other."""
    return pack_rows(codes.T, bits).T.contiguous()


def pack_awq(codes: Tensor) -> Tensor:
    """[A, B] -> int32 [A, B / 8]: of eight columns, nibble i holds column AWQ_ORDER[i]."""
    rows = [
        [word([row[i + at] for at in AWQ_ORDER], 4) for i in range(0, len(row), 8)]
        for row in codes.tolist()
    ]
    return torch.tensor(rows, dtype=torch.int32)


def gptq(drawn: Drawn, bits: int = 4, less: int = 1, order: Tensor | None = None) -> dict[str, Any]:
    """AutoGPTQ: inputs down, outputs across; zero points less one, modulo 2^bits."""
    n_in, groups = drawn.codes.shape[1], drawn.scale.shape[1]
    if order is None:
        order = torch.arange(n_in) // (n_in // groups)
    return {
        "qweight": pack_columns(drawn.codes.T, bits),
        "qzeros": pack_rows((drawn.zero.T - less) % (1 << bits), bits),
        "scales": drawn.scale.T.contiguous(),
        "g_idx": order.int(),
    }


def awq(drawn: Drawn) -> dict[str, Any]:
    """AutoAWQ, version gemm: inputs down, outputs across, eight outputs a word."""
    return {
        "qweight": pack_awq(drawn.codes.T),
        "qzeros": pack_awq(drawn.zero.T),
        "scales": drawn.scale.T.contiguous(),
    }


def packed(drawn: Drawn, bits: int, symmetric: bool) -> dict[str, Any]:
    """compressed-tensors, pack-quantized: rows as they are, zero points packed down."""
    found = {
        "weight_packed": pack_rows(drawn.codes, bits),
        "weight_scale": drawn.scale,
        "weight_shape": torch.tensor(drawn.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = pack_columns(drawn.zero, bits)
    return found


def plain_int8(drawn: Drawn, symmetric: bool) -> dict[str, Any]:
    """compressed-tensors, int-quantized: signed bytes."""
    found = {"weight": (drawn.codes - 128).to(torch.int8), "weight_scale": drawn.scale}
    if not symmetric:
        found["weight_zero_point"] = (drawn.zero - 128).to(torch.int8)
    return found


#: (matrix name, its shape, a seed) -> (tensors that replace it, the weights they stand for)
Writer = Callable[[int, int, int], tuple[dict[str, Any], Tensor]]


def rewrite(folder: Path, config: dict[str, Any], write: Writer) -> dict[str, Tensor]:
    """Quantise the linear layers of a checkpoint in place; returns what each stands for.

    `model.safetensors` gets the packed tensors, `config.json` the `quantization_config`, and
    `dense/` a copy of the checkpoint with the weights that the packed ones stand for.
    """
    tensors = load_file(folder / "model.safetensors")
    done, dense, meant = {}, {}, {}
    for i, (name, x) in enumerate(sorted(tensors.items())):
        stem = name.removesuffix(".weight")
        if name == stem or stem.rpartition(".")[2] not in PROJECTIONS:
            done[name] = dense[name] = x
            continue
        parts, meaning = write(*x.shape, i)
        done |= {f"{stem}.{part}": value for part, value in parts.items()}
        dense[name] = meant[name.removeprefix("model.")] = meaning
    save_file(done, folder / "model.safetensors")
    plain = json.loads((folder / "config.json").read_text())
    (folder / "dense").mkdir()
    (folder / "dense" / "config.json").write_text(json.dumps(plain))
    save_file(dense, folder / "dense" / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(plain | {"quantization_config": config}))
    return meant
