"""Sections of docs/results.md on engines and kernels on a GPU."""

from statistics import median
from typing import Any

from cells import Lines, cell, percent, ratio, table

#: what each load of the GPU yardstick should reach at least, and the goal
TARGETS: dict[tuple[str, str], tuple[float, float]] = {
    ("qwen3-0.6b", "W1"): (20e3, 24e3),
    ("llama-3.2-1b", "W1"): (33e3, 40e3),
    ("llama-3-8b", "W2"): (4100.0, 4500.0),
    ("llama-3-8b", "W2 prefill"): (43e3, 46e3),
    ("llama-3-8b", "W3"): (165.0, 185.0),
    ("llama-3-8b", "W3 first token"): (0.011, 0.008),
    ("llama-3-8b", "W4 warm"): (5000.0, 6500.0),
    ("llama-3-8b", "Y3"): (10e3, 15e3),
}

UNITS = {"output_tok_s": "output tok/s", "input_tok_s": "input tok/s", "seconds": "s"}


def gpu_engines(result: dict[str, Any]) -> Lines:
    """Engines on a GPU: what was reached, the targets, and what the device allows."""
    engines = list(dict.fromkeys(row["engine"] for row in result["results"]))
    loads: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in result["results"]:
        loads.setdefault((row["model"], row["load"]), {})[row["engine"]] = row
    summary = []
    for (model, load), by_engine in loads.items():
        some = next(iter(by_engine.values()))
        share = some["share"] if some["metric"] == "seconds" else 1 / some["share"]
        reached = [by_engine[name]["value"] if name in by_engine else None for name in engines]
        unit, target = UNITS[some["metric"]], TARGETS.get((model, load), (None, None))
        summary.append([f"{load}, {some['title']}", model, unit, *reached, *target,
                        some["value"] * share])  # fmt: skip
    about = {start["engine"]: start["about"]["version"] for start in result["starts"]}
    ceilings = result["ceilings"]
    fp8 = f", fp8 {cell(ceilings['fp8_tflop_s'])}" if ceilings["fp8_tflop_s"] else ""
    lines = [
        "Random weights; medians of the repeats listed below, each the time of the whole call; "
        f"{', '.join(f'{name} {version}' for name, version in about.items())}. Ceilings of the "
        f"same run: reading {cell(ceilings['read_gb_s'])} GB/s, matrix products "
        f"{cell(ceilings['matmul_tflop_s'])} TFLOP/s{fp8}. A floor reads weights and live KV every "
        "step at that bandwidth, multiplies prompts at that rate, and has no host.",
        "",
        *table(["load", "shape", "unit", *engines, "at least", "goal", "floor"], summary),
        "",
        "Achieved, with all repeats in seconds:",
        "",
        *table(["load", "shape", "engine", "GB/s", "TFLOP/s", "% of the floor's speed", "repeats"],
               [_achieved(row) for row in result["results"]]),
        "",
        "Start, until the first token, in seconds, in the order of the run; kernels that one start "
        "compiled serve the later ones. kvarn's with its imports, vLLM's without:",
        "",
        *table(["engine", "start", "shape", "seconds", "stages"],
               [_started(start) for start in result["starts"]]),
    ]  # fmt: skip
    for left in result["left_out"]:
        lines += ["", f"Not measured: {left['engine']}, {left['setting']}: {left['why']}."]
    return lines


def _achieved(row: dict[str, Any]) -> list[Any]:
    repeats = " ".join(f"{seconds:.4g}" for seconds in row["runs"])
    return [row["load"], row["model"], row["engine"], row["read_gb_s"], row["tflop_s"],
            100 * row["share"], repeats]  # fmt: skip


def _started(start: dict[str, Any]) -> list[Any]:
    stages = start["about"].get("startup", [])
    told = ", ".join(f"{one['stage']} {cell(float(one['seconds']))}" for one in stages)
    return [start["engine"], start["setting"], start["model"], start["start_s"], told or "-"]


def gpu_attention(result: dict[str, Any]) -> Lines:
    """Attention kernels alone."""
    said = result["workload"]
    cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in result["results"]:
        cases.setdefault((row["case"], row["dim"]), {})[row["kernel"]] = row
    names = [
        name for name in dict.fromkeys(row["kernel"] for row in result["results"])
        if any("ms" in by_kernel[name] for by_kernel in cases.values() if name in by_kernel)
    ]  # fmt: skip
    rows = []
    for (case, dim), found in cases.items():
        unit = next(row["unit"] for row in found.values() if "unit" in row)
        rows.append([case, dim, unit, *(found.get(name, {}).get("rate") for name in names)])
    return [
        f"bf16, {said['heads']}/{said['kv_heads']} heads; decodes 64 x 8192, prompts 4 x 8192; "
        f"kvarn (KV write and merges included), flash3 and flashinfer on pages of {said['page']}, "
        f"the others on contiguous KV; reading alone reaches {cell(result['read_gb_s'])} GB/s.",
        "",
        *table(["case", "head dim", "unit", *names], rows),
    ]


