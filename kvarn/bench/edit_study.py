"""Files written again with small edits: what n-grams and suffix trees see of the earlier ones.

The part of `kvarn reproduce suffix-decoding` that serves agents (`kvarn.bench.edits`): the model
says what it says once, greedily, in fp32; every proposer is then played over the same texts, one
request after the other (`kvarn.speculate.texts`). In counts: no clock is read. N-grams are swept by
their lengths of match, and the best in hindsight is what suffix trees are held against.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvarn.bench import edits, record
from kvarn.bench.edits import Agent
from kvarn.engine.llm import LLM
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.part import Proposer
from kvarn.speculate.propose import native_tree
from kvarn.speculate.propose.native_tree import NativeTree
from kvarn.speculate.propose.ngram import NGram
from kvarn.speculate.propose.suffix import Suffix
from kvarn.speculate.propose.suffix_tree import Drafting, SuffixTree
from kvarn.speculate.texts import Told, tell

FILES = 15  #: that are edited; descriptions are as many as there are
LENGTHS = (3, 7, 15, 31)  #: longest drafts [tokens]
MATCHES = ((1, 2), (1, 3), (2, 3), (1, 4), (2, 4), (3, 5), (4, 8))  #: n_min, n_max
#: how the trees draft: as in the paper, and more tokens for each that matches
WAYS = {"suffix": Drafting(), "suffix, twice": Drafting(factor=2.0)}
ALONE = "suffix, alone"  #: every request is a tenant of its own, so that only its own tree drafts
WORKLOADS: dict[str, Callable[[LLM, Sequence[int]], list[Agent]]] = {
    "conversation": edits.conversations,
    "patch": edits.patches,
    "rewrite": edits.rewrites,
}
FIRST, AGAIN = "first", "again"  #: a file's first request, and those that come after it


@dataclass(slots=True)
class Row:
    """One proposer on the first requests of a workload's files, or on the others."""

    workload: str
    requests: str  #: FIRST or AGAIN
    setting: str
    most: int  #: longest draft [tokens]
    tokens: int
    rounds: int
    drafted: int


def run(model: str) -> dict[str, Any]:
    """What was recorded, and what every proposer makes of it."""
    rows, about = list[Row](), dict[str, Any]()
    llm = LLM(model, max_len=2048, max_seqs=FILES, dtype="float32")
    for name, ask in WORKLOADS.items():
        count = len(edits.TASKS) if name == "rewrite" else FILES
        agents = ask(llm, range(count))
        about[name] = {"asked": count} | statistics(agents)
        rows += played(name, agents)
    llm.close()
    said = {"lengths": list(LENGTHS), "matches": list(MATCHES), "about": about}
    header = record.header("reproduce-edits", said, {"model": model})
    return header | {"rows": [asdict(row) for row in rows]}


def statistics(agents: Sequence[Agent]) -> dict[str, int]:
    """How much was recorded: files, requests, tokens."""
    turns = [turn for agent in agents for turn in agent]
    return {
        "files": len(agents),
        "requests": len(turns),
        "prompt_tokens": sum(len(turn.prompt) for turn in turns),
        "answer_tokens": sum(len(turn.answer) for turn in turns),
    }


def played(workload: str, agents: Sequence[Agent]) -> list[Row]:
    """Every proposer on the same requests."""
    rows = list[Row]()
    for most in LENGTHS:
        for low, high in MATCHES:
            rows += _rows(workload, f"ngram {low} to {high}", most, agents, NGram(low, high))
        for setting, how in WAYS.items():
            rows += _rows(workload, setting, most, agents, _suffix(how))
        rows += _rows(workload, ALONE, most, agents, _suffix(Drafting()), alone=True)
    return rows


def _suffix(how: Drafting) -> Suffix:
    """With trees that know nothing yet."""
    return Suffix(how, tree=NativeTree if native_tree.available() else SuffixTree)


def _rows(
    workload: str,
    setting: str,
    most: int,
    agents: Sequence[Agent],
    proposer: Proposer,
    alone: bool = False,
) -> list[Row]:
    """One proposer on all requests, in the order in which they come."""
    told = {FIRST: Told(), AGAIN: Told()}
    for number, (at, turn) in enumerate(edits.in_turn(agents)):
        salt = str(number) if alone else ""
        requests = AGAIN if at else FIRST
        told[requests] += tell(proposer, Fixed(), turn.prompt, turn.answer, most, salt=salt)
    return [
        Row(workload, requests, setting, most, one.tokens, one.rounds, one.drafted)
        for requests, one in told.items()
    ]


@dataclass(slots=True)
class Line:
    """A workload and a longest draft: tokens a round, and drafted tokens that fell, a token."""

    workload: str
    most: int
    ngram: str  #: the best one, in hindsight
    each: dict[str, float]  #: tokens a round by setting, requests that came again
    lost: dict[str, float]  #: of these, drafted tokens that did not stand, for each token
    ratio: float  #: suffix over the best n-gram, requests that came again
    ratio_all: float  #: the same with each file's first request


def table_of(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """One line for each workload and longest draft."""
    cases = dict.fromkeys((row["workload"], row["most"]) for row in rows)
    return [_line(*case, [row for row in rows if (row["workload"], row["most"]) == case])
            for case in cases]  # fmt: skip


def _line(workload: str, most: int, rows: Sequence[dict[str, Any]]) -> Line:
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    again = {row["setting"]: row for row in rows if row["requests"] == AGAIN}
    each = {name: again[name]["tokens"] / again[name]["rounds"] for name in settings}
    whole = {
        name: sum(row["rounds"] for row in rows if row["setting"] == name) for name in settings
    }
    ngrams = [name for name in settings if name.startswith("ngram")]
    best = max(ngrams, key=each.__getitem__)
    lost = {
        name: (row["drafted"] - row["tokens"] + row["rounds"]) / row["tokens"]
        for name, row in again.items()
    }
    chosen = {"ngram": best} | {name: name for name in (ALONE, *WAYS)}
    return Line(
        workload, most, best.removeprefix("ngram "),
        {name: each[one] for name, one in chosen.items()},
        {name: lost[one] for name, one in chosen.items()},
        each["suffix"] / each[best],
        min(whole[name] for name in ngrams) / whole["suffix"],
    )  # fmt: skip


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    names = ["ngram", ALONE, *WAYS]
    head = "".join(f"{name:>15}{'lost':>7}" for name in names)
    out = [f"{'tokens a round, edits':21}{'match':>8}{head}{'over ngram':>12}{'with first':>12}"]
    for one in table_of(result["rows"]):
        said = "".join(f"{one.each[name]:>15.2f}{one.lost[name]:>7.2f}" for name in names)
        case = f"{one.workload}, {one.most}"
        out.append(f"{case:21}{one.ngram:>8}{said}{one.ratio:>12.2f}{one.ratio_all:>12.2f}")
    return out
