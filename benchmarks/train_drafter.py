"""Train the drafter of SmolLM2-135M-Instruct on its own text, and measure it.

    python benchmarks/train_drafter.py corpus WORK    # the target writes
    python benchmarks/train_drafter.py train WORK     # distil
    python benchmarks/train_drafter.py measure WORK   # acceptance on topics never trained on
    python benchmarks/train_drafter.py head WORK      # its acceptance head
    python benchmarks/train_drafter.py calibrate WORK # the head that there is, on other text

`WORK` is a folder for text. On an NVIDIA GPU where there is one: give `--minutes`,
`--epochs` and `--batch` that fit. The drafter goes to `--folder`, by default the one that kvarn
ships, and measurements to `--json`.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import isotonic_regression

from kvarn.bench import record
from kvarn.core.config import resolve
from kvarn.models.gguf import GGUFWeights, spec_from_gguf
from kvarn.models.load import load, locate
from kvarn.speculate.train import corpus
from kvarn.speculate.train import head as head_
from kvarn.speculate.train.acceptance import measure
from kvarn.speculate.train.drafter import Schedule, Trained, train
from kvarn.speculate.train.load import load_drafter, load_network
from kvarn.speculate.train.network import Network, from_target, save

TARGET = "smollm2-135m"
ROOT = Path(__file__).resolve().parent.parent
LESSON = ("confidence", "accepted", "hidden")  #: fields
#: held-out text by name -> temperature it is written at
HELD_OUT = {"greedy": 0.0, "sampled": 1.0}
APART = "apart-"  #: before the names of texts on the topics of training, to calibrate the head with


def write_corpus(args: argparse.Namespace) -> None:
    """Text to train on for `--minutes`, then the texts to calibrate and to measure with."""
    from kvarn.engine.llm import LLM

    teacher = whole_target(args)
    options = {"max_queue": 1 << 20, "max_seqs": args.seqs, "kv_memory": args.kv_memory}
    llm, began = LLM(TARGET, threads=args.threads, **options), time.perf_counter()

    def go_on(made: int) -> bool:
        seconds = time.perf_counter() - began
        print(f"{made} tokens, {made / seconds:.0f} a second", flush=True)
        return seconds < 60 * args.minutes

    corpus.generate(
        llm, teacher, args.work / "train", 10_000, per_shard=args.per_shard, go_on=go_on
    )
    for seed, (name, heat) in enumerate(HELD_OUT.items(), 1):
        for at, (folder, held_out) in enumerate(((name, True), (f"{APART}{name}", False))):
            corpus.generate(
                llm, teacher, args.work / folder, 1, held_out=held_out, per_shard=args.held_out,
                max_tokens=128, temperatures={heat: 1.0}, seed=1_000_000 * (seed + 2 * at),
            )  # fmt: skip
    llm.close()


def from_layers(layers: list[int] | None, ffn: int | None) -> Network:
    """Layers of the target that can be trained; None: all of them, whole."""
    file = locate(TARGET).gguf()
    if file is None:
        raise SystemExit(f"{TARGET} is not a .gguf file here")
    spec = spec_from_gguf(file, TARGET)
    layers = list(range(spec.n_layers)) if layers is None else layers
    return from_target(spec, GGUFWeights(file, spec), layers, ffn or spec.ffn)


def whole_target(args: argparse.Namespace) -> Network:
    """The target, to label text with."""
    return from_layers(None, None).to(args.device)


def train_drafter(args: argparse.Namespace) -> None:
    """Distil the corpus into a drafter and save it with its history."""
    samples = corpus.read(args.work / "train")
    network = from_layers(args.layers, args.ffn).to(args.device)
    if args.vocab:
        network.drafts = corpus.common(samples, args.vocab, network.spec.vocab)
    how = Schedule(epochs=args.epochs, batch=args.batch, others=args.others)
    began = time.perf_counter()

    def progress(so_far: Trained) -> None:
        if so_far.steps % 100 == 0:
            recent, seconds = so_far.losses[-25:], time.perf_counter() - began
            print(
                f"step {so_far.steps}: KL {sum(recent) / len(recent):.3f} nats, {seconds:.0f} s",
                flush=True,
            )

    done = train(network, samples, how, progress)
    about = {
        "target": TARGET,
        "from_layers": args.layers,
        "vocabulary": args.vocab or network.spec.vocab,
        "sequences": len(samples),
        "corpus_tokens": sum(len(sample.top) for sample in samples),
        "steps": done.steps,
        "labels_seen": done.tokens,
        "seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
        "last_kl_nats": sum(done.losses[-25:]) / len(done.losses[-25:]),
        "schedule": asdict(how),
        "temperatures": {str(heat): share for heat, share in corpus.TEMPERATURES.items()},
        "device": record.device(),
        "versions": record.versions(),
        "git_commit": record.commit(),
    }
    save(network, args.folder, about)


def measure_drafter(args: argparse.Namespace) -> None:
    """Acceptance of chains of 1 to 8 drafts on held-out topics, greedy and at temperature 1."""
    target = load(resolve({"model": TARGET}))
    drafter = load_drafter(args.folder, target)
    rows = []
    for name, heat in HELD_OUT.items():
        samples = corpus.read(args.work / name)
        found = measure(target.decoder, drafter, samples, greedy=heat == 0)
        rows.append(
            {
                "text": name,
                "temperature": heat,
                "sequences": len(samples),
                "chains": found.chains,
                "acceptance_by_position": found.by_position,
                "survival": found.survival,
                "tokens_per_round": [1 + sum(found.survival[:k]) for k in range(1, 9)],
                "overlap": found.overlap,
                "likeliest": found.likeliest,
            }
        )
        print(json.dumps(rows[-1], indent=1))
    trained = json.loads((args.folder / "config.json").read_text())["trained"]
    config = {
        "target": TARGET,
        "dtype": str(target.dtype).removeprefix("torch."),
        "drafter_bytes": drafter.weight_bytes,
        "trained": trained,
    }
    workload = {"held_out_topics": corpus.items(corpus.HELD_OUT_TOPICS), "longest": 8}
    result = record.header("drafter", workload, config) | {"rows": rows}
    record.write(result, args.json)


def train_head(args: argparse.Namespace) -> None:
    """The acceptance head of the drafter, and what it knows of topics never trained on."""
    target = load(resolve({"model": TARGET}))
    network, began = load_network(args.folder, target), time.perf_counter()
    about: dict[str, Any] = {}
    if args.stage == "head":
        samples = corpus.read(args.work / "train")[: args.texts]
        taught = head_.lessons(network, samples, seed=0)
        print(f"{len(taught)} lessons, {time.perf_counter() - began:.0f} s", flush=True)
        found = head_.train_head(taught, weight=args.weight)
        about = {
            "texts": len(samples), "drafts": sum(len(one.accepted) for one in taught),
            "weight_of_rejections": args.weight,
        }  # fmt: skip
    else:
        found = head_.load_head(args.folder, network.spec.hidden, torch.device("cpu"))
        about = {"trained": head_.read_about(args.folder)}
    chance = torch.Generator().manual_seed(2)
    apart = {name: corpus.read(args.work / f"{APART}{name}") for name in HELD_OUT}
    told = [
        [head_.lesson(network, one, HELD_OUT[name] == 0, chance) for one in texts]
        for name, texts in apart.items()
    ]
    head_.calibrate(found, told)
    about["calibrated_on"] = {name: len(texts) for name, texts in apart.items()}
    seconds = time.perf_counter() - began
    asked = {name: corpus.read(args.work / name) for name in HELD_OUT}
    seen = {
        name: _judged(network, found, samples, greedy=HELD_OUT[name] == 0)
        for name, samples in asked.items()
    }
    for name, row in seen.items():
        print(name, row)
    about |= {"seconds": round(seconds, 1), "threads": torch.get_num_threads()}
    head_.save_head(found, args.folder, about)
    header = record.header("acceptance_head", about, {"target": TARGET})
    record.write(header | {"results": seen}, args.json)


def _judged(
    network: Any, head: head_.AcceptanceHead, samples: list[corpus.Sample], greedy: bool
) -> dict[str, float]:
    """The head beside the drafter's own probability, calibrated on one half, on the other half."""
    generator = torch.Generator().manual_seed(1)
    seen = [head_.lesson(network, one, greedy, generator) for one in samples]
    (fit_q, fit_a, _), (q, accepted, hidden) = (
        tuple(torch.cat([getattr(one, name) for one in half]) for name in LESSON)
        for half in (seen[::2], seen[1::2])
    )
    order = fit_q.argsort()
    rising = torch.from_numpy(isotonic_regression(fit_a[order].double().numpy()).x)
    at = torch.searchsorted(fit_q[order].contiguous(), q).clamp_max(len(order) - 1)
    said = head.accepted(hidden, q, int(not greedy))
    return {
        "drafts": len(q),
        "acceptance": accepted.mean().item(),
        "auc": head_.auc_of_rejection(said, accepted),
        "auc_of_probability": head_.auc_of_rejection(q, accepted),
        "kl_nats": head_.binary_kl(said, accepted),
        "kl_of_probability_calibrated": head_.binary_kl(rising[at], accepted),
    }


