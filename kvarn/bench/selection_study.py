"""`kvarn reproduce quest`: which pages should a row read? At equal budgets, and equal reads.

Everything stays with `quest`; what differs is what a step reads. So it stands beside as many pages
at random, and beside what is kept for good (`streamingllm`, `snapkv`): with the same budget, and
with as many positions as `quest` reads, its bounds and dense layers included. KL divergence from
the full cache on a book, and questions as in `kvarn reproduce sage-kv`.
"""

from statistics import fmean, median
from typing import Any

from kvarn.bench import record
from kvarn.bench.forced import Answer, Case, force, kl, perplexity
from kvarn.bench.kept_study import GIVEN, QUESTIONS, TEXTS, answers_to, texts_of
from kvarn.core.errors import ConfigError
from kvarn.engine.llm import LLM
from kvarn.sparse.rules import parse

PROMPT = 2048  #: tokens
BUDGETS = (64, 128, 256, 512, 1024, 2048)
ASKED = (128, 256)  #: budgets whose questions are asked: an eighth and a quarter of a document
KEPT = ("streamingllm", "snapkv")


def run(model: str) -> dict[str, Any]:
    """The rows, as a result."""
    llm = LLM(model, max_len=4096, max_seqs=64, dtype="float32", sparsity="quest:budget=4096")
    if llm.tokenizer is None:
        raise ConfigError("quest is judged on words, and this model has no tokenizer")
    texts = texts_of(llm, PROMPT)
    full = force(llm, _with(texts, "none"))
    rows = [_row(llm, "none", texts, full, asked=True)]
    for budget in BUDGETS:
        asked = budget in ASKED
        rows += [
            _row(llm, f"{name}:budget={budget}", texts, full, asked)
            for name in ("quest", "random-pages", *KEPT)
        ]
        if budget < PROMPT:
            read = round(rows[-4]["read"])
            rows += [_row(llm, f"{name}:budget={read}", texts, full, False) for name in KEPT]
    said = {
        "prompt": PROMPT, "given": GIVEN, "texts": TEXTS, "questions": QUESTIONS,
        "budgets": list(BUDGETS), "page_size": llm.engine.control.kv.page_size,
    }  # fmt: skip
    header = record.header("reproduce-selection", said, {"model": model, "dtype": "float32"})
    return header | {"experiment": "quest", "results": rows}


def _with(texts: list[Case], rule: str) -> list[Case]:
    return [Case(text.prompt, text.given, 0, rule) for text in texts]


def positions_read(llm: LLM, rule: str, prompt: int) -> float:
    """Positions whose K and V, or as much, a step reads after `prompt` tokens, in the mean."""
    part, control = parse(rule), llm.engine.control
    if part is None:
        return float(prompt)
    n_layers, size = llm.spec.n_layers, control.kv.page_size
    select = part.rule(size, n_layers)
    if select is not None:
        return float(select.seen(prompt, prompt))
    keeps = [part.keep(group, n_layers) for group in control.kv.groups]
    return fmean(keep.seen(prompt, prompt) + 1 for keep in keeps if keep is not None)


def _row(llm: LLM, rule: str, texts: list[Case], full: list[Answer], asked: bool) -> dict[str, Any]:
    """One rule on the texts, and on the questions where they are asked."""
    cases = _with(texts, rule)
    answers = force(llm, cases)
    each = [x for pair in zip(full, answers, strict=True) for x in kl(*pair)]
    row: dict[str, Any] = {
        "sparsity": rule,
        "read": positions_read(llm, rule, PROMPT),
        "kl": fmean(each),
        "kl_median": median(each),
        "perplexity": fmean(map(perplexity, cases, answers)),
    }
    return row | (answers_to(llm, rule) if asked else {})


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    out = [f"{'what is read':28}{'positions':>10}{'KL':>9}{'median':>9}{'ppl':>8}{'needle':>8}"]
    for row in result["results"]:
        found = f"{row['needle']:>8.2f}" if "needle" in row else ""
        out.append(
            f"{row['sparsity']:28}{row['read']:>10.0f}{row['kl']:>9.4f}{row['kl_median']:>9.4f}"
            f"{row['perplexity']:>8.2f}{found}"
        )
    return out
