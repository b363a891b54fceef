"""`kvarn bench offline`: throughput of the engine without a server.

Beside tokens a second it prints what they cost: bytes read a second (weights once a step, KV) and
operations a second, and with `ceiling` the share of what this machine was measured to do.
"""

import statistics
from dataclasses import asdict
from random import Random
from typing import Any

from kvarn.bench import cost, record
from kvarn.bench.engines import Burst, burst
from kvarn.bench.options import Offline, Workload
from kvarn.bench.presets import Preset, bursts, find_preset
from kvarn.bench.prompts import Turn, make_jobs
from kvarn.core.errors import ConfigError


def check(work: Workload, how: Offline) -> None:
    """Raise `ConfigError` for what cannot be run, before a model is loaded."""
    if how.repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {how.repeats}")
    for name in how.preset:
        find_preset(name)
    if not how.preset and work.dataset in ("multi-turn", "sharegpt"):
        raise ConfigError(f"data set {work.dataset!r} needs a server: use `kvarn bench serve`")


def run(llm: Any, work: Workload, how: Offline) -> dict[str, Any]:
    """Measure on a loaded engine; the result holds one entry a workload."""
    check(work, how)
    presets = {name: find_preset(name) for name in how.preset}
    config = _config(llm)
    vocab = min(work.vocab, llm.spec.vocab)
    _warm_up(llm, vocab)
    runs = (
        {name: _preset(llm, preset, vocab, how.repeats) for name, preset in presets.items()}
        if presets
        else {"": {"": _dataset(llm, work, how.repeats, vocab)}}
    )
    ceiling = _ceiling(config) if how.ceiling else None
    said = {"presets": sorted(presets)} if presets else asdict(work)
    result = record.header("offline", said, config)
    rows = [
        {"workload": f"{name} {phase}".strip() or work.dataset}
        | _numbers(llm, config, repeated, ceiling)
        for name, phases in runs.items()
        for phase, repeated in phases.items()
    ]
    result |= {"model_id": config["model"], "ceiling": ceiling, "results": rows}
    if len(rows) == 1:
        names = ("elapsed_time", "num_requests", "total_num_tokens", "requests_per_second")
        result |= {name: rows[0][name] for name in (*names, "tokens_per_second")}
    return result


def _config(llm: Any) -> dict[str, Any]:
    return {row["option"]: row["value"] for row in llm.engine.explain()["options"]}


def _warm_up(llm: Any, vocab: int) -> None:
    rng = Random("warm-up")
    for n in (1, 8):
        turns = bursts(Preset(n, 32, 4), vocab, rng)[0][1]
        _burst(llm, turns)


def _burst(llm: Any, turns: list[Turn]) -> Burst:
    prompts = [turn.prompt for turn in turns if isinstance(turn.prompt, list)]
    return burst(llm, prompts, [turn.n_output for turn in turns])


def _preset(llm: Any, preset: Preset, vocab: int, repeats: int) -> dict[str, list[Burst]]:
    """Bursts by phase ('cold', 'warm', or '' for a workload of one phase)."""
    phases: dict[str, list[Burst]] = {}
    for i in range(repeats):
        for phase, turns in bursts(preset, vocab, Random(f"repeat {i}")):
            phases.setdefault(phase, []).append(_burst(llm, turns))
    return phases


def _dataset(llm: Any, work: Workload, repeats: int, vocab: int) -> list[Burst]:
    found = []
    for i in range(repeats):
        own = Workload(**(asdict(work) | {"seed": work.seed + i, "vocab": vocab}))
        found.append(_burst(llm, [turn for job in make_jobs(own) for turn in job.turns]))
    return found


def _ceiling(config: dict[str, Any]) -> dict[str, float]:
    from kvarn.bench.ceiling import measure

    return measure(config["dtype"], "cpu" if config["device"] == "cpu" else config["device"])


def _numbers(
    llm: Any, config: dict[str, Any], repeated: list[Burst], ceiling: dict[str, float] | None
) -> dict[str, Any]:
    """Medians over the repetitions of one workload."""
    dtype, quantization = config["dtype"], config["quantization"]
    middle = sorted(repeated, key=lambda b: b.seconds)[len(repeated) // 2]
    done = cost.requests_of(middle.lengths, middle.steps)
    read = cost.bytes_read(llm.spec, done, dtype, quantization) / middle.seconds / 1e9
    flops = cost.operations(llm.spec, done) / middle.seconds / 1e9
    seconds = statistics.median(b.seconds for b in repeated)
    tokens = middle.n_prompt + middle.n_output
    return {
        "elapsed_time": seconds,
        "num_requests": len(middle.lengths),
        "total_num_tokens": tokens,
        "total_prompt_tokens": middle.n_prompt,
        "total_cached_tokens": sum(cached for _, cached, _ in middle.lengths),
        "total_output_tokens": middle.n_output,
        "requests_per_second": len(middle.lengths) / seconds,
        "tokens_per_second": tokens / seconds,
        "output_tokens_per_second": middle.n_output / seconds,
        "prefill_tokens_per_second": _prefill_rate(middle),
        "decode_tokens_per_second_per_request": _decode_rate(middle),
        "median_ttft_ms": statistics.median(middle.first_token) * 1000,
        "steps": middle.steps,
        "read_gb_s": read,
        "gflop_s": flops,
        "share_of_read": read / ceiling["read_gb_s"] if ceiling else None,
        "share_of_gemm": flops / ceiling["gemm_gflop_s"] if ceiling else None,
        "runs": [b.seconds for b in repeated],
    }


def _prefill_rate(b: Burst) -> float:
    """Prompt tokens computed (not cached) a second, until every request had its first token."""
    computed = sum(n_prompt - cached for n_prompt, cached, _ in b.lengths)
    return computed / max(b.first_token)


def _decode_rate(b: Burst) -> float | None:
    """Tokens a second of one request after its first; None where there is no second token."""
    rates = [
        (n - 1) / (total - first)
        for (_, _, n), first, total in zip(b.lengths, b.first_token, b.total, strict=True)
        if n > 1 and total > first
    ]
    return statistics.median(rates) if rates else None
