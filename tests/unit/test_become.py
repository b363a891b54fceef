"""A decoder takes over another's layers where its own are, or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from golden.naive import naive_logits

from kvarn.kernels import native
from kvarn.kernels.linear import Mode
from kvarn.models.decoder import Decoder
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.random_weights import RandomWeights
from kvarn.models.reader import tensors_of

TOKENS = [3, 1, 4, 1, 5, 9, 2, 6]
MODES = ["plain", "invariant", "native"]


def make(folder: str, seed: int, mode: Mode, share: Decoder | None = None) -> Decoder:
    spec = spec_from_config(read_json(Path(folder) / "config.json"), "tiny")
    weights = RandomWeights(seed, spec.norm_offset, torch.float32, "cpu")
    return Decoder(spec, weights, mode=mode, share=share)


def places(decoder: Decoder) -> list[int]:
    return [x.data_ptr() for x in tensors_of([decoder.layers, decoder.norm])]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_it_says_what_the_other_says(tiny_folder: Any, family: str, mode: Any) -> None:
    if mode == "native" and not native.available():
        pytest.skip(native.reason())
    one = make(tiny_folder(family), 0, mode)
    other = make(tiny_folder(family), 1, mode, share=one)
    before, wanted = (naive_logits(x, x.spec, TOKENS) for x in (one, other))
    at = places(one)
    one.become(other)
    assert torch.equal(naive_logits(one, one.spec, TOKENS), wanted)
    assert not torch.equal(before, wanted) and places(one) == at


def test_what_is_not_alike_changes_nothing(tiny_folder: Any) -> None:
    one, other = make(tiny_folder("llama"), 0, "plain"), make(tiny_folder("gemma2"), 1, "plain")
    before = naive_logits(one, one.spec, TOKENS)
    with pytest.raises(ValueError, match="not of the shape"):
        one.become(other)
    assert torch.equal(naive_logits(one, one.spec, TOKENS), before)
