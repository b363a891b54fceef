"""`kvarn reproduce gemfilter`: do early layers know which tokens of a prompt the answer needs?

Questions about documents of several lengths, asked at an eighth of the prompt. First a sweep: what
each layer would choose, whether the number that is asked for is among it, and what all layers make
of those tokens. Then the part beside tokens by lot, the last tokens, and `snapkv` with a KV as
large. Two sets show where it fails: the second of two facts, of which the question names only the
first, and all of several facts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from kvarn.bench import record
from kvarn.bench.kept_study import PLACES
from kvarn.bench.reproduce import SENTENCES
from kvarn.core.errors import ConfigError
from kvarn.core.keep import Filter
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.runner.filtering import chosen
from kvarn.sparse.gemfilter import GemFilter

LENGTHS = (1024, 2048, 4096)  #: tokens of a prompt, at most
QUESTIONS, SHARE, ANSWER = 8, 8, 6  #: a kind and length; prompt over what goes on; answer [tokens]
FAILURES = 1024  #: prompt of the sets that are to fail [tokens]
NAMES = ("Anna", "Bertil", "Cecilia", "David", "Erik", "Frida", "Gustav", "Hanna")


@dataclass(slots=True)
class Question:
    """A document with facts in it, and what is asked about them."""

    facts: list[str]
    ask: str
    answer: str
    needed: list[str]  #: stretches of the facts without which nobody can answer
    prompt: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)  #: positions of each of `needed`


def needle(seed: int) -> Question:
    """One number among sentences that hold none."""
    chance = Random(seed)
    place, number = chance.choice(PLACES), str(chance.randrange(1000, 10000))
    fact = f"The code of the {place} is {number}."
    return Question([fact], f"\n\nThe code of the {place} is", number, [number])


def two_hops(seed: int) -> Question:
    """The question names a place; its keeper, whom only the first fact names, has the number."""
    chance = Random(seed)
    place, name = chance.choice(PLACES), chance.choice(NAMES)
    number = str(chance.randrange(1000, 10000))
    facts = [f"The keeper of the {place} is {name}.", f"The number of {name} is {number}."]
    ask = f"\n\nThe number of the keeper of the {place} is"
    return Question(facts, ask, number, [name, number])


def count_all(seed: int) -> Question:
    """How often something happened: every mention counts."""
    chance = Random(seed)
    days = chance.sample(range(1, 29), chance.randrange(3, 8))
    facts = [f"On day {day} of May a swan was seen." for day in days]
    ask = "\n\nThe number of days of May on which a swan was seen is"
    return Question(facts, ask, str(len(days)), [f"day {day} of" for day in days])


def lay_out(tokenizer: Any, question: Question, length: int, depth: float, seed: int) -> Question:
    """Make it a prompt of nearly `length` tokens, its facts spread from `depth` (0 to 1) on."""
    chance = Random(seed)
    n_facts = len(question.facts)
    at = sorted((depth + i / n_facts) % 1.0 for i in range(n_facts))

    def encode(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special=False)
        return found

    room = length - len(encode(" ".join(question.facts) + question.ask)) - n_facts
    lines, used = [chance.choice(SENTENCES)], 0
    while used < room:
        lines.append(" " + chance.choice(SENTENCES))
        used += len(encode(lines[-1]))
    lines = lines[:-2]
    for fact, where in sorted(zip(question.facts, at), key=lambda pair: -pair[1]):
        lines.insert(1 + int(where * (len(lines) - 1)), " " + fact)
    for line in lines:
        start = len(question.prompt)
        ids = encode(line)
        question.prompt += ids
        for i, fact in enumerate(question.facts):
            if line == " " + fact:
                wanted = question.needed if n_facts == 1 else [question.needed[i]]
                question.places += [_within(encode, line, part, start) for part in wanted]
    question.prompt += encode(question.ask)
    return question


def _within(encode: Callable[[str], list[int]], line: str, part: str, start: int) -> list[int]:
    """Positions of the tokens of `part` in a line that begins at `start`."""
    before, _, after = line.partition(part)
    first, last = len(encode(before.rstrip())), len(encode(line)) - len(encode(after))
    return list(range(start + first, start + last))


@dataclass(slots=True)
class Look:
    """Queries and keys of every layer, while one prompt is computed."""

    length: int
    rows: dict[int, int] = field(default_factory=dict)  #: seen so far, by layer
    q: dict[int, Tensor] = field(default_factory=dict)  #: [Hq, d] of the last position
    k: dict[int, list[Tensor]] = field(default_factory=dict)

    def tap(self, point: str, layer: int, x: Tensor) -> Tensor:
        """See `kvarn.models.points`."""
        if point == "k_rot" and self.rows.get(layer, 0) < self.length:
            self.k.setdefault(layer, []).append(x)
            self.rows[layer] = self.rows.get(layer, 0) + len(x)
        elif point == "q_rot" and self.rows.get(layer, 0) < self.length:
            self.q[layer] = x[-1]
        return x

    def chosen(self, layer: int, rule: Filter) -> list[int]:
        """What would go on, and how many of it the scores lack, if this layer chose."""
        scores = GemFilter().score(self.q[layer], torch.cat(self.k[layer]))
        return [int(at) for at in chosen(scores, rule)]


class Study:
    """One engine, and the answers that it gives."""

    def __init__(self, model: str) -> None:
        self.llm = LLM(model, max_len=max(LENGTHS) + 64, max_seqs=32, dtype="float32", budget=1024)
        if self.llm.tokenizer is None:
            raise ConfigError("gemfilter is judged on words, and this model has no tokenizer")
        self.layers = range(self.llm.spec.n_layers)

    def right(self, question: Question, prompt: list[int], sparsity: str = "none") -> bool:
        """Whether the greedy answer to `prompt` is the question's."""
        return self.all_right(question, [prompt], sparsity)[0]

    def all_right(
        self, question: Question, prompts: list[list[int]], sparsity: str = "none"
    ) -> list[bool]:
        """The same of several prompts."""
        params = SamplingParams(temperature=0.0, max_tokens=ANSWER, ignore_eos=True)
        done = self.llm.generate(prompts, params, sparsity=sparsity)
        return [one.text.strip().startswith(question.answer) for one in done]

    def ask(self, question: Question, every: bool, seed: int) -> dict[str, Any]:
        """What each setting makes of one question; of `every` layer, what it would choose."""
        made: Any = self.llm.engine.executor
        prompt, n = question.prompt, len(question.prompt)
        self.llm.engine.reset_prefix_cache()  # every key must pass by
        look = Look(n)
        made.tap = look.tap
        full = self.right(question, prompt)
        made.tap = None
        budget = n // SHARE
        picks = [
            look.chosen(at, GemFilter(budget=budget, layer=at).filter(len(self.layers)))
            for at in self.layers
        ]
        lot = Random(seed).sample(range(1, n - 32), budget - 33)
        by_lot = [0, *sorted(lot), *range(n - 32, n)]
        last = [0, *range(n - budget + 1, n)]
        default = GemFilter(budget=budget).filter(len(self.layers)).layers - 1
        found: dict[str, Any] = {
            "full": full,
            "gemfilter": self.right(question, prompt, f"gemfilter:budget={budget}"),
            "snapkv": self.right(question, prompt, f"snapkv:budget={budget}"),
            "random": self.right(question, [prompt[at] for at in by_lot]),
            "last": self.right(question, [prompt[at] for at in last]),
            "covered": _covered(question, picks[default]),
            "lacking": picks[default][-1],
        }  # fmt: skip
        found["sweep"] = [_covered(question, pick) for pick in picks]
        if every:
            prompts = [[prompt[at] for at in pick[:-1]] for pick in picks]
            found["answers"] = self.all_right(question, prompts)
        return found


