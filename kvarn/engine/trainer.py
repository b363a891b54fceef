"""The trainer of an engine's drafting model."""

import time
from pathlib import Path

import torch
from torch import Tensor

from kvarn.core.config import Resolved
from kvarn.core.errors import ConfigError
from kvarn.engine.drafter import Drafter
from kvarn.models.decoder import Decoder
from kvarn.models.load import Model
from kvarn.runner.executor import Runner
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.train.load import Held, load_network, make_drafter
from kvarn.speculate.train.student import Recipe, Student
from kvarn.speculate.train.trainer import OnlineTrainer, Pace
from kvarn.speculate.train.updater import Updater
from kvarn.speculate.train.worker import Background, Inline, Worker


def make_trainer(
    resolved: Resolved, target: Model, drafter: Drafter, proposer: DraftModel, runner: Runner
) -> OnlineTrainer:
    """What `train_drafter` asks for; `runner` is the target's, on rank 0.

    Raises `ConfigError` where the drafter is none that kvarn can train.
    """
    config, kind = resolved.config, drafter.kind
    if kind is None:
        raise ConfigError(
            f"train_drafter={config.train_drafter} needs a drafter that kvarn.speculate.train "
            f"made; {config.draft_model!r} is a model of its own"
        )
    if not target.spec.tie_embeddings:
        raise ConfigError(
            f"train_drafter={config.train_drafter} teaches drafters that multiply by the target's "
            f"embedding, and {target.spec.name} has an output matrix of its own"
        )
    # whatever the target runs on, its drafter is small, and learns beside the steps
    network = load_network(Path(drafter.model.source), target, torch.device("cpu"))
    spec, deterministic = network.spec, config.deterministic

    def build(tensors: dict[str, Tensor]) -> Decoder:
        with torch.no_grad():
            made = make_drafter(spec, Held(tensors), network.drafts, target, kind, deterministic)
        if target.device.type == "cuda":
            torch.cuda.current_stream(target.device).synchronize()  # another thread will read it
        return made

    inline = config.train_drafter == "inline"
    # a thread gives way to steps, so what it takes is processor time; between steps all wait for it
    clock = time.perf_counter if inline else time.thread_time
    updater = Updater(Student(network, Recipe(), config.seed), build, clock)
    worker: Worker = Inline() if inline else Background()

    def ask(count: int) -> None:
        runner.alternatives = count

    pace = Pace(share=1.0) if inline else Pace(idle=config.train_drafter == "idle")
    return OnlineTrainer(updater, worker, updater.weights(), proposer.renew, ask, pace)
