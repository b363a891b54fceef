"""Load a drafter: its own layers from a folder, embedding and output matrix from the target."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from kvarn.core.config import EngineConfig
from kvarn.core.errors import ConfigError, ModelError
from kvarn.core.model import ModelSpec
from kvarn.kernels.linear.stored import Stored
from kvarn.models.decoder import Decoder
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.load import Model
from kvarn.models.precision import linear_mode
from kvarn.models.pull import ALIASES
from kvarn.models.quantized.convert import Converted, Kind, Source
from kvarn.models.safetensors_file import SafetensorsWeights
from kvarn.models.weights import Part
from kvarn.speculate.train.network import DRAFTS, Network


def shipped(name: str) -> Path | None:
    """The folder of the drafter that comes with kvarn for the model called `name`, or None."""
    if name.lower() not in ALIASES:
        return None
    folder = Path(str(files("kvarn"))) / "speculate" / "drafters" / "smollm2-135m"
    return folder if folder.is_dir() else None


def shares_embedding(folder: Path) -> bool:
    """Whether `folder` holds a drafter that takes its embedding from its target."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("embedding") == "target"


@dataclass(slots=True)
class Held:
    """`Weights` that are in memory."""

    tensors: Mapping[str, Tensor]

    def read(self, name: str, shape: tuple[int, ...], part: Part | None = None) -> Tensor:
        """See `Weights.read`."""
        found = self.tensors.get(name)
        if found is None or tuple(found.shape) != shape:
            there = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise ModelError(f"tensor {name!r} of a drafter {there}, expected {list(shape)}")
        return found if part is None else found[part]

    def stored(self, name: str, shape: tuple[int, ...]) -> Stored:
        """See `Weights.stored`."""
        return self.read(name, shape)


def load_drafter(
    folder: Path, target: Model, *, quantization: Kind = "none", deterministic: bool = False
) -> Decoder:
    """The drafter in `folder` (as `network.save` writes it) for a target that is loaded.

    It shares the target's embedding and output matrix, quantised if the target's is (of a
    vocabulary of its own it has the rows, never quantised), and lives on its device in its dtype;
    `quantization` is of its own layers. Raises `ConfigError` where the folder is no such drafter or
    the two do not fit, `ModelError` for broken files.
    """
    spec, weights = _spec(folder, target), SafetensorsWeights(folder)
    drafts = _drafts(weights, spec)
    return make_drafter(spec, weights, drafts, target, quantization, deterministic)


def make_drafter(
    spec: ModelSpec,
    weights: Source,
    drafts: Tensor | None,
    target: Model,
    quantization: Kind,
    deterministic: bool,
) -> Decoder:
    """`load_drafter` from weights that are there, and the tokens that it drafts."""
    mode = linear_mode(EngineConfig(deterministic=deterministic), target.device, target.dtype, spec)
    return Decoder(
        spec,
        Converted(weights, quantization, target.device),
        dtype=target.dtype,
        device=target.device,
        mode=mode,
        max_len=len(next(iter(target.decoder.ropes.values())).cos),
        group=target.decoder.group,
        share=target.decoder,
        drafts=drafts,
    )


def load_network(folder: Path, target: Model, device: torch.device | None = None) -> Network:
    """The drafter in `folder` as it can be trained, on `device` (default: the target's).

    Raises as `load_drafter` does.
    """
    device, weights = device or target.device, SafetensorsWeights(folder)
    network = Network(_spec(folder, target), target.decoder.embed.to(device))
    network.drafts = _drafts(weights, network.spec)
    network.to(device)
    with torch.no_grad():
        for name, x in network.state_dict().items():
            x.copy_(weights.read(name, tuple(x.shape)))
    return network


def _drafts(weights: SafetensorsWeights, spec: ModelSpec) -> Tensor | None:
    """The tokens that a drafter drafts, where these are not all."""
    if DRAFTS not in weights:
        return None
    drafts = weights.tensor(DRAFTS, None, ("I32",)).long()
    if drafts.dim() != 1 or not len(drafts) or drafts.min() < 0 or drafts.max() >= spec.vocab:
        raise weights.broken(DRAFTS, f"is no list of tokens below {spec.vocab}")
    return drafts


def _spec(folder: Path, target: Model) -> ModelSpec:
    """The shape of the drafter in `folder`; it fits the target."""
    config = read_json(folder / "config.json")
    if config.get("embedding") != "target":
        raise ConfigError(
            f"{folder} is a model of its own: its config.json does not say "
            f'"embedding": "target"; load it as any other model'
        )
    spec, theirs = spec_from_config(config, folder.name), target.spec
    for what, own, needed in (
        ("a vocabulary", spec.vocab, theirs.vocab),
        ("a hidden size", spec.hidden, theirs.hidden),
        ("an embedding scale", spec.embed_scale, theirs.embed_scale),
        ("a logit cap", spec.logit_softcap, theirs.logit_softcap),
    ):
        if own != needed:
            raise ConfigError(
                f"the drafter in {folder} has {what} of {own}, but {theirs.name} of {needed}; it "
                f"shares the target's embedding, so it works only with the model it was made from"
            )
    return spec
