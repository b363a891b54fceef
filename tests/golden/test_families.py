"""Every family on tiny random checkpoints against transformers: logits, decode, greedy tokens."""

from pathlib import Path

import pytest
import torch
from golden.checkpoints import CASES, PROMPT, checkpoint, loaded
from golden.naive import dense_attention, naive_generate, naive_logits
from torch import Tensor

from kvarn.core.model import ModelSpec

pytest.importorskip("transformers")


class DenseCache:
    """An `attend` that keeps all K and V of one sequence, for decoding token by token."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kv:
            k, v = (torch.cat(pair) for pair in zip(self.kv[layer], (k, v), strict=True))
        self.kv[layer] = (k, v)
        return dense_attention(q, k, v, self.spec, layer)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = checkpoint(case, tmp_path)
    decoder, spec = loaded(tmp_path)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT])).logits[0]
    prefill = naive_logits(decoder, spec, PROMPT)
    assert (prefill - expected).abs().max() < 1e-4
    attend = DenseCache(spec)
    with torch.inference_mode():
        for i, token in enumerate(PROMPT):
            hidden = decoder.forward(torch.tensor([token]), torch.tensor([i]), attend)
            row = decoder.logits(hidden)[0]
            assert (row - expected[i]).abs().max() < 1e-4, f"position {i}"


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    theirs = checkpoint(case, tmp_path)
    decoder, spec = loaded(tmp_path)
    expected = theirs.generate(
        torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )[0, len(PROMPT) :]
    assert naive_generate(decoder, spec, PROMPT, 12) == expected.tolist()


@pytest.mark.parametrize("case", CASES)
def test_spec_names_what_slides(case: str, tmp_path: Path) -> None:
    checkpoint(case, tmp_path)
    _, spec = loaded(tmp_path)
    layers = sorted(layer for group in spec.groups() for layer in group.layers)
    assert layers == list(range(spec.n_layers))
    sliding = {"mistral": 3, "qwen2-window": 2, "gemma2": 2, "gemma3": 3}.get(case, 0)
    assert sum(spec.window(i) is not None for i in range(spec.n_layers)) == sliding
    assert spec.eos_ids == (1,)
