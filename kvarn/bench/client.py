"""One process of the load generator: sends its share of the jobs when due, records the answers."""

import asyncio
import contextlib
import signal
import time
from array import array
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from typing import Any

from kvarn.bench.backends import BACKENDS, Asking, History
from kvarn.bench.http import Client, HTTPError
from kvarn.bench.prompts import Job, Turn


@dataclass(slots=True)
class Sample:
    """One request as the client saw it. Times are seconds; `start` counts from the run's start."""

    index: int  #: position of the request in the whole run
    start: float = 0.0  #: when it was sent
    queued: float = (
        0.0  #: from when it was due until it was sent (limit on concurrency, late client)
    )
    n_prompt: int = 0  #: tokens of the prompt, by the server's count where it gives one
    n_output: int = 0  #: tokens generated, by the server's count where it gives one
    n_cached: int | None = None  #: prompt tokens that the server found in its cache
    ttft: float = 0.0  #: sent to first event with tokens
    itl: "list[float] | array[float]" = field(default_factory=list)  #: between events with tokens
    latency: float = 0.0  #: sent to last event with tokens (E2EL)
    text: str = ""
    error: str = ""  #: empty for a request that was answered in full

    @property
    def ok(self) -> bool:
        """Whether it was answered in full."""
        return not self.error


@dataclass(slots=True)
class Share:
    """What one process does."""

    base_url: str
    backend: str
    asking: Asking
    headers: dict[str, str]
    jobs: list[tuple[int, float, Job]]  #: (index of the first request, due time [s], job)
    concurrency: int | None  #: most requests of this process in flight; None: no limit
    timeout: float  #: of one request [s]


async def ask(
    client: Client, share: Share, turn: Turn, history: History, sample: Sample, zero: float
) -> None:
    """Send one request and fill `sample`; every way to fail ends as its `error`."""
    backend = BACKENDS[share.backend]()
    sent = time.monotonic()
    sample.start = sent - zero
    try:
        async with asyncio.timeout(share.timeout):
            await _read(client, backend, backend.body(share.asking, history, turn), sample, sent)
        if not sample.latency:
            sample.error = "the stream held no token"
    except TimeoutError:
        sample.error = f"no full answer within {share.timeout:g} s"
    except (HTTPError, OSError, ValueError, asyncio.LimitOverrunError) as error:
        sample.error = str(error) or type(error).__name__
    if not sample.n_output and sample.ok:
        sample.n_output = 1 + len(sample.itl)


async def _read(
    client: Client, backend: Any, body: dict[str, Any], sample: Sample, sent: float
) -> None:
    last = sent
    texts = []
    async for event in client.events(backend.path, body):
        now = time.monotonic()
        piece = backend.read(event)
        if piece.error is not None:
            raise HTTPError(piece.error)
        if piece.tokens:
            if last is sent:
                sample.ttft = now - sent
            else:
                sample.itl.append(now - last)
            last = now
            sample.latency = now - sent
        texts.append(piece.text)
        sample.n_prompt = piece.n_prompt or sample.n_prompt
        sample.n_output = piece.n_output or sample.n_output
        sample.n_cached = sample.n_cached if piece.n_cached is None else piece.n_cached
    sample.text = "".join(texts)


async def run_share(share: Share, zero: float, progress: Any = None) -> list[Sample]:
    """Run every job of a share; `zero` is the run's start on `time.monotonic`."""
    client = Client(share.base_url, share.headers)
    gate = asyncio.Semaphore(share.concurrency) if share.concurrency else contextlib.nullcontext()

    async def run(first: int, due: float, job: Job) -> list[Sample]:
        history: History = []
        samples = []
        for place, turn in enumerate(job.turns):
            sample = Sample(first + place, n_prompt=_n_prompt(history, turn))
            due_at = zero + due if place == 0 else time.monotonic()
            async with gate:
                sample.queued = time.monotonic() - due_at
                await ask(client, share, turn, history, sample, zero)
            samples.append(sample)
            history.append((turn, sample.text))
            if progress is not None:
                with progress.get_lock():
                    progress.value += 1
            if not sample.ok:
                samples += _skipped(first, place, job, sample, zero)
                break
        return samples

    tasks = []
    for first, due, job in sorted(share.jobs, key=lambda entry: entry[1]):
        wait = zero + due - time.monotonic()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.create_task(run(first, due, job)))
    done = await asyncio.gather(*tasks)
    client.close()
    return [sample for samples in done for sample in samples]


def _n_prompt(history: History, turn: Turn) -> int:
    """Tokens of a turn's whole prompt as far as the client knows; 0 for text."""
    parts = [said.prompt for said, _ in history] + [turn.prompt]
    if any(isinstance(part, str) for part in parts):
        return 0
    return sum(map(len, parts)) + sum(len(said.reply) for said, _ in history)


def _skipped(first: int, place: int, job: Job, failed: Sample, zero: float) -> list[Sample]:
    """The later turns of a conversation whose turn `place` failed: failed too, never hidden."""
    error = f"not sent: an earlier turn failed ({failed.error})"
    rest = range(place + 1, len(job.turns))
    return [Sample(first + i, start=time.monotonic() - zero, error=error) for i in rest]


def work(pipe: Pipe, share: Share, progress: Any) -> None:
    """Body of a client process: say ready, receive the start time, run, send the samples back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes itself
    pipe.send("ready")
    zero = pipe.recv()
    pipe.send(asyncio.run(run_share(share, zero, progress)))
    pipe.close()
