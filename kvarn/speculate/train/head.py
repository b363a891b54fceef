"""The acceptance head of SpecDec++ (arXiv 2405.19715): will the target accept this drafted token?

A few residual blocks over the drafter's last hidden state at the token, as the drafter consumes it:
so the answer comes one token late, and the newest token of a draft has none yet. Beside it stands
what the drafter itself thought of the token (ours: on a small drafter the hidden state alone knows
less than that), and the head begins as a repetition of it. Labels are soft:
min(1, p / q) of a drawn token, and whether it is the target's own choice of a likeliest one (half
of the texts each: requests are of both kinds). The head must see drafts, not only text: what it is
trained on is text in which most tokens are the drafter's ("token mixing").

The paper weighs rejections six times, and tunes the threshold; here the threshold follows measured
costs, so the head must say what is true: the weight is 1 unless told, and what it says is
calibrated on texts that it was not trained on, for likeliest tokens as greedy requests judge them
and for drawn ones apart, since one and the same state promises more to the former. Of likeliest
tokens for a request that samples (`draft_choice`) it says too much.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, silu

from kvarn.core.errors import ConfigError
from kvarn.kernels.residual_head import ResidualHead
from kvarn.speculate.train.corpus import Sample
from kvarn.speculate.train.network import Network

FILE = "acceptance.safetensors"  #: beside the drafter's own weights
KINDS = 2  #: of drafted tokens: the likeliest, and drawn ones


class AcceptanceHead(nn.Module):
    """Hidden states [n, hidden] of drafted tokens, and the drafter's own log-odds of each [n]
    -> log-odds [n] of their acceptance, as likeliest tokens (kind 0) or drawn ones (1)."""

    def __init__(self, hidden: int, depth: int = 3) -> None:
        """Begins as the drafter's own probability."""
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth))
        self.out = nn.Linear(hidden + 1, KINDS)
        nn.init.zeros_(self.out.weight)
        nn.init.ones_(self.out.weight[:, -1:])
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, own: Tensor, kind: int | Tensor = 0) -> Tensor:
        """See the class; `kind` of all, or [n] int64 of each."""
        x = self.features(x, own)
        if isinstance(kind, int):
            return x @ self.out.weight[kind] + self.out.bias[kind]
        odds: Tensor = self.out(x).gather(1, kind.unsqueeze(1))
        return odds.squeeze(1)

    def features(self, x: Tensor, own: Tensor) -> Tensor:
        """[n, hidden + 1]: what both kinds are linear in."""
        for block in self.blocks:
            x = x + silu(block(x))
        return torch.cat((x, own.unsqueeze(-1)), -1)

    @torch.inference_mode()
    def accepted(self, hidden: Tensor, own: Tensor, kind: int | Tensor = 0) -> Tensor:
        """Probabilities of acceptance [n], of hidden states of any dtype and of the drafter's own
        probabilities [n]."""
        weight = self.out.weight
        found: Tensor = self(hidden.to(weight.dtype), log_odds(own.to(weight)), kind).sigmoid()
        return found

    def captured(self, dtype: torch.dtype) -> ResidualHead:
        """What judges likeliest tokens in captured steps of a drafter of `dtype`, on a GPU."""
        layers: Any = self.blocks
        blocks = [(one.weight.detach().to(dtype), one.bias.detach()) for one in layers]
        head = ResidualHead(blocks, self.out.weight[0].detach(), self.out.bias[:1].detach())
        head.compile(dtype)
        return head


def log_odds(chance: Tensor) -> Tensor:
    """Of probabilities, bounded."""
    return chance.clamp(1e-4, 1 - 1e-4).logit()


def save_head(head: AcceptanceHead, folder: Path, about: dict[str, Any]) -> None:
    """Write the head beside its drafter; `about` says how it was trained."""
    state = {name: x.detach().bfloat16().contiguous() for name, x in head.state_dict().items()}
    save_file(state, folder / FILE, {"trained": json.dumps(about)})


