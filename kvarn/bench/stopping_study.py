"""`kvarn reproduce draft-stops`: where should a draft end? Every policy on the same drafts.

A model writes greedily; from every place of its text its drafter drafts the longest chain. Every
policy is then played over the same chains (`kvarn.speculate.chains`): it cuts the chain of the
place where it is, goes on behind what was accepted, and pays for what was discarded and for the
verification. Two rates say all, for any two models. No clock is read.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from kvarn.bench import record
from kvarn.bench.reproduce import QUESTIONS, chats
from kvarn.core.request import SamplingParams
from kvarn.engine.llm import LLM
from kvarn.speculate.chains import Chain, Counts, GoesOn, chains_of, known, play
from kvarn.speculate.length.fixed import Fixed
from kvarn.speculate.length.specdec_pp import LONGEST, SpecDecPP
from kvarn.speculate.propose.draft_model import DraftModel

TEXT = 64  #: tokens of a text
LENGTHS = range(1, 11)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
RATIOS = (1.0, 2.0, 3.7, 8.0, 20.0)  #: c2 / c1; the paper's pair has 3.7

Texts = list[list[Chain]]


def run(model: str) -> dict[str, Any]:
    """The rows, as a result."""
    headed, bare = _chains(model, "specdec-pp"), _chains(model, "fixed")
    for text, plain in zip(headed, bare, strict=True):
        for chain, own in zip(text, plain, strict=True):
            chain.own = own.said
    rows = [_row(f"fixed {k}", bare, Fixed().goes_on, k) for k in LENGTHS]
    for name, texts in (("head", headed), ("probability", bare)):
        for h in THRESHOLDS:
            rule = SpecDecPP(h).goes_on
            rows.append(_row(f"{name} {h:g}", texts, rule, LONGEST))
    rows.append(_rates("known", sum(map(partial(known, longest=LONGEST), bare), Counts())))
    said = {"texts": len(bare), "tokens": TEXT, "longest": LONGEST, "ratios": list(RATIOS)}
    header = record.header("reproduce-stops", said, {"model": model})
    return header | {"experiment": "draft-stops", "results": rows, "costs": costs(rows)}


def _chains(model: str, length: str) -> Texts:
    """From every place of every text; with `length` specdec-pp the head says what it thinks."""
    llm = LLM(model, max_len=1024, speculate="draft", draft_length=length, draft_tokens=LONGEST)
    speculation = llm.engine.speculation
    assert speculation is not None and isinstance(speculation.proposer, DraftModel)
    greedy = SamplingParams(temperature=0.0, max_tokens=TEXT, ignore_eos=True)
    done = llm.generate(chats(llm, QUESTIONS), greedy)
    found = [
        chains_of(
            speculation.proposer,
            one.prompt_tokens + one.outputs[0].tokens,
            len(one.prompt_tokens),
            LONGEST,
        )
        for one in done
    ]
    llm.close()
    return found


def _row(policy: str, texts: Texts, goes_on: GoesOn, longest: int) -> dict[str, Any]:
    """One policy over every text."""
    return _rates(policy, sum((play(one, goes_on, longest) for one in texts), Counts()))


def _rates(policy: str, made: Counts) -> dict[str, Any]:
    """Tokens discarded and verifications, for each token; drafts of a round."""
    return {
        "policy": policy,
        "discarded": made.discarded / made.tokens,
        "verified": made.verifications / made.tokens,
        "drafted": made.drafted / made.verifications,
    }


def costs(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By c2 / c1: the best of every kind, and its cost over that of the best fixed length."""
    out = []
    for ratio in RATIOS:
        price = {row["policy"]: row["discarded"] + ratio * row["verified"] for row in rows}
        best = {
            kind: min((name for name in price if name.startswith(kind)), key=price.__getitem__)
            for kind in ("fixed", "head", "probability")
        }
        own = ratio / (1 + ratio)  # where the theorem stops, among the thresholds that were tried
        nearest = min(THRESHOLDS, key=lambda h: abs(h - min(max(own, 0.2), 0.8)))
        out.append(
            {"ratio": ratio, "by_theorem": price[f"head {nearest:g}"] / price[best["fixed"]]}
            | {f"best_{kind}": name for kind, name in best.items()}
            | {kind: price[best[kind]] / price[best["fixed"]] for kind in ("head", "probability")}
        )
    return out


def lines(result: dict[str, Any]) -> list[str]:
    """Two tables for people."""
    out = [f"{'policy':18}{'discarded':>10}{'verified':>10}{'drafted':>9}"]
    for row in result["results"]:
        rates = f"{row['discarded']:>10.3f}{row['verified']:>10.3f}{row['drafted']:>9.2f}"
        out.append(f"{row['policy']:18}{rates}")
    out.append(f"{'c2 / c1':>8}{'best fixed':>12}{'head':>8}{'by theorem':>12}{'probability':>13}")
    for row in result["costs"]:
        out.append(
            f"{row['ratio']:>8g}{row['best_fixed']:>12}{row['head']:>8.3f}"
            f"{row['by_theorem']:>12.3f}{row['probability']:>13.3f}"
        )
    return out