def two_trees(result: dict[str, Any]) -> Lines:
    """Times of dense steps in either tree."""
    said = result["workload"]
    rows = [
        [row["step"], median(row["old_ms"]), median(row["new_ms"]), ratio(row["ratio"]),
         _spread(row["old_ms"]), _spread(row["new_ms"])]
        for row in result["results"]
    ]  # fmt: skip
    return [
        f"`benchmarks/gpu/two_trees.py`: {result['config']['model']}, random weights; this tree "
        f"beside {said['old']}, in turns; processes of each: {said['turns']}. Medians, and how far "
        "the processes of a tree differ. Decode steps are replays alone, a prompt is from end to "
        "end.",
        "",
        *table(
            ["step", "before [ms]", "after [ms]", "ratio", "spread before", "spread after"], rows
        ),
    ]


def _spread(times: list[float]) -> str | None:
    return percent((max(times) - min(times)) / median(times)) if len(times) > 1 else None


def attention_plans(result: dict[str, Any]) -> Lines:
    """Balanced work, and prefixes that are read once."""
    said = result["workload"]
    balanced = [
        [row["case"], row["whole_us"], row["cut_us"], f"{cell(row['times'])}x"]
        for row in result["balanced"]
    ]
    shared = [
        [row["sharers"], row["prefix"], row["flat_us"], row["once_us"], row["chosen_us"],
         f"{cell(row['times'])}x", row["difference"]]
        for row in result["shared"]
    ]  # fmt: skip
    return [
        f"`benchmarks/gpu/attention_plans.py`: {said['heads']}/{said['kv_heads']} heads of "
        f"{said['dim']}, bf16, pages of {said['page']} in random order; microseconds a layer, "
        "attention and merge. One row for each length; a program for each row and KV head, and cut "
        "so that all programs have as much to do:",
        "",
        *table(["rows", "a program each", "cut", "faster"], balanced),
        "",
        "Rows that share a prefix, and have 256 positions of their own behind it: read by each, "
        "read once, and as the plan chooses; the largest difference of the outputs.",
        "",
        *table(["rows", "prefix", "by each", "once", "chosen", "faster", "difference"], shared),
    ]


def context_channels(result: dict[str, Any]) -> Lines:
    """What a long context costs, beside three fitted efficiencies."""
    said, fitted = result["workload"], result["efficiencies"]
    rows = [
        [row["context"], row["channel"], row["users"], row["measured_s"], row["predicted_s"],
         percent(row["error"])]
        for row in result["results"]
    ]  # fmt: skip
    shares = ", ".join(f"{name} {value:.3f}" for name, value in fitted.items())
    return [
        f"`benchmarks/gpu/context_channels.py`: {result['config']['model']}, random weights: a "
        "prompt alone up to its first token, a decode step of so many sequences, and all KV of a "
        "sequence out to pinned host memory and back. Beside the closed forms of "
        f"[sessions](cost-model.md#sessions) with three efficiencies ({shares} of the peaks of "
        f"{said['priced_as']}), which were fitted to one sequence at {said['fit']} and to nothing "
        "else. Errors may be 15 %.",
        "",
        *table(["context", "what", "sequences", "measured [s]", "predicted [s]", "error"], rows),
    ]


def verify_gap(result: dict[str, Any]) -> Lines:
    """How long the device waits for the host between steps."""
    said = result["workload"]
    rows = [
        [row["step"], row["batch"], 1e3 * row["step_s"], 1e3 * row["gap_s"], percent(row["share"])]
        for row in result["results"]
    ]
    return [
        f"`benchmarks/gpu/verify_gap.py`: {result['config']['model']}, random weights; rounds that "
        f"verify {said['drafts']} drafts, accepted with {said['acceptance']}, beside plain steps, "
        "by events on the device around every replay. A plain step is handed over while the one "
        "before it runs. `verify`: drafts that the host has for nothing, once it knows what "
        f"stands. `drafter`: {said['drafter_layers']} layer of the same shape makes them; the step "
        "behind its drafts, and the next drafts behind the step, are handed over before either is "
        "known; `by the host`: they wait for it instead.",
        "",
        *table(["round", "sequences", "round [ms]", "device waits [ms]", "share"], rows),
    ]  # fmt: skip


def head_in_chain(result: dict[str, Any]) -> Lines:
    """The acceptance head in a chain of passes, and what it adds to one and the same replay."""
    rows = [
        [row["setting"], row["tokens_per_s"], row["ratio"],
         None if row["pass_s"] is None else 1e6 * row["pass_s"],
         row["output_tokens"] / (row["output_tokens"] - row["accepted_tokens"]),
         row["drafted_tokens"]]
        for row in result["results"]
    ]  # fmt: skip
    names = ["setting", "tok/s", "over plain", "device, a pass [us]", "tokens a round", "drafted"]
    heads = [
        [row["head"], row["passes"], 1e6 * row["replay_s"], 1e6 * row["pass_s"],
         1e6 * row["added_s"], row["added"]]
        for row in result.get("heads", [])
    ]  # fmt: skip
    of_heads = ["head", "passes", "a replay [us]", "a pass [us]", "added, a replay [us]", "share"]
    alone = ["", "One and the same replay on the device, with heads and without, in turns:", ""]
    return [
        f"`benchmarks/gpu/head_in_chain.py`: {result['config']['model']} with its drafter, one "
        "request after the other, greedy. Drafts that end by the acceptance head, its word part of "
        "the replay of four passes or asked for after each pass; beside a fixed length without a "
        "head.",
        "",
        *table(names, rows),
        *([*alone, *table(of_heads, heads)] if heads else []),
    ]
