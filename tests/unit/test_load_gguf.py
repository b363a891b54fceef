"""GGUF files: every family, every quantisation, and what is said about broken ones."""

import contextlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from golden.checkpoints import PROMPT, checkpoint
from golden.gguf_writer import write_gguf
from golden.naive import naive_logits

from kvarn.core.errors import ModelError
from kvarn.core.model import RopeScaling
from kvarn.models.decoder import Decoder
from kvarn.models.gguf import GGUFWeights, spec_from_gguf
from kvarn.models.gguf_file import GGUFFile

pytest.importorskip("transformers")


def decoder_of(path: Path) -> tuple[Decoder, Any]:
    file = GGUFFile(path)
    spec = spec_from_gguf(file, "tiny")
    return Decoder(spec, GGUFWeights(file, spec)), spec


@pytest.mark.parametrize("case", ["llama2", "llama-linear", "smollm2", "qwen2", "qwen3"])
def test_logits_from_gguf_equal_transformers(case: str, tmp_path: Path) -> None:
    model = checkpoint(case, tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model)
    decoder, spec = decoder_of(tmp_path / "m.gguf")
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert (naive_logits(decoder, spec, PROMPT) - expected).abs().max() < 1e-4
    assert spec.eos_ids == (1,)


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_gemma_from_gguf_equals_its_config(case: str, tmp_path: Path) -> None:
    """GGUF fixes Gemma's pattern of windows and its attention scale, so the config must too."""
    changes: dict[str, Any] = {"query_pre_attn_scalar": 32}
    if case == "gemma3":
        kinds = ["sliding_attention"] * 5 + ["full_attention"]
        changes |= {"num_hidden_layers": 6, "layer_types": kinds}
    model = checkpoint(case, tmp_path / "hf", **changes)
    write_gguf(tmp_path / "m.gguf", model)
    decoder, spec = decoder_of(tmp_path / "m.gguf")
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert (naive_logits(decoder, spec, PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [(None, (8,) * 4), (2, (8, None, 8, None)), ([True, True, False, True], (8, 8, None, 8))],
)
def test_pattern_of_windows_in_the_metadata(
    pattern: Any, windows: tuple[int | None, ...], tmp_path: Path
) -> None:
    model = checkpoint("gemma3", tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model)
    file = GGUFFile(tmp_path / "m.gguf")
    file.metadata["gemma3.attention.sliding_window_pattern"] = pattern
    assert spec_from_gguf(file, "tiny").windows == windows


def test_llama3_scaling_is_found_from_the_stored_divisors(tmp_path: Path) -> None:
    rope = {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    model = checkpoint("llama3", tmp_path / "hf", rope_parameters=rope, head_dim=64)
    write_gguf(tmp_path / "m.gguf", model)
    decoder, spec = decoder_of(tmp_path / "m.gguf")
    assert spec.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert (naive_logits(decoder, spec, PROMPT) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_matrices_are_read_as_written(kind: str, tmp_path: Path) -> None:
    model = checkpoint("qwen3", tmp_path / "hf")
    written = write_gguf(tmp_path / "m.gguf", model, Kind[kind])
    file = GGUFFile(tmp_path / "m.gguf")
    weights = GGUFWeights(file, spec_from_gguf(file, "tiny"))
    for name, expected in written.items():
        found = weights.read(name, tuple(expected.shape))
        assert torch.equal(found.float(), expected), name


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_are_dequantised_block_by_block(kind: str, tmp_path: Path) -> None:
    _, block_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    raw = np.random.default_rng(0).integers(0, 64, (6, 2 * block_bytes), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("x", raw, raw_dtype=Kind[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "m.gguf").read("x")
    assert found.shape == (6, 512)
    expected = gguf.quants.dequantize(raw, Kind[kind])
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "m.gguf", checkpoint("llama2", folder / "hf"), Kind.Q8_0)
    return (folder / "m.gguf").read_bytes()


def test_truncated_tensor_is_named(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: len(whole) - 1000])
    with pytest.raises(
        ModelError, match=r"cut\.gguf: tensor '[a-z0-9_.]+' is cut off: .* bytes too"
    ):
        decoder_of(path)


@pytest.mark.parametrize("size", [5, 30, 200, 1500])
def test_truncated_header(whole: bytes, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:size])
    with pytest.raises(ModelError, match="truncated or corrupt in its header"):
        decoder_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot read"),
        (b"not a model at all", "is not a GGUF file"),
        (b"GGUF" + (99).to_bytes(4, "little") + bytes(16), "version 99"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        GGUFFile(path)


def test_random_damage_in_the_header_is_a_model_error(whole: bytes, tmp_path: Path) -> None:
    """Whatever bytes flip, the reader copes or says ModelError; it never crashes or hangs."""
    path = tmp_path / "x.gguf"
    header = GGUFFile(_write(path, whole)).header_bytes
    chance = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(whole)
        for at in chance.integers(0, header, 3):
            damaged[at] = chance.integers(0, 256)
        # a fresh file: the map of the one before may still be open
        path = tmp_path / f"x{chance.integers(0, 1 << 60)}.gguf"
        with contextlib.suppress(ModelError):
            decoder_of(_write(path, bytes(damaged)))


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_missing_tensor_and_wrong_shape_are_named(whole: bytes, tmp_path: Path) -> None:
    file = GGUFFile(_write(tmp_path / "x.gguf", whole))
    spec = spec_from_gguf(file, "tiny")
    weights = GGUFWeights(file, spec)
    with pytest.raises(ModelError, match=r"tensor 'blk\.9\.attn_v\.weight' is missing"):
        weights.read("layers.9.self_attn.v_proj.weight", (32, 64))
    with pytest.raises(
        ModelError, match=r"'output_norm\.weight' has shape \[64\], expected \[65\]"
    ):
        weights.read("norm.weight", (65,))


def test_unsupported_architecture_lists_the_supported(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'rwkv7' is not supported; supported: gemma2, gemma3, ll"):
        spec_from_gguf(GGUFFile(tmp_path / "m.gguf"), "tiny")
