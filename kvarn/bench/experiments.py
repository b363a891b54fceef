"""Experiments of `kvarn reproduce` by name."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from kvarn.core.errors import ConfigError, nearest


@dataclass(slots=True, frozen=True)
class Experiment:
    """What is run, and how its result is told."""

    run: Callable[[str], dict[str, Any]]  #: the result, with a model by name
    lines: Callable[[dict[str, Any]], list[str]]  #: a result for people
    model: str  #: taken where none is named


#: experiments in modules of their own, with `run(model)` and `lines(result)`, and their models
MODULES = {
    "deployment-challenges": ("kvarn.bench.session_study", "llama-3.1-8b"),
    "draft-lengths": ("kvarn.bench.modelled_lengths", "modelled"),
    "draft-stops": ("kvarn.bench.stopping_study", "smollm2-135m"),
    "gammatune": ("kvarn.bench.gamma_study", "smollm2-135m"),
    "gemfilter": ("kvarn.bench.filter_study", "smollm2-135m"),
    "hermes": ("kvarn.bench.pipeline_study", "llama-3.1-8b"),
    "online-spec": ("kvarn.bench.online_spec", "smollm2-135m"),
    "online-spec-sim": ("kvarn.bench.online_sim", "llama-3.1-8b"),
    "quest": ("kvarn.bench.selection_study", "smollm2-135m"),
    "recall": ("kvarn.bench.recall_study", "recall"),
    "sage-kv": ("kvarn.bench.kept_study", "smollm2-135m"),
    "suffix-decoding": ("kvarn.bench.suffix_study", "smollm2-135m"),
    "streamingllm": ("kvarn.bench.streaming_study", "smollm2-135m"),
}

#: experiments of `kvarn.bench.reproduce`, by text and setting
TEXTS = ("specdec-pp", "utility-spec")


def find(name: str) -> Experiment:
    """The experiment of that name."""
    if name in MODULES:
        path, model = MODULES[name]
        module = import_module(path)
        return Experiment(module.run, module.lines, model)
    if name not in TEXTS:
        raise ConfigError(f"unknown experiment {name!r}{nearest(name, [*TEXTS, *MODULES])}")
    from kvarn.bench import reproduce

    return Experiment(partial(reproduce.run, name), reproduce.lines, "smollm2-135m")
