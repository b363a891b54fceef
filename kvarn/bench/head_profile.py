"""What each KV head is needed for: what recall loses when it alone sees sinks and recent positions.

A text ends with a question about its middle and the answer. The last rows are computed once with
every head whole, and once for each (layer, KV head) pair with that head streaming; all variants go
through the model together, beside the KV that the rows before them left. A pair's score is the KL
divergence of what is said of the answer's tokens from what the whole model says, over all texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvarn.bench.kept_study import needle, recall
from kvarn.core.model import ModelSpec
from kvarn.models.decoder import Decoder

FIRST_SEED = 1000  #: of the texts: not those that experiments ask
SENTENCES, PAIRS = 28, 24  #: of a story; lines of a list of names and numbers
JUDGED = 2  #: digits of an answer
Pair = tuple[int, int]  #: layer and KV head


@dataclass(slots=True)
class Text:
    """A document, a question and the begin of the answer."""

    tokens: list[int]
    rows: int  #: the last ones, after each of which comes a digit of the answer


def texts_of(tokenizer: Any, count: int) -> list[Text]:
    """Half of them a number in a story, half a list of names and numbers."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        if seed % 2:
            document, question, value = recall(seed, PAIRS)
        else:
            document, question, value = needle(seed, SENTENCES)[:3]
        ids = tokenizer.encode(document + question, add_special=False)
        answer = tokenizer.encode(f" {value}", add_special=False)
        if not tokenizer.decode(answer[:1]).strip():  # the space by itself
            ids, answer = [*ids, answer[0]], answer[1:]
        rows = min(JUDGED, len(answer))
        found.append(Text([*ids, *answer[: rows - 1]], rows))
    return found


@dataclass(slots=True)
class _Variants:
    """Attention of r rows of V variants over n earlier positions and the variant's own rows."""

    spec: ModelSpec
    streams: Sequence[Pair | None]  #: by variant; None: no head
    sinks: int
    window: int
    rows: int
    keys: dict[int, Tensor] = field(default_factory=dict)  #: by layer: [n, Hkv, d]
    values: dict[int, Tensor] = field(default_factory=dict)

    def first(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keep what the rows before leave: plain causal attention."""
        self.keys[layer], self.values[layer] = k.clone(), v.clone()
        per_kv = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(per_kv, 1).transpose(0, 1) for x in (k, v))
        z = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k, v, is_causal=True, scale=self.spec.scale
        )
        return z.transpose(0, 1)

    def last(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each variant's rows, q [V r, Hq, d]."""
        kv_heads, dim = k.shape[1:]
        n, r, count = len(self.keys[layer]), self.rows, len(self.streams)
        q = q.view(count, r, kv_heads, -1, dim)
        own = [x.view(count, r, kv_heads, dim) for x in (k, v)]
        before = torch.einsum("vrhgd,nhd->vhgrn", q, self.keys[layer])
        beside = torch.einsum("vrhgd,vshd->vhgrs", q, own[0])
        scores = torch.cat([before, beside], -1) * self.spec.scale
        at, row = torch.arange(n + r), torch.arange(n, n + r).unsqueeze(1)
        scores.masked_fill_(at > row, -torch.inf)
        hidden = (at <= row - self.window) & (at >= self.sinks)
        for variant, pair in enumerate(self.streams):
            if pair is not None and pair[0] == layer:
                scores[variant, pair[1]].masked_fill_(hidden, -torch.inf)
        weights = scores.softmax(-1)
        z = torch.einsum("vhgrn,nhd->vrhgd", weights[..., :n], self.values[layer])
        z = z + torch.einsum("vhgrs,vshd->vrhgd", weights[..., n:], own[1])
        return z.reshape(count * r, -1, dim)


def losses(
    decoder: Decoder, text: Text, streams: Sequence[Pair], sinks: int, window: int
) -> list[float]:
    """KL divergence of the answer's tokens [nats a token], by the pair that streams."""
    rows, tokens = text.rows, torch.tensor(text.tokens)
    n, count = len(tokens) - rows, len(streams) + 1
    variants = _Variants(decoder.spec, [None, *streams], sinks, window, rows)
    with torch.inference_mode():
        decoder.forward(tokens[:n], torch.arange(n), variants.first)
        at = torch.arange(n, n + rows).repeat(count)
        hidden = decoder.forward(tokens[n:].repeat(count), at, variants.last)
        said = decoder.logits(hidden).log_softmax(-1).view(count, rows, -1)
    divergence = (said[0].exp() * (said[0] - said[1:])).sum(-1).mean(-1)
    return [max(0.0, float(x)) for x in divergence]


def profile(decoder: Decoder, texts: Sequence[Text], sinks: int, window: int) -> list[list[float]]:
    """Mean losses over the texts, by layer and KV head."""
    spec = decoder.spec
    pairs = [(layer, head) for layer in range(spec.n_layers) for head in range(spec.n_kv_heads)]
    total = [0.0] * len(pairs)
    for text in texts:
        for i, loss in enumerate(losses(decoder, text, pairs, sinks, window)):
            total[i] += loss / len(texts)
    heads = spec.n_kv_heads
    return [total[at : at + heads] for at in range(0, len(total), heads)]
