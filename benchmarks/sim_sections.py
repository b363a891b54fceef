"""Sections of docs/results.md on the simulator."""

from typing import Any

from cells import Lines, cell, columns, percent, ratio, table


def sim_routers(result: dict[str, Any]) -> Lines:
    """Routers in simulation, and the simulator's own speed."""
    said, big = result["config"], result["large"]
    picked = {
        "speed": "trace speed", "router": "router", "mean_ttft_ms": "mean TTFT ms",
        "p99_ttft_ms": "p99 TTFT ms", "mean_tpot_ms": "mean TPOT ms",
        "prefix_hit_rate": "prefix hits", "best_hit_rate": "best possible",
        "e2e_over_bound": "mean E2E / bound", "energy_j": "energy J", "wall_seconds": "wall s",
    }  # fmt: skip
    return [
        f"{said['instances']} instances of {said['model']} on {said['device']}, priced by the "
        f"{said['cost']} (nothing measured: read the differences, not the times; the "
        f"section below has error bars, for a smaller fleet and part of the trace), "
        f"{result['workload']['trace']}.",
        "",
        *columns(result, picked),
        "",
        f"{big['instances']} instances at {big['rate']:.0f} requests/s for "
        f"{big['virtual_seconds']:.0f} virtual seconds: {cell(big['wall_us_per_request'])} us a "
        f"request, so that an hour takes {cell(big['hour_in_hours'])} hours in one process.",
    ]


def sim_scale(result: dict[str, Any]) -> Lines:
    """What the simulator itself takes."""
    names = (
        "jobs", "instances", "router", "prefix", "requests", "steps", "virtual_seconds",
        "wall_seconds", "cpu_seconds", "requests_per_second",
    )  # fmt: skip
    large, shared = result["large"], result["shared"]
    rows = [[result[one][name] for name in names] for one in ("large", "shared", "mooncake")]
    hours = [
        f"{cell(one['hour_in_wall_hours'])} hours ({cell(one['hour_in_cpu_hours'])} of processors)"
        for one in (large, shared)
    ]
    return [
        f"The first two rows are {large['minutes']:g} minutes of arrivals at {large['rate']:.0f} "
        f"requests/s; by their time a request, an hour of them takes {hours[0]} in one process, "
        f"and {hours[1]} in {shared['jobs']}. The last is the whole Mooncake conversation trace.",
        "",
        *table([name.replace("_", " ") for name in names], rows),
    ]


def policies(result: dict[str, Any]) -> Lines:
    """Ratios of policies in simulation, with what is left of them when the times are wrong."""
    said, option = result["config"], result["vary"].partition("=")[0]
    rows = [
        [
            one["measure"], one["policy"].removeprefix(f"{option}="), ratio(one["nominal"]),
            f"[{ratio(one['p5'])}, {ratio(one['p95'])}]", one["verdict"],
        ]
        for one in result["claims"]
    ]  # fmt: skip
    base = result["policies"][0].removeprefix(f"{option}=")
    sigmas = ", ".join(f"{term} {cell(wide)}" for term, wide in result["sigma"].items())
    return [
        f"How many times better than {base}, and [p5, p95] of that over {result['draws']} draws of "
        f"a wrong time model that every {option} meets; better only if p5 is above 1 "
        f"([how](cost-model.md#how-far-to-trust-a-conclusion)). {said['instances']} instances of "
        f"{said['model']} on {said['device']}, priced by the {said['cost']}; "
        f"{result['workload']['requests']} requests of {result['workload']['trace']}. "
        f"Log-deviations by term: {sigmas} ({result['source']}).",
        "",
        *table(["measure", option, "ratio", "[p5, p95]", "verdict"], rows),
    ]


def sim_validation(result: dict[str, Any]) -> Lines:
    """Simulated closed loops beside measured end-to-end points."""
    limits = result["workload"]["point_limits"]
    picked = {
        "model": "model", "device": "device", "tp": "tp", "points": "points",
        "tpot_median_error": "median TPOT error", "tpot_bias": "TPOT bias",
        "tpot_within": "within limit", "missing_ms": "TPOT short by ms",
        "ttft_median_error": "median TTFT error", "ttft_bias": "TTFT bias",
        "ttft_within": "within limit ", "prefill_load": "prefill load",
    }  # fmt: skip
    rows = [[row.get(key) for key in picked] for row in result["groups"]]
    return [
        f"Llama-3.1 on vLLM (AIConfigurator's silicon sample) against closed loops priced by "
        f"kernel tables without host time; limits of the median error: TPOT "
        f"{limits['tpot']:.0%}, TTFT {limits['ttft']:.0%}. {len(result['refused'])} points were "
        f"refused. [How, and what is missed](simulator-validation.md). "
        f"Scatter: [TPOT](img/sim_tpot.svg), [TTFT](img/sim_ttft.svg).",
        "",
        *table(list(picked.values()), rows),
    ]


