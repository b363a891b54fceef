"""`cost_model`: the price list of an instance from the words that users say."""

from pathlib import Path

from kvarn.core.errors import ConfigError, nearest
from kvarn.core.model import ModelSpec
from kvarn.cost.devices import DEVICES, GIB, Device, find_device
from kvarn.cost.moe import MoEShape
from kvarn.cost.precision import Precision, precision
from kvarn.cost.roofline import Host, Roofline
from kvarn.cost.shape import CostModel
from kvarn.cost.tables import from_table

SOURCES = ("roofline", "table", "fitted")

#: share of a device's memory that weights and KV may fill (our choice: activations, graphs, driver)
USABLE = 0.9


def cost_model(
    spec: ModelSpec,
    *,
    device: str,
    tp: int = 1,
    pp: int = 1,
    dtype: str = "bfloat16",
    quantization: str = "none",
    kv_dtype: str = "auto",
    source: str = "roofline",
    table: str | None = None,
    overlap: bool = True,
    moe: MoEShape | None = None,
    host: Host | None = None,
) -> CostModel:
    """Prices of `spec` on `tp` x `pp` devices; `dtype` and the rest as in the engine's options.

    `source`: "roofline" (analytic), "table" (measured kernels or steps) or "fitted" (a model
    fitted to steps); the last two read `table`, a folder or file that `from_table` knows, in which
    `device` names a family. A file of measured steps says itself in what precision they ran, and
    whether the model fits was settled when it was measured. `moe`, `pp`, `overlap` and `host` (its
    own if None) are of the roofline alone. Raises `ConfigError` for what cannot run.
    """
    if source not in SOURCES:
        raise ConfigError(f"unknown source {source!r}{nearest(source, SOURCES)}")
    if source == "roofline" and table is not None:
        raise ConfigError("a table was given, but source='roofline' reads none; say source='table'")
    _check_split(spec, tp, pp)
    if source != "roofline":
        if table is None:
            raise ConfigError(f"source={source!r} needs a table: a folder or file of measurements")
        if moe is not None or pp > 1:
            raise ConfigError("no table covers pp or experts: use source='roofline' for them")
        options = _table_options(dtype, quantization, kv_dtype) if Path(table).is_dir() else {}
        return from_table(table, spec, device=device, tp=tp, **options)
    hardware = find_device(device)
    numbers = precision(hardware, dtype, quantization, kv_dtype)
    _kv_room(spec, hardware, tp, pp, numbers, moe)
    return Roofline(spec, hardware, numbers, tp=tp, pp=pp, moe=moe, host=host, overlap=overlap)


def _table_options(dtype: str, quantization: str, kv_dtype: str) -> dict[str, str]:
    """The precision as words of the kernel tables, where it is not what they hold anyway."""
    options = {}
    if (dtype, quantization) != ("bfloat16", "none"):
        options["gemm"] = dtype if quantization == "none" else quantization
    if kv_dtype != "auto":
        options["kv"] = kv_dtype
    return options


def kv_capacity(
    spec: ModelSpec,
    device: str,
    tp: int = 1,
    pp: int = 1,
    *,
    dtype: str = "bfloat16",
    quantization: str = "none",
    kv_dtype: str = "auto",
    moe: MoEShape | None = None,
) -> int:
    """KV that all ranks together hold, by formula: what `USABLE` leaves beside the weights [bytes].

    Only where nobody measured: an engine's own count of pages is the truth, and simulations that
    differ from it in memory differ in everything that follows.
    """
    hardware = find_device(device)
    numbers = precision(hardware, dtype, quantization, kv_dtype)
    _check_split(spec, tp, pp)
    return int(_kv_room(spec, hardware, tp, pp, numbers, moe))


def _check_split(spec: ModelSpec, tp: int, pp: int) -> None:
    if tp < 1 or pp < 1:
        raise ConfigError(f"tp and pp must be at least 1, got tp={tp}, pp={pp}")
    if spec.n_heads % tp or spec.ffn % tp:
        works = [n for n in range(1, 17) if spec.n_heads % n == 0 and spec.ffn % n == 0]
        raise ConfigError(
            f"tp={tp} does not divide {spec.name!r} ({spec.n_heads} heads, MLP width {spec.ffn}); "
            f"tp may be {', '.join(map(str, works))}"
        )
    if spec.n_kv_heads % tp and tp % spec.n_kv_heads:
        raise ConfigError(
            f"tp={tp} neither divides the {spec.n_kv_heads} KV heads of {spec.name!r} nor is a "
            f"multiple of them"
        )
    if pp > spec.n_layers:
        raise ConfigError(f"pp={pp} is more than the {spec.n_layers} layers of {spec.name!r}")


def _kv_room(
    spec: ModelSpec, device: Device, tp: int, pp: int, numbers: Precision, moe: MoEShape | None
) -> float:
    """Memory left for KV on all ranks; an error if the weights do not even fit. [bytes]"""
    weights = numbers.weight_bytes(spec, moe)
    usable = USABLE * device.memory * tp * pp
    if weights >= usable:
        raise ConfigError(
            f"{spec.name!r} has {weights / GIB:.1f} GiB of weights; {tp * pp} x {device.name} "
            f"hold {usable / GIB:.1f} GiB{_would_fit(spec, device, weights)}"
        )
    return usable - weights


def _would_fit(spec: ModelSpec, device: Device, weights: float) -> str:
    """What to change so that weights fit, as the end of a sentence."""
    ways = [
        f"tp={n}" for n in (2, 4, 8)
        if spec.n_heads % n == 0 and spec.ffn % n == 0 and weights < USABLE * device.memory * n
    ][:1]  # fmt: skip
    ways += [f"device={d.name!r}" for d in DEVICES.values() if weights < USABLE * d.memory][:1]
    ways += ["a narrower quantization"]
    return f"; would fit or help: {', '.join(ways)}"
