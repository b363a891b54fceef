"""Named points: they tell the truth, may change it, and cost nothing when nobody looks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.naive import dense_attend, naive_logits
from torch import Tensor

from kvarn.core.model import ModelSpec
from kvarn.models.decoder import Decoder
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.points import POINTS, WHOLE_MODEL
from kvarn.models.random_weights import RandomWeights

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
FAMILIES = ["llama", "qwen3", "gemma2"]


def make(folder: str, dtype: torch.dtype = torch.float32) -> tuple[Decoder, ModelSpec]:
    spec = spec_from_config(read_json(Path(folder) / "config.json"), "tiny")
    weights = RandomWeights(0, spec.norm_offset, dtype, "cpu")
    return Decoder(spec, weights, dtype=dtype), spec


def tapped(decoder: Decoder, spec: ModelSpec, tap: Any) -> Tensor:
    ids = torch.tensor(TOKENS)
    hidden = decoder.forward(ids, torch.arange(len(ids)), dense_attend(spec), tap)
    return decoder.logits(hidden, tap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_identity_taps_leave_logits_bit_equal(
    family: str, dtype: torch.dtype, tiny_folder: Any
) -> None:
    decoder, spec = make(tiny_folder(family), dtype)
    plain = naive_logits(decoder, spec, TOKENS)
    assert torch.equal(tapped(decoder, spec, lambda point, layer, x: x.clone()), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_points_give_true_values(family: str, tiny_folder: Any) -> None:
    decoder, spec = make(tiny_folder(family))
    seen: dict[tuple[str, int], Tensor] = {}

    def record(point: str, layer: int, x: Tensor) -> Tensor:
        assert (point, layer) not in seen
        seen[point, layer] = x.clone()
        return x

    logits = tapped(decoder, spec, record)
    for i in range(spec.n_layers):
        mid = seen["resid_pre", i] + seen["attn_out", i]
        torch.testing.assert_close(mid, seen["resid_mid", i])
        torch.testing.assert_close(mid + seen["mlp_out", i], seen["resid_post", i])
        before = seen["embed", WHOLE_MODEL] if i == 0 else seen["resid_post", i - 1]
        assert torch.equal(seen["resid_pre", i], before)
        z = dense_attend(spec)(i, seen["q_rot", i], seen["k_rot", i], seen["v", i])
        assert torch.equal(z, seen["z", i])
    assert torch.equal(seen["logits", WHOLE_MODEL], logits)
    assert torch.equal(decoder.head(seen["final_norm", WHOLE_MODEL]).argmax(-1), logits.argmax(-1))


def test_every_listed_point_fires_and_no_other(tiny_folder: Any) -> None:
    decoder, spec = make(tiny_folder("llama"))
    fired: set[tuple[str, int]] = set()
    shapes: dict[str, tuple[int, ...]] = {}

    def record(point: str, layer: int, x: Tensor) -> Tensor:
        fired.add((point, layer))
        shapes[point] = tuple(x.shape)
        return x

    tapped(decoder, spec, record)
    layers = {True: range(spec.n_layers), False: [WHOLE_MODEL]}
    assert fired == {(p.name, i) for p in POINTS for i in layers[p.per_layer]}
    sizes = {
        "T": len(TOKENS),
        "R": len(TOKENS),
        "hidden": spec.hidden,
        "heads": spec.n_heads,
        "kv_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "ffn": spec.ffn,
        "vocab": spec.vocab,
    }
    for point in POINTS:
        named = point.shape.strip("[]").split(", ")
        assert shapes[point.name] == tuple(sizes[name] for name in named), point.name


@pytest.mark.parametrize("point", [p.name for p in POINTS])
def test_a_tap_may_change_what_follows(point: str, tiny_folder: Any) -> None:
    decoder, spec = make(tiny_folder("llama"))
    plain = naive_logits(decoder, spec, TOKENS)

    def change(name: str, layer: int, x: Tensor) -> Tensor:
        return x * 0.5 if name == point and layer in (WHOLE_MODEL, 1) else x

    assert not torch.allclose(tapped(decoder, spec, change), plain)


def test_a_changed_residual_is_what_later_layers_see(tiny_folder: Any) -> None:
    decoder, spec = make(tiny_folder("llama"))
    last = spec.n_layers - 1
    seen = {}

    def wipe(point: str, layer: int, x: Tensor) -> Tensor:
        if point == "resid_post" and layer == last:
            return torch.ones_like(x)
        seen[point] = x
        return x

    tapped(decoder, spec, wipe)
    torch.testing.assert_close(seen["final_norm"], decoder.norm.expand_as(seen["final_norm"]))
