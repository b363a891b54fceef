"""`from_table`: the cost model of whatever measured data a path holds."""

import json
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError, nearest
from kvarn.core.model import ModelSpec
from kvarn.cost import fitted
from kvarn.cost.kernel_tables import KernelTables
from kvarn.cost.layer_tables import LayerTables
from kvarn.cost.profile_table import ProfileTable
from kvarn.cost.shape import CostModel
from kvarn.cost.token_tables import TokenTables

#: a file of a family of tables is found by its last word
KERNELS = "gemm_perf.csv.gz"
LAYERS = "dense.csv.gz"
PHASES = "splitwise_perf_model.csv.gz"


def from_table(
    path: str | Path, spec: ModelSpec, *, device: str = "", tp: int = 1, **options: Any
) -> CostModel:
    """Cost model of `spec` from measured data.

    `path` is a folder with families of tables, of which `device` names one (`device` may be left
    out where there is only one): `aic_h100_sxm_vllm0.24_`, or a part of it that fits one only;
    or the file `splitwise_perf_model.csv.gz` with `device` its `model/hardware`; or the JSON of
    `kvarn profile`, or of a fitted model. `options` go to the model that is made: `host`,
    `host_per_seq` [s], `busy_watts`, `idle_watts`, `skew`, `gemm`, `kv`, as far as it has them.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _family(path, spec, device, tp, options)
        if path.name == PHASES:
            model, slash, hardware = device.partition("/")
            if not slash:
                raise ConfigError(f"{path} needs a device such as llama2-70b/h100-80gb")
            return TokenTables(path, model, hardware, tp, **options)
        return _json(path, spec, tp, options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ConfigError(f"an option that {path} cannot honour: {error}") from None


def families(folder: Path) -> list[str]:
    """Prefixes of the families of tables in a folder."""
    found = [p.name[: -len(end)] for end in (KERNELS, LAYERS) for p in folder.glob(f"*_{end}")]
    return sorted(found)


def _family(
    folder: Path, spec: ModelSpec, device: str, tp: int, options: dict[str, Any]
) -> CostModel:
    known = families(folder)
    if not known:
        raise ConfigError(f"{folder} holds no tables (*_{KERNELS} or *_{LAYERS})")
    fitting = [prefix for prefix in known if device.lower() in prefix.lower()]
    if len(fitting) != 1:
        what = f"several tables fit {device!r}: {', '.join(fitting)}"
        raise ConfigError(
            what if fitting else f"{folder} has no tables of {device!r}{nearest(device, known)}"
        )
    prefix = fitting[0]
    if (folder / f"{prefix}{KERNELS}").exists():
        return KernelTables(folder, prefix, spec, tp=tp, **options)
    _one_rank(prefix, tp)
    return LayerTables(folder, prefix, spec, **options)


def _json(path: Path, spec: ModelSpec, tp: int, options: dict[str, Any]) -> CostModel:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is neither a folder of tables, {PHASES}, nor JSON: {error}"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no profile and no fitted model (a JSON object)")
    if found.get("kind") == "fitted":
        if options:
            raise ConfigError(f"{path} is a fitted model: it takes no option {next(iter(options))}")
        return fitted.loaded(found, str(path))
    measured = found.get("config", {}).get("tp", 1)
    if tp != measured:
        raise ConfigError(f"{path} was measured with tp={measured}, not {tp}")
    return ProfileTable(found, str(path), spec, **options)


def _one_rank(prefix: str, tp: int) -> None:
    if f"tp{tp}" not in prefix.split("_"):
        raise ConfigError(f"the tables {prefix}* were not measured with tp={tp}")
