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
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

from kvarn.bench.options import Workload
from kvarn.core.errors import ConfigError, nearest
from kvarn.workload.load import TOKENS_PER_WORD, open_trace
from kvarn.workload.tokens import FIRST_ID, prompt_tokens
from kvarn.workload.transform import limit, time_warp


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


#: least value of the whole numbers of a workload
LEAST = {"num_prompts": 1, "input_len": 1, "output_len": 0, "prefix_len": 0}


def make_jobs(work: Workload) -> list[Job]:
    """All conversations of a workload, in the order in which they are sent."""
    if work.dataset not in MAKERS:
        raise ConfigError(f"unknown data set {work.dataset!r}{nearest(work.dataset, MAKERS)}")
    for name, least in LEAST.items():
        if getattr(work, name) < least:
            raise ConfigError(f"{name} must be at least {least}, got {getattr(work, name)}")
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
    """Lengths and times of a recorded trace; equal blocks become equal tokens.

    A turn whose prompt has room for its parent's prompt and answer waits for that answer (closed
    loop, no time to think); all else is sent when it is due.
    """
    trace = time_warp(limit(open_trace(str(work.dataset_path)), work.num_prompts), work.speed)
    jobs: list[Job] = []
    ends: dict[str, tuple[Job, int]] = {}  # last request of a job -> (job, tokens so far)
    for one in trace:
        prompt = prompt_tokens(one, trace.block_size, work.vocab, work.seed)
        n_output = max(1, one.n_out)
        job, said = ends.pop(one.parent or "", (None, 0))
        if job is not None and said < one.n_in:
            before = job.turns[-1]
            before.reply = prompt[said - before.n_output : said]
            job.turns.append(Turn(prompt[said:], n_output))
        else:
            job = Job([Turn(prompt, n_output)], one.at)
            jobs.append(job)
        ends[one.id] = (job, one.n_in + n_output)
    return jobs


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
