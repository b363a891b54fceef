"""Checkpoints of GPTQ, AWQ, compressed-tensors and fp8: what is read is what was packed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import quantized_writer as writer
from golden.checkpoints import PROMPT, checkpoint
from golden.naive import naive_logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvarn.core.config import resolve
from kvarn.core.errors import ModelError
from kvarn.kernels.linear.stored import Affine, Float8
from kvarn.models.load import load
from kvarn.models.quantized.methods import METHODS, find_scheme
from kvarn.models.quantized.scheme import QuantizedWeights
from kvarn.models.safetensors_file import SafetensorsWeights

pytest.importorskip("transformers")
MATRIX = "layers.1.mlp.up_proj"


def compressed(layout: str, **weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"} | weights}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def gptq(bits: int, group: int, **more: Any) -> tuple[dict[str, Any], writer.Writer]:
    less = 0 if more.get("checkpoint_format") == "gptq_v2" else 1

    def write(n: int, k: int, seed: int) -> tuple[dict[str, Any], Tensor]:
        drawn = writer.draw(n, k, group, bits, seed)
        if not more.get("desc_act"):
            return writer.gptq(drawn, bits, less), drawn.dense()
        chance = torch.Generator().manual_seed(seed)
        order = (torch.arange(k) // group)[torch.randperm(k, generator=chance)]
        return writer.gptq(drawn, bits, less, order), drawn.dense(order)

    return {"quant_method": "gptq", "bits": bits, "group_size": group, **more}, write


def awq(group: int) -> tuple[dict[str, Any], writer.Writer]:
    def write(n: int, k: int, seed: int) -> tuple[dict[str, Any], Tensor]:
        drawn = writer.draw(n, k, group, 4, seed)
        return writer.awq(drawn), drawn.dense()

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    return config | {"version": "gemm"}, write


def integers(
    layout: str, bits: int, group: int, symmetric: bool
) -> tuple[dict[str, Any], writer.Writer]:
    def write(n: int, k: int, seed: int) -> tuple[dict[str, Any], Tensor]:
        drawn = writer.draw(n, k, group, bits, seed, symmetric)
        if layout == "pack-quantized":
            return writer.packed(drawn, bits, symmetric), drawn.dense()
        return writer.plain_int8(drawn, symmetric), drawn.dense()

    how = {"strategy": "channel"} if group < 1 else {"strategy": "group", "group_size": group}
    return compressed(layout, num_bits=bits, symmetric=symmetric, **how), write


def floats(config: dict[str, Any], by: str, name: str) -> tuple[dict[str, Any], writer.Writer]:
    """fp8 with a scale by "tensor", "row" or "block" (of 16 x 32)."""

    def write(n: int, k: int, seed: int) -> tuple[dict[str, Any], Tensor]:
        chance = torch.Generator().manual_seed(seed)
        codes = (torch.randn(n, k, generator=chance) * 60).to(torch.float8_e4m3fn)
        shape = {"tensor": (1,), "row": (n, 1), "block": (-(-n // 16), -(-k // 32))}[by]
        scale = torch.rand(shape, generator=chance) / 400
        wide = scale.expand(n, 1) if by != "block" else torch.empty(n, k)
        if by == "block":
            for i in range(n):
                for j in range(k):
                    wide[i, j] = scale[i // 16, j // 32]
        return {"weight": codes, name: scale}, codes.float() * wide

    return config, write


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FLOAT = {"num_bits": 8, "type": "float"}
#: name -> (config and writer, kind, what `stored` returns)
LAYOUTS: dict[str, tuple[Callable[[], Any], str, type]] = {
    "gptq": (lambda: gptq(4, 32, desc_act=False), "int4", Affine),
    "gptq-v2": (lambda: gptq(4, 16, checkpoint_format="gptq_v2"), "int4", Affine),
    "gptq-8": (lambda: gptq(8, 32), "int8", Affine),
    "gptq-rows": (lambda: gptq(4, -1), "int4", Affine),
    "gptq-order": (lambda: gptq(4, 32, desc_act=True), "int4", Tensor),
    "awq": (lambda: awq(32), "int4", Affine),
    "ct-4": (lambda: integers("pack-quantized", 4, 32, True), "int4", Affine),
    "ct-4-zero": (lambda: integers("pack-quantized", 4, 32, False), "int4", Affine),
    "ct-8": (lambda: integers("pack-quantized", 8, 32, False), "int8", Affine),
    "ct-rows": (lambda: integers("int-quantized", 8, -1, True), "int8", Affine),
    "ct-rows-zero": (lambda: integers("naive-quantized", 8, -1, False), "int8", Affine),
    "ct-fp8": (
        lambda: floats(
            compressed("float-quantized", strategy="channel", **FLOAT), "row", "weight_scale"
        ),
        "fp8",
        Float8,
    ),
    "ct-fp8-tensor": (
        lambda: floats(
            compressed("float-quantized", strategy="tensor", **FLOAT), "tensor", "weight_scale"
        ),
        "fp8",
        Float8,
    ),
    "fp8": (lambda: floats(FP8, "tensor", "weight_scale"), "fp8", Float8),
    "fbgemm": (
        lambda: floats({"quant_method": "fbgemm_fp8"}, "row", "weight_scale"),
        "fp8",
        Float8,
    ),
    "fp8-block": (
        lambda: floats(FP8 | {"weight_block_size": [16, 32]}, "block", "weight_scale_inv"),
        "fp8",
        Tensor,
    ),
}


Made = Callable[[str, Path], tuple[dict[str, Any], dict[str, Tensor]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A checkpoint in a layout, in a folder: (config.json, what each matrix stands for)."""
    plain = tmp_path_factory.mktemp("plain")
    checkpoint("llama2", plain)

    def make(layout: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        meant = writer.rewrite(folder, *LAYOUTS[layout][0]())
        return json.loads((folder / "config.json").read_text()), meant

    return make


def weights_of(config: dict[str, Any], folder: Path) -> QuantizedWeights:
    scheme = find_scheme(config, "tiny")
    assert scheme is not None
    return QuantizedWeights(SafetensorsWeights(folder), scheme)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_are_read_as_they_were_packed(made: Made, layout: str, tmp_path: Path) -> None:
    config, meant = made(layout, tmp_path)
    weights = weights_of(config, tmp_path)
    _, kind, form = LAYOUTS[layout]
    assert weights.scheme.kind == kind
    assert bool(weights.scheme.expands) == (form is Tensor)
    for name, expected in meant.items():
        stored = weights.stored(name, tuple(expected.shape))
        assert isinstance(stored, form), name
        found = weights.read(name, tuple(expected.shape))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, msg=name)
    norm = weights.stored("norm.weight", (64,))
    assert isinstance(norm, Tensor)


