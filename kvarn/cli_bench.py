"""`kvarn bench offline | serve | latency | startup | perplexity | compare | policies`."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvarn.bench.options import Latency, Load, Offline, Perplexity, Startup, Workload
from kvarn.cli_compare_policies import policies
from kvarn.cli_options import chosen, takes
from kvarn.core.config import EngineConfig
from kvarn.core.errors import ConfigError

if TYPE_CHECKING:
    from kvarn.bench.compare import Row

Model = Annotated[str | None, typer.Argument(metavar="[MODEL]", help="the same as --model")]
ToFile = Annotated[str | None, typer.Option("--json", metavar="FILE", help="write the result")]

#: a request that leaves this long after it was due is worth a word [ms]
LATE_MS = 50.0


def add_bench(app: typer.Typer) -> None:
    """Add `bench` and its commands to the program."""
    bench = typer.Typer(help="Measure speed and quality; compare two results.")
    for command in (_offline, _serve, _latency, _startup, _perplexity, _compare):
        bench.command(command.__name__.strip("_"))(command)
    bench.command("policies")(policies)
    app.add_typer(bench, name="bench")


@takes(engine=EngineConfig, work=Workload, how=Offline)
def _offline(
    engine: dict[str, Any],
    work: dict[str, Any],
    how: dict[str, Any],
    name: Model = None,
    json: ToFile = None,
) -> int:
    """Throughput of the engine without a server: tokens, bytes and operations a second."""
    from kvarn.bench import offline
    from kvarn.cli_model import open_llm

    resolved = chosen(engine, name)
    workload = Workload(**work, seed=resolved.config.seed)
    options = Offline(**how)
    offline.check(workload, options)
    with open_llm(resolved) as llm:
        result = offline.run(llm, workload, options)
    _report(result, json, offline_lines(result))
    return 0


@takes(work=Workload, load=Load)
def _serve(work: dict[str, Any], load: dict[str, Any], json: ToFile = None) -> int:
    """Load a running server from several processes: TTFT, TPOT, ITL, E2EL, goodput."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    from kvarn.bench import serve

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("requests", total=None)

        def watch(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        options = Load(**load)
        result = serve.run(Workload(**work), options, watch)
    _report(result, json, serve_lines(result, options.percentiles))
    return 0 if result["completed"] else 1


@takes(engine=EngineConfig, how=Latency)
def _latency(
    engine: dict[str, Any], how: dict[str, Any], name: Model = None, json: ToFile = None
) -> int:
    """TTFT and time a token by batch size, without a server."""
    from kvarn.bench import latency
    from kvarn.cli_model import open_llm

    options = Latency(**how)
    latency.check(options)
    with open_llm(chosen(engine, name)) as llm:
        result = latency.run(llm, options)
    _report(result, json, latency_lines(result))
    return 0


@takes(engine=EngineConfig, how=Startup)
def _startup(
    engine: dict[str, Any], how: dict[str, Any], name: Model = None, json: ToFile = None
) -> int:
    """What a fresh process spends until its first token, stage by stage."""
    from kvarn.bench import startup
    from kvarn.cli_model import fetch

    resolved = chosen(engine, name)
    fetch(resolved.config)
    given = {
        name: getattr(resolved.config, name)
        for name, origin in resolved.origins.items()
        if origin.source == "flag"
    }
    result = startup.run(given, Startup(**how))
    _report(result, json, startup_lines(result))
    return 0


@takes(engine=EngineConfig, how=Perplexity)
def _perplexity(
    engine: dict[str, Any], how: dict[str, Any], name: Model = None, json: ToFile = None
) -> int:
    """What a number format costs: perplexity of a fixed text, as the engine serves it."""
    from kvarn.bench import perplexity
    from kvarn.cli_model import open_llm

    options = Perplexity(**how)
    text = perplexity.read_text(options)
    runs = []
    for given in perplexity.forms(engine, options):
        with open_llm(chosen(given, name)) as llm:
            runs.append(perplexity.score(llm, text, options))
    result = perplexity.result(runs, text, options)
    _report(result, json, perplexity_lines(result))
    return 0


def _compare(
    files: Annotated[list[str], typer.Argument(metavar="A.json B.json [C.json ...]")],
    force: Annotated[
        bool, typer.Option("--force", help="compare in spite of different workloads")
    ] = False,
) -> int:
    """Two results as ratios b / a, or a simulation against runs; 1 where workloads differ."""
    from kvarn.bench import compare, record

    results = [record.read(path) for path in files]
    parts = compare.split(results)
    if parts is None and len(results) != 2:
        raise ConfigError(
            f"two results, or a simulation and its measurements, are compared; got {len(results)}"
        )
    if parts is not None:
        guess, real = parts
        differing = compare.unlike(guess, real)
        lines = compare.warnings(real[0], guess | {"device": real[0].get("device")})
    else:
        differing, lines = compare.mismatches(*results), compare.warnings(*results)
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)
    for line in differing:
        print(f"the workloads differ: {line}", file=sys.stderr)
    if differing and not force:
        print("kvarn: not compared; --force compares all the same", file=sys.stderr)
        return 1
    if parts is not None:
        print("\n".join(compare.prediction_lines(compare.judged(guess, real), len(real))))
    else:
        print("\n".join(ratio_lines(compare.rows(*results))))
    return 0


