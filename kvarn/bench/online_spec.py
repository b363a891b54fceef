"""`kvarn reproduce online-spec`: a drafter that learns, while the traffic's subject changes.

All settings serve the same requests in the same order, a batch at a time and in turns, so that the
machine's moods meet all of them; greedy, so that all must give the same tokens, which is checked.
What is counted is the acceptance at each position of a draft, given that those before it stood,
by phase and quarter of a phase; and the output rate, training included, over plain decoding.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.bench.drift import PHASES, prompts
from kvarn.core.errors import ConfigError
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.speculate.part import Verified
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.train.student import Recipe
from kvarn.speculate.train.trainer import OnlineTrainer

REQUESTS, OUTPUT, BATCH = 128, 48, 16  #: of a phase; tokens of an answer; requests at once
QUARTERS = 4
POSITIONS = 4  #: of a draft, counted one by one
LENGTH = 2  #: of the drafts of all settings that learn [tokens]

Change = Callable[[LLM], None]


def fixed(length: int, **options: Any) -> dict[str, Any]:
    """The drafter that comes with kvarn, so many tokens a round."""
    return {
        "speculate": "draft", "draft_length": "fixed", "draft_tokens": length, **options
    }  # fmt: skip


def _trainer(llm: LLM) -> OnlineTrainer | None:
    speculation = llm.engine.speculation
    trainer = None if speculation is None else speculation.trainer
    return trainer if isinstance(trainer, OnlineTrainer) else None


def _drop_kv(llm: LLM) -> None:
    """Sequences that run compute the drafter's KV anew whenever its weights change."""
    trainer, speculation = _trainer(llm), llm.engine.speculation
    assert trainer is not None and speculation is not None
    proposer = speculation.proposer
    assert isinstance(proposer, DraftModel)
    trainer.renew = lambda decoder, keep_kv: proposer.renew(decoder, False)


def _recipe(recipe: Recipe) -> Change:
    def change(llm: LLM) -> None:
        trainer: Any = _trainer(llm)
        trainer.updates.student.how = recipe

    return change


@dataclass(slots=True)
class Setting:
    """An engine's options, and what is changed in it for the sake of comparison."""

    options: dict[str, Any]
    change: Change = lambda llm: None


LEARNS = fixed(LENGTH, train_drafter="inline")
SETTINGS: dict[str, Setting] = {
    "plain": Setting({}),
    "frozen, 1 token": Setting(fixed(1)),
    "frozen, 2 tokens": Setting(fixed(2)),
    "frozen, 4 tokens": Setting(fixed(4)),
    "learns between steps": Setting(LEARNS),
    "learns in a thread": Setting(fixed(LENGTH, train_drafter="on")),
    "learns, KV dropped at swaps": Setting(LEARNS, _drop_kv),
    "learns where refused, as many labels": Setting(
        LEARNS, _recipe(Recipe(wrong_only=True, passes=3))
    ),
    "learns the best token only": Setting(LEARNS, _recipe(Recipe(loss="token"))),
}


