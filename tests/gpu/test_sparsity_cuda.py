"""Compaction on the GPU: captured decode steps over what stays equal the masked dense pass."""

from typing import Any

import pytest
import torch
from golden.test_sparsity import ONE_SHOT, PROMPT, TEXT, generate, make_engine, masked_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("graphs", ["off", "on"])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_compaction_is_a_mask(tiny_folder: Any, name: str, graphs: str, overlap: str) -> None:
    engine = make_engine(
        tiny_folder("llama"), sparsity=f"{name}:budget=41{TEXT.get(name, '')}", device="cuda",
        graphs=graphs, overlap=overlap, prefix="none",
    )  # fmt: skip
    tokens, kept = generate(engine, PROMPT, 60)
    assert kept is not None
    logits = masked_logits(engine, PROMPT + tokens, kept)
    assert logits[len(PROMPT) - 1 : -1].argmax(-1).tolist() == tokens
    assert engine.control.check_integrity() == []
    engine.close()
