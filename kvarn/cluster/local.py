"""`LocalCluster`: several real engines in one process behind a cluster policy, driven by asyncio.

Each engine steps in a thread of its own; the policy runs on the event loop only, so it needs no
locks and sees events one at a time, as under the simulator's heap. Engines in one process share
its cores and its interpreter: this driver is for tests, small models and GPUs of one host.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kvarn.cluster.policy import Arrived, ClusterPolicy, Event, Finished, Refuse, Send, Started
from kvarn.core.errors import KvarnError, QueueFull
from kvarn.core.output import Output
from kvarn.core.request import Request

log = logging.getLogger("kvarn.cluster")


class Steps(Protocol):
    """What is asked of an engine; `kvarn.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        ...

    def add(self, request: Request) -> None:
        """Queue a request."""
        ...

    def abort(self, request_id: str) -> None:
        """Drop a request."""
        ...

    def step(self) -> list[Output]:
        """Advance; what is new."""
        ...


class _Worker(threading.Thread):
    """Steps one engine; calls come through `inbox`, outputs leave through `deliver`."""

    def __init__(self, engine: Steps, deliver: Callable[[Any], None]) -> None:
        super().__init__(daemon=True)
        self.engine = engine
        self.deliver = deliver
        self.inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            while not (self.engine.has_work and self.inbox.empty()):
                call = self.inbox.get()
                if call is None:
                    return
                call()
            for output in self.engine.step():
                self.deliver(output)

    def add(self, request: Request) -> None:
        """On the worker's thread: what the engine refuses becomes an output of that request."""
        try:
            self.engine.add(request)
        except KvarnError as error:
            self.deliver((request.id, error))


class LocalCluster:
    """Engines behind a policy. Use inside a running event loop; `close` stops the threads."""

    def __init__(
        self,
        engines: Sequence[Steps],
        policy: ClusterPolicy,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.clock = clock
        self.routes: dict[str, tuple[int, str]] = {}  #: open requests: instance, and why
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, asyncio.Queue[Output | Exception]] = {}
        self._started: set[str] = set()
        self._workers = [_Worker(engine, self._deliver) for engine in engines]
        for worker in self._workers:
            worker.start()

    async def stream(self, request: Request) -> AsyncIterator[Output]:
        """Outputs of one request (n = 1) as they come; leaving the loop early drops the request."""
        if request.id in self._streams:
            raise KvarnError(f"request id {request.id!r} is already open")
        request = replace(request, arrival=self.clock())
        outputs: asyncio.Queue[Output | Exception] = asyncio.Queue()
        self._streams[request.id] = outputs
        try:
            self._tell(Arrived(request))
            while True:
                output = await outputs.get()
                if isinstance(output, Exception):
                    raise output
                yield output
                if output.finish is not None:
                    return
        finally:
            self._leave(request.id)

    def close(self) -> None:
        """Stop the workers; open requests get no further output."""
        for worker in self._workers:
            worker.inbox.put(None)
        for worker in self._workers:
            worker.join()

    def _tell(self, event: Event) -> None:
        """Let the policy decide, and carry it out."""
        for action in self.policy.handle(event, self.clock()):
            if isinstance(action, Send):
                worker, request = self._workers[action.instance], action.request
                self.routes[request.id] = (action.instance, action.why)
                log.debug("%s to instance %d: %s", request.id, action.instance, action.why)
                worker.inbox.put(lambda w=worker, r=request: w.add(r))  # type: ignore[misc]
            elif isinstance(action, Refuse):
                error = QueueFull(action.why, retry_after=action.retry_after)
                self._streams[action.request.id].put_nowait(error)

    def _deliver(self, output: Output | tuple[str, Exception]) -> None:
        """From a worker's thread to the event loop."""
        self._loop.call_soon_threadsafe(self._received, output)

    def _received(self, output: Output | tuple[str, Exception]) -> None:
        key = output[0] if isinstance(output, tuple) else output.request_id
        if key not in self._streams:
            return  # its reader has left
        if isinstance(output, tuple):
            self._streams[key].put_nowait(output[1])
            return
        if output.tokens and key not in self._started:
            self._started.add(key)
            self._tell(Started(key, self.routes[key][0]))
        self._streams[key].put_nowait(output)

    def _leave(self, key: str) -> None:
        """Forget a request; drop it at its instance, which ignores what it no longer knows."""
        del self._streams[key]
        self._started.discard(key)
        route = self.routes.pop(key, None)
        if route is not None:
            worker = self._workers[route[0]]
            worker.inbox.put(lambda: worker.engine.abort(key))
            self._tell(Finished(key, route[0]))
