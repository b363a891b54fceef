"""`EngineClient`: the API process's end. Starts the engine process, talks to it, starts it again.

When the engine process dies, every open request gets `EngineDied` at once and a new process is
started after a pause that doubles; after `MAX_QUICK_DEATHS` deaths in a row the client gives up.
"""

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, cast

import msgspec

from kvarn.core.config import Resolved
from kvarn.core.errors import EngineDied, RequestError
from kvarn.core.output import EngineStats, Output
from kvarn.core.request import Request
from kvarn.serve import wire

log = logging.getLogger("kvarn.client")

ENGINE = "kvarn.engine.engine:Engine"
MAX_QUICK_DEATHS = 3  #: deaths in a row, each within QUICK of being ready
QUICK = 30.0  #: [s]
FIRST_PAUSE = 0.25  #: before the first restart; doubles each time [s]
SOCKET_BUFFER = 4 << 20  #: so that a busy API process does not hold up the engine [bytes]


class State(Enum):
    """Where the engine process stands."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    CLOSED = "closed"


class Stream:
    """Outputs of one or more requests of one client, in the order in which they came."""

    def __init__(self, requests: Sequence[Request], release: Callable[["Stream"], None]) -> None:
        self.open = {r.id: r.sampling.n for r in requests}  #: sequences still to end, by request
        self._release = release
        self._untaken = set(self.open)
        self._arrived: deque[Output | Exception] = deque()
        self._wake = asyncio.Event()

    def push(self, item: Output | Exception) -> None:
        """Add what came in (called by the client)."""
        if isinstance(item, Output) and item.finish is not None:
            self.open[item.request_id] -= 1
            if not self.open[item.request_id]:
                del self.open[item.request_id]
        self._arrived.append(item)
        self._wake.set()

    def take(self, id: str) -> None:
        """Note that the engine has accepted a request (called by the client)."""
        self._untaken.discard(id)
        self._wake.set()

    async def accepted(self) -> None:
        """Wait until the engine has taken every request; raises what it refused one with."""
        while self._untaken:
            for item in self._arrived:
                if isinstance(item, Exception):
                    raise item
            self._wake.clear()
            await self._wake.wait()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        while not self._arrived:
            if not self.open:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        item = self._arrived.popleft()
        if isinstance(item, Exception):
            raise item
        return item

    def close(self) -> None:
        """Abort what is still open; harmless when all has ended."""
        self._release(self)


class _Wire(asyncio.Protocol):
    """One connection to one engine process."""

    def __init__(
        self, received: Callable[[wire.FromEngine], None], lost: Callable[[], None]
    ) -> None:
        self._received, self._lost = received, lost
        self._frames = wire.Frames()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        for body in self._frames.feed(data):
            self._received(wire.from_engine(body))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()

    def send(self, message: wire.ToEngine) -> None:
        """Queue a message."""
        self.write(wire.frame(message))

    def write(self, frames: bytes) -> None:
        """Queue whole frames; dropped when the connection is gone (`lost` has told everyone)."""
        if self._transport is not None:
            self._transport.write(frames)

    def close(self) -> None:
        """Close the connection, which ends the engine process."""
        if self._transport is not None:
            self._transport.close()


class EngineClient:
    """One engine process at a time, and the requests that are open in it."""

    def __init__(self, resolved: Resolved, factory: str = ENGINE) -> None:
        self.resolved = resolved  #: as chosen by the engine, once it is ready
        self.state = State.STARTING
        self.info: wire.Ready | None = None  #: of the latest engine process
        self.restarts = 0
        self.failure = ""  #: why the engine failed, in words
        self._changed = asyncio.Event()  #: set whenever `state` changes
        self._start = wire.Start(resolved, factory)
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: _Wire | None = None
        self._streams: dict[str, Stream] = {}
        self._numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._quick_deaths = 0
        self._ready_at = 0.0
        self._restart: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the engine."""
        return self._process.pid if self._process else None

    @property
    def n_open(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    async def start(self) -> None:
        """Start the engine process; returns before the model is loaded."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
        command = [sys.executable, "-m", "kvarn.serve.worker", str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        loop = asyncio.get_running_loop()
        _, self._wire = await loop.create_unix_connection(
            lambda: _Wire(self._received, self._lost), sock=ours
        )
        self._wire.send(self._start)

    async def until(self, state: State) -> None:
        """Wait for a state."""
        while self.state is not state:
            self._changed.clear()
            await self._changed.wait()

    def submit(self, requests: Sequence[Request]) -> Stream:
        """Send requests to the engine; their outputs come through the stream.

        Raises `EngineDied` when there is no engine to take them.
        """
        if self.state is not State.READY or self._wire is None:
            raise EngineDied(f"the engine is not ready ({self.state.value}); try again later")
        try:
            frames = [wire.frame(wire.Add(request)) for request in requests]
        except (OverflowError, UnicodeEncodeError) as error:
            raise RequestError(f"a value of the request cannot be sent: {error}") from None
        stream = Stream(requests, self._release)
        for request in requests:
            self._streams[request.id] = stream
        self._wire.write(b"".join(frames))
        return stream

    def _release(self, stream: Stream) -> None:
        gone = [id for id in stream.open if self._streams.pop(id, None) is not None]
        if gone and self._wire is not None:
            self._wire.send(wire.Abort(gone))

    async def _ask(self, what: wire.Question) -> Any:
        if self.state is not State.READY or self._wire is None:
            raise EngineDied(f"the engine is not ready ({self.state.value}); try again later")
        number = next(self._numbers)
        future = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        self._wire.send(wire.Ask(number, what))
        try:
            return await future
        finally:
            self._questions.pop(number, None)

    async def stats(self) -> EngineStats:
        """A fresh snapshot; waits for the step that is running."""
        return msgspec.convert(await self._ask("stats"), EngineStats)

    async def explain(self) -> dict[str, Any]:
        """Options in force, capabilities and memory, as the engine says it now."""
        answer: dict[str, Any] = await self._ask("explain")
        return answer

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes; False when some are in use."""
        return bool(await self._ask("reset_prefix_cache"))

    def disconnect(self, why: str) -> None:
        """Take no more requests; those that are open get an error; the engine process ends."""
        self._become(State.CLOSED)
        if self._restart is not None:
            self._restart.cancel()
        self._tell(EngineDied(why))
        if self._wire is not None:
            self._wire.close()

    async def close(self, patience: float = 3.0) -> None:
        """Disconnect, and wait for the process; kills it when it takes longer. [s]"""
        if self.state is not State.CLOSED:
            self.disconnect("the server is closed")
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)

    def _become(self, state: State) -> None:
        self.state = state
        self._changed.set()

    def _received(self, message: wire.FromEngine) -> None:
        match message:
            case wire.Outputs(outputs):
                for output in outputs:
                    self._deliver(output)
            case wire.Taken(id):
                if id in self._streams:
                    self._streams[id].take(id)
            case wire.Refused(id):
                stream = self._streams.pop(id, None)
                if stream is not None:
                    stream.push(message.error())
            case wire.Answer(number, value):
                future = self._questions.get(number)
                if future is not None and not future.done():
                    future.set_result(value)
            case wire.Ready():
                self.info, self.resolved = message, message.resolved
                self._ready_at = time.monotonic()
                self._become(State.READY)
            case wire.Failed(text):
                self.failure = text

    def _deliver(self, output: Output) -> None:
        stream = self._streams.get(output.request_id)
        if stream is None:
            return  # aborted while the step was running
        stream.push(output)
        if output.request_id not in stream.open:
            del self._streams[output.request_id]

    def _lost(self) -> None:
        """The connection is gone: tell everyone, then start again or give up."""
        if self.state is State.CLOSED:
            return
        started = self.state is State.READY
        self._wire = None
        self._tell(EngineDied(self._obituary()))
        quick = time.monotonic() - self._ready_at < QUICK
        self._quick_deaths = self._quick_deaths + 1 if quick or not started else 1
        first_start = self.info is None
        if first_start or self._quick_deaths > MAX_QUICK_DEATHS:
            self.failure = self.failure or self._obituary()
            self._become(State.FAILED)
            return
        self._become(State.RESTARTING)
        self._restart = asyncio.get_running_loop().create_task(self._start_again())

    def _tell(self, error: EngineDied) -> None:
        for stream in set(self._streams.values()):
            stream.push(error)
        self._streams.clear()
        for future in self._questions.values():
            if not future.done():
                future.set_exception(error)

    def _obituary(self) -> str:
        detail = f": {self.failure}" if self.failure else ""
        return f"the engine process ended unexpectedly{detail}"

    async def _start_again(self) -> None:
        pause = FIRST_PAUSE * 2 ** (self._quick_deaths - 1)
        if self._process is not None:
            code = await asyncio.to_thread(self._process.wait)
            log.error("the engine process ended (status %s); restart in %.2g s", code, pause)
        await asyncio.sleep(pause)
        self.failure = ""
        self.restarts += 1
        await self.start()