@pytest.mark.parametrize("layout", ["gptq", "gptq-order", "awq", "ct-4-zero", "ct-rows", "fp8"])
def test_model_equals_the_one_it_stands_for(made: Made, layout: str, tmp_path: Path) -> None:
    made(layout, tmp_path)
    plain = {"dtype": "float32", "device": "cpu"}
    dense = load(resolve(plain | {"model": str(tmp_path / "dense")}))
    expected = naive_logits(dense.decoder, dense.spec, PROMPT)
    expanded = load(resolve(plain | {"model": str(tmp_path), "quantization": "none"}))
    found = naive_logits(expanded.decoder, expanded.spec, PROMPT)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    resolved = resolve(plain | {"model": str(tmp_path)})
    own = naive_logits((model := load(resolved)).decoder, model.spec, PROMPT)
    # activations in eight bits where weights are codes: far nearer than another model's logits
    assert (own - expected).square().mean().sqrt() < 0.1 * expected.std()


def test_auto_says_why(made: Made, tmp_path: Path) -> None:
    """As the checkpoint holds them, or expanded with the reason."""
    for layout, words in (
        ("gptq-order", "GPTQ int4 in groups of 32 is expanded: its groups are of inputs out"),
        ("fp8", "fp8 is expanded: nothing multiplies by fp8 on cpu"),
    ):
        made(layout, tmp_path / layout)
        resolved = resolve({"model": str(tmp_path / layout), "device": "cpu"})
        load(resolved)
        assert resolved.config.quantization == "none"
        assert resolved.origins["quantization"].why.startswith(words)


