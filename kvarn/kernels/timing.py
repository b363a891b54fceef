"""Timing for the micro-benchmarks: forms take turns, so that a noisy machine is fair to all."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def medians(
    forms: dict[str, Callable[[], Any]], seconds: float = 0.5, least: int = 7
) -> dict[str, float]:
    """Median time of a call of each form, measured in turns for about `seconds` in all. [s]"""
    for form in forms.values():
        form()
    taken: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < least:
        for name, form in forms.items():
            began = time.perf_counter()
            form()
            taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(times) for name, times in taken.items()}


def compare(title: str, **forms: Callable[[], Any]) -> None:
    """Print one line: the median of each form in microseconds, and its speed over the first."""
    times = medians(forms)
    first = next(iter(times.values()))
    cells = [f"{name} {t * 1e6:9.1f} us ({first / t:4.2f}x)" for name, t in times.items()]
    print(f"{title:44s} {'  '.join(cells)}", flush=True)