def _covered(question: Question, pick: list[int]) -> bool:
    """Whether all that the answer needs goes on."""
    there = set(pick[:-1])
    return all(at in there for places in question.places for at in places)


def run(model: str) -> dict[str, Any]:
    """The rows, as a result."""
    study = Study(model)
    tokenizer = study.llm.tokenizer
    sets: list[tuple[str, Callable[[int], Question], int]] = [
        *((f"needle {length}", needle, length) for length in LENGTHS),
        ("two facts", two_hops, FAILURES),
        ("all of several", count_all, FAILURES),
    ]
    rows = list[dict[str, Any]]()
    sweep: list[dict[str, Any]] = [{"layer": at} for at in study.layers]
    for kind, make, length in sets:
        answers = []
        for i in range(QUESTIONS):
            depth = (i + 0.5) / QUESTIONS
            question = lay_out(tokenizer, make(i), length, depth, i)
            answers.append(study.ask(question, make is needle and length < LENGTHS[-1], i))
        names = ("full", "gemfilter", "snapkv", "random", "last", "covered", "lacking")
        means: dict[str, Any] = {name: fmean(a[name] for a in answers) for name in names}
        rows.append({"set": kind} | means)
        for row in sweep:
            row[f"{kind}, there"] = fmean(a["sweep"][row["layer"]] for a in answers)
            if "answers" in answers[0]:
                row[f"{kind}, right"] = fmean(a["answers"][row["layer"]] for a in answers)
    default = GemFilter().filter(len(study.layers)).layers - 1
    said = {
        "questions": QUESTIONS, "share": SHARE, "lengths": list(LENGTHS), "failures": FAILURES,
        "default_layer": default,
    }  # fmt: skip
    header = record.header("reproduce-filter", said, {"model": model, "dtype": "float32"})
    return header | {"experiment": "gemfilter", "results": rows, "sweep": sweep}


def lines(result: dict[str, Any]) -> list[str]:
    """Tables for people."""
    names = ("full", "gemfilter", "snapkv", "random", "last", "covered", "lacking")
    out = [f"{'questions':18}" + "".join(f"{name:>11}" for name in names)]
    out += [
        f"{row['set']:18}" + "".join(f"{row[name]:>11.2f}" for name in names)
        for row in result["results"]
    ]
    columns = [name for name in result["sweep"][0] if name != "layer"]
    out += ["", "layer: " + "; ".join(columns)]
    out += [
        f"{row['layer']:>5}" + "".join(f"{row[name]:>8.2f}" for name in columns)
        for row in result["sweep"]
    ]
    return out
