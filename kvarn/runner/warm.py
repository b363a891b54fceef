"""Steps on made-up sequences: they measure what a step needs, compile kernels, capture graphs."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from kvarn.core.plan import SeqStart, Span, StepPlan
from kvarn.core.request import Request, SamplingParams
from kvarn.runner.executor import Runner
from kvarn.runner.pieces import SIZES

GREEDY = SamplingParams(temperature=0.0, max_tokens=1)
FILTERED = SamplingParams(temperature=1.0, top_p=0.9, max_tokens=1)
LONG = 4096  #: a context whose attention is split, and worth reading once if it is shared [tokens]
SHARERS = 64  #: sequences that share it
COMPILING = 60.0  #: no further step is begun at the start after so long [s]


def largest_step(runner: Runner, budget: int, max_seqs: int, page_size: int, max_len: int) -> None:
    """One step of `budget` positions in as many sequences as may run, all of which want a token.

    The sequences share their pages: what they compute means nothing.
    """
    n = min(max_seqs, budget)
    lengths = [min(budget // n + (i < budget % n), max_len) for i in range(n)]
    pages = list(range(-(-max(lengths) // page_size)))
    _run(runner, lengths, pages)


def decode_step(runner: Runner, n_seqs: int) -> None:
    """One step of `n_seqs` sequences of a single position each, all in page 0."""
    _run(runner, [1] * n_seqs, [0])


def peak_bytes(runner: Runner, budget: int, max_seqs: int, page_size: int, max_len: int) -> int:
    """Most memory that the largest step takes beside weights and KV, measured. [bytes]"""
    device = runner.decoder.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    largest_step(runner, budget, max_seqs, page_size, max_len)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def every_kernel(runner: Runner, pages: Sequence[int], budget: int, max_len: int) -> bool:
    """Compile what steps can launch, so that none is compiled while requests wait.

    Which kernels a step launches depends on whether attention is split over long contexts or shares
    prefixes, on filters of the sampler, and on its number of rows (tiles of products). Each is
    launched once, by steps like those that are captured, but uncaptured: graphs are as lazy as
    before. `pages`: of the pool, by group. Compiled kernels are kept on disk, so only the first
    start of a machine takes long; it ends after `COMPILING`, and then the result is False.
    """
    assert runner.graphs is not None
    decodes, size = runner.graphs.sizes, runner.image.page_size
    longest = min(max_len, LONG)
    table = [i % min(pages) for i in range(-(-longest // size))]  # pages that every group has
    steps = [
        partial(_run, runner, [1] * min(SHARERS, decodes[-1]), table, longest - 1),
        partial(_run, runner, [1], table, longest - 1),
        partial(_run, runner, [1], [0], 0, FILTERED),
        *(partial(_run, runner, [1] * n, [0]) for n in decodes),
        *(partial(_run, runner, [n], table) for n in SIZES if n <= min(budget, longest)),
    ]
    latest = time.monotonic() + COMPILING
    with _uncaptured(runner):
        for step in steps:
            if time.monotonic() > latest:
                return False
            step()
    return True


@contextmanager
def _uncaptured(runner: Runner) -> Iterator[None]:
    """No step is replayed in here."""
    kept = runner.graphs, runner.pieces
    runner.graphs = runner.pieces = None
    try:
        yield
    finally:
        runner.graphs, runner.pieces = kept


def _run(
    runner: Runner, lengths: list[int], pages: list[int], context: int = 0,
    params: SamplingParams = GREEDY,
) -> None:  # fmt: skip
    """One step that computes `lengths` positions of sequences, and one that forgets them.

    `context`: positions before them, whose KV is whatever the pages hold.
    """
    seqs = range(len(lengths))
    starts = [
        SeqStart(
            seq,
            Request(id=f"warm-{seq}", prompt=[0] * (context + length), sampling=params),
            0,
            [0] * (context + length),
            context + length,
            [list(pages) for _ in runner.groups],
        )
        for seq, length in zip(seqs, lengths)
    ]
    spans = [Span(seq, context, length) for seq, length in zip(seqs, lengths)]
    runner.run(StepPlan(0, starts=starts, spans=spans))
    runner.run(StepPlan(0, stops=list(seqs)))
