"""Sections of docs/results.md on speculation."""

from typing import Any

from cells import Lines, cell, table

from kvarn.bench import edit_study, modelled_lengths
from kvarn.bench import online_spec as online


def speculation_batches(result: dict[str, Any]) -> Lines:
    """Synthetic acceptance against batch size, and a drafter that was trained."""
    target = result["config"]["model"]
    lines = Lines()
    if result["results"]:
        lines += [
            f"{target}, random weights, **synthetic acceptance** (each draft is accepted with the "
            "probability named) and drafts that cost nothing: output rate over that without "
            "speculation in the same run, by batch size.",
            "",
            *_by_batch(result["results"]),
        ]
    if "priced_results" in result:
        lines += [
            "",
            f"{result['priced_config']['draft_model']} drafts for {target}, both with random "
            "weights: the drafter's time is real, and what stands of its drafts is drawn with the "
            "probability named. Output rate over that without speculation, by batch size.",
            "",
            *_by_batch(result["priced_results"]),
        ]
    if "drafter_results" in result:
        lines += [
            "",
            f"{result['drafter_config']['model']} with the drafter that comes with kvarn, greedy, "
            "on questions about what it was not trained on:",
            "",
            *_by_batch(result["drafter_results"]),
        ]
    return lines


def _by_batch(results: list[dict[str, Any]]) -> Lines:
    """Ratios by kind and batch size; expected tokens a round where they are told."""
    batches = list(dict.fromkeys(row["batch"] for row in results))
    ratio = {(row["kind"], row["batch"]): row["ratio"] for row in results}
    told = {row["kind"]: row.get("expected_tokens") for row in results}
    names, extra = ["kind"], any(told.values())
    names += ["expected tokens a round"] if extra else []
    rows = [
        [kind, *([tokens] if extra else []), *(ratio.get((kind, batch)) for batch in batches)]
        for kind, tokens in told.items()
    ]
    return table([*names, *map(str, batches)], rows)


def drafter(result: dict[str, Any]) -> Lines:
    """How far a drafter's chains are accepted."""
    rows = [
        [row["text"], row["chains"], *row["survival"], row["tokens_per_round"][3]]
        for row in result["rows"]
    ]
    names = ["held-out text", "chains", *(f"first {k} stand" for k in range(1, 9))]
    return [
        f"The drafter of {result['config']['target']}: share of chains of which the first k "
        "tokens are accepted (greedy: equal to the target's; sampled: by rejection sampling), and "
        "tokens a round with 4 drafts.",
        "",
        *table([*names, "tokens with 4"], rows),
        "",
        *[
            f"One draft at temperature 1, on text that was {row['text']}: drawn from the drafter's "
            f"distribution it stands with {cell(row['overlap'])}, its most likely token with "
            f"{cell(row['likeliest'])}."
            for row in result["rows"]
            if row["temperature"] and "likeliest" in row
        ],
    ]


def online_spec(result: dict[str, Any]) -> Lines:
    """A drafter that learns while the subject changes."""
    said, quarters = result["workload"], online.QUARTERS
    settings = ["frozen, 2 tokens", *result["training"]]
    phases = [f"{phase}: {what}" for phase in said["phases"] for what in ("rate", "steps")]
    return [
        f"`kvarn reproduce online-spec`: {result['config']['model']}, greedy, "
        f"{said['requests']} requests a phase, {said['batch']} at once, up to {said['output']} "
        "tokens an answer. All settings gave the same tokens. Share of the drafts' first tokens "
        f"that stand, by phase and quarter of it ({said['requests'] // quarters} requests):",
        "",
        *table(["phase", "quarter", *settings], online.curves(result, settings, 0)),
        "",
        "Of the second tokens, where the first stood:",
        "",
        *table(["phase", "quarter", *settings], online.curves(result, settings, 1)),
        "",
        "Over plain decoding, training included: output rate, and how many times fewer steps; "
        "versions put in force, taken back, and the share of the time that training took:",
        "",
        *table(["setting", *phases, "versions", "taken back", "training"], online.speeds(result)),
    ]