WHY_SESSIONS = """*Queue* is simulated: one turn at a time, first come, first served; the least
recently served gives way. The formula is a bound for any order of service and knows no waiting, so
that the queue stays below it; but it has KV come back in every turn, where a first turn needs none
back and a session that ends makes room, so that computing again serves more than it says. *Random*
draws the thoughts from an exponential: some users then come back soon enough to find their KV,
where in a fixed order least recently used is the worst choice. *Engine* is this engine's own
scheduler and prefix cache, which keeps the prompts of ended sessions too, so that nobody's is left
once more users are there than fit. The published figures are rounded, and were read second-hand."""


def sessions(result: dict[str, Any]) -> Lines:
    """Long-context sessions: published, by formula, simulated."""
    said, knees = result["workload"], result["knees"]
    fits = next(row["fits"] for row in knees if "engine_simulated" in row)
    kinds = {
        "swap": "swapped", "recompute": "computed again", "random": "again, random",
        "engine": "again, engine",
    }  # fmt: skip
    picked = {"users": "users"}
    for key, name in kinds.items():
        if f"{key}_formula" in knees[0]:
            picked[f"{key}_formula"] = f"{name}: formula"
        picked[f"{key}_simulated"] = f"{name}: queue" if key in ("swap", "recompute") else name
        picked[f"{key}_missed"] = "missed"
    rows = [[row.get(key) for key in picked] for row in knees if row["fits"] == fits]
    worked = [[one["measure"], one["context"], one["published"], one["ours"]]
              for one in result["published"]]  # fmt: skip
    links = [[one["context"], one["predicted"] / 1e9, one["simulated"] / 1e9, percent(one["error"])]
             for one in result["crossover"]]  # fmt: skip
    same = sum(one["said"] == one["simulated"] for one in result["techniques"])
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} on "
        f"{result['config']['device']} at peak; {said['context']} tokens of prompt, "
        f"{said['turns']} turns of {said['answer']}, {said['think']:g} s of thought. Sessions an "
        f"hour where the KV of {fits} users fits, and the share of later turns whose KV had gone:",
        "",
        *table(list(picked.values()), rows),
        "",
        WHY_SESSIONS,
        "",
        "Host link at which swapping serves as many sessions as computing again:",
        "",
        *table(["context", "2K/T_pre GB/s", "simulated GB/s", "error"], links),
        "",
        f"{same} of {len(result['techniques'])} techniques help the channels in simulation that "
        "the taxonomy names, and no others. The worked example (arXiv 2405.08944):",
        "",
        *table(["Yi-34B-200K on an A100", "context", "published", "cost model"], worked),
    ]


WHY_PIPELINES = """A station takes who is there, up to so many jobs, or waits up to the
named time for company. These stations are bound by arithmetic, so that batches save nothing and
waiting only costs; the static scheduler answers a whole batch before it begins the next."""


def pipelines(result: dict[str, Any]) -> Lines:
    """Requests of several stages, in simulation."""
    reasoning = {
        "paths": "paths", "shared_e2e": "E2E s", "alone_e2e": "unshared",
        "shared_pages": "KV pages", "alone_pages": "unshared ", "saved": "saved",
        "prompt_pages": "(k-1) prompts",
    }  # fmt: skip
    tools = {"rounds": "calls", "e2e_hash": "history cached", "e2e_none": "not cached"}
    batching = {
        "scheduler": "scheduler", "most": "jobs", "patience": "wait s", "rag_mean_e2e": "RAG E2E s",
        "rag_p99_e2e": "p99", "rag_mean_ttft": "RAG TTFT", "chat_mean_e2e": "chat E2E",
        "chat_mean_ttft": "chat TTFT", "chat_p99_ttft": "p99",
    }  # fmt: skip
    links = [
        [one["context"], *(one[key] / 1e9 for key in ("closed", "simulated")),
         percent(one["error"]), one["crowded"] / 1e9]
        for one in result["fetch"]
    ]  # fmt: skip
    ranked = sorted(result["batching"], key=lambda row: float(row["rag_mean_e2e"]))
    chat, rag = result["workload"]["rates"]
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} on one "
        f"{result['config']['device']}, priced by the roofline. Branches of reasoning that share "
        "a prompt, under load, and the KV pages of one such request:",
        "",
        *_picked(result["reasoning"], reasoning),
        "",
        "Agents that wait a second for a tool, end to end:",
        "",
        *_picked(result["tools"], tools),
        "",
        "Link at which fetching a context's KV brings the first token as soon as computing it:",
        "",
        *table(["context", "closed form GB/s", "simulated", "error", "8 at once"], links),
        "",
        f"RAG (embed, search, rerank, model) at {rag:g}/s beside chat at {chat:g}/s, best first. "
        f"{WHY_PIPELINES}",
        "",
        *_picked(ranked, batching),
    ]


def _picked(rows: list[dict[str, Any]], names: dict[str, str]) -> Lines:
    return table(list(names.values()), [[row[key] for key in names] for row in rows])
