"""The section of docs/results.md on drafts whose acceptance was recorded."""

from typing import Any

from cells import Lines, cell, table


def recorded_drafts(result: dict[str, Any]) -> Lines:
    """Output rates over plain decoding by batch size, and the time that n-grams take."""
    said, rows = result["workload"], result["results"]
    about, batches = said["statistics"], list(dict.fromkeys(row["batch"] for row in rows))
    repeated, unchanged = (_shares(about[name]) for name in ("repeated", "unchanged"))
    return [
        f"{result['config']['model']} with random weights serves what SmolLM2-135M said as an "
        "agent that regenerates a small file with an edit a turn: **acceptance recorded, from a "
        f"smaller model**; steps and drafts as they are. {about['agents']} agents; of their "
        f"answers' tokens, by turn, {repeated} repeat four in a row or more of what stands before "
        f"them; from the second turn on {unchanged} of the answers are the one before, unchanged. "
        f"At batch 1 the first {said['agents_alone']} agents come one after the other, else all of "
        f"a batch turn by turn; {said['turns']} turns. Answers end at different times: in the mean "
        f"{_held(rows)} sequences are in a plain step. Output rate with the prompts' time in it; "
        "over plain decoding of the same run; tokens that a sequence gains by a round (1 without "
        "drafts); share of the drafted tokens that stood.",
        "",
        *_by_batch(rows, batches),
        "",
        "Time of an n-gram's draft by the length of the prompt, on the host [us], medians; `edits` "
        "repeats one text with errors, tokens of `fresh` are drawn one by one:",
        "",
        *_matching(result["matching"]),
    ]


def _held(rows: list[dict[str, Any]]) -> str:
    """Sequences of a plain step, by batch size."""
    plain = (row for row in rows if not row["proposer"])
    return ", ".join(f"{row['tokens_per_step']:.1f} of {row['batch']}" for row in plain)


def _shares(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


def _by_batch(rows: list[dict[str, Any]], batches: list[int]) -> Lines:
    """A line for each setting."""
    found = {(row["proposer"], row["setting"], row["batch"]): row for row in rows}
    names = ["setting"]
    for batch in batches:
        names += [f"tok/s x{batch}", f"over plain x{batch}", f"tokens a round x{batch}"]
        names += [f"accepted x{batch}"]
    lines = list[list[Any]]()
    for proposer, setting in dict.fromkeys((row["proposer"], row["setting"]) for row in rows):
        line: list[Any] = [f"{proposer}, {setting}" if proposer else setting]
        for batch in batches:
            row = found[proposer, setting, batch]
            line += [row["tokens_per_s"], f"{cell(row['ratio'])}x", row["tokens_per_round"]]
            line.append(row["acceptance"])
        lines.append(line)
    return table(names, lines)


def _matching(rows: list[dict[str, Any]]) -> Lines:
    """A line for each kind of text."""
    lengths = list(dict.fromkeys(row["history"] for row in rows))
    found = {(row["text"], row["history"]): row["draft_us"] for row in rows}
    texts = dict.fromkeys(row["text"] for row in rows)
    lines = [[text, *(found[text, length] for length in lengths)] for text in texts]
    return table(["text", *map(str, lengths)], lines)