def reproduce(result: dict[str, Any]) -> Lines:
    """A technique beside plain decoding and fixed lengths, on real text."""
    found = {(row["setting"], row["text"], row["batch"]): row for row in result["results"]}
    settings = list(dict.fromkeys(row["setting"] for row in result["results"]))
    cases = list(dict.fromkeys((row["text"], row["batch"]) for row in result["results"]))
    rows = [
        [setting, *(f"{cell(found[setting, *case]['ratio'])}" for case in cases)]
        for setting in settings
    ]
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']}, greedy, "
        f"{result['workload']['output']} tokens an answer; output rate over plain decoding, by "
        "kind of text and batch size. All settings gave the same tokens.",
        "",
        *table(["setting", *(f"{text} x{batch}" for text, batch in cases)], rows),
        *(mixed(result["mixed"]) if "mixed" in result else []),
        *(edited(result["edits"]) if "edits" in result else []),
        *(modelled(result["modelled"]) if "modelled" in result else []),
    ]


def mixed(rows: list[dict[str, Any]]) -> Lines:
    """Proposers on a stream of all kinds of text, in counts."""
    found = {(row["setting"], row["kind"]): row for row in rows}
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    shown = [
        [
            setting,
            *(found[setting, kind]["tokens_per_round"] for kind in kinds),
            *(found[setting, "all"][name] for name in ("rounds", "drafted", "accepted", "passes")),
        ]
        for setting in settings
    ]
    return [
        "",
        "A stream of all kinds, one request at a time, in fp32, with fixed lengths: tokens a round "
        "(a step that brings tokens; 1 without drafts), which no machine changes; and of all of it "
        "the rounds, the tokens drafted and accepted, and the passes of the drafting model.",
        "",
        *table(["setting", *kinds, "rounds", "drafted", "accepted", "passes"], shown),
    ]


def edited(result: dict[str, Any]) -> Lines:
    """Files written again with small edits, in counts."""
    named = {"ngram": "best n-gram", edit_study.ALONE: "own tree alone"}
    lines, about = edit_study.table_of(result["rows"]), result["workload"]["about"]
    names = [named.get(name, name) for name in lines[0].each]
    shown = [
        [
            one.workload, one.most, one.ngram, *one.each.values(), one.ratio, one.ratio_all,
            *one.lost.values(),
        ]
        for one in lines
    ]  # fmt: skip
    said = "; ".join(
        f"{name}: {one['files']} of {one['asked']} files, {one['requests']} requests, "
        f"{one['prompt_tokens'] / one['requests']:.0f} tokens a prompt, "
        f"{one['answer_tokens'] / one['requests']:.0f} an answer"
        for name, one in about.items()
    )
    return [
        "",
        "Files written again with small edits (`kvarn/bench/edits.py`), one request at a time, "
        "fp32, fixed lengths, in counts: a **conversation** has all earlier answers in its prompt; "
        "a **patch** is a fresh request with the original file and one edit; a **rewrite** is a "
        "fresh request with a description of which one value has changed, and no file. Kept were "
        f"the files of which all answers ended by themselves. {said}. Tokens a round and tokens "
        "drafted in vain for each token, from a file's second request on; the best n-gram is that "
        f"of {len(result['workload']['matches'])} ranges of match, in hindsight; `own tree alone` "
        "knows no other request; `suffix, twice` drafts two tokens for each that matches "
        f"(`--draft-factor 2`). Counted {result['date']}, {(result['git_commit'] or '')[:10]}.",
        "",
        *table(
            [
                "workload", "longest draft", "n-gram's match", *names, "suffix over n-gram",
                "with first requests", *(f"in vain: {name}" for name in names),
            ],
            shown,
        ),
    ]  # fmt: skip