def ratio_lines(rows: "list[Row]") -> list[str]:
    """Measures of two results and their ratios as a table."""
    width = max((len(row.name) for row in rows), default=4)
    lines = [f"{'':{width}}  {'a':>12}  {'b':>12}  {'b/a':>7}"]
    for row in rows:
        ratio = f"{row.ratio:7.3f}" if row.ratio is not None else "      -"
        lines.append(f"{row.name:{width}}  {row.a:12.4g}  {row.b:12.4g}  {ratio}")
    return lines


def _report(result: dict[str, Any], path: str | None, lines: list[str]) -> None:
    from kvarn.bench import record

    record.write(result, path)
    print("\n".join(lines))
    if path is not None:
        print(f"written to {path}")


def offline_lines(result: dict[str, Any]) -> list[str]:
    """The result of `bench offline` as a table."""
    head = ("workload", "seconds", "out tok/s", "decode/req", "prefill tok/s", "GB/s", "GFLOP/s")
    lines = ["  ".join(f"{name:>13}" for name in head)]
    for row in result["results"]:
        values = (
            row["elapsed_time"], row["output_tokens_per_second"],
            row["decode_tokens_per_second_per_request"], row["prefill_tokens_per_second"],
            row["read_gb_s"], row["gflop_s"],
        )  # fmt: skip
        cells = [f"{'-' if value is None else format(value, '.2f'):>13}" for value in values]
        lines.append("  ".join([f"{row['workload']:>13}", *cells]))
    ceiling = result["ceiling"]
    if ceiling is not None:
        lines.append(
            f"this machine reads {ceiling['read_gb_s']:.1f} GB/s and multiplies at "
            f"{ceiling['gemm_gflop_s']:.0f} GFLOP/s"
        )
        for row in result["results"]:
            lines.append(
                f"{row['workload']:>12}  {row['share_of_read']:.0%} of the bandwidth, "
                f"{row['share_of_gemm']:.0%} of the GEMM rate"
            )
    return lines


def perplexity_lines(result: dict[str, Any]) -> list[str]:
    """The result of `bench perplexity` as a table."""
    work = result["workload"]
    lines = [
        f"{work['text']}: {work['tokens']} tokens in windows of {work['window']}",
        f"{'dtype':>10}  {'quantization':>12}  {'perplexity':>10}  {'ratio':>18}  {'seconds':>7}",
    ]
    for row in result["results"]:
        ratio = "-"
        if row["ratio"] is not None:
            ratio = f"{row['ratio']:.4f} +- {row['ratio_error']:.4f}"
        lines.append(
            f"{row['dtype']:>10}  {row['quantization']:>12}  {row['perplexity']:10.3f}  "
            f"{ratio:>18}  {row['seconds']:7.1f}"
        )
    return lines


def serve_lines(result: dict[str, Any], percentiles: tuple[float, ...]) -> list[str]:
    """The result of `bench serve`: the whole run beside its steady window."""
    from kvarn.bench.stats import label

    steady = result["steady"]
    lines = [
        f"{result['completed']} completed, {result['failed']} failed in {result['duration']:.2f} s",
        *(f"  {count} x {error}" for error, count in result["error_counts"].items()),
    ]
    if steady["start"] is None:
        lines.append(f"no steady window: {steady['why_empty']}")
    else:
        lines.append(
            f"steady: {steady['definition']} ({steady['start']:.2f}-{steady['end']:.2f} s)"
        )
    names = [
        "request_throughput", "request_goodput", "output_throughput", "total_token_throughput",
    ]  # fmt: skip
    for measure in ("ttft", "tpot", "itl", "e2el"):
        marks = ["mean", *(label(share) for share in percentiles)]
        names += [f"{mark}_{measure}_ms" for mark in marks]
    lines.append(f"{'':26}{'whole run':>12}{'steady':>12}")
    for name in names:
        values = [result.get(name), steady.get(name)]
        if values[0] is not None:
            cells = "".join(f"{'-' if v is None else format(v, '.2f'):>12}" for v in values)
            lines.append(f"{name:26}{cells}")
    late = max((result[name] for name in result if "client_queue_time" in name), default=0.0)
    if late > LATE_MS and result["max_concurrency"] is None:
        lines.append(f"the client itself was late by {late:.0f} ms: use more --processes")
    if result["total_cached_tokens"] and result["bench"] == "serve":
        lines.append(
            f"{result['total_cached_tokens']} of {result['total_input_tokens']} prompt tokens came "
            "from the server's prefix cache (another --seed asks for other prompts)"
        )
    return lines


def latency_lines(result: dict[str, Any]) -> list[str]:
    """The result of `bench latency` as a table."""
    lines = [f"{'batch':>6}{'seconds':>12}{'TTFT ms':>12}{'TPOT ms':>12}{'out tok/s':>12}"]
    for row in result["results"]:
        lines.append(
            f"{row['batch_size']:6d}{row['avg_latency']:12.3f}{row['median_ttft_ms']:12.1f}"
            f"{row['median_tpot_ms']:12.2f}{row['output_tokens_per_second']:12.1f}"
        )
    return lines


def startup_lines(result: dict[str, Any]) -> list[str]:
    """The result of `bench startup`: seconds by stage."""
    lines = [
        f"{name:14}{result[name + '_s']:8.2f} s"
        for name in ("process", "import_torch", "engine", "first_token", "total")
    ]
    stages = result["runs"][0]["stages"]
    return lines + [f"  {row['stage']:20}{row['seconds']:8.2f} s" for row in stages]
