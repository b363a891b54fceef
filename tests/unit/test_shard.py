"""Who holds what: every head, neuron and token id once, KV heads beside their query heads."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.models.random_weights import RandomWeights
from kvarn.models.shapes import SHAPES, named_shape
from kvarn.models.shard import ShardedWeights, holding, local_spec, part_of, split, widths

SPEC = ModelSpec("llama", "tiny", 2, 48, 64, 12, 4, 16, 97, 128)


@given(st.integers(0, 500), st.integers(1, 40), st.sampled_from([1, 2, 32]))
def test_split_covers_once_and_evenly(n: int, shares: int, unit: int) -> None:
    parts = split(n * unit, shares, unit)
    assert [i for part in parts for i in part] == list(range(n * unit))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= unit
    assert all(size % unit == 0 for size in sizes)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 64))
def test_heads_stay_together(n_kv: int, per_kv: int, ranks: int) -> None:
    spec = replace(SPEC, n_heads=n_kv * per_kv, n_kv_heads=n_kv, ffn=256)
    if ranks > spec.n_heads:
        with pytest.raises(ConfigError, match=f"tp={spec.n_heads} is the most"):
            holding(spec, 0, ranks)
        return
    held = [holding(spec, rank, ranks) for rank in range(ranks)]
    assert [head for mine in held for head in mine.q_heads] == list(range(spec.n_heads))
    assert [i for mine in held for i in mine.ffn] == list(range(spec.ffn))
    assert [i for mine in held for i in mine.vocab] == list(range(spec.vocab))
    for mine in held:
        assert {head // per_kv for head in mine.q_heads} == set(mine.kv_heads)
        local = local_spec(spec, mine)
        assert local.n_heads % local.n_kv_heads == 0
        assert local.groups()[0].n_kv_heads == len(mine.kv_heads)


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_of_quantised_files_stay_whole(name: str) -> None:
    """Of every known shape, on 2 to 8 ranks: neurons in multiples of 32, evenly."""
    spec = named_shape(name)
    for ranks in range(2, min(spec.n_heads, 8) + 1):
        sizes = [len(holding(spec, rank, ranks).ffn) for rank in range(ranks)]
        assert all(size % 32 == 0 for size in sizes)
        assert max(sizes) < 1.26 * min(sizes)


def test_one_rank_holds_everything() -> None:
    assert local_spec(SPEC, holding(SPEC, 0, 1)) == SPEC
    assert widths(97, 3) == [33, 32, 32]


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_parts_make_up_the_whole(ranks: int) -> None:
    """Each rank's product with its part of a layer, put together, is the product with all of it."""
    source = RandomWeights(0, 0.0, torch.float64, "cpu")
    held = [holding(SPEC, rank, ranks) for rank in range(ranks)]
    parts = [ShardedWeights(source, SPEC, mine) for mine in held]
    x = torch.randn(5, SPEC.hidden, dtype=torch.float64)
    up, down = "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight"
    whole = (x @ source.read(up, (64, 48)).T) @ source.read(down, (48, 64)).T
    summed = sum((x @ p.read(up, (64, 48)).T) @ p.read(down, (48, 64)).T for p in parts)
    assert torch.allclose(whole, torch.as_tensor(summed))
    head = torch.cat([p.read("lm_head.weight", (97, 48)) for p in parts])
    assert torch.equal(head, source.read("lm_head.weight", (97, 48)))
    bias = "layers.0.self_attn.o_proj.bias"
    total = sum(p.read(bias, (48,)) for p in parts)
    assert torch.equal(torch.as_tensor(total), source.read(bias, (48,)))
    embed = parts[-1].read("embed_tokens.weight", (97, 48))
    assert embed.shape == (97, 48)


def test_norms_are_whole() -> None:
    mine = holding(SPEC, 1, 2)
    assert part_of("layers.1.input_layernorm.weight", (48,), SPEC, mine) is None
    assert part_of("layers.1.self_attn.q_norm.weight", (16,), SPEC, mine) is None
