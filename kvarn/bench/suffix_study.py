"""`kvarn reproduce suffix-decoding`: drafts without a model, alone and beside a drafting model.

First the rates on texts of three kinds (`kvarn.bench.reproduce`). Then a stream of which some
repeats earlier text and some does not, in counts, without a clock: requests come one after the
other to one engine a setting: copies of the prompt, lists, questions, and questions asked before.
Greedy and in fp32, so that all settings give the same tokens, which is checked (in bf16 near ties
may fall otherwise: attention of trees is summed up by parts). A round is a step that brings tokens;
what a proposer saves is rounds, whatever the machine. Last, files that are written again with small
edits (`kvarn.bench.edit_study`).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from kvarn.bench import edit_study, reproduce
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.propose.mix import Mix

OUTPUT = 64  #: tokens of an answer
EACH = 6  #: requests of a kind
TREE = {"draft_shape": "tree"}

#: what is compared, plain decoding first
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ngram, 8": {"speculate": "ngram", "draft_tokens": 8},
    "suffix, 8": {"speculate": "suffix", "draft_tokens": 8},
    "suffix tree, 8": {"speculate": "suffix", "draft_tokens": 8} | TREE,
    "draft, 2": {"speculate": "draft", "draft_tokens": 2},
    "draft, 4": {"speculate": "draft", "draft_tokens": 4},
    "draft, 8": {"speculate": "draft", "draft_tokens": 8},
    "draft tree, 2": {"speculate": "draft", "draft_tokens": 2} | TREE,
    "draft tree, 4": {"speculate": "draft", "draft_tokens": 4} | TREE,
    "draft tree, 8": {"speculate": "draft", "draft_tokens": 8} | TREE,
    "mix, 8": {"speculate": "mix", "draft_tokens": 8},
    "mix tree, 8": {"speculate": "mix", "draft_tokens": 8} | TREE,
}


@dataclass(slots=True)
class Row:
    """One setting on one kind of request, or on all of them."""

    setting: str
    kind: str
    tokens: int  #: decoded; the first of each answer comes with its prompt, and is left out
    rounds: int  #: steps that brought them
    drafted: int
    accepted: int
    passes: int  #: of the drafting model

    @property
    def tokens_per_round(self) -> float:
        """1 without drafts."""
        return self.tokens / self.rounds


def stream() -> list[tuple[str, str]]:
    """(kind, prompt) in an order of its own; a question comes again after it came first."""
    chance = Random(1)
    asked = [(kind, one) for kind, texts in reproduce.TEXTS.items() for one in texts[:EACH]]
    chance.shuffle(asked)
    for one in reproduce.TEXTS["talk"][:EACH]:
        first = asked.index(("talk", one))
        asked.insert(chance.randint(first + 1, len(asked)), ("again", one))
    return asked


def run(model: str) -> dict[str, Any]:
    """Rates by text and setting, and the counts of the mixed stream and of edits."""
    rates = reproduce.run("suffix-decoding", model)
    return rates | {"mixed": mixed(model), "edits": edit_study.run(model)}


def mixed(model: str) -> list[dict[str, Any]]:
    """Rows by setting and kind of request, with tokens a round."""
    rows, plain, asked = list[Row](), list[list[int]](), stream()
    for setting, options in SETTINGS.items():
        fixed: dict[str, Any] = {"draft_length": "fixed", "dtype": "float32"}
        llm = LLM(model, max_len=1024, max_seqs=4, **fixed, **options)
        mine, answers = _serve(llm, setting, asked)
        llm.close()
        plain = plain or answers
        if answers != plain:
            raise AssertionError(f"{setting} changed the output: speculation must not")
        rows += mine
    return [asdict(row) | {"tokens_per_round": row.tokens_per_round} for row in rows]


def _serve(
    llm: LLM, setting: str, asked: Sequence[tuple[str, str]]
) -> tuple[list[Row], list[list[int]]]:
    """One request after the other: rows by kind and of all, and the answers."""
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    every, answers = Row(setting, "all", 0, 0, 0, 0, 0), list[list[int]]()
    rows = dict[str, Row]()
    for kind, prompt in asked:
        before, passed = llm.engine.stats(), _passes(llm)
        (done,) = llm.generate(reproduce.chats(llm, (prompt,)), params)
        after = llm.engine.stats()
        answers.append(done.outputs[0].tokens)
        accepted = after.accepted_tokens - before.accepted_tokens
        tokens = len(answers[-1]) - 1
        for row in (rows.setdefault(kind, Row(setting, kind, 0, 0, 0, 0, 0)), every):
            row.tokens += tokens
            row.rounds += tokens - accepted
            row.drafted += after.drafted_tokens - before.drafted_tokens
            row.accepted += accepted
            row.passes += _passes(llm) - passed
    return [*rows.values(), every], answers


def _passes(llm: LLM) -> int:
    """Forward passes of the drafting model so far."""
    proposer: Any = llm.engine.speculation and llm.engine.speculation.proposer
    if isinstance(proposer, Mix):
        proposer = proposer.other
    return proposer.passes if isinstance(proposer, DraftModel) else 0


def lines(result: dict[str, Any]) -> list[str]:
    """Tables for people."""
    mixed = mixed_lines(result["mixed"])
    return [*reproduce.lines(result), "", *mixed, "", *edit_study.lines(result["edits"])]


def mixed_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Tokens a round by setting and kind, and what they cost."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    found = {(row["setting"], row["kind"]): row for row in rows}
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    width = max(map(len, settings)) + 2
    head = "".join(f"{kind:>8}" for kind in kinds)
    out = [f"{'tokens a round, mixed stream':{width}}"]
    out.append(f"{'':{width}}{head}{'rounds':>10}{'drafted':>10}{'passes':>10}")
    for setting in settings:
        said = "".join(f"{found[setting, kind]['tokens_per_round']:>8.2f}" for kind in kinds)
        one = found[setting, "all"]
        out.append(
            f"{setting:{width}}{said}{one['rounds']:>10}{one['drafted']:>10}{one['passes']:>10}"
        )
    return out
