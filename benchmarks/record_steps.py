"""Record a real run's decisions for the replay test: small memory, every kind of event.

    python benchmarks/record_steps.py tests/data/steps_smollm2_cpu.jsonl.gz
    python benchmarks/record_steps.py tests/data/steps_1b_h100.jsonl.gz --cuda

SmolLM2 on the CPU, or random weights on a GPU, with few pages: preemptions, prefix hits, forks,
aborts, stop tokens, priorities, chunked prompts. What it shows is replayed in tests/replay.
"""

import argparse
from random import Random
from typing import Any

from kvarn.core.config import resolve
from kvarn.core.request import Request, SamplingParams
from kvarn.engine.engine import Engine

CPU: dict[str, Any] = {"model": "smollm2-135m", "pages": 120, "page_size": 4}
CUDA: dict[str, Any] = {
    "model": "llama-3.2-1b", "load": "random", "device": "cuda", "pages": 30, "page_size": 16,
}  # fmt: skip
OPTIONS = {"max_len": 256, "budget": 48, "max_seqs": 12}
STEPS = 2400


def main(path: str, cuda: bool) -> None:
    """Serve random requests for `STEPS` steps, then until all have ended."""
    engine = Engine(resolve((CUDA if cuda else CPU) | OPTIONS | {"step_log": path}))
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
        stop=("the",) if rng.random() < 0.2 and engine.tokenizer is not None else (),
        ignore_eos=rng.random() < 0.5,
    )
    priority, now = rng.choice((0, 0, 0, 1, -1)), engine.clock()
    return Request(name, prompt, params, priority=priority, arrival=now)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("log")
    parser.add_argument("--cuda", action="store_true")
    given = parser.parse_args()
    main(given.log, given.cuda)
