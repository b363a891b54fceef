"""Every option of the engine, with its default, unit and meaning, and where its value came from.

`resolve` turns what the user said into an `EngineConfig`; unknown names are errors that name the
nearest option. Values that the engine chooses itself (dtype "auto", pages 0) are set later through
`Resolved.choose`, so that `kvarn explain` can say what is in force and why.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from kvarn.core.errors import ConfigError, nearest


def option(default: Any, doc: str, unit: str = "") -> Any:
    """A configuration field that carries its meaning and unit."""
    return field(default=default, metadata={"doc": doc, "unit": unit})


@dataclass(slots=True)
class EngineConfig:
    """The options of one engine."""

    model: str = option("smollm2-135m", "name, folder, .gguf file or hub id of the model")
    load: str = option("auto", "weights: auto (real) or random (speed only, never quality)")
    seed: int = option(0, "of random weights and of sampling without a request seed")
    device: str = option("auto", "auto, cpu, cuda, cuda:N")
    dtype: str = option("auto", "of weights and activations: auto, float32, bfloat16, float16")
    quantization: str = option(
        "auto", "of the weights: none, int8, int4, fp8; auto: as a quantised checkpoint holds them"
    )
    kv_dtype: str = option("auto", "of the KV cache: auto (as the activations), fp8 (on a GPU)")
    tp: int = option(1, "ranks that share each layer (tensor parallelism): processes, or GPUs")
    threads: int = option(0, "CPU threads for computation, of all ranks; 0: all physical cores")
    max_len: int = option(0, "longest sequence; 0: the model's own limit", "tokens")
    max_seqs: int = option(256, "sequences that run at once")
    budget: int = option(0, "positions computed in one step; 0: chosen for the device", "tokens")
    max_queue: int = option(1024, "requests that may wait before new ones are refused (429)")
    page_size: int = option(16, "positions of a KV page", "tokens")
    kv_memory: float = option(0.0, "memory for KV; 0: a share of what is free", "GiB")
    pages: int = option(0, "KV pages of the full-attention group; 0: from kv_memory")
    scheduler: str = option("continuous", "part that forms the batch of each step")
    prefix: str = option("hash", "prefix index: hash, radix, none")
    evict: str = option("lru", "which cached prefix goes first: lru, lfu")
    attention: str = option("auto", "attention backend: auto, or a name from `kvarn parts`")
    sparsity: str = option(
        "none", "what stays of the KV: none, or a part of `kvarn parts`, as name:field=value,..."
    )
    speculate: str = option("none", "who drafts tokens ahead: none, or a proposer of `kvarn parts`")
    draft_length: str = option("survival", "how many are drafted for whom: a part of `kvarn parts`")
    draft_tokens: int = option(8, "longest draft; of a tree, all of it", "tokens")
    draft_shape: str = option(
        "chain", "of drafts by suffix, draft and mix: chain, or tree (alternatives at a place)"
    )
    draft_factor: float = option(
        1.0, "suffix trees: tokens drafted for each token that matches (the paper's alpha)"
    )
    draft_model: str = option("", "speculate=draft: name or folder of the drafting model")
    draft_choice: str = option(
        "drawn", "a drafting model's tokens: drawn at the request's temperature, or likeliest"
    )
    train_drafter: str = option(
        "off",
        "the drafter learns from live traffic: off, on (a thread beside the steps), idle (a thread "
        "while no request runs), inline",
    )
    synthetic_acceptance: float = option(
        0.0, "accept drafts with this probability instead of judging them: speed only, never output"
    )
    overlap: str = option("auto", "plan the next step while one runs: auto, on, off")
    graphs: str = option("auto", "replay captured decode steps on a GPU: auto, on, off")
    step_log: str = option(
        "", "record every decision in this file (JSON lines; .gz is compressed), for kvarn replay"
    )
    deterministic: bool = option(
        False, "batch-invariant: a request's tokens are bitwise the same alone and in any batch"
    )


@dataclass(slots=True)
class Origin:
    """Why an option has its value."""

    source: Literal["default", "flag", "environment", "measured", "model", "device", "derived"]
    why: str = ""


@dataclass(slots=True)
class Resolved:
    """An `EngineConfig` with the origin of every value."""

    config: EngineConfig
    origins: dict[str, Origin]

    def choose(self, name: str, value: Any, source: Any, why: str) -> None:
        """Set an option that the engine decides, and record the reason."""
        setattr(self.config, name, value)
        self.origins[name] = Origin(source, why)

    def rows(self) -> list[dict[str, Any]]:
        """One row an option, for `explain`."""
        return [
            {
                "option": f.name,
                "value": getattr(self.config, f.name),
                "unit": f.metadata["unit"],
                "source": self.origins[f.name].source,
                "why": self.origins[f.name].why,
                "doc": f.metadata["doc"],
            }
            for f in fields(EngineConfig)
        ]


def resolve(given: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Resolved:
    """Options from flags (`given`) over `KVARN_*` variables over defaults."""
    config = EngineConfig()
    origins = {f.name: Origin("default") for f in fields(EngineConfig)}
    kinds = {f.name: type(f.default) for f in fields(EngineConfig)}
    said: list[tuple[str, Any, Origin]] = []
    for key, text in (environ or {}).items():
        name = key.removeprefix("KVARN_").lower()
        if key.startswith("KVARN_") and name in kinds:
            said.append((name, text, Origin("environment", key)))
    said += [(name, value, Origin("flag")) for name, value in given.items() if value is not None]
    for name, value, origin in said:
        if name not in kinds:
            raise ConfigError(f"unknown option {name!r}{nearest(name, kinds)}")
        setattr(config, name, _convert(name, value, kinds[name]))
        origins[name] = origin
    _check(config)
    return Resolved(config, origins)


def _convert(name: str, value: Any, kind: type) -> Any:
    if kind is bool and isinstance(value, str):
        if value.lower() in ("1", "true", "on", "yes"):
            return True
        if value.lower() in ("0", "false", "off", "no"):
            return False
        raise ConfigError(f"option {name!r} must be true or false, not {value!r}")
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise ConfigError(
            f"option {name!r} must be of type {kind.__name__}, not {value!r}"
        ) from None


#: options with a closed list of values
CHOICES: dict[str, tuple[str, ...]] = {
    "load": ("auto", "random"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "quantization": ("auto", "none", "int8", "int4", "fp8"),
    "overlap": ("auto", "on", "off"),
    "graphs": ("auto", "on", "off"),
    "kv_dtype": ("auto", "fp8"),
    "draft_choice": ("drawn", "likeliest"),
    "draft_shape": ("chain", "tree"),
    "train_drafter": ("off", "on", "idle", "inline"),
}


def _check(config: EngineConfig) -> None:
    for name, choices in CHOICES.items():
        value = getattr(config, name)
        if value not in choices:
            raise ConfigError(f"option {name!r} cannot be {value!r}{nearest(value, choices)}")
    for name in ("max_len", "budget", "max_queue", "kv_memory", "pages", "threads"):
        if getattr(config, name) < 0:
            raise ConfigError(f"option {name!r} must not be negative, got {getattr(config, name)}")
    if not 0.0 <= config.synthetic_acceptance <= 1.0:
        raise ConfigError(
            f"synthetic_acceptance is a probability, got {config.synthetic_acceptance}"
        )
    if config.synthetic_acceptance and config.load != "random":
        raise ConfigError("synthetic_acceptance gives nonsense for text: it needs load=random")
    if config.train_drafter != "off" and config.speculate not in ("draft", "mix"):
        raise ConfigError(
            f"train_drafter={config.train_drafter} teaches a drafting model, and "
            f"speculate={config.speculate} has none: it needs speculate=draft or mix"
        )
    if config.draft_factor <= 0:
        raise ConfigError(f"draft_factor must be above 0, got {config.draft_factor}")
    if config.draft_factor != 1.0 and config.speculate not in ("suffix", "mix"):
        raise ConfigError(
            f"draft_factor={config.draft_factor} is of suffix trees: it needs speculate=suffix or "
            f"mix, and speculate={config.speculate} has none"
        )
    if config.draft_shape == "tree":
        _check_trees(config)
    for name in ("page_size", "max_seqs", "tp", "draft_tokens"):
        if getattr(config, name) < 1:
            raise ConfigError(f"option {name!r} must be at least 1, got {getattr(config, name)}")
    if config.budget and config.budget < config.max_seqs:
        raise ConfigError(
            f"budget={config.budget} is below max_seqs={config.max_seqs}: every running sequence "
            f"needs one position a step; raise budget or lower max_seqs"
        )


def _check_trees(config: EngineConfig) -> None:
    if config.speculate not in ("suffix", "draft", "mix"):
        raise ConfigError(
            f"draft_shape=tree needs speculate=suffix, draft or mix: speculate={config.speculate} "
            f"drafts no trees"
        )
    if config.deterministic:
        raise ConfigError(
            "draft_shape=tree cannot run with deterministic: attention of a tree's rows is summed "
            "up in two parts, not to the same bits as plain decoding; use draft_shape=chain"
        )
