"""`kvarn reproduce hermes`: requests of several stages on one cluster, in simulation.

Three case studies of HERMES (arXiv 2504.09775): branches of reasoning that share their prompt's
KV; KV fetched from a remote store against computing it again; and batching policies under a mix of
RAG and chat. No figure of the paper is set beside them: none could be read. What has a closed form
is held against it.
"""

from dataclasses import replace
from typing import Any

from kvarn.bench import record
from kvarn.bench.options import Fleet
from kvarn.bench.pipeline_cluster import PAGE, RAG, Cluster, figures, most_pages, retrieval
from kvarn.bench.sim_fleet import find_spec, price_list
from kvarn.cost.link import Link
from kvarn.cost.shape import CostModel, StepShape
from kvarn.sim.links import SharedLink
from kvarn.sim.stations import BatchServer, Transfers
from kvarn.workload import pipelines as made
from kvarn.workload.generate import by_name
from kvarn.workload.pipelines import MODEL, Pipeline, Pipelines, Stage

DEVICE = "H100"
PATHS = (1, 4, 8)
PATH_RATE = 0.25  #: [requests/s]
PROMPT, THOUGHT, ANSWER = 4096, 512, 256  #: of a reasoning request [tokens]
CONTEXTS = (4096, 16_384, 65_536)  #: whose KV is fetched [tokens]
ASKED = 64  #: after the fetched context [tokens]
LATENCY = 1e-3  #: of the remote store (our choice) [s]
AT_ONCE = 8  #: requests that fetch at the same time
ROUNDS = (0, 2, 4, 8)  #: calls of a tool
CHAT, QUESTIONS = 6.0, 4.0  #: arrivals of the mix [requests/s]
MIX = 300  #: requests of each kind
SCHEDULERS = ("continuous", "prefill-first", "orca", "static")
BATCHES = ((1, 0.0), (8, 0.0), (8, 0.2))  #: most jobs of a station's batch, and patience [s]
Row = dict[str, Any]


def run(model: str) -> dict[str, Any]:
    """All case studies, as a result; `model` is a shape by name."""
    fleet = Fleet(model=model, device=DEVICE, page_size=PAGE)
    said = {"rates": [CHAT, QUESTIONS], "requests": MIX, "prompt": PROMPT, "thought": THOUGHT}
    return record.header("reproduce-pipelines", said, {"model": model, "device": DEVICE}) | {
        "experiment": "hermes",
        "reasoning": [reasoning(fleet, k) for k in PATHS],
        "tools": [calls(fleet, rounds) for rounds in ROUNDS],
        "fetch": [fetching(fleet, context) for context in CONTEXTS],
        "batching": [
            mixed(fleet, scheduler, *rule) for scheduler in SCHEDULERS for rule in BATCHES
        ],
    }