def test_what_a_checkpoint_leaves_dense_stays_dense(made: Made, tmp_path: Path) -> None:
    """The output matrix is not quantised behind the checkpoint's back."""
    made("awq", tmp_path)
    resolved = resolve({"model": str(tmp_path), "device": "cpu", "dtype": "float32"})
    model = load(resolved)
    if resolved.config.quantization == "none":
        pytest.skip("no kernel here multiplies by int4")
    assert resolved.config.quantization == "int4"
    head, layer = model.decoder.head.mode, model.decoder.layers[0].qkv.mode
    assert head != layer
    why = resolved.origins["quantization"].why
    assert why.startswith("AWQ int4 in groups of 32, as it is; matrices: ")
    assert f"1 x {head}" in why and f"12 x {layer}" in why


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes' cannot be read; supported: gptq, awq"),
        ({"quant_method": "gptq", "bits": 3}, "GPTQ with bits 3 is not supported; supported: 4, 8"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "checkpoint_format 'marlin'",
        ),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "AWQ with version 'gemv'"),
        ({"quant_method": "awq", "bits": 4, "zero_point": False}, "zero_point False"),
        (compressed("marlin-24"), "format 'marlin-24'"),
        (compressed("int-quantized", num_bits=4), "4-bit weights in format 'int-quantized'"),
        (compressed("pack-quantized", num_bits=2), "num_bits 2"),
        (compressed("pack-quantized", strategy="token"), "strategy 'token'"),
        (
            compressed("pack-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity format",
        ),
        (compressed("pack-quantized") | {"transform_config": {"a": 1}}, "transform_config"),
        (compressed("pack-quantized") | {"config_groups": {}}, "say nothing of weights"),
        (FP8 | {"weight_block_size": 128}, "weight_block_size 128"),
    ],
)
def test_what_cannot_be_read_is_said(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        find_scheme({"quantization_config": change}, "tiny")


def test_every_method_is_tested() -> None:
    seen = {LAYOUTS[layout][0]()[0]["quant_method"] for layout in LAYOUTS}
    assert seen == set(METHODS)


@pytest.mark.parametrize(
    ("layout", "tensor", "damage", "words"),
    [
        ("gptq", "qweight", None, r"no safetensors file here holds tensor '.*up_proj\.weight'"),
        ("gptq", "qzeros", None, r"holds tensor 'layers\.1\.mlp\.up_proj\.qzeros'"),
        ("gptq", "scales", lambda x: x[:1], r"up_proj\.scales' has shape \[1, 96\], expected \[2,"),
        ("gptq", "qweight", lambda x: x.float(), r"qweight' is of type F32; supported: I32"),
        ("gptq", "g_idx", lambda x: x + 1, r"g_idx' names groups beyond 0 to 1"),
        ("awq", "qweight", lambda x: x[:, :-1], r"up_proj\.qweight' has shape \[64, 11\]"),
        ("ct-4-zero", "weight_zero_point", None, "weight_zero_point'"),
        ("ct-4", "weight_shape", lambda x: x + 1, r"weight_shape' says \[97, 65\]"),
        ("ct-rows", "weight_scale", lambda x: x[:-1], r"weight_scale' has shape \[95, 1\]"),
        ("fp8", "weight_scale", None, r"holds tensor 'layers\.1\.mlp\.up_proj\.weight_scale'"),
        ("ct-fp8", "weight_scale", lambda x: x[:-1], r"has shape \[95, 1\]; 96 x 64 weights need"),
    ],
)
def test_broken_checkpoints_name_the_tensor(
    made: Made,
    layout: str,
    tensor: str,
    damage: Callable[[Tensor], Tensor] | None,
    words: str,
    tmp_path: Path,
) -> None:
    config, _ = made(layout, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    at = f"model.{MATRIX}.{tensor}"
    broken = {k: v for k, v in tensors.items() if k != at}
    if damage is not None:
        broken[at] = damage(tensors[at]).contiguous()
    save_file(broken, path)
    weights = weights_of(config, tmp_path)
    with pytest.raises(ModelError, match=words) as caught:
        weights.stored(f"{MATRIX}.weight", (96, 64))
    assert str(tmp_path) in str(caught.value)


def test_groups_that_do_not_divide_the_inputs(made: Made, tmp_path: Path) -> None:
    config, _ = made("gptq", tmp_path)
    config["quantization_config"]["group_size"] = 48
    with pytest.raises(ModelError, match="cannot hold 96 x 64 weights of 4 bits in groups of 48"):
        weights_of(config, tmp_path).stored(f"{MATRIX}.weight", (96, 64))
