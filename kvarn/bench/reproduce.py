"""`kvarn reproduce NAME`: a technique beside plain decoding and its strongest static rivals.

Every setting serves the same texts with the same real model, in one run, in turns; greedy, so that
all must give the same tokens, which is checked. What is reported is the ratio of output rates.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.core.errors import ConfigError, nearest
from kvarn.core.output import EngineStats
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM

SENTENCES = (
    "The mill stands where the river bends.", "Its wheel has sixteen paddles of oak.",
    "The stones were cut in the spring of 1781.", "Every morning the miller opens the sluice.",
    "Rye comes on Mondays and wheat on Thursdays.", "Barley comes when the brewer remembers it.",
    "The cat sleeps on the warm side of the oven.", "In winter the wheel is hung with ice.",
    "Nobody has counted the sacks since the flood.", "The bridge is mended with the old beams.",
    "A heron fishes in the pool below the weir.", "At noon the bell of the chapel rings twice.",
    "The apprentice writes numbers on the door.", "Flour hangs in the light like smoke.",
)  # fmt: skip
QUESTIONS = (
    "Why is the sky blue?", "Tell me about a fox who wanted to learn to swim.",
    "What should I think about before I buy a house?", "Explain vaccines to a curious child.",
    "How do I bake bread without an oven?", "What made the Roman roads so durable?",
    "Write a letter to a friend who has moved away.", "How does a sailing boat go upwind?",
    "What is the use of philosophy?", "Describe a market in the early morning.",
    "How do bees find their way home?", "Give me a plan for learning to draw.",
    "Why do leaves change their colour?", "What can we learn from old maps?",
    "How does a piano make its sound?", "Describe the taste of an apple.",
)  # fmt: skip


def _copy(number: int) -> str:
    chosen = " ".join(Random(number).sample(SENTENCES, 8))
    return f"Repeat the following text exactly, word by word.\n\n{chosen}"


def _list(number: int) -> str:
    what = QUESTIONS[number].split()[-1].rstrip("?.")
    return (
        f"Write a numbered list in which every line has the form 'Number N: {what}'. "
        "Begin with 1 and go on to 40."
    )


#: texts by kind: what copies its prompt, what repeats itself, what does neither; all unlike
TEXTS: dict[str, tuple[str, ...]] = {
    "copy": tuple(_copy(i) for i in range(len(QUESTIONS))),
    "list": tuple(_list(i) for i in range(len(QUESTIONS))),
    "talk": QUESTIONS,
}
OUTPUT, REPEATS = 64, 2  #: tokens of an answer; runs, of other texts each, that are summed up
BATCHES = (1, 4)
Setting = dict[str, Any]


def _fixed(proposer: str, *lengths: int) -> dict[str, Setting]:
    return {
        f"{proposer}, fixed {k}": {
            "speculate": proposer, "draft_length": "fixed", "draft_tokens": k
        }
        for k in lengths
    }  # fmt: skip


def _control(proposer: str, *controls: str, most: int = 16) -> dict[str, Setting]:
    return {
        f"{proposer}, {name}": {
            "speculate": proposer, "draft_length": name, "draft_tokens": most
        }
        for name in controls
    }  # fmt: skip


#: what is compared; plain decoding is always there
EXPERIMENTS: dict[str, dict[str, Setting]] = {
    "suffix-decoding": _fixed("ngram", 2, 4, 8, 16)
    | _fixed("suffix", 4, 8, 16)
    | _control("suffix", "survival"),
    "gammatune": _fixed("ngram", 1, 2, 4, 8, 16)
    | _control("ngram", "gammatune", "gammatune-plus", "survival"),
    "specdec-pp": _fixed("draft", 1, 2, 4, 8)
    | _control("draft", "specdec-pp", "confidence", "survival"),
    "utility-spec": _fixed("ngram", 1, 2, 3, 5, 7)
    | _control("ngram", "utility", "survival", most=7)
    | _fixed("draft", 1, 3)
    | _control("draft", "utility", most=7),
}


@dataclass(slots=True)
class Row:
    """One setting on one kind of text at one batch size."""

    setting: str
    text: str
    batch: int
    tokens_per_s: float
    ratio: float  #: to plain decoding of the same run
    tokens_per_step: float  #: of a sequence: 1 without speculation
    acceptance: float  #: share of drafted tokens


@dataclass(slots=True)
class _Taken:
    """What one setting took, over all counted batches."""

    seconds: float = 0.0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    answers: list[list[list[int]]] = field(default_factory=list)

    def add(self, seconds: float, before: EngineStats, after: EngineStats) -> None:
        self.seconds += seconds
        self.steps += after.steps - before.steps
        self.drafted += after.drafted_tokens - before.drafted_tokens
        self.accepted += after.accepted_tokens - before.accepted_tokens


def run(name: str, model: str) -> dict[str, Any]:
    """The rows of an experiment, as a result."""
    if name not in EXPERIMENTS:
        raise ConfigError(f"unknown experiment {name!r}{nearest(name, EXPERIMENTS)}")
    settings: dict[str, Setting] = {"plain": {}} | EXPERIMENTS[name]
    engines = {key: LLM(model, max_len=1024, **options) for key, options in settings.items()}
    rows = []
    for text, prompts in TEXTS.items():
        for batch in BATCHES:
            rows += list(_compare(engines, text, prompts, batch))
    said = {"output": OUTPUT, "repeats": REPEATS, "texts": list(TEXTS)}
    header = record.header("reproduce", said, {"model": model, "experiment": name})
    return header | {
        "experiment": name,
        "results": [{f: getattr(row, f) for f in Row.__slots__} for row in rows],
    }


def _compare(
    engines: dict[str, LLM], text: str, prompts: tuple[str, ...], batch: int
) -> Iterator[Row]:
    """All settings on the same prompts, in turns; no setting meets a prompt twice.

    The first batch fills caches and is not counted.
    """
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    taken = {key: _Taken() for key in engines}
    start = 0 if batch == 1 else REPEATS + 1  # the smaller batch has had the first ones
    for repeat in range(REPEATS + 1):
        some = prompts[start + repeat * batch :][:batch]
        for key, llm in engines.items():
            before, began = llm.engine.stats(), perf_counter()
            done = llm.generate(chats(llm, some), params)
            seconds = perf_counter() - began
            taken[key].answers.append([one.outputs[0].tokens for one in done])
            if repeat:
                taken[key].add(seconds, before, llm.engine.stats())
    plain = taken["plain"]
    for key, one in taken.items():
        if one.answers != plain.answers:
            raise AssertionError(f"{key} changed the output of {text!r}: speculation must not")
        rate = REPEATS * batch * OUTPUT / one.seconds
        share = one.accepted / one.drafted if one.drafted else 0.0
        each = REPEATS * OUTPUT / one.steps
        yield Row(key, text, batch, rate, plain.seconds / one.seconds, each, share)


def chats(llm: LLM, prompts: tuple[str, ...]) -> list[list[int]]:
    """Tokens of each prompt as a message to the model."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise ConfigError("reproduce asks a model in words, and this one has no tokenizer")
    chats = [tokenizer.chat([{"role": "user", "content": prompt}]) for prompt in prompts]
    return [tokenizer.encode(chat, add_special=False) for chat in chats]


def lines(result: dict[str, Any]) -> list[str]:
    """A table for people: one line a setting, one column a text and batch."""
    rows = result["results"]
    columns = list(dict.fromkeys((row["text"], row["batch"]) for row in rows))
    found = {(row["setting"], row["text"], row["batch"]): row for row in rows}
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    width = max(map(len, settings)) + 2
    head = "".join(f"{f'{text} x{batch}':>16}" for text, batch in columns)
    out = [f"{'tokens/s over plain (tokens a step)':{width}}", f"{'':{width}}{head}"]
    for setting in settings:
        cells = [found[setting, *column] for column in columns]
        said = "".join(f"{c['ratio']:>8.2f} ({c['tokens_per_step']:>5.2f})" for c in cells)
        out.append(f"{setting:{width}}{said}")
    return out
