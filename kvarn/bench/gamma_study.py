"""`kvarn reproduce gammatune`: lengths that follow acceptance, beside every fixed one.

First the rates on texts of three kinds (`kvarn.bench.reproduce`). Then what clocks are too noisy
for: how close a control comes to the best fixed length of each kind, what it gains over the one
fixed length that is safe for all of them, and how unlike the requests' speeds are. The model writes
its texts once, greedily; controls are played over them (`kvarn.speculate.texts`), so that rounds
and drafted tokens are exact, and a round takes what steps and drafts were measured to take in the
same run. Two machines: the one it runs on, where rows cost time, and one whose step takes t_T
whatever it verifies, as the paper has it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import pstdev
from typing import Any

from kvarn.bench import record, reproduce
from kvarn.bench.edits import FENCE, TASKS, rewrite
from kvarn.bench.reproduce import chats
from kvarn.core.errors import ConfigError
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.speculate.chains import Chain, chains_of
from kvarn.speculate.costs import Measured
from kvarn.speculate.length.baselines import Confidence, Heuristic
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.gammatune import GammaTune, GammaTunePlus, Rates
from kvarn.speculate.length.specdec_pp import SpecDecPP
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.part import Costs, LengthControl, Proposer
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.propose.ngram import NGram
from kvarn.speculate.texts import Recorded, Told, tell
from kvarn.speculate.trial import Roofline

EACH, OUTPUT = 8, 96  #: texts of a kind; tokens of a text at most
LONGEST = 16  #: tokens of a draft
LENGTHS = range(1, LONGEST + 1)
TIMED = (0, 1, 2, 3, 4, 6, 8, 12, 16)  #: lengths of drafts whose steps are timed
TURNS, TIMED_TOKENS = 6, 24  #: each of them so often, and for so many tokens, in turns
CONTROLS: dict[str, Callable[[], LengthControl]] = {
    "gammatune": GammaTune,
    "gammatune-plus": GammaTunePlus,
    "gammatune, by 2": lambda: GammaTune(Rates(delta=2, above=0, first=4)),
    "hf-heuristic": Heuristic,
    "confidence": Confidence,
    "specdec-pp": SpecDecPP,
    "survival": Survival,
}
ORACLE = "oracle"  #: drafts what stands and nothing else


@dataclass(slots=True)
class Text:
    """One request: what was asked, what the model wrote, and what its drafter would have."""

    kind: str
    prompt: list[int]
    answer: list[int]
    chains: list[Chain]


def run(model: str) -> dict[str, Any]:
    """Rates by text and setting, and the mixed stream in modelled time."""
    return reproduce.run("gammatune", model) | {"modelled": modelled(model)}


def modelled(model: str) -> dict[str, Any]:
    """Prices, and rows by proposer, machine and setting."""
    llm = LLM(model, max_len=1024, speculate="draft", draft_length="fixed", draft_tokens=LONGEST)
    texts = _texts(llm)
    measured = {"draft": _timed(llm)}
    llm.close()
    llm = LLM(model, max_len=1024, speculate="ngram", draft_length="fixed", draft_tokens=LONGEST)
    measured["ngram"] = _timed(llm)
    llm.close()
    rows, prices = list[dict[str, Any]](), list[dict[str, Any]]()
    for proposer, costs in measured.items():
        prices.append({"proposer": proposer} | _prices(costs))
        for machine, paid in (("this one", costs), ("flat", flat(costs))):
            rows += compared(texts, proposer, machine, paid)
    said = {kind: sum(len(one.answer) for one in texts if one.kind == kind) for kind in KINDS}
    header = record.header("reproduce-gammatune", {"each": EACH, "tokens": said}, {"model": model})
    return header | {"prices": prices, "rows": rows}


# what is recorded and measured


def _copies(llm: LLM) -> list[list[int]]:
    return chats(llm, reproduce.TEXTS["copy"][-EACH:])


def _talks(llm: LLM) -> list[list[int]]:
    return chats(llm, reproduce.TEXTS["talk"][-EACH:])


def _code(llm: LLM) -> list[list[int]]:
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    tasks = range(len(TASKS) - EACH, len(TASKS))
    said = [tokenizer.chat(rewrite(task, 0)) + FENCE for task in tasks]
    return [tokenizer.encode(one, add_special=False) for one in said]


KINDS = {"code": _code, "talk": _talks, "copy": _copies}


def _texts(llm: LLM) -> list[Text]:
    """All kinds, in an order of their own."""
    if llm.tokenizer is None:
        raise ConfigError("reproduce asks a model in words, and this one has no tokenizer")
    asked = [(kind, prompt) for kind, ask in KINDS.items() for prompt in ask(llm)]
    Random(1).shuffle(asked)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT)
    speculation = llm.engine.speculation
    assert speculation is not None and isinstance(speculation.proposer, DraftModel)
    found = list[Text]()
    for (kind, prompt), done in zip(asked, llm.generate([p for _, p in asked], params)):
        answer = done.outputs[0].tokens
        chains = chains_of(speculation.proposer, prompt + answer, len(prompt), LONGEST)
        found.append(Text(kind, prompt, answer, chains))
    return found


def _timed(llm: LLM) -> Measured:
    """Steps without drafts and with drafts of several lengths, of one sequence, as they come.

    In turns: where others slow the machine down for a while, they slow down all of them.
    """
    speculation = llm.engine.speculation
    assert speculation is not None
    speculation.costs = Measured()
    params = SamplingParams(temperature=0.0, max_tokens=TIMED_TOKENS, ignore_eos=True)
    for length in TIMED * TURNS:
        speculation.most = length
        llm.generate(_copies(llm)[:1], params)
    return speculation.costs


def flat(costs: Costs) -> Roofline:
    """t_T a step, t_d a drafted token (the paper's model)."""
    return Roofline(costs.step(1), 0.0, 0.0, costs.draft(1, LONGEST) / LONGEST)


def _prices(costs: Costs) -> dict[str, Any]:
    """Milliseconds."""
    return {
        "step_ms": 1e3 * costs.step(1),
        "token_ms": 1e3 * costs.draft(1, LONGEST) / LONGEST,
        "verify_ms": {k: 1e3 * costs.verifying(1 + k) for k in TIMED if k},
    }


# what is compared


def compared(
    texts: Sequence[Text], proposer: str, machine: str, costs: Costs
) -> list[dict[str, Any]]:
    """Every control on one machine: a row each, and those of the fixed lengths to be beaten."""
    fixed = {k: _stream(texts, proposer, Fixed, k, costs) for k in LENGTHS}
    kinds = list(dict.fromkeys(one.kind for one in texts))
    speed = {k: _speeds(texts, told, costs) for k, told in fixed.items()}
    best = {kind: max(LENGTHS, key=lambda k: speed[k][kind]) for kind in (*kinds, "mixed")}
    safest = max(LENGTHS, key=lambda k: min(speed[k][kind] for kind in kinds))
    streams = {f"fixed {best['mixed']} (best)": fixed[best["mixed"]]}
    streams |= {f"fixed {safest} (safest)": fixed[safest]}
    for name, make in CONTROLS.items():
        streams[name] = _stream(texts, proposer, make, LONGEST, costs)
    streams[ORACLE] = _stream(texts, proposer, Fixed, LONGEST, costs, knows=True)
    spread = _spread(fixed[best["mixed"]], costs)
    rows = list[dict[str, Any]]()
    for name, told in streams.items():
        mine = _speeds(texts, told, costs)
        rows.append({
            "proposer": proposer, "machine": machine, "setting": name,
            "speed": mine["mixed"], "best": best,
            "share": {kind: mine[kind] / speed[best[kind]][kind] for kind in (*kinds, "mixed")},
            "over_safest": mine["mixed"] / speed[safest]["mixed"],
            "spread": _spread(told, costs) / spread,
            "rounds": sum(one.rounds for one in told), "drafted": sum(one.drafted for one in told),
        })  # fmt: skip
    return rows


def _stream(
    texts: Sequence[Text],
    proposer: str,
    make: Callable[[], LengthControl],
    most: int,
    costs: Costs,
    knows: bool = False,
) -> list[Told]:
    """All requests under one control, one after the other."""
    control, ngram = make(), NGram()
    found = list[Told]()
    for one in texts:
        who: Proposer = ngram
        if proposer == "draft":
            who = Recorded(one.chains, len(one.prompt) + 1, one.prompt + one.answer)
        found.append(tell(who, control, one.prompt, one.answer, most, costs, knows))
    return found


def _speeds(texts: Sequence[Text], told: Sequence[Told], costs: Costs) -> dict[str, float]:
    """Over no drafts, by kind and of all."""
    sums = {"mixed": sum(told, Told())}
    for one, mine in zip(texts, told, strict=True):
        sums[one.kind] = sums.get(one.kind, Told()) + mine
    return {kind: total.speedup(costs) for kind, total in sums.items()}


def _spread(told: Sequence[Told], costs: Costs) -> float:
    """Standard deviation of the requests' speeds over no drafts."""
    return pstdev(one.speedup(costs) for one in told)


def lines(result: dict[str, Any]) -> list[str]:
    """Tables for people."""
    return [*reproduce.lines(result), "", *modelled_lines(result["modelled"])]


def modelled_lines(said: dict[str, Any]) -> list[str]:
    """One block for each proposer and machine, one line for each control."""
    out = list[str]()
    for case in dict.fromkeys((row["proposer"], row["machine"]) for row in said["rows"]):
        rows = [row for row in said["rows"] if (row["proposer"], row["machine"]) == case]
        lengths = ", ".join(f"{kind} {k}" for kind, k in rows[0]["best"].items())
        out += ["", f"{case[0]}, machine: {case[1]}; best fixed lengths: {lengths}"]
        head = "".join(f"{kind:>8}" for kind in rows[0]["share"])
        out.append(
            f"{'share of best fixed':24}{head}{'over safest':>13}{'spread':>8}{'drafted':>9}"
        )
        for row in rows:
            said_ = "".join(f"{share:>8.3f}" for share in row["share"].values())
            rest = f"{row['over_safest']:>13.3f}{row['spread']:>8.2f}{row['drafted']:>9}"
            out.append(f"{row['setting']:24}{said_}{rest}")
    return out
