"""Quantising on load: errors within bounds; GGUF blocks as they lie; joining and cutting."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from golden.checkpoints import checkpoint
from golden.gguf_writer import write_gguf

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.kernels.linear import form_of, make_linear
from kvarn.kernels.linear.quantize import (
    cut,
    expanded,
    joined,
    rows_of,
    to_float8,
    to_int4,
    to_int8,
)
from kvarn.kernels.linear.stored import Affine, Float8, Stored
from kvarn.models.gguf import GGUFWeights, spec_from_gguf
from kvarn.models.gguf_blocks import READERS
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.load import load
from kvarn.models.quantized.convert import Converted, kind_of
from kvarn.models.random_weights import RandomWeights

CPU = torch.device("cpu")


def spread(found: Stored, wanted: torch.Tensor) -> float:
    """Root mean square error over root mean square."""
    return float((expanded(found) - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def test_int4_is_nearer_than_rounding_alone() -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 256)
    found = to_int4(weight)
    assert found.codes.dtype == torch.uint8 and int(found.codes.max()) == 15
    x = weight.view(-1, 32)
    low, step = x.amin(1, True), (x.amax(1, True) - x.amin(1, True)) / 15
    rounded = (((x - low) / step).round() * step + low).view_as(weight)
    assert spread(found, weight) < 0.97 * spread(rounded, weight)
    assert spread(to_int4(weight.bfloat16(), 64), weight) < 0.1


@pytest.mark.parametrize(("make", "bound"), [(to_int8, 0.01), (to_float8, 0.03)])
def test_eight_bits(make: Any, bound: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(70, 256) * torch.rand(70, 1)
    assert spread(make(weight), weight) < bound
    assert spread(make(torch.zeros(3, 32)), torch.ones(3, 32)) == 1.0  # no division by nothing


def test_int8_by_group_follows_outliers() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 3] = 100.0
    rest = slice(32, 128)
    by_group, by_row = (expanded(to_int8(weight, group))[:, rest] for group in (32, None))
    assert spread(by_group, weight[:, rest]) < 0.2 * spread(by_row, weight[:, rest])


@pytest.mark.parametrize(
    "make", [to_int8, to_int4, to_float8, lambda x: x, lambda x: to_int8(x, 32)]
)
def test_joining_and_cutting_change_no_weight(make: Any) -> None:
    torch.manual_seed(1)
    weight = torch.randn(24, 96)
    stored: Stored = make(weight)
    whole = expanded(stored)
    parts = [cut(stored, slice(0, 8), slice(0, 96)), cut(stored, slice(8, 24), slice(0, 96))]
    assert torch.equal(expanded(joined(parts)), whole)
    assert torch.equal(expanded(cut(stored, slice(2, 9), slice(32, 64))), whole[2:9, 32:64])
    if not isinstance(stored, torch.Tensor):
        order = torch.randperm(24)
        assert torch.equal(rows_of(stored, order).dense(), whole[order])


def test_joining_what_differs() -> None:
    torch.manual_seed(2)
    weight = torch.randn(8, 128)
    wide, narrow, eight = to_int4(weight, 128), to_int4(weight, 32), to_int8(weight, 64)
    both = joined([wide, narrow])
    assert isinstance(both, Affine) and both.group == 32
    assert torch.equal(both.dense(), torch.cat([wide.dense(), narrow.dense()]))
    row = joined([eight, to_int8(weight)])
    assert isinstance(row, Affine) and row.group == 64 and row.offset is None
    mixed = joined([wide, eight, weight])
    assert isinstance(mixed, torch.Tensor) and mixed.shape == (24, 128)
    one, each = Float8(to_float8(weight).codes, torch.ones(1)), to_float8(weight)
    eights = joined([one, each])
    assert isinstance(eights, Float8)
    assert torch.equal(eights.dense(), torch.cat([one.dense(), each.dense()]))
    with pytest.raises(ValueError, match="cut a group of 32"):
        cut(narrow, slice(0, 8), slice(16, 64))


@pytest.mark.parametrize("kind", READERS)
def test_blocks_are_taken_as_they_lie(kind: str, tmp_path: Path) -> None:
    """Codes times scales are bit for bit what the format's own package makes of the bytes."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    chance = np.random.default_rng(0)
    raw = chance.integers(0, 256, (6 * 3, block_bytes), dtype=np.uint8)
    n_halves = {"Q4_0": 1, "Q4_1": 2, "Q8_0": 1, "Q4_K": 2}[kind]
    numbers = chance.normal(size=(18, n_halves)).astype(np.float16)
    raw[:, : 2 * n_halves] = numbers.view(np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw.reshape(6, -1), raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GGUFFile(tmp_path / "m.gguf")
    found = file.read_affine("x")
    assert found is not None and found.shape == (6, 3 * block)
    assert torch.equal(found.dense(), file.read("x"))


def test_gguf_matrices_keep_their_codes(tmp_path: Path) -> None:
    """Rows of q and k in this engine's order; what holds no codes is dense."""
    model = checkpoint("llama2", tmp_path / "hf")
    written = write_gguf(tmp_path / "m.gguf", model, Kind.Q4_1)
    file = GGUFFile(tmp_path / "m.gguf")
    weights = GGUFWeights(file, spec_from_gguf(file, "tiny"))
    for name in written:
        dense = weights.read(name, tuple(written[name].shape))
        if dense.dim() == 2:
            stored = weights.stored(name, tuple(dense.shape))
            assert isinstance(stored, Affine)
            assert torch.equal(stored.dense(), dense), name


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_engine_of_a_gguf_is_near_the_dense_one(quantization: str, tmp_path: Path) -> None:
    from golden.checkpoints import PROMPT
    from golden.naive import naive_logits

    write_gguf(tmp_path / "m.gguf", checkpoint("qwen3", tmp_path / "hf"), Kind.Q8_0)
    made = GGUFFile(tmp_path / "m.gguf")
    spec = spec_from_gguf(made, "tiny")
    from kvarn.models.decoder import Decoder

    logits = [
        naive_logits(
            Decoder(spec, Converted(GGUFWeights(made, spec), kind, CPU)),  # type: ignore[arg-type]
            spec,
            PROMPT,
        )
        for kind in ("none", quantization)
        if kind == "none" or _runs(kind)
    ]
    if len(logits) == 1:
        pytest.skip(f"nothing here multiplies by {quantization}")
    bound = {"int8": 0.1, "int4": 0.6}[quantization]
    assert (logits[1] - logits[0]).square().mean().sqrt() < bound * logits[0].std()


def _runs(kind: str) -> bool:
    weight = torch.zeros(32, 64)
    return form_of(to_int8(weight) if kind == "int8" else to_int4(weight)) is not None


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_sums_of_the_largest_products_are_exact(bits: int, rows: int) -> None:
    """Codes at both ends of their range, activations likewise: no sum on the way may saturate."""
    if not _runs(f"int{bits}"):
        pytest.skip(f"nothing here multiplies by int{bits}")
    ends = [0, 15] if bits == 4 else [-128, 127]
    generator = torch.Generator().manual_seed(bits)
    which = torch.randint(0, 2, (64, 96), generator=generator)
    which[:3] = torch.tensor([0, 1, 1])[:, None]  # whole rows of one end, with either sign of x
    codes = torch.tensor(ends)[which].to(torch.uint8 if bits == 4 else torch.int8)
    weight = Affine(codes, torch.ones(64, 3), None, bits, 32)
    x = 127.0 * (1.0 - 2.0 * torch.randint(0, 2, (rows, 96), generator=generator))
    x[0] = 127.0
    assert torch.equal(make_linear(weight).wide(x), x @ codes.float().T)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_random_weights_of_every_kind(kind: Any) -> None:
    weights = RandomWeights(0, 0.0, torch.bfloat16, CPU, kind)
    stored = weights.stored("layers.0.mlp.up_proj.weight", (300, 256))
    assert kind_of(stored) == kind
    assert abs(float(expanded(stored).std()) * 16 - 1) < 0.05
    again = RandomWeights(0, 0.0, torch.bfloat16, CPU, kind)
    assert torch.equal(
        expanded(again.stored("layers.0.mlp.up_proj.weight", (300, 256))), expanded(stored)
    )
    other = weights.stored("layers.1.mlp.up_proj.weight", (300, 256))
    assert not torch.equal(expanded(other), expanded(stored))


def test_random_weights_fill_more_than_the_pool() -> None:
    weights = RandomWeights(3, 0.0, torch.float32, CPU)
    x = weights.read("layers.0.mlp.up_proj.weight", (4300, 1024))
    assert abs(float(x.std()) * 32 - 1) < 0.01 and abs(float(x.mean())) < 1e-3
    assert torch.equal(x.view(-1)[:100], x.view(-1)[4_194_301 : 4_194_301 + 100])


def test_what_the_device_cannot_multiply_by(tiny_folder: Any) -> None:
    options = {"model": tiny_folder("llama"), "load": "random", "device": "cpu"}
    with pytest.raises(ConfigError, match=r"quantization=fp8 does not run on device=cpu; what do"):
        load(resolve(options | {"quantization": "fp8"}))
    with pytest.raises(ConfigError, match="no linear layer here multiplies by fp8 with a scale a"):
        make_linear(to_float8(torch.ones(4, 32)))
    with pytest.raises(ConfigError, match="did you mean 'int4'"):
        resolve({"quantization": "int-4"})
