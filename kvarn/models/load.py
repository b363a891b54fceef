"""Load a model: find it, read its shape, check that it fits, build decoder and tokenizer."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvarn.core.config import Resolved
from kvarn.core.errors import ModelError, nearest
from kvarn.core.model import ModelSpec
from kvarn.kernels.linear import SHARES_MEMORY
from kvarn.models.decoder import Decoder
from kvarn.models.fit import check_fits, free_memory
from kvarn.models.gguf import GGUFWeights, spec_from_gguf
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.precision import choose_device, choose_dtype, linear_mode
from kvarn.models.pull import ALIASES, Progress, pull, quiet
from kvarn.models.random_weights import RandomWeights
from kvarn.models.safetensors_file import SafetensorsWeights
from kvarn.models.shapes import SHAPES, named_shape
from kvarn.models.tokenizer import Tokenizer
from kvarn.models.weights import Weights


@dataclass(slots=True)
class Model:
    """A model ready to run."""

    spec: ModelSpec
    decoder: Decoder
    tokenizer: Tokenizer | None  #: None: token ids only
    source: str  #: where the weights came from
    dtype: torch.dtype
    device: torch.device
    weight_bytes: int  #: held on the device
    seconds: dict[str, float]  #: start-up, by stage


@dataclass(slots=True)
class Located:
    """A model's files, or only its shape (`path` None: random weights of a named shape)."""

    name: str
    path: Path | None

    def gguf(self) -> GGUFFile | None:
        """The GGUF file: itself, or the only one of a folder without safetensors."""
        if self.path is None or self.path.is_file():
            return None if self.path is None else GGUFFile(self.path)
        files = sorted(self.path.glob("*.gguf"))
        if len(files) == 1 and not any(self.path.glob("*.safetensors")):
            return GGUFFile(files[0])
        return None


def locate(name: str, random: bool = False, progress: Progress = quiet) -> Located:
    """Where the model called `name` is; brings it to this machine if need be.

    A path, an alias of the default model or a hub id; with `random` a named shape as well.
    """
    path = Path(name).expanduser()
    if path.exists():
        return Located(name, path)
    if random and name.lower() in SHAPES:
        return Located(name, None)
    if name.lower() in SHAPES and name.lower() not in ALIASES:
        raise ModelError(
            f"{name!r} is a shape without weights: use load=random (for speed only), or give a "
            f"folder, a .gguf file or a hub id"
        )
    if path.is_absolute() or path.suffix in (".gguf", ".safetensors") or name.startswith("."):
        raise ModelError(f"there is no file or folder {name!r}")
    if "/" not in name and name.lower() not in ALIASES:
        known = SHAPES if random else ALIASES
        raise ModelError(f"no model is called {name!r}{nearest(name.lower(), known)}")
    return Located(name, pull(name, progress))


def load_tokenizer(located: Located) -> Tokenizer | None:
    """The tokenizer that comes with a model; None where it has none."""
    if located.path is None:
        return None
    file = located.gguf()
    return Tokenizer.from_gguf(file) if file is not None else Tokenizer.from_folder(located.path)


def load(resolved: Resolved, progress: Progress = quiet) -> Model:
    """The model that the options name, on their device, in their number format.

    Chooses device and dtype where they are "auto". Raises `ModelError` for what cannot be found,
    read or held, `ConfigError` for options that contradict each other.
    """
    config, clock = resolved.config, _Stages()
    device = choose_device(resolved)
    dtype = choose_dtype(resolved, device)
    clock.done("device")
    random = config.load == "random"
    located = locate(config.model, random, progress)
    clock.done("find")
    file = located.gguf()
    spec = _spec(located, file)
    mode = linear_mode(config, device, dtype, spec)
    check_fits(
        spec,
        config.dtype,
        config.quantization,
        mode not in SHARES_MEMORY,
        device,
        *free_memory(device),
    )
    clock.done("config")
    tokenizer = None
    if not random:
        tokenizer = Tokenizer.from_gguf(file) if file else Tokenizer.from_folder(_folder(located))
        spec = _with_tokenizer_ends(spec, tokenizer)
    clock.done("tokenizer")
    weights: Weights
    if random:
        weights = RandomWeights(config.seed, spec.norm_offset, dtype, device)
    else:
        weights = GGUFWeights(file, spec) if file else SafetensorsWeights(_folder(located))
    decoder = Decoder(
        spec, weights, dtype=dtype, device=device, mode=mode, max_len=config.max_len or None
    )
    clock.done("weights")
    source = f"random weights, seed {config.seed}" if random else str(located.path)
    return Model(
        spec, decoder, tokenizer, source, dtype, device, decoder.weight_bytes, clock.seconds
    )


def _spec(located: Located, file: GGUFFile | None) -> ModelSpec:
    if located.path is None:
        return named_shape(located.name)
    if file is not None:
        return spec_from_gguf(file, located.name)
    folder = _folder(located)
    generation = folder / "generation_config.json"
    return spec_from_config(
        read_json(folder / "config.json"),
        located.name,
        read_json(generation) if generation.is_file() else None,
    )


def _folder(located: Located) -> Path:
    if located.path is None or not located.path.is_dir():
        raise ModelError(f"{located.path} is neither a folder nor a .gguf file")
    return located.path


def _with_tokenizer_ends(spec: ModelSpec, tokenizer: Tokenizer | None) -> ModelSpec:
    """The spec with the tokenizer's own end tokens added: chat models often say them only there."""
    if tokenizer is None:
        return spec
    return replace(spec, eos_ids=tuple(dict.fromkeys(spec.eos_ids + tokenizer.eos_ids)))


class _Stages:
    """Seconds since the stage before, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.began = time.perf_counter()

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self.began
        self.began = now