def reasoning(fleet: Fleet, k: int) -> Row:
    """`k` paths of one prompt: latency under load, and the KV of one request, shared and not."""
    kind, row = f"{k} paths", Row(paths=k)
    for name, prefix in (("shared", "hash"), ("alone", "none")):
        cluster = Cluster(replace(fleet, prefix=prefix))
        busy, single = (
            made.branches(n, PATH_RATE, k, PROMPT, THOUGHT, ANSWER, PAGE, seed=1) for n in (40, 1)
        )
        row[f"{name}_e2e"] = figures(cluster.run(busy), kind)["mean_e2e"]
        row[f"{name}_pages"] = most_pages(cluster.run(single, pages=True))
    # thoughts of several lengths, of which one is enough: the others are dropped
    race = made.race(40, PATH_RATE, k, PROMPT, THOUGHT, ANSWER, PAGE, seed=1)
    first = Cluster(fleet).run(race)
    row["first_e2e"] = figures(first, f"first of {k} paths")["mean_e2e"]
    row["saved"] = row["alone_pages"] - row["shared_pages"]
    row["prompt_pages"] = (k - 1) * (PROMPT // PAGE)  # what k paths but one need not hold
    return row


def calls(fleet: Fleet, rounds: int) -> Row:
    """An agent with a tool of one second: latency with and without the cached history."""
    load = made.tools(40, 0.5, rounds, 2048, 128, 512, "tool", PAGE, seed=2)
    row: Row = {"rounds": rounds}
    for prefix in ("hash", "none"):
        stations = {"tool": BatchServer(lambda works: 1.0, workers=len(load))}
        outcome = Cluster(replace(fleet, prefix=prefix), stations).run(load)
        row[f"e2e_{prefix}"] = figures(outcome, f"{rounds} calls")["mean_e2e"]
    return row


def fetching(fleet: Fleet, context: int) -> Row:
    """The link speed at which fetching a context's KV is as fast as computing it [bytes/s]."""
    spec = find_spec(fleet.model)
    cost = price_list(fleet, spec)
    n_bytes = context * sum(group.bytes_per_token(2) for group in spec.groups())
    whole = _prefill(cost, 0, context + ASKED, fleet.budget)
    rest = _prefill(cost, context, ASKED, fleet.budget)
    closed = n_bytes / (whole - rest - LATENCY)
    row = {"context": context, "closed": closed}
    for name, n in (("simulated", 1), ("crowded", AT_ONCE)):
        again = _first_token(fleet, cost, context, n, None)
        low, high = closed / 100, closed * 100
        while high / low > 1.001:
            middle = (low * high) ** 0.5
            link = Link("remote", LATENCY, middle, 0.0)
            slower = _first_token(fleet, cost, context, n, link, n_bytes) > again
            low, high = (middle, high) if slower else (low, middle)
        row[name] = high
    return row | {"error": closed / row["simulated"] - 1}


def _prefill(cost: CostModel, start: int, rows: int, budget: int) -> float:
    """Steps of at most `budget` rows, one after the other [s]."""
    ends = [*range(start + budget, start + rows, budget), start + rows]
    starts = [start, *ends[:-1]]
    return sum(
        cost.step(StepShape(((end - at, end),), n_logits=int(end == ends[-1]))).seconds
        for at, end in zip(starts, ends, strict=True)
    )


def _first_token(
    fleet: Fleet, cost: CostModel, context: int, n: int, link: Link | None, n_bytes: float = 0.0
) -> float:
    """Mean time to the first token of `n` requests at once, with or without fetching [s]."""
    blocks, found = context // PAGE, list[Pipeline]()
    for i in range(n):
        own = tuple(range(i * blocks, (i + 1) * blocks))
        model = Stage(MODEL, n_in=context + ASKED, n_out=1, blocks=own)
        if link is None:
            stages: tuple[Stage, ...] = (model,)
        else:
            stages = (Stage("link", work=n_bytes), replace(model, after=(0,), fetched=context))
        found.append(Pipeline(str(i), 0.0, stages))
    stations = {"link": Transfers(SharedLink(link))} if link else {}
    # memory is not the question: any number of contexts fits
    roomy = replace(fleet, pages=(n + 1) * (context + 2 * ASKED) // PAGE)
    outcome = Cluster(roomy, stations, cost).run(Pipelines(tuple(found), PAGE), coasts=False)
    return float(figures(outcome, "")["mean_ttft"])


def mixed(fleet: Fleet, scheduler: str, most: int, patience: float) -> Row:
    """RAG and chat on one instance, with a scheduler there and a batching rule at the stations."""
    chat = by_name("poisson", n=MIX, rate=CHAT, n_in=512.0, n_out=256.0, seed=3)
    rag = by_name("rag", n=MIX, rate=QUESTIONS, block_size=PAGE, seed=4)
    talks = made.in_front(replace(chat, block_size=PAGE), (), "chat")
    load = made.merged(talks, made.in_front(rag, RAG, "rag"))
    cluster = Cluster(replace(fleet, scheduler=scheduler), retrieval(most, patience))
    outcome = cluster.run(load)
    row: Row = {"scheduler": scheduler, "most": most, "patience": patience}
    for kind in ("chat", "rag"):
        row |= {f"{kind}_{key}": value for key, value in figures(outcome, kind).items()}
    return row


def lines(result: dict[str, Any]) -> list[str]:
    """The case studies as tables for people."""
    said = result["config"]
    out = [
        f"{said['model']} on one {said['device']}, priced by a roofline. Reasoning in paths: "
        f"{PROMPT} tokens of prompt, {THOUGHT} a path, then {ANSWER} of answer:",
        f"{'paths':>7}{'E2E s':>9}{'unshared':>10}{'first':>9}{'KV pages':>10}{'unshared':>10}"
        f"{'saved':>8}{'(k-1) prompts':>15}",
    ]
    for row in result["reasoning"]:
        out.append(
            f"{row['paths']:>7}{row['shared_e2e']:>9.2f}{row['alone_e2e']:>10.2f}"
            f"{row['first_e2e']:>9.2f}{row['shared_pages']:>10}{row['alone_pages']:>10}"
            f"{row['saved']:>8}{row['prompt_pages']:>15}"
        )
    out += ["", "agents with a tool of 1 s: E2E [s]",
            f"{'calls':>7}{'history cached':>16}{'not cached':>12}"]  # fmt: skip
    for row in result["tools"]:
        out.append(f"{row['rounds']:>7}{row['e2e_hash']:>16.2f}{row['e2e_none']:>12.2f}")
    out += ["", "link at which fetching KV is as fast as computing it [GB/s]",
            f"{'context':>9}{'closed form':>13}{'simulated':>11}{'error':>8}"
            f"{f'{AT_ONCE} at once':>12}"]  # fmt: skip
    for row in result["fetch"]:
        rates = [row[key] / 1e9 for key in ("closed", "simulated", "crowded")]
        out.append(
            f"{row['context']:>9}{rates[0]:>13.2f}{rates[1]:>11.2f}{row['error']:>8.1%}"
            f"{rates[2]:>12.2f}"
        )
    rag, chat = result["workload"]["rates"][::-1]
    out += ["", f"RAG at {rag:g}/s beside chat at {chat:g}/s [s]; best first by RAG's mean E2E",
            f"{'scheduler':>14}{'station':>16}{'RAG E2E':>9}{'p99':>8}{'RAG TTFT':>10}"
            f"{'chat E2E':>10}{'p99':>8}{'chat TTFT':>11}{'p99':>8}"]  # fmt: skip
    for row in sorted(result["batching"], key=lambda row: float(row["rag_mean_e2e"])):
        rule = f"{row['most']}" + (f", {row['patience']:g} s" if row["patience"] else "")
        cells = (row[key] for key in _MIXED)
        out.append(
            f"{row['scheduler']:>14}{rule:>16}"
            + "".join(f"{value:>{wide}.2f}" for value, wide in zip(cells, _WIDE, strict=True))
        )
    return out


_MIXED = (
    "rag_mean_e2e", "rag_p99_e2e", "rag_mean_ttft", "chat_mean_e2e", "chat_p99_e2e",
    "chat_mean_ttft", "chat_p99_ttft",
)  # fmt: skip
_WIDE = (9, 8, 10, 10, 8, 11, 8)
