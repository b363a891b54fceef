"""Load a model: find it, read its shape, check that it fits, build decoder and tokenizer."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from kvarn.core.config import Resolved
from kvarn.core.errors import ModelError, nearest
from kvarn.core.model import ModelSpec
from kvarn.kernels.collective import ALONE, Collective
from kvarn.kernels.linear import SHARES_MEMORY
from kvarn.models.decoder import Decoder
from kvarn.models.fit import check_fits, free_memory
from kvarn.models.gguf import GGUFWeights, spec_from_gguf
from kvarn.models.gguf_file import GGUFFile
from kvarn.models.hf_config import spec_from_config
from kvarn.models.json_file import read_json
from kvarn.models.precision import (
    choose_device,
    choose_dtype,
    choose_quantization,
    linear_mode,
)
from kvarn.models.pull import ALIASES, Progress, pull, quiet
from kvarn.models.quantized.convert import Converted, Source
from kvarn.models.quantized.methods import find_scheme
from kvarn.models.quantized.scheme import QuantizedWeights, Scheme
from kvarn.models.random_weights import RandomWeights
from kvarn.models.safetensors_file import SafetensorsWeights
from kvarn.models.shapes import SHAPES, named_shape
from kvarn.models.shard import holding, local_spec
from kvarn.models.tokenizer import Tokenizer


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


def load(resolved: Resolved, progress: Progress = quiet, group: Collective = ALONE) -> Model:
    """The model that the options name, on their device, in their number format.

    In a group of ranks, this rank's part of it.

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
    local = local_spec(spec, holding(spec, group.rank, group.ranks))
    scheme = None if random else _scheme(located, file)
    kind = choose_quantization(resolved, device, scheme)
    mode = linear_mode(config, device, dtype, local)
    check_fits(
        local,
        config.dtype,
        kind,
        mode not in SHARES_MEMORY,
        device,
        *free_memory(device, group.ranks),
    )
    clock.done("config")
    tokenizer = None
    if not random:
        tokenizer = Tokenizer.from_gguf(file) if file else Tokenizer.from_folder(_folder(located))
        spec = _with_tokenizer_ends(spec, tokenizer)
    clock.done("tokenizer")
    source: Source
    if random:
        source = RandomWeights(config.seed, spec.norm_offset, dtype, device, kind)
    elif file is not None:
        source = GGUFWeights(file, spec)
    else:
        source = SafetensorsWeights(_folder(located))
        if scheme is not None:
            source = QuantizedWeights(source, scheme)
    own = scheme is not None and scheme.kind == kind
    weights = Converted(source, kind, device, keep=own)
    longest = min(config.max_len or spec.max_len, spec.max_len)  # a stream's positions end there
    decoder = Decoder(
        spec, weights, dtype=dtype, device=device, mode=mode, max_len=longest, group=group,
    )  # fmt: skip
    clock.done("weights")
    if kind != "none":
        chosen = resolved.origins["quantization"]
        held = ", ".join(f"{n} x {form}" for form, n in sorted(decoder.forms.items()))
        chosen.why = f"{chosen.why}; matrices: {held}".removeprefix("; ")
    origin = f"random weights, seed {config.seed}" if random else str(located.path)
    return Model(
        spec, decoder, tokenizer, origin, dtype, device, decoder.weight_bytes, clock.seconds
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


def _scheme(located: Located, file: GGUFFile | None) -> Scheme | None:
    """How another tool quantised the checkpoint; None where none did."""
    if file is not None:
        return None
    return find_scheme(read_json(_folder(located) / "config.json"), located.name)


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
