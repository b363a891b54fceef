"""`load`: where models come from, what is chosen for the device, and whether it fits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.checkpoints import checkpoint
from golden.naive import naive_generate, naive_logits

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError, ModelError
from kvarn.kernels import linear, native
from kvarn.kernels.linear.dynamic_int8 import Int8
from kvarn.models import fit, load, precision
from kvarn.models.fit import GIB, check_fits, weight_bytes
from kvarn.models.shapes import named_shape

CPU = torch.device("cpu")
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]


def test_random_weights_follow_the_seed(tiny_folder: Any) -> None:
    def logits(seed: int) -> torch.Tensor:
        options = {"model": tiny_folder("gemma2"), "load": "random", "dtype": "float32"}
        model = load.load(resolve(options | {"seed": seed}))
        assert model.tokenizer is None
        assert "seed" in model.source
        return naive_logits(model.decoder, model.spec, TOKENS)

    first = logits(1)
    assert torch.equal(first, logits(1))
    assert not torch.allclose(first, logits(2))
    assert first.isfinite().all() and first.std() > 0.1


def test_seconds_and_bytes_are_reported(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_compiled", lambda dtype: False)
    options = {"model": tiny_folder("llama"), "load": "random", "dtype": "float32"}
    model = load.load(resolve(options))
    assert set(model.seconds) == {"device", "find", "config", "tokenizer", "weights"}
    expected = weight_bytes(model.spec, "float32", "none", packed=True)
    assert abs(model.weight_bytes - expected) < 0.02 * expected


def test_folder_with_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    checkpoint("qwen3", tmp_path)
    model = load.load(resolve({"model": str(tmp_path), "dtype": "float32"}))
    assert model.spec.family == "qwen3"
    assert model.tokenizer is None
    assert model.source == str(tmp_path)


@pytest.mark.parametrize(
    ("options", "compiled", "mode"),
    [
        ({"deterministic": True}, False, "invariant"),
        ({"quantization": "int8"}, True, "int8"),
        ({}, False, "packed"),
        ({}, True, "native"),
        ({"deterministic": True}, True, "native"),
    ],
)
def test_form_of_the_linear_layers(
    options: dict[str, Any],
    compiled: bool,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_folder: Any,
) -> None:
    if compiled and not native.available():
        pytest.skip(native.reason())
    monkeypatch.setattr(precision, "_compiled", lambda dtype: compiled)
    given = {"model": tiny_folder("llama"), "load": "random", "dtype": "float32"}
    model = load.load(resolve(given | options))
    assert model.decoder.head.mode == mode
    assert model.decoder.layers[0].qkv.mode == mode


def test_int8_through_torch_cannot_be_batch_invariant(
    monkeypatch: pytest.MonkeyPatch, tiny_folder: Any
) -> None:
    monkeypatch.setattr(linear, "QUANTIZED", (Int8,))
    options = {"model": tiny_folder("llama"), "quantization": "int8", "deterministic": True}
    with pytest.raises(ConfigError, match="leave out one of the two"):
        load.load(resolve(options | {"load": "random"}))


@pytest.mark.parametrize(("fast", "name"), [(True, "bfloat16"), (False, "float32")])
def test_auto_dtype_is_recorded(
    fast: bool, name: str, monkeypatch: pytest.MonkeyPatch, tiny_folder: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "_seconds", lambda kind: 1.0 if kind == torch.float32 else 2.0)
    resolved = resolve({"model": tiny_folder("llama"), "load": "random"})
    assert load.load(resolved).dtype == getattr(torch, name)
    assert resolved.config.dtype == name
    assert resolved.origins["dtype"].source == ("device" if fast else "measured")


@pytest.mark.parametrize("device", ["tpu", "mps", "cuda:97"])
def test_device_that_is_not_there(device: str, tiny_folder: Any) -> None:
    options = {"model": tiny_folder("llama"), "load": "random", "device": device}
    with pytest.raises(ConfigError, match=device):
        load.load(resolve(options))


def test_what_does_not_fit_says_what_would() -> None:
    spec = named_shape("llama-3-8b")
    with pytest.raises(ModelError) as caught:
        check_fits(spec, "float32", "none", True, CPU, 16 * GIB, 24 * GIB)
    message = str(caught.value)
    assert "29.91 GiB in float32" in message and "16.00 GiB of 24.00 GiB are free" in message
    assert "dtype=bfloat16 (14.96 GiB)" in message and "quantization=int8" in message
    with pytest.raises(ModelError, match=r"at most 2\.\d billion weights in bfloat16"):
        check_fits(spec, "bfloat16", "none", True, CPU, 4 * GIB, 24 * GIB)
    check_fits(spec, "bfloat16", "none", True, CPU, 15 * GIB, 24 * GIB)


def test_load_checks_before_it_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "free_memory", lambda device, ranks: (GIB, 2 * GIB))
    with pytest.raises(ModelError, match=r"llama-3\.1-70b does not fit on cpu"):
        load.load(resolve({"model": "llama-3.1-70b", "load": "random", "dtype": "bfloat16"}))


def test_free_memory_is_plausible() -> None:
    free, total = fit.free_memory(CPU)
    assert 0 < free <= total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "qwen3-0.6b"}, "a shape without weights: use load=random"),
        ({"model": "no-such-model"}, "no model is called 'no-such-model'"),
        ({"model": "smollm2-135"}, "did you mean 'smollm2-135m'"),
        ({"model": "qwen3-0.6", "load": "random"}, "did you mean 'qwen3-0.6b'"),
        ({"model": "/no/such/folder"}, "no file or folder '/no/such/folder'"),
        ({"model": "missing.gguf"}, "no file or folder 'missing.gguf'"),
    ],
)
def test_unknown_models(options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load.load(resolve(options))


def test_empty_folder_and_broken_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        load.load(resolve({"model": str(tmp_path)}))
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        load.load(resolve({"model": str(tmp_path)}))


def test_smollm2_knows_the_capital_of_france() -> None:
    model = load.load(resolve({"model": "smollm2-135m", "dtype": "float32", "max_len": 256}))
    assert model.tokenizer is not None
    prompt = model.tokenizer.encode("The capital of France is")
    tokens = naive_generate(model.decoder, model.spec, prompt, 3)
    assert model.tokenizer.decode(tokens).startswith(" Paris")
    assert model.spec.eos_ids == (2,)
