"""Safetensors folders: single, sharded, and what is said about broken ones."""

import json
from pathlib import Path

import pytest
import torch
from golden.checkpoints import PROMPT, checkpoint, loaded
from golden.naive import naive_logits
from safetensors.torch import load_file, save_file

from kvarn.core.errors import ModelError
from kvarn.models.safetensors_file import SafetensorsWeights

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint("llama2", tmp_path)
    return tmp_path


def shard(folder: Path) -> list[str]:
    """Cut model.safetensors into three shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    places = {key: names[i % 3] for i, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({k: tensors[k].clone() for k in tensors if places[k] == name}, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return names


def test_shards_equal_the_single_file(folder: Path) -> None:
    single = naive_logits(*loaded(folder), PROMPT)
    shard(folder)
    assert torch.equal(naive_logits(*loaded(folder), PROMPT), single)


def test_missing_shard_is_named(folder: Path) -> None:
    names = shard(folder)
    (folder / names[1]).unlink()
    with pytest.raises(ModelError, match=f"{names[1]} is missing"):
        loaded(folder)


def test_corrupt_index(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match=r"index\.json is corrupt"):
        loaded(folder)


def test_truncated_file_names_the_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n_header])
    spans = {k: v["data_offsets"] for k, v in header.items() if k != "__metadata__"}
    middle = sorted(spans, key=lambda k: spans[k][1])[len(spans) // 2]
    path.write_bytes(content[: 8 + n_header + spans[middle][1] - 10])
    with pytest.raises(ModelError, match=f"model.safetensors: tensor '{middle}' is cut off"):
        loaded(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or corrupt"),
        (b"\xff" * 40, "truncated or corrupt"),
        ((20).to_bytes(8, "little") + b"x" * 20, "header is not readable"),
    ],
)
def test_corrupt_file(content: bytes, message: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        loaded(folder)


def test_missing_tensor_and_wrong_shape_are_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != gone}, path)
    with pytest.raises(ModelError, match=r"tensor 'layers\.1\.mlp\.up_proj\.weight'"):
        loaded(folder)
    save_file(tensors | {gone: torch.zeros(96, 63)}, path)
    with pytest.raises(ModelError, match=rf"'{gone}' has shape \[96, 63\], expected \[96, 64\]"):
        loaded(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.ones(64, dtype=torch.int8)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' is of type I8"):
        loaded(folder)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no \.safetensors file"):
        SafetensorsWeights(tmp_path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", ""])
def test_prefixes_of_multimodal_checkpoints(prefix: str, folder: Path) -> None:
    single = naive_logits(*loaded(folder), PROMPT)
    tensors = load_file(folder / "model.safetensors")
    renamed = {k.replace("model.", prefix, 1): v for k, v in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    assert torch.equal(naive_logits(*loaded(folder), PROMPT), single)