def main() -> None:
    """One stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=("corpus", "train", "measure", "head", "calibrate"))
    parser.add_argument("work", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "kvarn/speculate/drafters" / TARGET)
    parser.add_argument("--json", default=None, help="of measure and head")
    parser.add_argument("--texts", type=int, default=900, help="to train the head on")
    parser.add_argument("--weight", type=float, default=1.0, help="of rejections, for the head")
    parser.add_argument("--minutes", type=float, default=24.0, help="of writing text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seqs", type=int, default=96, help="written at once")
    parser.add_argument("--per-shard", type=int, default=256, help="texts of a file")
    parser.add_argument(
        "--held-out", type=int, default=96, help="texts to calibrate and to measure with, each kind"
    )
    parser.add_argument("--kv-memory", type=float, default=0.0, help="of writing text [GiB]")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 29], help="to begin from")
    parser.add_argument("--ffn", type=int, default=512, help="neurons kept of each layer")
    parser.add_argument("--vocab", type=int, default=8192, help="tokens it drafts; 0: all")
    parser.add_argument("--batch", type=int, default=16, help="texts a step")
    parser.add_argument("--others", type=int, default=2048, help="tokens that stand for the rest")
    parser.add_argument("--epochs", type=float, default=3.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    stages: dict[str, Any] = {
        "corpus": write_corpus,
        "train": train_drafter,
        "measure": measure_drafter,
        "head": train_head,
        "calibrate": train_head,
    }
    stages[args.stage](args)


if __name__ == "__main__":
    main()
