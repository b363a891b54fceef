"""A fitted cost model on steps of runs that it did not see: SmolLM2 on this machine.

    python benchmarks/validate_steps.py [--json FILE]

Real serving with a step log, three loads (prompts alone, decodes alone, both) a round; fitted on
all rounds but the last, judged on the last. The machine is shared: `median_decode_seconds_by_round` shows its noise, which
is in the errors.
"""

import argparse
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from random import Random

from kvarn.bench import record
from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.cost.fitted import Step, errors, fit, regime
from kvarn.engine.engine import Engine
from kvarn.sim.replay import step_rows

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {"model": "smollm2-135m", "max_len": 1024, "budget": 256, "max_seqs": 16}
ROUNDS = 3
LIMITS = {"mape": 0.08, "bias": 0.02, "p95": 0.20}
#: (requests, most prompt tokens, most answer tokens, steps between arrivals) of a load
LOADS = {"prompts": (12, 400, 1, 1), "decodes": (16, 40, 40, 0), "both": (14, 250, 24, 4)}


def serve(engine: Engine, seed: str, load: tuple[int, int, int, int]) -> None:
    """One load to its end; arrivals are by steps, so that every machine sees the same mix."""
    n, n_in, n_out, every = load
    rng, steps, sent = Random(seed), 0, 0
    while sent < n or engine.has_work:
        while sent < n and (not every or steps % every == 0):
            prompt = [rng.randrange(1000, 40000) for _ in range(rng.randint(8, n_in))]
            params = SamplingParams(
                max_tokens=rng.randint(1, n_out), ignore_eos=True, temperature=0.0
            )
            engine.add(Request(f"{seed}-{sent}", prompt, params, arrival=engine.clock()))
            sent += 1
            if every:
                break
        engine.step()
        steps += 1


def recorded(seed: int, folder: Path) -> list[Step]:
    """Steps of one round: every load once, in its own order."""
    log = str(folder / f"steps_{seed}.jsonl")
    engine = Engine(resolve(OPTIONS | {"step_log": log}))
    for name, load in LOADS.items():
        serve(engine, f"{seed}-{name}", load)
    engine.close()
    return list(step_rows(log))


def main() -> None:
    """Record, fit, judge, write one result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", default=str(ROOT / "benchmarks/results/step_validation.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rounds = [recorded(i, Path(folder)) for i in range(ROUNDS)]
    model = fit([step for steps in rounds[:-1] for step in steps])
    by_regime: dict[str, list] = {}
    for shape, seconds in rounds[-1]:
        for name in (regime(shape), "all"):
            by_regime.setdefault(name, []).append((model.step(shape), seconds))
    rows = []
    for name, pairs in sorted(by_regime.items()):
        found = errors(pairs)
        within = {key: abs(getattr(found, key)) <= limit for key, limit in LIMITS.items()}
        rows.append({"regime": name} | asdict(found) | {"within": within})
        print(rows[-1])
    alike = [statistics.median(s for shape, s in steps if not shape.chunks) for steps in rounds]
    result = record.header("step_validation", {"loads": LOADS, "limits": LIMITS}, OPTIONS)
    result |= {"rounds": ROUNDS, "fitted_steps": sum(map(len, rounds[:-1])), "results": rows}
    record.write(result | {"median_decode_seconds_by_round": alike}, given.json)


if __name__ == "__main__":
    main()