@dataclass(slots=True)
class Count:
    """What happened in a quarter of a phase."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    judged: list[int] = field(default_factory=lambda: [0] * POSITIONS)
    accepted: list[int] = field(default_factory=lambda: [0] * POSITIONS)

    def observe(self, records: Sequence[Verified]) -> None:
        """Each position that was judged: those before it stood."""
        for one in records:
            for at in range(min(one.judged, POSITIONS)):
                self.judged[at] += 1
                self.accepted[at] += at < one.accepted

    @property
    def acceptance(self) -> list[float | None]:
        """By position; None where none was judged."""
        pairs = zip(self.accepted, self.judged, strict=True)
        return [accepted / judged if judged else None for accepted, judged in pairs]


class Served:
    """One setting, as it goes through the phases."""

    def __init__(self, model: str, setting: Setting) -> None:
        self.llm = LLM(model, max_len=1024, max_seqs=BATCH, kv_memory=0.25, **setting.options)
        setting.change(self.llm)
        self.count = Count()
        speculation = self.llm.engine.speculation
        if speculation is not None:
            # the drafting model itself has nothing to learn from records
            proposer: Any = speculation.proposer
            proposer.observe = lambda records: self.count.observe(records)

    def serve(self, asked: list[list[int]]) -> list[list[int]]:
        """A batch, and its answers; a thread that trains rests while others have their turn."""
        trainer, before = _trainer(self.llm), self.llm.engine.stats().steps
        began = perf_counter()
        done = self.llm.generate(asked, SamplingParams(temperature=0.0, max_tokens=OUTPUT))
        self.count.seconds += perf_counter() - began
        if trainer is not None:
            trainer.worker.yields(True)
        answers = [one.outputs[0].tokens for one in done]
        self.count.tokens += sum(map(len, answers))
        self.count.steps += self.llm.engine.stats().steps - before
        return answers


def run(
    model: str, requests: int = REQUESTS, settings: dict[str, Setting] = SETTINGS
) -> dict[str, Any]:
    """All settings through all phases, `requests` each: a multiple of a quarter's batches.

    Raises `AssertionError` where a setting changed the output.
    """
    if requests % (QUARTERS * BATCH):
        raise ConfigError(f"requests={requests} is no multiple of {QUARTERS} times {BATCH}")
    served = {name: Served(model, setting) for name, setting in settings.items()}
    rows = []
    for phase in PHASES:
        some, quarter = prompts(phase, requests), requests // QUARTERS
        for at in range(QUARTERS):
            rows += _quarter(served, phase, at, some[at * quarter : (at + 1) * quarter])
            print(f"{phase}, quarter {at + 1} of {QUARTERS}", flush=True)
    said = {"requests": requests, "output": OUTPUT, "batch": BATCH, "phases": list(PHASES)}
    training = {
        name: asdict(stats)
        for name, one in served.items()
        if (stats := one.llm.engine.stats().trainer) is not None
    }
    for one in served.values():
        one.llm.close()
    header = record.header("online_spec", said, {"model": model, "experiment": "online-spec"})
    return header | {"results": rows, "training": training}


def _quarter(
    served: dict[str, Served], phase: str, at: int, some: list[str]
) -> list[dict[str, Any]]:
    """A row for each setting."""
    for one in served.values():
        one.count = Count()
    for start in range(0, len(some), BATCH):
        first: list[list[int]] | None = None
        for name, one in served.items():
            answers = one.serve(_ids(one.llm, some[start : start + BATCH]))
            if first is not None and answers != first:
                raise AssertionError(f"{name} changed the output of {phase!r}: it must not")
            first = answers
    plain = next(iter(served.values())).count
    return [
        {
            "setting": name, "phase": phase, "quarter": at + 1, "requests": len(some),
            "acceptance": one.count.acceptance, "judged": one.count.judged,
            "seconds": one.count.seconds, "tokens": one.count.tokens, "steps": one.count.steps,
            "ratio": plain.seconds / one.count.seconds,
            "fewer_steps": plain.steps / one.count.steps,
        }
        for name, one in served.items()
    ]  # fmt: skip


def _ids(llm: LLM, asked: list[str]) -> list[list[int]]:
    if llm.tokenizer is None:
        raise ConfigError("online-spec asks a model in words, and this one has no tokenizer")
    chats = [llm.tokenizer.chat([{"role": "user", "content": text}]) for text in asked]
    return [llm.tokenizer.encode(chat, add_special=False) for chat in chats]


def speeds(result: dict[str, Any]) -> list[list[Any]]:
    """By setting: of each phase, the output rate over plain decoding and how many times fewer steps
    it took; versions put in force, taken back, and the share of the time that training took."""
    rows = []
    for setting in dict.fromkeys(row["setting"] for row in result["results"]):
        cells: list[Any] = [setting]
        total = 0.0
        for phase in result["workload"]["phases"]:
            here = [r for r in result["results"] if r["phase"] == phase]
            mine = [r for r in here if r["setting"] == setting]
            plain = [r for r in here if r["setting"] == "plain"]
            spent, base = (sum(r["seconds"] for r in x) for x in (mine, plain))
            total += spent
            cells += [base / spent, sum(r["steps"] for r in plain) / sum(r["steps"] for r in mine)]
        trained = result["training"].get(setting)
        cells += [None] * 3 if trained is None else [
            trained["published"], trained["rolled_back"], trained["seconds"] / total
        ]  # fmt: skip
        rows.append(cells)
    return rows


def curves(result: dict[str, Any], settings: Sequence[str], position: int) -> list[list[Any]]:
    """By phase and quarter: the acceptance at a position (from 0) under each setting."""
    found = {(r["setting"], r["phase"], r["quarter"]): r["acceptance"] for r in result["results"]}
    return [
        [phase, quarter, *(found[setting, phase, quarter][position] for setting in settings)]
        for phase in result["workload"]["phases"]
        for quarter in range(1, QUARTERS + 1)
    ]


def lines(result: dict[str, Any]) -> list[str]:
    """Tables for people."""
    settings = [name for name in SETTINGS if name != "plain"]
    out = [f"acceptance of the first token of a draft: {'; '.join(settings)}"]
    for phase, quarter, *shares in curves(result, settings, 0):
        out.append(f"{phase:>8} {quarter}" + "".join(f"{share:>8.3f}" for share in shares))
    out.append("over plain decoding, by phase: rate (steps saved); versions, taken back, share")
    for setting, *cells in speeds(result):
        pairs = zip(cells[0:-3:2], cells[1:-3:2], strict=True)
        said = "".join(f"{rate:>8.2f} ({steps:.2f})" for rate, steps in pairs)
        trained = "" if cells[-1] is None else f"{cells[-3]:>6} {cells[-2]:>3} {cells[-1]:>6.3f}"
        out.append(f"{setting:38}{said}{trained}")
    return out
