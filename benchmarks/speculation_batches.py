"""Speculation against batch size: fixed lengths and control by survival beside none, in one run.

    python benchmarks/speculation_batches.py [--batches N ...] [--drafter SHAPE [--layers N]]
                                             [--smollm2 FILE.gguf] [--json FILE]

The first part is an 8B shape with random weights and synthetic acceptance: each draft is accepted
with the probability named, and costs nothing, so it is what verification allows, not what a drafter
brings. The second, with `--drafter`, has a smaller shape draft for it, or its own with fewer
layers; its time is real and its acceptance as synthetic; once with a replay for each of its passes.
The third, with `--smollm2`, is SmolLM2 with the drafter that comes with kvarn. Every kind of
speculation serves the same requests as none, batch by batch in turns; the ratio of the output rates
is the result. One engine serves all kinds of a part; each keeps what it has learnt.

About 7 minutes on an H100 or H200 (the 8B part 200 s, the drafter 80 s, SmolLM2 80 s).
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from kvarn.bench import record
from kvarn.bench.drift import prompts
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.models.shapes import SHAPES
from kvarn.runner.chain import Chains
from kvarn.speculate.costs import Measured
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.gammatune import GammaTune
from kvarn.speculate.length.survival import Survival
from kvarn.speculate.length.utility import Utility
from kvarn.speculate.part import LengthControl
from kvarn.speculate.propose.draft_model import DraftModel
from kvarn.speculate.propose.synthetic import Synthetic
from kvarn.speculate.train.load import shipped
from kvarn.theory.speculation import expected_tokens

BATCHES, SOME_BATCHES, SMALL_BATCHES = (1, 4, 16, 64, 128, 256), (1, 4, 16, 64), (1, 8, 32, 128)
SMALL_REPEATS = 4  #: runs of SmolLM2, which are short
PROMPT, OUTPUT, REPEATS = 128, 128, 2  #: tokens, tokens, runs that capture nothing
MORE = 7  #: turns beside these: a capture takes as long as dozens of steps, and comes but once
#: acceptance of each token with about 2, 3 and 4 expected tokens a round of the longest draft
TWO, THREE, FOUR = 0.51, 0.7, 0.835
LONGEST = 5  #: draft [tokens]
COUNTS = (
    "output_tokens", "steps", "drafted_tokens", "accepted_tokens", "verify_steps",
    "replayed_verify_steps",
)  # fmt: skip
Ask = Callable[[int, int], list[list[int]]]  #: prompts of a batch size, by turn
CONTROLS: dict[str, type[Any]] = {
    "fixed": Fixed, "survival": Survival, "utility": Utility, "gammatune": GammaTune,
}  # fmt: skip


@dataclass(slots=True)
class Kind:
    """A way to draft, and what its control has learnt."""

    name: str
    control: LengthControl | None  #: None: no speculation
    most: int = LONGEST  #: longest draft [tokens]
    share: float = 0.0  #: of drafts that are accepted; 0: they are judged
    costs: Measured = field(default_factory=Measured)
    chains: Chains | None = None  #: a drafting model's: its passes are one replay


class Told:
    """A control that hears of every drafted token that it stands with the synthetic share."""

    def __init__(self, control: LengthControl, share: float) -> None:
        self.control, self.share = control, share

    def __getattr__(self, name: str) -> Any:
        return getattr(self.control, name)

    def goes_on(self, confidence: Sequence[float]) -> bool:
        """As the control."""
        return self.control.goes_on([self.share] * len(confidence))


def kind(control: str, share: float = 0.0, most: int = LONGEST) -> Kind:
    """By the name of the control."""
    length = f" {most}" if control == "fixed" else ""
    said = f", {share}" if share else ""
    return Kind(f"{control}{length}{said}", CONTROLS[control](), most, share)


def synthetic_kinds(more: bool) -> list[Kind]:
    """None first: the others are held against it. `more`: also the other adaptive controls."""
    found = [Kind("none", None)]
    for share, lengths in ((TWO, (1, 2)), (THREE, (2, 3, 4, 5)), (FOUR, (3, 5))):
        found += [kind("fixed", share, most) for most in lengths]
        found.append(kind("survival", share))
        if more:
            found += [kind("utility", share), kind("gammatune", share)]
    return [*found, kind("survival", 0.3)]


def use(llm: LLM, chosen: Kind, speculation: Any) -> None:
    """Have the engine draft in this way from now on."""
    engine: Any = llm.engine
    if chosen.control is None:
        engine.speculation = None
        return
    engine.speculation = speculation
    speculation.length, speculation.most = chosen.control, chosen.most
    speculation.costs = chosen.costs
    engine.executor.acceptance = chosen.share
    if isinstance(speculation.proposer, Synthetic):
        speculation.proposer.acceptance = chosen.share
    if isinstance(speculation.proposer, DraftModel):
        speculation.proposer.chains = chosen.chains
        if chosen.share:  # what random weights think of their drafts says nothing of their fate
            speculation.length = Told(chosen.control, chosen.share)


def chained(llm: LLM, kinds: list[Kind]) -> list[Kind]:
    """The same with the chains that the drafter came with, which keep what they have captured."""
    engine: Any = llm.engine
    for one in kinds:
        one.chains = engine.speculation.proposer.chains
    return kinds


def made_up(batch: int, turn: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return [[1 + (7 * i + 13 * j + turn) % 1000 for j in range(PROMPT)] for i in range(batch)]


def questions(llm: LLM) -> Ask:
    """Prompts of the kind that the drafter was trained on, about other things."""
    tokenizer: Any = llm.tokenizer

    def ask(batch: int, turn: int) -> list[list[int]]:
        chats = [[{"role": "user", "content": text}] for text in prompts("talk", batch, seed=turn)]
        return [tokenizer.encode(tokenizer.chat(chat), add_special=False) for chat in chats]

    return ask


def measure(llm: LLM, kinds: Sequence[Kind], batch: int, ask: Ask, repeats: int) -> list[Any]:
    """Every kind at one batch size: rows of the result, the runs in turns."""
    engine: Any = llm.engine
    speculation, found = engine.speculation, dict[str, list[dict[str, float]]]()
    for turn in range(repeats + MORE):
        for one in kinds:
            if len(found.get(one.name, ())) == repeats:
                continue
            use(llm, one, speculation)
            params = SamplingParams(temperature=0, max_tokens=OUTPUT, ignore_eos=ask is made_up)
            engine.reset_prefix_cache()  # or who comes first alone computes the prompts
            asked, before, captured = ask(batch, turn), engine.stats(), speculation.captures()
            began = perf_counter()
            llm.generate(asked, params)
            seconds, after = perf_counter() - began, engine.stats()
            run = {name: getattr(after, name) - getattr(before, name) for name in COUNTS}
            run["tokens_per_s"] = run["output_tokens"] / seconds
            run["captures"] = speculation.captures() - captured
            if turn and (not run["captures"] or turn >= MORE):
                found.setdefault(one.name, []).append(run)  # the first compiles and learns
    engine.speculation = speculation
    plain = median(run["tokens_per_s"] for run in found["none"])
    return [row(one, batch, found[one.name], plain) for one in kinds if one.name in found]


def row(one: Kind, batch: int, runs: list[dict[str, float]], plain: float) -> dict[str, Any]:
    """What several runs of one kind say."""
    rates = [run["tokens_per_s"] for run in runs]
    sums = {name: sum(run[name] for run in runs) for name in runs[0] if name != "tokens_per_s"}
    said = {"kind": one.name, "batch": batch, "tokens_per_s": median(rates), "runs": rates}
    bound = expected_tokens(one.share, one.most) if one.share else None
    found = said | {"ratio": median(rates) / plain, "expected_tokens": bound} | sums
    print(found, flush=True)
    return found


def synthetic(given: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The 8B shape: its options, and the rows."""
    options: dict[str, Any] = {
        "model": given.model, "load": "random", "max_len": 512, "max_seqs": max(given.batches),
        "speculate": "synthetic", "draft_length": "fixed", "draft_tokens": LONGEST,
        "synthetic_acceptance": THREE,
    }  # fmt: skip
    llm, kinds, rows = LLM(**options), synthetic_kinds(given.controls), list[Any]()
    for batch in sorted(given.batches, reverse=True):  # its end captures what the smaller ones need
        rows = measure(llm, kinds, batch, made_up, given.repeats) + rows
    llm.close()
    return options, rows


