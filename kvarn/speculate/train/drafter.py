"""Distil a target model into a drafter: forward KL to the distributions kept with the corpus.

Speculation accepts a token in proportion to the overlap of the two distributions, so the target's
whole distribution is the label, not the token that it happened to draw (DistillSpec, arXiv
2310.08461). The target's `TOP` most likely tokens count one by one, the rest as one bucket.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

from kvarn.core.errors import ConfigError
from kvarn.speculate.train.corpus import Sample
from kvarn.speculate.train.network import Network, autocast

POOL = 16  #: batches that sequences of like length are gathered from, against padding


@dataclass(slots=True)
class Schedule:
    """How long and how fast to learn."""

    epochs: float = 4.0
    batch: int = 16  #: sequences a step
    rate: float = 1e-3  #: AdamW's highest; reached after `warmup` steps, then half a cosine to 0
    warmup: int = 50
    decay: float = 0.01  #: weight decay
    clip: float = 1.0  #: norm of the gradient
    others: int = 2048  #: tokens drawn at random that stand for all that are nobody's label
    seed: int = 0


@dataclass(slots=True)
class Trained:
    """What came of it."""

    steps: int = 0
    tokens: int = 0  #: labels seen, epochs counted
    losses: list[float] = field(default_factory=list)  #: of each step [nats]


def train(
    network: Network,
    samples: Sequence[Sample],
    how: Schedule,
    progress: Callable[[Trained], None] = lambda so_far: None,
) -> Trained:
    """Train the network in place; the embedding stays as it is."""
    if not samples:
        raise ConfigError("there is no sample to train on")
    matrices = [p for p in network.parameters() if p.dim() > 1]
    norms = [p for p in network.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": how.decay},
        {"params": norms},
    ]
    optimizer = torch.optim.AdamW(groups, lr=how.rate, betas=(0.9, 0.95), weight_decay=0.0)
    n_steps = max(1, round(how.epochs * len(samples) / how.batch))
    generator = torch.Generator().manual_seed(how.seed)
    source, done = batches(samples, how.batch, how.seed), Trained()
    for step in range(n_steps):
        for group in optimizer.param_groups:
            group["lr"] = how.rate * _warmth(step, n_steps, how.warmup)
        batch = next(source)
        with autocast(network.embed.device):
            loss = distillation_loss(network, batch, how.others, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        clip_grad_norm_(network.parameters(), how.clip)
        optimizer.step()
        done.steps += 1
        done.tokens += sum(len(sample.top) for sample in batch)
        done.losses.append(loss.item())
        progress(done)
    return done


def _warmth(step: int, n_steps: int, warmup: int) -> float:
    """Share of the highest rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, n_steps - warmup))


def batches(samples: Sequence[Sample], size: int, seed: int) -> Iterator[list[Sample]]:
    """Endless batches of like length, each sample once an epoch (but for a rest below a batch)."""
    rng, size = Random(seed), min(size, len(samples))
    order = list(range(len(samples)))
    while True:
        rng.shuffle(order)
        made = list[list[Sample]]()
        for start in range(0, len(order), size * POOL):
            pool = sorted(
                (samples[i] for i in order[start : start + size * POOL]),
                key=lambda sample: len(sample.tokens),
            )
            made += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
        rng.shuffle(made)
        yield from made


def distillation_loss(
    network: Network, batch: Sequence[Sample], others: int, generator: torch.Generator
) -> Tensor:
    """Mean KL(target || drafter) over the batch's output positions [nats]."""
    device = network.embed.device
    tokens = pad_sequence([sample.tokens for sample in batch], batch_first=True)
    states = network(tokens.to(device))
    # the state at a token foretells the next one
    wanted = torch.cat(
        [states[i, s.prompt - 1 : s.prompt - 1 + len(s.top)] for i, s in enumerate(batch)]
    )
    labels = torch.cat([sample.top for sample in batch]).to(device)
    said = torch.cat([sample.logprobs for sample in batch]).to(device)
    chosen = logprobs_of(network, wanted, labels, others, generator)
    return divergence(said, chosen).mean()


def logprobs_of(
    network: Network, states: Tensor, labels: Tensor, others: int, generator: torch.Generator
) -> Tensor:
    """The drafter's logprobs [n, TOP] of the tokens `labels` [n, TOP] at states [n, hidden].

    Logits are computed for all labels and for `others` more tokens, each of which stands for many:
    the sum over the vocabulary is then an estimate without bias, for a small part of the work.
    """
    device = labels.device
    named, places = torch.unique(labels, return_inverse=True)
    rest = torch.ones(network.spec.vocab, dtype=torch.bool, device=device)
    rest[named] = False
    unnamed = rest.nonzero().squeeze(1)
    drawn = unnamed[torch.randperm(len(unnamed), generator=generator)[:others].to(device)]
    table = network.embed[torch.cat((named, drawn))].bfloat16()
    logits = (states.to(table.dtype) @ table.T).float()
    weight = torch.zeros(logits.shape[1], device=device)
    if len(drawn):
        weight[len(named) :] = math.log(len(unnamed) / len(drawn))
    return logits.gather(1, places) - (logits + weight).logsumexp(1, keepdim=True)


def divergence(target: Tensor, drafter: Tensor) -> Tensor:
    """KL of two distributions by logprobs of the same tokens [n, TOP], all others one bucket."""
    p, p_rest = target.exp(), _rest(target)
    q_rest = _rest(drafter)
    named = (p * (target - drafter)).sum(1)
    return named + p_rest * (p_rest.log() - q_rest.log())


def _rest(logprobs: Tensor) -> Tensor:
    return (1.0 - logprobs.exp().sum(1)).clamp_min(1e-5)
