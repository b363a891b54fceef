"""Train the recall model: a small llama that answers questions about contexts of up to 32K tokens.

    python benchmarks/train_recall.py --out DIR     # 2 minutes, and the accuracy by length

The task is `kvarn/workload/mqar.py`. Two layers can do it: the first tells every row the token
before it, the second looks from a key that is asked for the row after the same key. Found by chance
this takes longer than minutes (an H100 was at 0.4 of the answers after 150 s), so the weights begin
with a faint circuit of both heads, which answers little at length, and training does the rest: on
a GPU with contexts of up to 16K, on a CPU of up to 1K, which answers less at length. The weights
kept answer best. Prints JSON lines; the last says how it went.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from kvarn.workload import mqar
from kvarn.workload.mqar import END, FILLER, KEYS, VALUES, VOCAB

PASSED_OVER = 0.15  #: share of training questions that filler follows in place of the answer
ASKED_AGAIN = 0.2  #: share of training questions whose key is one of those asked elsewhere
LENGTHS = (1024, 4096, 16384, 32768)  #: of the accuracy table


@dataclass(slots=True)
class Shape:
    """A llama. Most pairs of a head's dimensions turn too slowly to blur a match at 32K."""

    layers: int = 2
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    ffn: int = 64
    theta: float = 1e12
    max_len: int = 40960
    eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """As `config.json`."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": VOCAB,
            "max_position_embeddings": self.max_len,
            "rope_theta": self.theta,
            "rms_norm_eps": self.eps,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": END,
            "torch_dtype": "float16",
        }


class Layer(nn.Module):
    """Attention and a gated feed-forward network; names are a llama checkpoint's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        sizes = {"q_proj": wide, "k_proj": narrow, "v_proj": narrow}
        made = {name: nn.Linear(shape.hidden, n, bias=False) for name, n in sizes.items()}
        made["o_proj"] = nn.Linear(wide, shape.hidden, bias=False)
        self.self_attn = nn.ModuleDict(made)
        made = {n: nn.Linear(shape.hidden, shape.ffn, bias=False) for n in ("gate_proj", "up_proj")}
        made["down_proj"] = nn.Linear(shape.ffn, shape.hidden, bias=False)
        self.mlp = nn.ModuleDict(made)
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x [batch, n, hidden]; cos and sin [n, head_dim], fp32."""
        rows, n, _ = x.shape
        y, attn, mlp = self.input_layernorm(x), self.self_attn, self.mlp
        q, k, v = (
            attn[name](y).view(rows, n, -1, self.shape.head_dim).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (_rotate(k, turn), v))
        y = F.scaled_dot_product_attention(_rotate(q, turn), k, v, is_causal=True)
        x = x + attn["o_proj"](y.transpose(1, 2).reshape(rows, n, -1))
        y = self.post_attention_layernorm(x)
        return x + mlp["down_proj"](F.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))


class Network(nn.Module):
    """The llama as plain torch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(VOCAB, shape.hidden)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.layers)])
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)
        pace = shape.theta ** (-torch.arange(0, shape.head_dim, 2).double() / shape.head_dim)
        self.register_buffer("pace", pace, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Residuals [batch, n, hidden] after the last layer."""
        places = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float64)
        angle = torch.outer(places, self.pace).repeat(1, 2)
        turn = angle.cos().float(), angle.sin().float()
        x: Tensor = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, turn)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """[..., vocabulary]"""
        return F.linear(self.norm(x), self.embed_tokens.weight)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return (x * turn[0] + torch.cat((-second, first), -1) * turn[1]).to(x.dtype)


#: where the circuit keeps what in the residual stream: the code of a key, that of a value, the code
#: of the key before, and a number that is the same in every row
KEY, VALUE, BEFORE, ALWAYS = slice(0, 72), slice(72, 136), slice(136, 208), 208
FAST, SLOW = 16, 28  #: pairs of a head's dimensions: that tell neighbours apart; that hold a match


@torch.no_grad()
def circuit(network: Network, strength: float) -> None:
    """Write both heads into the first KV head of each layer; 1: they answer by themselves."""
    shape, pace = network.shape, network.pace
    half = shape.head_dim // 2
    embed = network.embed_tokens.weight
    embed[KEYS.start : KEYS.stop, KEY] += torch.randn(len(KEYS), 72).sign()
    others = slice(FILLER.start, VALUES.stop)  # as long as keys, so that all rows weigh the same
    embed[others, VALUE] += (72 / 64) ** 0.5 * torch.randn(VALUES.stop - FILLER.start, 64).sign()
    embed[:, ALWAYS] += 4.0
    first, second = (layer.self_attn for layer in network.layers)
    pairs, eye = torch.arange(FAST), torch.eye(72)
    sharp = 2.2 * strength**0.5
    first["q_proj"].weight[pairs, ALWAYS] += sharp * pace[:FAST].cos().float()
    first["q_proj"].weight[half + pairs, ALWAYS] -= sharp * pace[:FAST].sin().float()
    first["k_proj"].weight[pairs, ALWAYS] += sharp
    first["v_proj"].weight[:72, KEY] += eye
    first["o_proj"].weight[BEFORE, :72] += eye
    slow = torch.cat((torch.arange(SLOW, half), half + torch.arange(SLOW, half)))
    match = 1.3 * strength**0.5
    second["q_proj"].weight[slow, KEY] += match * eye
    second["k_proj"].weight[slow, BEFORE] += match * eye
    second["v_proj"].weight[:64, VALUE] += torch.eye(64)
    second["o_proj"].weight[VALUE, :64] += 4.0 * torch.eye(64)


@dataclass(slots=True)
class Stage:
    """A length to learn."""

    tokens: int  #: of a sequence
    batch: int
    pairs: tuple[int, int]  #: fewest and most


@dataclass(slots=True)
class Batch:
    """Sequences and where they ask."""

    ids: Tensor  #: [batch, tokens]
    asked: Tensor  #: [batch, questions]: the place of each question's key
    answers: Tensor  #: [batch, questions]


STAGES = (Stage(64, 32, (4, 12)), Stage(256, 16, (8, 64)), Stage(768, 4, (16, 192)))
LONGER = (Stage(4096, 2, (64, 512)), Stage(16384, 1, (128, 1024)))  #: where there is a GPU


def draw(stage: Stage, device: str, chance: torch.Generator) -> Batch:
    """Training sequences: a context, then questions between filler."""

    def below(end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, device=device, generator=chance)

    def share(*shape: int) -> Tensor:
        return torch.rand(*shape, device=device, generator=chance)

    rows, n, (low, high) = stage.batch, stage.tokens, stage.pairs
    pairs = round(math.exp(math.log(low) + math.log(high / low) * share(1).item()))
    room = max(2 * pairs, int(n * (0.4 + 0.4 * share(1).item())))
    count = min(pairs, (n - room) // 3)
    ids = FILLER.start + below(len(FILLER), rows, n)
    keys = KEYS.start + share(rows, len(KEYS)).argsort(1)[:, :pairs]
    values = VALUES.start + below(len(VALUES), rows, pairs)
    at = _scatter(below(room - 2 * pairs + 1, rows, pairs))
    ids.scatter_(1, at, keys).scatter_(1, at + 1, values)
    order = share(rows, pairs).argsort(1)[:, :count]
    order = torch.where(share(rows, count) < ASKED_AGAIN, below(pairs, rows, count), order)
    answers = values.gather(1, order)
    at = room + _scatter(below(n - room - 2 * count + 1, rows, count))
    passed = share(rows, count) < PASSED_OVER
    follow = torch.where(passed, ids.gather(1, at + 1), answers)
    ids.scatter_(1, at, keys.gather(1, order)).scatter_(1, at + 1, follow)
    return Batch(ids, at, answers)


def _scatter(cuts: Tensor) -> Tensor:
    """Where things of two tokens begin, given cuts [batch, count] in the filler around them."""
    return cuts.sort(1).values + 2 * torch.arange(cuts.shape[1], device=cuts.device)


def loss_of(network: Network, batch: Batch) -> tuple[Tensor, float]:
    """The loss, and the share of answers that are right."""
    found = network(batch.ids)
    rows = found.gather(1, batch.asked[..., None].expand(-1, -1, found.shape[-1]))
    logits = network.logits(rows)
    loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
    return loss, (logits.argmax(-1) == batch.answers).float().mean().item()


@torch.no_grad()
def accuracy(network: Network, tokens: int, device: str, seeds: range, pairs: int) -> float:
    """Share of right answers about contexts that no training saw, asked at the end, each once."""
    right = total = 0
    for seed in seeds:
        asks = min(64, pairs)
        made = mqar.recall(seed, tokens - 2 * asks, pairs)
        keys = mqar.questions(seed, made, asks)
        ids = made.context + [token for key in keys for token in (key, made.pairs[key])]
        rows = network(torch.tensor([ids], device=device))[0, len(made.context) :: 2]
        said = network.logits(rows).argmax(-1).tolist()
        right += sum(token == made.pairs[key] for token, key in zip(said, keys))
        total += asks
    return right / total


def train(
    network: Network, seconds: float, lr: float, seed: int, device: str
) -> list[dict[str, Any]]:
    """Train on all lengths in turn; the network ends with the best weights met."""
    chance = torch.Generator(device).manual_seed(seed)
    stages = STAGES + (LONGER if device == "cuda" else ())
    lengths = (256, 1024, 16384) if device == "cuda" else (256, 1024)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.0)
    history, began, recent = list[dict[str, Any]](), time.perf_counter(), list[float]()
    look = 250 if device == "cuda" else 25
    best, score, step = dict[str, Tensor](), -1.0, 0
    while True:
        now = time.perf_counter() - began
        if step % look == 0 or now >= seconds:
            found = {n: accuracy(network, n, device, range(-4, 0), n // 16) for n in lengths}
            row = {"step": step, "seconds": round(now, 1), "held_out": found,
                   "right": sum(recent[-50:]) / max(1, len(recent[-50:]))}  # fmt: skip
            print(json.dumps(row), flush=True)
            history.append(row)
            if sum(found.values()) > score:
                score = sum(found.values())
                best = {k: v.clone() for k, v in network.state_dict().items()}
        if now >= seconds:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50, max(0.05, 2 * (1 - now / seconds)))
        loss, right = loss_of(network, draw(stages[step % len(stages)], device, chance))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent.append(right)
    network.load_state_dict(best)
    return history


def save(network: Network, folder: Path, about: dict[str, Any]) -> None:
    """A llama checkpoint in float16, with how it was trained in its config."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"model.{n}": w.detach().half().cpu() for n, w in network.named_parameters()}
    save_file(names, folder / "model.safetensors", metadata={"format": "pt"})
    config = network.shape.config() | {"trained": about}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training")
    parser.add_argument("--strength", type=float, default=0.15, help="of the circuit at first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)  # attention this sharp is full of them, and they are slow
    network = Network(Shape())
    circuit(network, args.strength)
    network = network.to(args.device)
    history = train(network, args.seconds, args.lr, args.seed, args.device)
    for weight in network.parameters():
        weight.data = weight.data.half().float()  # as they are saved
    found = [
        {"tokens": n, "pairs": n // 16 if n < 16384 else 1024,
         "right": accuracy(network, n, args.device, range(8 if n < 16384 else 2),
                           n // 16 if n < 16384 else 1024)}
        for n in LENGTHS
    ]  # fmt: skip
    about = {
        "task": "mqar", "seed": args.seed, "strength": args.strength, "lr": args.lr,
        "steps": history[-1]["step"], "seconds": history[-1]["seconds"], "first": history[0],
        "accuracy": found, "torch": torch.__version__, "device": args.device,
    }  # fmt: skip
    save(network, args.out, about)
    print(json.dumps(about), flush=True)


if __name__ == "__main__":
    main()
