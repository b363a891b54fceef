"""`kvarn reproduce sage-kv`: what of a prompt should stay? Policies at equal stored bytes.

On a real text: KL divergence from the full cache and perplexity of the continuation. On questions
about a document: a sentence with a number (needle), one of many keys (recall), and a second
question asked on what the first one left. Random positions and recency (sinks and a window) are the
baselines; every budget is the same number of positions of every layer and head, exactly.

Beside them stand heads that keep all while the others keep sinks and a window (`duoattention`), as
many of them as make the same bytes: those of the model's profile, and heads by lot.
"""

from importlib.resources import files
from random import Random
from statistics import fmean
from typing import Any

from kvarn.bench import record
from kvarn.bench.forced import Answer, Case, divergence, force, perplexity
from kvarn.bench.reproduce import SENTENCES
from kvarn.core.errors import ConfigError
from kvarn.engine.llm import LLM
from kvarn.sparse.rules import split

PARTS = ("random", "streamingllm", "knorm", "h2o", "snapkv", "sage-kv")
BUDGETS = (128, 256)
SINKS, WINDOW = 16, 48  #: of heads that stream
WHO = ("by=random,seed=0", "by=random,seed=1", "by=profile")
PROMPT, GIVEN, TEXTS = 1024, 32, 2  #: tokens; texts
QUESTIONS, ANSWER = 16, 6  #: of each kind; tokens of an answer
PLACES = ("mill", "bridge", "tower", "harbour", "market", "castle", "garden", "station")


def needle(seed: int, sentences: int = 56) -> tuple[str, str, str, str, str]:
    """A document with two numbers in it: (document, question, answer, second question, answer)."""
    chance = Random(seed)
    lines = [chance.choice(SENTENCES) for _ in range(sentences)]
    first, second = chance.sample(PLACES, 2)
    numbers = [str(chance.randrange(1000, 10000)) for _ in range(2)]
    for place, number in zip((first, second), numbers):
        lines.insert(chance.randrange(4, sentences - 8), f"The code of the {place} is {number}.")
    asks = [f"\n\nThe code of the {place} is" for place in (first, second)]
    return " ".join(lines), asks[0], numbers[0], asks[1], numbers[1]


def recall(seed: int, pairs: int = 60) -> tuple[str, str, str]:
    """Lines of names and numbers, and one of them asked for: (document, question, answer)."""
    chance = Random(seed)
    names = [f"{chance.choice(PLACES)} {i}" for i in chance.sample(range(10, 100), pairs)]
    values = [str(chance.randrange(1000, 10000)) for _ in names]
    document = "\n".join(f"{name}: {value}" for name, value in zip(names, values))
    asked = chance.randrange(pairs)
    return document, f"\n{names[asked]}:", values[asked]


def run(model: str) -> dict[str, Any]:
    """The rows, as a result."""
    llm = LLM(model, max_len=2048, max_seqs=64, dtype="float32")
    if llm.tokenizer is None:
        raise ConfigError("sage-kv is judged on words, and this model has no tokenizer")
    texts = texts_of(llm)
    first, full = _rows(llm, "none", texts, None)
    rows = [first]
    for budget in BUDGETS:
        rows += [_rows(llm, f"{name}:budget={budget}", texts, full)[0] for name in PARTS]
    for rule in [_heads(budget, who) for budget in BUDGETS for who in WHO if profiled(llm, who)]:
        own = LLM(model, max_len=2048, max_seqs=64, dtype="float32", sparsity=rule)
        rows.append(_rows(own, rule, texts, full)[0])
        own.close()
    said = {
        "prompt": PROMPT, "given": GIVEN, "texts": TEXTS, "questions": QUESTIONS,
        "budgets": list(BUDGETS),
    }  # fmt: skip
    header = record.header("reproduce-kept", said, {"model": model, "dtype": "float32"})
    return header | {"experiment": "sage-kv", "results": rows}


def _heads(budget: int, who: str) -> str:
    """As many heads that keep all as hold `budget` positions of a head in the mean, at the end."""
    end, least = PROMPT + GIVEN - 1, SINKS + WINDOW
    share = (budget - least) / (end - least)
    return f"duoattention:share={share:.3f},sinks={SINKS},window={WINDOW},{who}"


def profiled(llm: LLM, who: str) -> bool:
    """Whether there is what `who` asks for: the head profile that is named is of one model."""
    if "by=profile" not in who:
        return True
    try:
        split(llm.spec.groups(), f"duoattention:{who}")
    except ConfigError:
        return False
    return True


def texts_of(llm: LLM, prompt: int = PROMPT) -> list[Case]:
    """Stretches of the book that comes with kvarn; `prompt` tokens and what follows them."""
    text = (files("kvarn.bench") / "texts" / "alice.txt").read_text(encoding="utf-8")
    ids: list[int] = llm.tokenizer.encode(text, add_special=False)
    step = len(ids) // TEXTS
    starts = [i * step for i in range(TEXTS)]
    return [Case(ids[a : a + prompt], ids[a + prompt : a + prompt + GIVEN]) for a in starts]


def _rows(
    llm: LLM, rule: str, texts: list[Case], full: list[Answer] | None
) -> tuple[dict[str, Any], list[Answer]]:
    """One rule on everything; `full`: the answers of the full cache."""
    cases = [Case(text.prompt, text.given, 0, rule) for text in texts]
    answers = force(llm, cases)
    spec = llm.spec
    wide = 2 * spec.n_layers * spec.n_kv_heads * spec.head_dim * 4
    row = {
        "sparsity": rule,
        "stored_bytes": round(answers[0].slots * wide),
        "kl": 0.0 if full is None else fmean(map(divergence, full, answers)),
        "perplexity": fmean(map(perplexity, cases, answers)),
    }
    return row | answers_to(llm, rule), answers


def answers_to(llm: LLM, rule: str) -> dict[str, float]:
    """Shares of questions answered rightly."""
    tokenizer = llm.tokenizer

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special=False)
        return found

    first, second, pairs = list[Case](), list[Case](), list[Case]()
    answers = list[tuple[str, str, str]]()
    for seed in range(QUESTIONS):
        document, ask, number, ask_again, other = needle(seed)
        first.append(Case(encode(document + ask), [], ANSWER, rule))
        again = encode(f" {number}.{ask_again}")
        second.append(Case(encode(document + ask), again, ANSWER, rule))
        lines, question, value = recall(seed)
        pairs.append(Case(encode(lines + question), [], ANSWER, rule))
        answers.append((number, other, value))
    found = force(llm, first + second + pairs, keep_logprobs=False)
    texts = [tokenizer.decode(answer.chosen) for answer in found]
    kinds = ("needle", "second", "recall")
    right = dict.fromkeys(kinds, 0)
    for i, kind in enumerate(kinds):
        for text, said in zip(texts[i * QUESTIONS :], answers):
            right[kind] += text.strip().startswith(said[i])
    return {kind: count / QUESTIONS for kind, count in right.items()}


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people."""
    width = max(28, 2 + max(len(row["sparsity"]) for row in result["results"]))
    columns = ("KL", "ppl", "needle", "recall", "second")
    head = f"{'what stays':{width}}{'MiB':>8}" + "".join(f"{name:>8}" for name in columns)
    out = [head]
    for row in result["results"]:
        shares = "".join(f"{row[kind]:>8.2f}" for kind in ("needle", "recall", "second"))
        size = row["stored_bytes"] / 2**20
        out.append(
            f"{row['sparsity']:{width}}{size:>8.1f}{row['kl']:>8.3f}{row['perplexity']:>8.2f}{shares}"
        )
    return out