def load_head(folder: Path, hidden: int, device: torch.device) -> AcceptanceHead:
    """The head of the drafter in `folder`; `ConfigError` where there is none, or none that fits."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(
            f"draft_length=specdec-pp stops drafts by an acceptance head, and the drafter in "
            f"{folder} has no {FILE}: train one (benchmarks/train_drafter.py head), or take "
            f"draft_length=survival or confidence"
        )
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    found = state["out.weight"].shape[1] - 1
    if found != hidden:
        raise ConfigError(
            f"{path} is for hidden states of {found} numbers, and the drafter's have {hidden}: "
            f"it belongs to another drafter"
        )
    head = AcceptanceHead(hidden, sum(name.endswith(".bias") for name in state) - 1)
    for name in ("out.weight", "out.bias"):  # of an older one: the same for both kinds
        state[name] = state[name].expand(KINDS, *state[name].shape[1:])
    head.load_state_dict(state)
    return head.to(device).eval()


def read_about(folder: Path) -> dict[str, Any]:
    """How the head in `folder` was trained."""
    with safe_open(folder / FILE, framework="pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["trained"])
    return found


@dataclass(slots=True)
class Lesson:
    """n drafted tokens of one text."""

    hidden: Tensor  #: [n, hidden] of the drafter, at each
    accepted: Tensor  #: [n] in [0, 1]
    confidence: Tensor  #: [n] the drafter's own probability of each


@torch.no_grad()
def lesson(
    network: Network, sample: Sample, greedy: bool, generator: torch.Generator, mixing: float = 0.15
) -> Lesson:
    """Drafts at every place of a text; `greedy`: the likeliest tokens, else drawn ones.

    The text that the head sees has the target's token with probability `mixing`, else the draft;
    only places where the draft stands count.
    """
    device, place = network.embed.device, sample.prompt
    tokens, top = sample.tokens.to(device), sample.top.to(device)
    wrote = tokens[place:]
    states = network(tokens[:-1].unsqueeze(0))[0, place - 1 :]
    q = network.logits(states).softmax(1)
    drafts = q.argmax(1) if greedy else _drawn(q, generator)
    confidence = q.gather(1, drafts.unsqueeze(1)).squeeze(1)
    if greedy:
        accepted = (drafts == top[:, 0]).float()
    else:
        named = top == drafts.unsqueeze(1)  # what is not among the labels has next to none
        p = (named * sample.logprobs.to(device).exp()).sum(1)
        accepted = (p / confidence).clamp_max(1.0)
    text = (torch.rand(len(wrote), generator=generator) < mixing).to(device)
    mixed = torch.cat((tokens[:place], torch.where(text, wrote, drafts)))
    mine = mixed[place:] == drafts
    hidden = network(mixed.unsqueeze(0))[0, place:]
    return Lesson(*(x[mine].cpu() for x in (hidden, accepted, confidence)))


def _drawn(q: Tensor, generator: torch.Generator) -> Tensor:
    """A token [n] of each distribution [n, vocab]; `torch.multinomial` takes a number for each."""
    u = torch.rand(len(q), 1, generator=generator).to(q.device)
    return torch.searchsorted(q.cumsum(1), u).squeeze(1).clamp_max(q.shape[1] - 1)


def lessons(network: Network, samples: Sequence[Sample], seed: int) -> list[Lesson]:
    """One of each text, half of them greedy."""
    generator = torch.Generator().manual_seed(seed)
    return [lesson(network, one, i % 2 == 0, generator) for i, one in enumerate(samples)]


def weighted_bce(odds: Tensor, accepted: Tensor, weight: float) -> Tensor:
    """Cross-entropy with soft labels; rejections count `weight` times. [nats]"""
    costs = -weight * (1 - accepted) * logsigmoid(-odds) - accepted * logsigmoid(odds)
    return costs.sum() / (weight * (1 - accepted) + accepted).sum()


def train_head(
    taught: Sequence[Lesson],
    *,
    depth: int = 1,
    weight: float = 1.0,
    epochs: int = 4,
    batch: int = 16,
    rate: float = 3e-4,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> AcceptanceHead:
    """A head that has seen every lesson `epochs` times, `batch` texts a step, cosine rate."""
    if not taught:
        raise ConfigError("there is no text to train the head on")
    torch.manual_seed(seed)
    head = AcceptanceHead(taught[0].hidden.shape[1], depth)
    steps = max(1, epochs * len(taught) // batch)
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = Random(seed)
    for step in range(steps):
        some = rng.sample(taught, min(batch, len(taught)))
        hidden, own, accepted = (
            torch.cat(x) for x in zip(*((s.hidden, s.confidence, s.accepted) for s in some))
        )
        loss = weighted_bce(head(hidden, log_odds(own)), accepted, weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(step, loss.item())
    for part in (head.out.weight.data, head.out.bias.data):
        part[1:] = part[0]  # until it is calibrated
    return head


def calibrate(head: AcceptanceHead, taught: Sequence[Sequence[Lesson]]) -> None:
    """Fit what the head says to lessons that it was not trained on, by kind: the log-odds of its
    first kind times a number, the drafter's own times another, and a third one."""
    weight, bias = head.out.weight.data, head.out.bias.data
    first, shift = weight[0].clone(), bias[0].clone()
    for kind, lessons_ in enumerate(taught):
        hidden, own, accepted = (
            torch.cat(x) for x in zip(*((s.hidden, s.confidence, s.accepted) for s in lessons_))
        )
        own = log_odds(own)
        with torch.no_grad():
            odds = head.features(hidden, own) @ first + shift
        a, b, c = _fitted(torch.stack((odds, own, torch.ones_like(own)), 1), accepted)
        weight[kind], bias[kind] = a * first, a * shift + c
        weight[kind, -1] += b


def _fitted(x: Tensor, accepted: Tensor) -> Tensor:
    """The factors [3] of the features x [n, 3] whose sums are the best log-odds."""
    by = torch.tensor([1.0, 0.0, 0.0], requires_grad=True)
    optimizer = torch.optim.LBFGS([by], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = weighted_bce(x @ by, accepted, 1.0)
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    return by.detach()


def auc_of_rejection(score: Tensor, accepted: Tensor) -> float:
    """Chance that a rejected token scores below an accepted one; labels are soft, ties half."""
    order = score.argsort()
    score, accepted = score[order], accepted[order].double()
    _, same = torch.unique_consecutive(score, return_inverse=True)
    groups = int(same[-1]) + 1
    rejected = torch.zeros(groups, dtype=torch.float64).index_add_(0, same, 1 - accepted)
    kept = torch.zeros(groups, dtype=torch.float64).index_add_(0, same, accepted)
    below = rejected.cumsum(0) - rejected / 2
    return float((kept * below).sum() / (kept.sum() * rejected.sum()))


def binary_kl(said: Tensor, accepted: Tensor) -> float:
    """Mean KL of Bernoulli(accepted) from Bernoulli(said) [nats]."""
    said, accepted = said.double().clamp(1e-6, 1 - 1e-6), accepted.double()
    pairs = ((accepted, said), (1 - accepted, 1 - said))
    return float(sum(torch.xlogy(a, a / b) for a, b in pairs).mean())  # type: ignore[union-attr]
