"""Head profiles: what is measured, and the one that comes with kvarn."""

import json
from typing import Any

import torch
from golden.naive import dense_attend
from golden.test_sparsity import make_engine
from torch import Tensor

from kvarn.bench.head_profile import Text, losses, profile
from kvarn.sparse.profile import SHIPPED

TOKENS = [(11 * i * i + 5 * i) % 97 for i in range(60)]
PAIRS = [(layer, head) for layer in range(3) for head in range(2)]


def test_losses_are_those_of_masked_rows(tiny_folder: Any) -> None:
    """All variants at once give what each gives in a pass of its own."""
    engine = make_engine(tiny_folder("llama"))
    decoder, spec = engine.executor.decoder, engine.spec  # type: ignore[attr-defined]
    rows, sinks, window, n = 3, 4, 10, len(TOKENS)
    at = torch.arange(n)

    def said(pair: tuple[int, int] | None) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = (at <= at.unsqueeze(1)).repeat(spec.n_kv_heads, 1, 1)
            if pair is not None and pair[0] == layer:
                near = (at > at.unsqueeze(1) - window) | (at < sinks)
                seen[pair[1], n - rows :] &= near[n - rows :]
            keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, keys) * spec.scale
            scores = scores.masked_fill(~seen.repeat_interleave(2, 0), -torch.inf)
            return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)

        with torch.inference_mode():
            hidden = decoder.forward(torch.tensor(TOKENS), at, attend)
            found: Tensor = decoder.logits(hidden[n - rows :]).log_softmax(-1)
        return found

    whole = said(None)
    with torch.inference_mode():
        dense = decoder.forward(torch.tensor(TOKENS), at, dense_attend(spec))[n - rows :]
        torch.testing.assert_close(whole, decoder.logits(dense).log_softmax(-1))
    wanted = [float((whole.exp() * (whole - said(pair))).sum(-1).mean()) for pair in PAIRS]
    found = losses(decoder, Text(TOKENS, rows), PAIRS, sinks, window)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-6, rtol=1e-3)
    assert min(found) > 1e-6


def test_a_window_that_holds_all_loses_nothing(tiny_folder: Any) -> None:
    decoder = make_engine(tiny_folder("llama")).executor.decoder  # type: ignore[attr-defined]
    scores = profile(decoder, [Text(TOKENS, 2)], sinks=0, window=60)
    assert len(scores) == 3 and max(map(max, scores)) < 1e-9


def test_the_shipped_profile_says_how_it_was_made() -> None:
    for file in SHIPPED.glob("*.json"):
        said = json.loads(file.read_text())
        assert said.keys() >= {"model", "measure", "texts", "first_seed", "sinks", "window"}
        assert max(map(max, said["scores"])) > 0
