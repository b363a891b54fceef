"""The naive decoder that golden tests compare with: everything from scratch for every token.

No cache, no pages, no batch: dense attention in fp32 over the whole sequence, each time. It shares
only the decoder's arithmetic with the engine, nothing of its scheduling, paging or sampling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvarn.core.model import ModelSpec
from kvarn.models.decoder import Attend, Decoder


def dense_attention(q: Tensor, k: Tensor, v: Tensor, spec: ModelSpec, layer: int) -> Tensor:
    """Causal attention in fp32: the last Tq of the Tk positions attend; q [Tq, Hq, d] -> z."""
    n_q, n_k = q.shape[0], k.shape[0]
    group = spec.n_heads // spec.n_kv_heads
    keys = k.float().repeat_interleave(group, dim=1)
    values = v.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * spec.scale
    if spec.attn_softcap is not None:
        scores = torch.tanh(scores / spec.attn_softcap) * spec.attn_softcap
    at_q = torch.arange(n_k - n_q, n_k, device=q.device).unsqueeze(1)
    at_k = torch.arange(n_k, device=q.device)
    visible = at_k <= at_q
    window = spec.window(layer)
    if window is not None:
        visible &= at_k > at_q - window
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)


def dense_attend(spec: ModelSpec) -> Attend:
    """An `attend` for one whole sequence at once."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_attention(q, k, v, spec, layer)

    return attend


@torch.inference_mode()
def naive_logits(decoder: Decoder, spec: ModelSpec, tokens: Sequence[int]) -> Tensor:
    """Logits [T, vocab] of every position of `tokens`, in one dense pass."""
    ids = torch.tensor(tokens, dtype=torch.int64, device=decoder.device)
    positions = torch.arange(len(tokens), device=decoder.device)
    hidden = decoder.forward(ids, positions, dense_attend(spec))
    return decoder.logits(hidden)


def naive_generate(
    decoder: Decoder, spec: ModelSpec, prompt: Sequence[int], n: int, eos: Sequence[int] = ()
) -> list[int]:
    """The greedy continuation of `prompt`: up to `n` tokens, the end token included."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(int(naive_logits(decoder, spec, tokens)[-1].argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]
