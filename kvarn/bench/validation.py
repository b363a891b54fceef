"""What a validation of the simulator needs: times of requests, their errors, a closed loop."""

import statistics
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.core.request import Request, SamplingParams
from kvarn.sim.heap import NS
from kvarn.sim.run import Record

#: The client of InferenceMAX, which the 70B points seem to come from (its README, "Benchmark Client
#: Configuration"): `--request-rate inf --max-concurrency CONC --num-prompts 10 * CONC`, every
#: request counts, the first burst too; `--random-range-ratio 0.8`; no prefix cache; the server has
#: `--max-num-seqs CONC --max-num-batched-tokens 8192`.
WAVES = 10  #: requests of a closed loop, in concurrencies
SHORTEST = 0.8  #: lengths are uniform from this share of isl and osl on


def summary(values: Sequence[float]) -> dict[str, float]:
    """Mean, median and 99th percentile (nearest rank)."""
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(ordered),
        "p50": statistics.median(ordered),
        "p99": ordered[max(0, -(-99 * len(ordered) // 100) - 1)],
    }


def times(rows: Iterable[tuple[float, float, float, int]]) -> dict[str, dict[str, float]]:
    """TTFT, TPOT and E2E [s] and throughput [tokens/s] of (arrival, first, last, tokens)."""
    found = list(rows)
    span = max(last for _, _, last, _ in found) - min(at for at, *_ in found)
    return {
        "ttft": summary([first - at for at, first, _, _ in found]),
        "tpot": summary([(last - first) / (n - 1) for _, first, last, n in found if n > 1]),
        "e2e": summary([last - at for at, _, last, _ in found]),
        "throughput": {"mean": sum(n for *_, n in found) / span},
    }


def simulated_times(records: Iterable[Record]) -> list[tuple[float, float, float, int]]:
    """The same of simulated requests; one that did not complete is an error."""
    found = []
    for one in records:
        if one.first is None or one.last is None or one.end is None:
            raise ConfigError(f"request {one.id} did not complete: {one.error}")
        found.append((one.arrival / NS, one.first / NS, one.last / NS, one.n_out))
    return found


def errors(
    guess: dict[str, dict[str, float]], truth: dict[str, dict[str, float]]
) -> dict[str, dict[str, float]]:
    """Relative errors, predicted / measured - 1."""
    return {
        name: {key: guess[name][key] / value - 1 for key, value in found.items()}
        for name, found in truth.items()
    }


def closed_loop(concurrency: int, isl: int, osl: int) -> tuple[list[Request], Any]:
    """The burst that starts the run, and `after`: each answer makes room for one more request."""
    rng, made = Random(f"{concurrency} {isl} {osl}"), 0

    def request(now: float = 0.0) -> Request:
        nonlocal made
        n_in = rng.randint(max(1, round(SHORTEST * isl)), isl)
        n_out = rng.randint(max(2, round(SHORTEST * osl)), osl)
        made += 1
        params = SamplingParams(max_tokens=n_out, ignore_eos=True, temperature=0.0)
        return Request(str(made - 1), [(1 << 61) + made] * n_in, params, arrival=now)

    def after(_: str, now: float) -> list[Request]:
        return [request(now)] if made < WAVES * concurrency else []

    return [request() for _ in range(concurrency)], after
