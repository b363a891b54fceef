"""Steps on made-up sequences: they measure what a step needs, compile kernels, capture graphs."""

import torch

from kvarn.core.plan import SeqStart, Span, StepPlan
from kvarn.core.request import Request, SamplingParams
from kvarn.runner.executor import Runner

GREEDY = SamplingParams(temperature=0.0, max_tokens=1)


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


def _run(runner: Runner, lengths: list[int], pages: list[int]) -> None:
    """One step that computes sequences of these lengths, and one that forgets them."""
    seqs = range(len(lengths))
    starts = [
        SeqStart(
            seq,
            Request(id=f"warm-{seq}", prompt=[0] * length, sampling=GREEDY),
            0,
            [0] * length,
            length,
            [list(pages) for _ in runner.groups],
        )
        for seq, length in zip(seqs, lengths)
    ]
    spans = [Span(seq, 0, length) for seq, length in zip(seqs, lengths)]
    runner.run(StepPlan(0, starts=starts, spans=spans))
    runner.run(StepPlan(0, stops=list(seqs)))
