"""What drafts without a model cost by the history they are found in: time and memory.

    python benchmarks/proposers.py [--json FILE]

Suffix trees hold past outputs of 1000 tokens each and one running sequence; the n-gram index holds
one sequence. Each case runs in a process of its own, so that its memory is what the process grew.
"""

import argparse
import ctypes
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from kvarn.bench import record
from kvarn.core.request import Request
from kvarn.core.seq import Seq
from kvarn.speculate.part import Ask
from kvarn.speculate.propose import native_tree
from kvarn.speculate.propose.native_tree import NativeTree
from kvarn.speculate.propose.ngram import NGram
from kvarn.speculate.propose.suffix_tree import Drafting, SuffixTree

HISTORIES = (1 << 10, 1 << 13, 1 << 16, 1 << 19)
PYTHON_MOST = 1 << 16  #: the tree in Python takes minutes to read more
OUTPUT, ROUNDS, MOST, VOCAB = 1000, 500, 32, 30_000


class Always:
    """A length control that never stops a draft."""

    def goes_on(self, confidence: Any) -> bool:
        """Yes."""
        return True


def fresh(n: int) -> list[int]:
    """Tokens by Zipf's law, independent of each other."""
    chance = Random(0)
    return [int(chance.paretovariate(1.0)) % VOCAB for _ in range(n)]


def edits(n: int) -> list[int]:
    """One text of 2000 tokens over and over, of which each time one token in fifty is another."""
    chance, text, found = Random(1), fresh(2000), list[int]()
    while len(found) < n:
        found += [t if chance.random() > 0.02 else chance.randrange(VOCAB) for t in text]
    return found[:n]


TEXTS: dict[str, Callable[[int], list[int]]] = {"fresh": fresh, "edits": edits}


def held() -> int:
    """Memory of this process, without what it could give back [bytes]."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def tree_case(make: Callable[[], Any], text: list[int], history: int) -> dict[str, float]:
    """A suffix tree over `history` tokens; then it follows a sequence token by token."""
    tree, how = make(), Drafting(MOST)
    before, began = held(), time.process_time()
    for key, at in enumerate(range(0, history, OUTPUT)):
        tree.extend(key, text[at : min(at + OUTPUT, history)])
        tree.close(key)
    read, grown = time.process_time() - began, held() - before
    appends, drafts = [], []
    for end in range(history, history + ROUNDS):
        began = time.perf_counter()
        tree.extend(-1, text[end : end + 1])
        middle = time.perf_counter()
        tree.speculate(text[end - 63 : end + 1], how)
        drafts.append(time.perf_counter() - middle)
        appends.append(middle - began)
    return measures(read / history, each(grown, history), appends, drafts)


def ngram_case(text: list[int], history: int) -> dict[str, float]:
    """An n-gram index over `history` tokens of one sequence; a draft reads the newest token too."""
    seq = Seq(1, Request("r", text[:history]), 0, text[:history], 10**9, (0, 0))
    proposer, control, drafts = NGram(), Always(), []
    before, began = held(), time.process_time()
    proposer.propose([Ask(seq, MOST)], control)
    read, grown = time.process_time() - began, held() - before
    for token in text[history : history + ROUNDS]:
        seq.tokens.append(token)
        began = time.perf_counter()
        proposer.propose([Ask(seq, MOST)], control)
        drafts.append(time.perf_counter() - began)
    return measures(read / history, each(grown, history), [], drafts)


def each(grown: int, history: int) -> float | None:
    """Bytes of a token; a short history is lost among the pages of the process."""
    return grown / history if history >= HISTORIES[1] else None


def measures(
    read: float, grown: float | None, appends: list[float], drafts: list[float]
) -> dict[str, Any]:
    """Microseconds and bytes, for each token or draft; medians of single calls."""
    return {
        "read_us": 1e6 * read,
        "append_us": 1e6 * statistics.median(appends) if appends else None,
        "draft_us": 1e6 * statistics.median(drafts),
        "draft_p95_us": 1e6 * statistics.quantiles(drafts, n=20)[-1],
        "bytes_per_token": grown,
    }


def measure(proposer: str, kind: str, history: int) -> dict[str, Any]:
    """One case."""
    text = TEXTS[kind](history + ROUNDS)
    row: dict[str, Any] = {"proposer": proposer, "text": kind, "history": history}
    if proposer == "ngram":
        return row | ngram_case(text, history)
    return row | tree_case(NativeTree if proposer == "suffix" else SuffixTree, text, history)


def main() -> None:
    """Measure the cases, print them, and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    options = parser.parse_args()
    proposers = ["ngram", *(["suffix"] if native_tree.available() else []), "suffix, in Python"]
    cases = [
        (proposer, kind, history)
        for proposer in proposers
        for kind in TEXTS
        for history in HISTORIES
        if proposer != "suffix, in Python" or history <= PYTHON_MOST
    ]
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for case in cases:
            rows.append(pool.apply(measure, case))
            print(rows[-1], flush=True)
    said = {"output": OUTPUT, "rounds": ROUNDS, "most": MOST, "ngram_window": NGram().window}
    config = {"native": native_tree.reason()}
    record.write(record.header("proposers", said, config) | {"results": rows}, options.json)


if __name__ == "__main__":
    main()
