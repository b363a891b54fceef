"""Collectives between the ranks of an instance: a latency, and bytes over the link of one rank.

Sizes are of the tensor on one rank; `n` ranks each have a link of their own (a switch or a ring,
which move the same bytes a rank).
"""

from kvarn.cost.link import Link


def all_reduce(n_bytes: float, n: int, link: Link) -> float:
    """Sum a tensor of `n_bytes` over `n` ranks: each sends 2(n-1)/n of it. [s]"""
    return link.latency + 2 * (n - 1) / n * n_bytes / link.bandwidth if n > 1 else 0.0


def all_gather(n_bytes: float, n: int, link: Link) -> float:
    """Give every rank the whole tensor of `n_bytes`, of which each has an n-th. [s]"""
    return link.latency + (n - 1) / n * n_bytes / link.bandwidth if n > 1 else 0.0


def all_to_all(n_bytes: float, n: int, link: Link) -> float:
    """Each rank has `n_bytes` to spread evenly over all: an n-th stays at home. [s]"""
    return link.latency + (n - 1) / n * n_bytes / link.bandwidth if n > 1 else 0.0


def pipeline_rounds(stages: int, microbatches: int) -> int:
    """Times of one stage and micro-batch until a step has passed: m + p - 1 (GPipe's bubble)."""
    return microbatches + stages - 1
