"""Record a real run's decisions for the replay test: small memory, every kind of event.

    python benchmarks/record_steps.py tests/data/steps_smollm2_cpu.jsonl.gz

SmolLM2 on the CPU with few pages: preemptions, prefix hits, forks (n > 1), aborts, stop tokens,
priorities, chunked prompts. What it shows is replayed in tests/replay.
"""

import sys
from random import Random

from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine

OPTIONS = {"pages": 120, "page_size": 4, "max_len": 256, "budget": 48, "max_seqs": 12}
STEPS = 2400


def main(path: str) -> None:
    """Serve random requests for `STEPS` steps, then until all have ended."""
    engine = Engine(resolve(OPTIONS | {"model": "smollm2-135m", "step_log": path}))
    rng, made, steps = Random(0), 0, 0
    open_: list[str] = []
    while steps < STEPS or engine.has_work:
        if steps < STEPS and rng.random() < 0.22 and len(engine.control.queues.waiting) < 6:
            request = random_request(f"r{made}", rng, engine)
            engine.add(request)
            open_.append(request.id)
            made += 1
        if open_ and rng.random() < 0.01:
            engine.abort(open_.pop(rng.randrange(len(open_))))
        for output in engine.step():
            if output.finish is not None and output.request_id in open_:
                open_.remove(output.request_id)
        steps += 1
    print(f"{made} requests, {engine.stats()}")
    engine.close()


def random_request(name: str, rng: Random, engine: Engine) -> Request:
    """A prompt of one of a few families, so that prefixes meet again."""
    family = rng.randrange(5)
    shared = [1000 + family] * rng.choice((0, 8, 17, 40))
    prompt = shared + [rng.randrange(2000, 2040) for _ in range(rng.randrange(1, 60))]
    params = SamplingParams(
        n=3 if rng.random() < 0.12 else 1,
        max_tokens=rng.randrange(1, 70),
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(1 << 30),
        stop=("the",) if rng.random() < 0.2 else (),
        ignore_eos=rng.random() < 0.5,
    )
    priority, now = rng.choice((0, 0, 0, 1, -1)), engine.clock()
    return Request(name, prompt, params, priority=priority, arrival=now)


if __name__ == "__main__":
    main(sys.argv[1])