def modelled(said: dict[str, Any]) -> Lines:
    """Length controls on real texts in modelled time."""
    rows = said["rows"]
    kinds = list(rows[0]["share"])
    lines = [
        "",
        f"A mixed stream, {said['workload']['each']} texts a kind, in **modelled time**: rounds "
        "and drafted tokens of each request are exact, prices are those measured in the same run: "
        + "; ".join(
            f"{one['proposer']}: a step {cell(one['step_ms'])} ms, a drafted token "
            f"{cell(one['token_ms'])} ms, verifying "
            + ", ".join(f"{k}: {cell(ms)}" for k, ms in one["verify_ms"].items())
            for one in said["prices"]
        )
        + ". On the machine `flat` a step takes the same whatever it verifies. Speed over the best "
        "fixed length of each kind and of the stream in hindsight; over the fixed length that is "
        "safest (its worst kind is the best); standard deviation of the requests' speed-ups over "
        f"that of the stream's best fixed length. Measured {said['date']}, "
        f"{(said['git_commit'] or '')[:10]}.",
    ]
    for case in dict.fromkeys((row["proposer"], row["machine"]) for row in rows):
        mine = [row for row in rows if (row["proposer"], row["machine"]) == case]
        best = ", ".join(f"{kind} {k}" for kind, k in mine[0]["best"].items())
        shown = [
            [
                row["setting"], row["speed"], *(f"{row['share'][kind]:.3f}" for kind in kinds),
                f"{row['over_safest']:.3f}", row["spread"], row["rounds"], row["drafted"],
            ]
            for row in mine
        ]  # fmt: skip
        lines += [
            "",
            f"Drafts by `{case[0]}`, machine: {case[1]}; best fixed lengths: {best}.",
            "",
            *table(
                [
                    "setting", "over plain", *(f"share, {kind}" for kind in kinds),
                    "over safest fixed", "spread", "rounds", "drafted",
                ],
                shown,
            ),
        ]  # fmt: skip
    return lines


def acceptance_head(result: dict[str, Any]) -> Lines:
    """What the acceptance head knows."""
    said = result["workload"]
    about, apart = said.get("trained", said), said["calibrated_on"]
    rows = [
        [
            name, row["drafts"], row["acceptance"], row["auc"], row["auc_of_probability"],
            row["kl_nats"], row["kl_of_probability_calibrated"],
        ]
        for name, row in result["results"].items()
    ]  # fmt: skip
    return [
        f"SpecDec++'s head for the drafter of SmolLM2, trained on {about['drafts']} drafts in "
        f"{about['texts']} texts ({about['seconds']:.0f} s on {about['threads']} threads) and "
        f"calibrated on {apart['greedy']} greedy and {apart['sampled']} sampled ones, on half of "
        "the texts of topics never trained on: AUC for rejections, and KL of its word from "
        "acceptance [nats], beside the drafter's own probability (its KL calibrated by isotonic "
        "regression on the other half).",
        "",
        *table(
            ["text", "drafts", "accepted", "AUC", "AUC of probability", "KL", "KL of probability"],
            rows,
        ),
    ]


def stops(result: dict[str, Any]) -> Lines:
    """Where drafts should end."""
    said = result["workload"]
    rates = [
        [row["policy"], row["discarded"], row["verified"], row["drafted"]]
        for row in result["results"]
    ]
    prices = [
        [
            f"{row['ratio']:g}", row["best_fixed"], row["best_head"], row["head"],
            row["by_theorem"], row["best_probability"], row["probability"],
        ]
        for row in result["costs"]
    ]  # fmt: skip
    return [
        f"`kvarn reproduce {result['experiment']}`: {result['config']['model']} and its drafter, "
        f"{said['texts']} greedy texts of {said['tokens']} tokens, drafts of up to "
        f"{said['longest']} from every place: tokens discarded and verifications for each token, "
        "drafts a round.",
        "",
        *table(["policy", "discarded", "verified", "drafted"], rates),
        "",
        "What is paid above one drafted token a token (c1 discarded + c2 verified), over the best "
        "fixed length: the head with its best threshold, with that of the theorem, and the "
        "drafter's own probability with its best.",
        "",
        *table(
            ["c2 / c1", "best fixed", "head", "ratio", "by theorem", "probability", "ratio "],
            prices,
        ),
    ]


def lengths(result: dict[str, Any]) -> Lines:
    """Length controls on modelled machines."""
    settings, rows = modelled_lengths.table_of(result)
    return [
        f"`kvarn reproduce {result['experiment']}`: length controls on **modelled** machines, one "
        "sequence, a proposer that knows how sure it is; speed over no drafts. Fixed lengths are "
        f"{modelled_lengths.LENGTHS[0]} to {modelled_lengths.LENGTHS[-1]}.",
        "",
        *table(["machine; text", *settings], [[name, *ratios] for name, ratios in rows]),
    ]
