"""Sections of docs/results.md on one engine: speed, latency, start, number formats, decisions."""

from typing import Any

from cells import Lines, cell, columns, table


def scheduler_overhead(result: dict[str, Any]) -> Lines:
    """Decisions of a step."""
    said = result["workload"]
    return [
        f"`plan` + `apply` with {said['sequences']} running sequences and "
        f"{said['page_size']}-token pages, {said['steps']} decode steps.",
        "",
        *columns(
            result,
            {
                "workload": "case", "median_ms": "median ms", "p90_ms": "p90 ms",
                "p99_ms": "p99 ms",
            },
        ),
    ]  # fmt: skip


def cpu_peers(result: dict[str, Any]) -> Lines:
    """Engines side by side: tokens a second, and the first engine's ratio to each peer."""
    names = dict.fromkeys(row["engine"] for row in result["results"])
    engines = sorted(names, key=lambda name: not name.startswith("kvarn"))
    rows = []
    for workload in dict.fromkeys(row["workload"] for row in result["results"]):
        rate = {r["engine"]: r["tok_s"] for r in result["results"] if r["workload"] == workload}
        ours = rate[engines[0]]
        cells: list[Any] = [workload]
        for engine in engines:
            ratio = "" if engine == engines[0] else f" ({ours / rate[engine]:.2f}x)"
            cells.append(f"{cell(rate[engine])}{ratio}")
        rows.append(cells)
    versions = ", ".join(
        f"{name} {about['version']}{' (eager)' if about.get('eager') else ''}"
        for name, about in result["config"].items()
    )
    return [
        f"{result['model_id']}, {result['workload']['threads']} threads, medians of "
        f"{result['workload']['repeats']} interleaved repeats; tokens/s, in brackets how many "
        f"times as fast {engines[0]} is. {versions}.",
        "",
        *table(["load", *engines], rows),
    ]


def offline(result: dict[str, Any]) -> Lines:
    """The engine without a server."""
    picked = {
        "workload": "load", "output_tokens_per_second": "output tok/s",
        "prefill_tokens_per_second": "prefill tok/s", "read_gb_s": "GB/s", "gflop_s": "GFLOP/s",
        "share_of_read": "share of bandwidth", "share_of_gemm": "share of GEMM rate",
    }  # fmt: skip
    return [f"{result['model_id']}, {result['config']['dtype']}.", "", *columns(result, picked)]


def latency(result: dict[str, Any]) -> Lines:
    """By batch size."""
    picked = {
        "batch_size": "batch", "avg_latency": "seconds", "median_ttft_ms": "TTFT ms",
        "median_tpot_ms": "TPOT ms", "output_tokens_per_second": "output tok/s",
    }  # fmt: skip
    return [f"{result['model_id']}.", "", *columns(result, picked)]


def startup(result: dict[str, Any]) -> Lines:
    """Seconds until the first token of a fresh process."""
    names = ("process", "import_torch", "engine", "first_token", "total")
    return table(list(names), [[result[f"{name}_s"] for name in names]])


def perplexity(result: dict[str, Any]) -> Lines:
    """Quality of number formats, beside that of the last row."""
    said, rows = result["workload"], []
    for row in result["results"]:
        error = f" ± {row['ratio_error']:.4f}" if row["ratio_error"] else ""
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.4f}{error}"
        rows.append([row["dtype"], row["quantization"], f"{row['perplexity']:.3f}", ratio])
    return [
        f"{result['config']['model']}, {said['tokens']} tokens of {said['text']} in windows of "
        f"{said['window']}; the ratio is to the last row.",
        "",
        *table(["dtype", "quantization", "perplexity", "ratio"], rows),
    ]


def serve(result: dict[str, Any]) -> Lines:
    """A server under load."""
    names = (
        "completed", "failed", "request_throughput", "output_throughput", "median_ttft_ms",
        "p99_ttft_ms", "median_tpot_ms", "p99_itl_ms",
    )  # fmt: skip
    steady = result["steady"]
    rows = [["whole run", *(result.get(name) for name in names)]]
    if steady["start"] is not None:
        rows.append(["steady window", *(steady.get(name) for name in names)])
    said = result["workload"]
    return [
        f"{result['model_id']}, data set {said['dataset']}, {said['num_prompts']} requests, rate "
        f"{said['request_rate']}, at most {said['max_concurrency'] or 'any number'} at once.",
        "",
        *table(["", *names], rows),
    ]
