"""How many drafts the target would accept, measured on text that the target wrote.

One pass of each model over a text gives chains of every length. Greedy: a chain reaches its k-th
token only if all before it are the target's own, so its drafts are judged on the text itself. At
temperature 1 the chance that k drafts are accepted is E[prod min(1, q(x) / p(x))] over texts x
that the target drew from p: sum over x of prod min(p, q). Neither needs to run a chain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvarn.core.errors import ConfigError
from kvarn.core.model import ModelSpec
from kvarn.models.decoder import Attend, Decoder
from kvarn.speculate.train.corpus import Sample


@dataclass(slots=True)
class Acceptance:
    """Of chains of each length, from every place that has text for the longest."""

    chains: int  #: places measured from
    survival: list[float]  #: chance that the first k drafts are all accepted, k = 1, 2, ...
    overlap: float  #: mean of sum min(p, q): acceptance at temperature 1 of a token drawn from q
    likeliest: float  #: the same of the drafter's most likely token: mean of p(argmax q)

    @property
    def by_position(self) -> list[float]:
        """Chance that draft k is accepted, given that those before it were."""
        before = [1.0, *self.survival]
        return [s / b if b else 0.0 for s, b in zip(self.survival, before)]


@torch.inference_mode()
def measure(
    target: Decoder, drafter: Decoder, samples: Sequence[Sample], greedy: bool, longest: int = 8
) -> Acceptance:
    """Acceptance of the drafter's chains on `samples`, texts written greedily or at temperature 1.

    Raises `ConfigError` where no text is `longest` tokens long.
    """
    chains, overlaps, likeliest = list[Tensor](), list[Tensor](), list[Tensor]()
    for sample in samples:
        wrote = sample.tokens[sample.prompt :].to(target.device)
        p, q = (_distributions(model, sample) for model in (target, drafter))
        if greedy:
            share = (q.argmax(1) == wrote).float()
        else:
            at = wrote.unsqueeze(1)
            share = (q.gather(1, at) / p.gather(1, at)).clamp_max(1.0).squeeze(1)
        overlaps.append(torch.minimum(p, q).sum(1))
        likeliest.append(p.gather(1, q.argmax(1, keepdim=True)).squeeze(1))
        if len(share) >= longest:
            chains.append(share.unfold(0, longest, 1).cumprod(1))
    if not chains:
        raise ConfigError(f"no text here has {longest} tokens after its prompt")
    survival = torch.cat(chains).mean(0).tolist()
    overlap, best = (torch.cat(one).mean().item() for one in (overlaps, likeliest))
    return Acceptance(sum(map(len, chains)), survival, overlap, best)


def _distributions(model: Decoder, sample: Sample) -> Tensor:
    """Probabilities [n, vocab] of each output token of a sample."""
    tokens = sample.tokens[:-1].to(model.device)
    positions = torch.arange(len(tokens), device=model.device)
    states = model.forward(tokens, positions, causal(model.spec))
    return model.logits(states[sample.prompt - 1 :]).softmax(1)


def causal(spec: ModelSpec) -> Attend:
    """An `attend` for one whole text of a model without windows or caps on its scores."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        z = scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=True)
        return z.squeeze(0).transpose(0, 1)

    return attend
