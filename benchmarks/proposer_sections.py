"""The section of docs/results.md on proposers without a model."""

from typing import Any

from cells import Lines, columns


def proposers(result: dict[str, Any]) -> Lines:
    """Time and memory by history."""
    said = result["workload"]
    picked = {
        "proposer": "proposer", "text": "text", "history": "history", "read_us": "reading [us]",
        "append_us": "append [us]", "draft_us": "draft [us]", "draft_p95_us": "draft, p95 [us]",
        "bytes_per_token": "bytes a token",
    }  # fmt: skip
    return [
        "Drafts without a model: processor time to read a token of the history, time of one call "
        f"that appends a token, of one that drafts (medians of {said['rounds']}; up to "
        f"{said['most']} tokens), and what the process grew by. `edits` repeats one text with "
        "errors; tokens of `fresh` are drawn one by one, by Zipf's law. Suffix trees hold outputs "
        f"of {said['output']} tokens; the n-gram index holds the last {said['ngram_window']} "
        "tokens of one sequence, and its drafts read the newest token too.",
        "",
        *columns(result, picked),
    ]
