"""What is asked: jobs of one or more turns, as token ids, so that no tokenizer is needed.

Lengths with a range ratio r are uniform in [floor(mean (1 - r)), ceil(mean (1 + r))], as in
`vllm bench serve`.
"""

import csv
import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

from kvarn.bench.options import Workload
from kvarn.core.errors import ConfigError, nearest

#: lower ids are often special tokens
FIRST_ID = 256
#: tokens of one word of English, for texts whose tokenizer is not at hand
TOKENS_PER_WORD = 1.3
#: positions that one entry of `hash_ids` stands for in Mooncake's traces
TRACE_BLOCK = 512


@dataclass(slots=True)
class Turn:
    """One request: what it adds to the conversation, and how long the answer may be."""

    prompt: list[int] | str
    n_output: int  #: most tokens generated
    reply: list[int] = field(default_factory=list)  #: stands for the answer in later turns


@dataclass(slots=True)
class Job:
    """A conversation: later turns are sent when the answer to the earlier one is complete."""

    turns: list[Turn]
    at: float | None = None  #: due time that the data set itself gives [s after the start]


def make_jobs(work: Workload) -> list[Job]:
    """All conversations of a workload, in the order in which they are sent."""
    if work.dataset not in MAKERS:
        raise ConfigError(f"unknown data set {work.dataset!r}{nearest(work.dataset, MAKERS)}")
    if work.num_prompts < 1:
        raise ConfigError(f"num_prompts must be at least 1, got {work.num_prompts}")
    if not 0 <= work.range_ratio < 1:
        raise ConfigError(f"range_ratio must be in [0, 1), got {work.range_ratio}")
    if work.dataset in ("sharegpt", "trace") and work.dataset_path is None:
        raise ConfigError(f"data set {work.dataset!r} needs a file: give --dataset-path")
    if work.vocab < 2 or work.speed <= 0:
        raise ConfigError(
            f"vocab must be at least 2 and speed above 0, got {work.vocab} and {work.speed}"
        )
    return MAKERS[work.dataset](work, Random(work.seed))


def tokens(n: int, vocab: int, rng: Random) -> list[int]:
    """`n` random token ids, none of the low ones that are often special."""
    low = min(FIRST_ID, vocab // 2)
    return [rng.randrange(low, vocab) for _ in range(n)]


def _length(mean: int, ratio: float, rng: Random) -> int:
    low, high = math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))
    return max(1, rng.randint(low, high))


def _random(work: Workload, rng: Random) -> list[Job]:
    prefix = tokens(work.prefix_len, work.vocab, rng)
    return [Job([_turn(work, prefix, rng)]) for _ in range(work.num_prompts)]


def _turn(work: Workload, prefix: list[int], rng: Random) -> Turn:
    n_input = _length(work.input_len, work.range_ratio, rng)
    n_output = _length(work.output_len, work.range_ratio, rng)
    return Turn(prefix + tokens(n_input, work.vocab, rng), n_output)


def _shared_prefix(work: Workload, rng: Random) -> list[Job]:
    if work.prefixes < 1 or work.prefix_len < 1:
        raise ConfigError("data set 'shared-prefix' needs --prefixes and --prefix-len above 0")
    prefixes = [tokens(work.prefix_len, work.vocab, rng) for _ in range(work.prefixes)]
    jobs = [Job([_turn(work, prefixes[i % work.prefixes], rng)]) for i in range(work.num_prompts)]
    rng.shuffle(jobs)
    return jobs


def _multi_turn(work: Workload, rng: Random) -> list[Job]:
    """Conversations that grow turn by turn.

    A server's stream does not tell which ids it generated, so later turns carry random ids in the
    place (and of the length) of the answers: the load is then the same on every server.
    """
    if work.turns < 1:
        raise ConfigError(f"turns must be at least 1, got {work.turns}")
    prefix = tokens(work.prefix_len, work.vocab, rng)
    jobs, left = [], work.num_prompts
    while left > 0:
        n = min(work.turns, left)
        turns = [_turn(work, prefix if i == 0 else [], rng) for i in range(n)]
        for turn in turns:
            turn.reply = tokens(turn.n_output, work.vocab, rng)
        jobs.append(Job(turns))
        left -= n
    return jobs


def _sharegpt(work: Workload, rng: Random) -> list[Job]:
    asked = list(_conversations(work))
    rng.shuffle(asked)
    if not asked:
        raise ConfigError(f"{work.dataset_path} holds no prompt: see `kvarn bench serve --help`")
    jobs = []
    for prompt, reply in asked[: work.num_prompts]:
        guess = max(4, round(len(reply.split()) * TOKENS_PER_WORD))
        jobs.append(Job([Turn(prompt, work.output_len or guess)]))
    return jobs


def _conversations(work: Workload) -> Iterator[tuple[str, str]]:
    """(question, answer) of the first exchange of each conversation of a ShareGPT-like file."""
    for row in _rows(str(work.dataset_path)):
        said = row.get("conversations") or row.get("messages")
        if said is None and isinstance(row.get("prompt"), str):
            yield row["prompt"], str(row.get("completion", row.get("output", "")))
        elif isinstance(said, list) and len(said) >= 2:
            texts = [part.get("value", part.get("content")) for part in said[:2]]
            if all(isinstance(text, str) for text in texts):
                yield texts[0], texts[1]


def _trace(work: Workload, rng: Random) -> list[Job]:
    """Lengths and times of a recorded trace; equal `hash_ids` become equal tokens."""
    jobs: list[Job] = []
    blocks: dict[int, list[int]] = {}
    for row in _rows(str(work.dataset_path)):
        if len(jobs) == work.num_prompts:
            break
        at, n_input, n_output = _trace_row(row, str(work.dataset_path))
        prompt: list[int] = []
        for block in row.get("hash_ids") or ():
            if block not in blocks:
                blocks[block] = tokens(TRACE_BLOCK, work.vocab, rng)
            prompt += blocks[block]
        prompt = prompt[:n_input] + tokens(max(0, n_input - len(prompt)), work.vocab, rng)
        jobs.append(Job([Turn(prompt, max(1, n_output))], at))
    if not jobs:
        raise ConfigError(f"{work.dataset_path} holds no request")
    first = min(job.at or 0.0 for job in jobs)
    for job in jobs:
        job.at = ((job.at or 0.0) - first) / work.speed
    return jobs


def _trace_row(row: dict[str, Any], path: str) -> tuple[float, int, int]:
    """(seconds, input tokens, output tokens) of a Mooncake or Azure row."""
    try:
        if "input_length" in row:
            return row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"])
        when = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
        return when, int(row["ContextTokens"]), int(row["GeneratedTokens"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(
            f"{path}: a row of a trace needs timestamp, input_length and output_length (JSON "
            f"lines), or TIMESTAMP, ContextTokens and GeneratedTokens (CSV); got {row}"
        ) from None


def _rows(path: str) -> Iterator[dict[str, Any]]:
    """Objects of a JSON list, JSON lines or CSV file, gzipped or not."""
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    name = path.removesuffix(".gz")
    if name.endswith(".csv"):
        yield from csv.DictReader(StringIO(text))
        return
    try:
        if text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None


MAKERS = {
    "random": _random,
    "shared-prefix": _shared_prefix,
    "multi-turn": _multi_turn,
    "sharegpt": _sharegpt,
    "trace": _trace,
}
