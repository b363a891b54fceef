"""`kvarn reproduce recall`: what is still recalled, by a model that can do nothing else.

The recall model (`benchmarks/train_recall.py` made it, in 80 s on a GPU; its config.json has the
record) answers questions about a context of pairs with the full cache, so what is lost is lost by
what was dropped or not read. The first question is the prompt's last token, which eviction can see
and which its last dense step answers; a late one comes after that answer and has nothing to do with
it. Every part keeps, or reads, an eighth of the context.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from kvarn.bench import record
from kvarn.bench.forced import Case, force
from kvarn.core.errors import ConfigError
from kvarn.engine.llm import LLM
from kvarn.workload.mqar import questions, recall

#: tokens of a context -> contexts, questions of each kind about one
SIZES = {1024: (8, 8), 4096: (2, 8), 16384: (1, 4)}
SHARE = 8  #: of the context, one part is kept or read
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
    llm = LLM(
        str(folder), max_len=max(SIZES) + 64, max_seqs=16, dtype="float32",
        sparsity="quest:dense=0",
    )  # fmt: skip
    rows = []
    for tokens in SIZES:
        for name in ("none", *PARTS):
            rows.append({"tokens": tokens, "sparsity": name} | _right(llm, tokens, name))
    sizes = {str(tokens): list(counts) for tokens, counts in SIZES.items()}
    said = {"sizes": sizes, "share": SHARE}
    header = record.header("reproduce-recall", said, {"model": model})
    return header | {"experiment": "recall", "results": rows}


def _rule(name: str, tokens: int) -> str:
    if name == "none":
        return name
    return f"{name}:budget={tokens // SHARE}{MORE.get(name, '')}"


def _right(llm: LLM, tokens: int, name: str) -> dict[str, float]:
    """Shares of first and of late questions that are answered rightly."""
    contexts, count = SIZES[tokens]
    rule, right = _rule(name, tokens), {"first": 0, "late": 0}
    for seed in range(contexts):
        made = recall(seed, tokens, tokens // 16)
        asked = questions(seed, made, 2 * count)
        pairs = list(zip(asked[::2], asked[1::2]))
        prompts = [[*made.context, first] for first, _ in pairs]
        cases = [Case(prompt, [], 1, rule) for prompt in prompts]
        cases += [
            Case(prompt, [made.pairs[first], late], 1, rule)
            for prompt, (first, late) in zip(prompts, pairs)
        ]
        answers = [answer.chosen[0] for answer in force(llm, cases, keep_logprobs=False)]
        wanted = [made.pairs[first] for first, _ in pairs] + [made.pairs[b] for _, b in pairs]
        for i, (said, true) in enumerate(zip(answers, wanted, strict=True)):
            right["first" if i < count else "late"] += said == true
    return {kind: n / (contexts * count) for kind, n in right.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    out = [f"{'tokens':>8}  {'what stays or is read':22}{'first':>8}{'late':>8}"]
    for row in result["results"]:
        shares = f"{row['first']:>8.2f}{row['late']:>8.2f}"
        out.append(f"{row['tokens']:>8}  {row['sparsity']:22}{shares}")
    return out
