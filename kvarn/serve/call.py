"""`Call`: one HTTP request's way through the engine, counted and timed.

What it counts becomes the metrics, the log line, `usage` and `timings`.
"""

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvarn.core.errors import EngineDied, RequestError
from kvarn.core.output import Output, Timings
from kvarn.core.request import Request
from kvarn.serve.client import EngineClient
from kvarn.serve.metrics import Metrics

log = logging.getLogger("kvarn.request")


@dataclass(slots=True)
class Tally:
    """What one sequence has given so far; times are of `time.monotonic`. [s]"""

    n_prompt: int = 0
    n_cached: int = 0
    n_output: int = 0
    first: float | None = None
    last: float = 0.0
    finish: str | None = None
    timings: Timings = field(default_factory=Timings)

    @property
    def pace(self) -> float | None:
        """TPOT: mean time of a token after the first; None before the second. [s]"""
        if self.first is None or self.n_output < 2:
            return None
        return (self.last - self.first) / (self.n_output - 1)


class Call:
    """The engine requests of one HTTP request, from submission to the last output."""

    def __init__(
        self, engine: EngineClient, metrics: Metrics, requests: Sequence[Request], label: str
    ) -> None:
        self.requests = requests
        self.tallies = {(r.id, i): Tally() for r in requests for i in range(r.sampling.n)}
        self.position = {r.id: p * r.sampling.n for p, r in enumerate(requests)}
        self._metrics = metrics
        self._label = label
        self._arrival = requests[0].arrival
        self._failure = ""  #: what went wrong
        self._closed = False
        self._stream = engine.submit(requests)

    async def accepted(self) -> None:
        """Wait until the engine has queued everything; raises its refusal, and forgets the call."""
        try:
            await self._stream.accepted()
        except RequestError:
            self._closed = True  # it never was one of ours: not in the metrics
            self._stream.close()
            raise
        except BaseException as error:
            self._failure = str(error) if isinstance(error, EngineDied) else ""
            self.close()
            raise

    async def outputs(self) -> AsyncGenerator[Output, None]:
        """Outputs as they come; whatever is still open is aborted when the caller stops."""
        try:
            async for output in self._stream:
                self._count(output)
                if output.finish == "error":
                    message = output.error or "the request failed"
                    raise RequestError(message, code="generation_failed", status=422)
                yield output
        except (EngineDied, RequestError) as error:
            self._failure = str(error)
            raise
        finally:
            self.close()

    def choice(self, output: Output) -> int:
        """Index of the output's sequence among all choices of the answer."""
        return self.position[output.request_id] + output.index

    def _count(self, output: Output) -> None:
        now = time.monotonic()
        tally, metrics = self.tallies[output.request_id, output.index], self._metrics
        tally.n_prompt, tally.n_cached = output.n_prompt, output.n_cached
        tally.timings = output.timings
        if output.tokens:
            if tally.first is None:
                tally.first = now
                metrics.first_token.observe(now - self._arrival)
                metrics.queue.observe(max(0.0, output.timings.queue))
            else:
                metrics.inter_token.observe((now - tally.last) / len(output.tokens))
            tally.n_output += len(output.tokens)
            tally.last = now
            metrics.output_tokens.inc(len(output.tokens))
        tally.finish = output.finish

    def close(self) -> None:
        """Abort what is open, and account for the call; harmless a second time."""
        if self._closed:
            return
        self._closed = True
        self._stream.close()
        for request in self.requests:
            self._account([self.tallies[request.id, i] for i in range(request.sampling.n)])
        self._log()

    def _account(self, tallies: list[Tally]) -> None:
        """Add one ended request to the metrics."""
        metrics = self._metrics
        if all(t.finish for t in tallies):
            reason = str(tallies[-1].finish)
        else:
            reason = "error" if self._failure else "abort"
        metrics.requests.labels(reason).inc()
        if not tallies[0].n_prompt:
            return
        metrics.prompt_tokens.inc(tallies[0].n_prompt)
        metrics.prompt_length.observe(tallies[0].n_prompt)
        metrics.output_length.observe(sum(t.n_output for t in tallies))
        metrics.whole.observe(time.monotonic() - self._arrival)
        for tally in tallies:
            if tally.pace is not None:
                metrics.per_token.observe(tally.pace)

    def _log(self) -> None:
        if self._failure:
            log.warning("%s  error: %s", self._label, self._failure)
            return
        timings = self.timings()
        finish = ",".join(sorted({t.finish or "client gone" for t in self.tallies.values()}))
        log.info(
            "%s  %d in (%d cached), %d out, ttft %.0f ms, %.1f ms a token, %s",
            self._label,
            self.n_prompt,
            self.n_cached,
            self.n_output,
            timings["time_to_first_token_ms"],
            timings["time_per_output_token_ms"],
            finish,
        )

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(self.tallies[r.id, 0].n_prompt or len(r.prompt) for r in self.requests)

    @property
    def n_cached(self) -> int:
        """Of those, found in the prefix cache."""
        return sum(self.tallies[r.id, 0].n_cached for r in self.requests)

    @property
    def n_output(self) -> int:
        """Tokens generated so far by all sequences."""
        return sum(t.n_output for t in self.tallies.values())

    def usage(self) -> dict[str, Any]:
        """OpenAI's `usage`, as of now."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_output,
            "total_tokens": self.n_prompt + self.n_output,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
        }

    def metrics(self) -> dict[str, float]:
        """Waiting and first-token time of the slowest sequence, seen from this process."""
        timings = self.timings()
        return {key: timings[key] for key in ("queue_time_ms", "time_to_first_token_ms")}

    def timings(self) -> dict[str, float]:
        """Where the time went, in milliseconds, for the slowest sequence."""
        tallies = self.tallies.values()
        firsts = [t.first - self._arrival for t in tallies if t.first is not None]
        paces = [t.pace for t in tallies if t.pace is not None]
        return {
            "queue_time_ms": 1e3 * max(t.timings.queue for t in tallies),
            "time_to_first_token_ms": 1e3 * max(firsts, default=0.0),
            "time_per_output_token_ms": 1e3 * max(paces, default=0.0),
            "total_time_ms": 1e3 * (time.monotonic() - self._arrival),
        }