def priced(given: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """The 8B shape with a drafter's real time: its options, and the rows."""
    if not given.layers:
        return _priced(given, given.drafter)
    with TemporaryDirectory() as folder:
        shape = SHAPES[given.drafter] | {"num_hidden_layers": given.layers}
        Path(folder, "config.json").write_text(json.dumps(shape))
        options, rows = _priced(given, folder)
    return options | {"draft_model": f"{given.drafter}, {given.layers} layers"}, rows


def _priced(given: argparse.Namespace, drafter: str) -> tuple[dict[str, Any], list[Any]]:
    options: dict[str, Any] = {
        "model": given.model, "load": "random", "max_len": 512,
        "max_seqs": max(given.drafter_batches), "speculate": "draft", "draft_model": drafter,
        "draft_choice": "likeliest", "draft_length": "fixed", "draft_tokens": LONGEST,
    }  # fmt: skip
    kinds = [Kind("none", None), *(kind("fixed", THREE, most) for most in (1, 2, 3, 4))]
    kinds += [kind("survival", THREE), kind("survival", 0.3)]
    apart = kind("fixed", THREE, 3)
    apart.name = f"{apart.name}, a replay for each pass"
    llm, rows = LLM(**options), list[Any]()
    kinds = [*chained(llm, kinds), apart]
    for batch in sorted(given.drafter_batches, reverse=True):
        rows = measure(llm, kinds, batch, made_up, given.repeats) + rows
    llm.close()
    return options, rows


def real(given: argparse.Namespace) -> tuple[dict[str, Any], list[Any]]:
    """SmolLM2 with its drafter: its options, and the rows."""
    options: dict[str, Any] = {
        "model": given.smollm2, "max_len": 512, "max_seqs": max(SMALL_BATCHES),
        "speculate": "draft", "draft_model": str(shipped("smollm2-135m")),
        "draft_choice": "likeliest", "draft_length": "fixed", "draft_tokens": LONGEST,
    }  # fmt: skip
    kinds = [Kind("none", None), *(kind("fixed", most=most) for most in (1, 2, 3))]
    kinds.append(kind("survival"))
    llm, rows = LLM(**options), list[Any]()
    kinds = chained(llm, kinds)
    for batch in sorted(SMALL_BATCHES, reverse=True):
        rows = measure(llm, kinds, batch, questions(llm), SMALL_REPEATS) + rows
    llm.close()
    said = {"model": Path(given.smollm2).stem, "draft_model": Path(options["draft_model"]).name}
    return options | said, rows


def main() -> None:
    """All kinds at all batch sizes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--smollm2", default=None, help="SmolLM2-135M-Instruct, as a GGUF file")
    parser.add_argument("--drafter", default=None, help="a shape that drafts: llama-3.2-1b")
    parser.add_argument("--layers", type=int, default=0, help="of the drafter; 0: all")
    parser.add_argument("--drafter-batches", type=int, nargs="*", default=SOME_BATCHES)
    parser.add_argument(
        "--batches", type=int, nargs="*", default=BATCHES, help="none: the drafters alone"
    )
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--controls", action="store_true", help="utility and gammatune as well")
    parser.add_argument("--json", default=None)
    given = parser.parse_args()
    said = {"prompt": PROMPT, "output": OUTPUT, "repeats": given.repeats, "synthetic": True}
    options, rows = synthetic(given) if given.batches else ({"model": given.model}, [])
    header = record.header("speculation_batches", said, options)
    record.write(header | {"results": rows}, given.json)
    if given.drafter:
        priced_options, priced_rows = priced(given)
        header |= {"priced_config": priced_options, "priced_results": priced_rows}
        record.write(header | {"results": rows}, given.json)
    if given.smollm2:
        small, trained = real(given)
        header |= {"drafter_config": small, "drafter_results": trained}
        record.write(header | {"results": rows}, given.json)


if __name__ == "__main__":
    main()
