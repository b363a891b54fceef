"""`kvarn reproduce recall`: what is still recalled, by a model that can do nothing else.

The recall model (`benchmarks/train_recall.py` made it, in 80 s on a GPU; its config.json has the
record) answers questions about a context of pairs with the full cache, so what is lost is lost by
what was dropped or not read. The first question is the prompt's last token, which eviction can see
and which its last dense step answers, whatever was dropped. The same one asked again, after the
first time was passed over, has to be answered from what was chosen for it; a late one comes after
the first's answer and has nothing to do with it. Every part keeps, or reads, an eighth of the
context; beside them a window of four times as much, and twice as many pages (what SAGE-KV is
compared with), and as many positions in smaller pages, of which two are no choice.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from kvarn.bench import record
from kvarn.bench.forced import Case, force
from kvarn.core.errors import ConfigError
from kvarn.engine.llm import LLM
from kvarn.workload.mqar import FILLER, questions, recall

#: tokens of a context -> contexts, questions of each kind about one
SIZES = {1024: (16, 8), 4096: (4, 8), 16384: (1, 4)}
SHARE = 8  #: of the context, one part is kept or read
FINE = 8  #: positions of a page, half as many as the others have
LARGER = {"streamingllm": 2, "quest": 4}  #: the same with more: one of so many parts
PARTS = (
    "random", "streamingllm", "knorm", "h2o", "snapkv", "sage-kv", "random-pages", "quest",
    "gemfilter",
)  # fmt: skip
#: the model has two layers: all of them choose, and the second one filters
MORE = {"random-pages": ",dense=0", "quest": ",dense=0", "gemfilter": ",layer=1"}
SHIPPED = Path(str(files("kvarn.bench"))) / "recall_model"


def run(model: str) -> dict[str, Any]:
    """The rows, as a result."""
    folder = SHIPPED if model == "recall" else Path(model)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"recall asks the model that comes with kvarn, or one in a folder that "
            f"benchmarks/train_recall.py made; {model!r} is neither"
        )
    options: dict[str, Any] = {
        "max_len": max(SIZES) + 64, "max_seqs": 16, "dtype": "float32", "sparsity": "quest:dense=0"
    }  # fmt: skip
    llm = LLM(str(folder), **options)
    fine = LLM(str(folder), page_size=FINE, **options)
    rows = []
    for tokens in SIZES:
        settings = [(name, SHARE) for name in ("none", *PARTS)] + list(LARGER.items())
        for name, share in settings:
            said = {"tokens": tokens, "sparsity": name, "share": share}
            rows.append(said | _right(llm, tokens, name, share))
        said = {"tokens": tokens, "sparsity": "quest", "share": SHARE, "page_size": FINE}
        rows.append(said | _right(fine, tokens, "quest", SHARE))
    sizes = {str(tokens): list(counts) for tokens, counts in SIZES.items()}
    said = {"sizes": sizes, "share": SHARE}
    header = record.header("reproduce-recall", said, {"model": model})
    return header | {"experiment": "recall", "results": rows}


def _rule(name: str, tokens: int, share: int) -> str:
    if name == "none":
        return name
    return f"{name}:budget={tokens // share}{MORE.get(name, '')}"


def _right(llm: LLM, tokens: int, name: str, share: int) -> dict[str, float]:
    """Shares of the questions of each kind that are answered rightly, and how many were asked."""
    contexts, count = SIZES[tokens]
    rule, kinds = _rule(name, tokens, share), ("first", "again", "late")
    right = dict.fromkeys(kinds, 0)
    for seed in range(contexts):
        made = recall(seed, tokens, tokens // 16)
        asked = questions(seed, made, 2 * count)
        pairs = list(zip(asked[::2], asked[1::2]))
        prompts = [[*made.context, first] for first, _ in pairs]
        cases = [Case(prompt, [], 1, rule) for prompt in prompts]
        cases += [Case(prompt, [FILLER[seed], prompt[-1]], 1, rule) for prompt in prompts]
        cases += [
            Case(prompt, [made.pairs[first], late], 1, rule)
            for prompt, (first, late) in zip(prompts, pairs)
        ]
        answers = [answer.chosen[0] for answer in force(llm, cases, keep_logprobs=False)]
        firsts = [made.pairs[first] for first, _ in pairs]
        wanted = [*firsts, *firsts, *(made.pairs[late] for _, late in pairs)]
        for i, (said, true) in enumerate(zip(answers, wanted, strict=True)):
            right[kinds[i // count]] += said == true
    asked_of_each = contexts * count
    return {kind: n / asked_of_each for kind, n in right.items()} | {"asked": asked_of_each}


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    out = [f"{'tokens':>8}  {'what stays or is read':22}{'first':>8}{'again':>8}{'late':>8}"]
    for row in result["results"]:
        name = row["sparsity"] if row["share"] == SHARE else f"{row['sparsity']} 1/{row['share']}"
        name += f" pages of {row['page_size']}" if "page_size" in row else ""
        shares = f"{row['first']:>8.3f}{row['again']:>8.3f}{row['late']:>8.3f}"
        out.append(f"{row['tokens']:>8}  {name:22}{shares}")
    return out
