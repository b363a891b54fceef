"""`serve`: start the engine process and the HTTP server, run until told to stop, drain, end."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn
from rich.console import Console
from rich.table import Table

from kvarn import __version__
from kvarn.core.config import Resolved
from kvarn.core.errors import KvarnError
from kvarn.serve.app import build
from kvarn.serve.client import ENGINE, EngineClient, State
from kvarn.serve.options import ServeOptions
from kvarn.serve.service import Service, Tokenizer

log = logging.getLogger("kvarn.serve")

KEEP_ALIVE = 75  #: idle connections are kept for this long; longer than most clients keep them [s]
FLUSH = 5  #: time for the last bytes of open answers at the end [s]

TokenizerLoader = Callable[[Resolved], Tokenizer | None]


def serve(
    resolved: Resolved,
    options: ServeOptions,
    load_tokenizer: TokenizerLoader,
    engine: str = ENGINE,
) -> int:
    """Serve until SIGTERM or Ctrl-C; returns the exit code: 0 after a drain, 1 on failure."""
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s  %(message)s",
        datefmt="%H:%M:%S",
    )
    try:
        listener = listen(options.host, options.port)
    except (OSError, OverflowError) as error:
        print(f"error: {cannot_listen(options, error)}", file=sys.stderr)
        return 1
    with listener:
        server = Server(resolved, options, load_tokenizer, engine)
        return loop_runner()(server.run(listener))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    return listener


def cannot_listen(options: ServeOptions, error: Exception) -> str:
    """What to tell the user when the address cannot be had."""
    why = getattr(error, "strerror", None) or error
    return (
        f"cannot listen on {options.host}:{options.port}: {why}; "
        "choose another port with --port (0 takes any free one)"
    )


def options_table(resolved: Resolved) -> Table:
    """The options that are not at their defaults, and why."""
    table = Table(box=None, pad_edge=False)
    for column in ("option", "value", "because"):
        table.add_column(column)
    for row in resolved.rows():
        if row["source"] != "default":
            value = f"{row['value']} {row['unit']}".strip()
            table.add_row(row["option"], value, f"{row['source']}: {row['why']}".rstrip(": "))
    return table


def example(address: str, service: Service) -> str:
    """A command that works against this server."""
    if service.tokenizer is None:
        return f"curl {address}/v1/completions -d '{{\"prompt\": [1, 2, 3]}}'"
    message = '{"messages": [{"role": "user", "content": "Hello"}]}'
    return f"curl {address}/v1/chat/completions -d '{message}'"


def loop_runner() -> Callable[..., int]:
    """`asyncio.run`, on uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run
    run: Callable[..., int] = uvloop.run
    return run


class Quiet(uvicorn.Server):
    """uvicorn without its own signal handlers: draining comes first."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Leave signals alone."""
        yield


class Server:
    """One run of the server."""

    def __init__(
        self,
        resolved: Resolved,
        options: ServeOptions,
        load_tokenizer: TokenizerLoader,
        engine: str,
    ) -> None:
        self.options = options
        self.resolved = resolved
        self.load_tokenizer = load_tokenizer
        self.client = EngineClient(resolved, engine)
        self._stop = asyncio.Event()
        self._signals = 0

    async def run(self, listener: socket.socket) -> int:
        """Start everything, wait for the end, stop everything."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        await self.client.start()
        try:
            tokenizer = await asyncio.to_thread(self.load_tokenizer, self.resolved)
        except KvarnError as error:
            print(f"error: {error}", file=sys.stderr)
            await self.client.close()
            return 1
        service = Service(self.client, tokenizer, self.options)
        http = Quiet(
            uvicorn.Config(
                build(service),
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE,
                timeout_graceful_shutdown=FLUSH,
            )
        )
        serving = asyncio.create_task(http.serve([listener]))
        code = await self._until_end(service, listener)
        self.client.disconnect("the server is shutting down")
        http.should_exit = True
        await serving
        await self.client.close()
        return code

    async def _until_end(self, service: Service, listener: socket.socket) -> int:
        """Wait for a signal (then drain: 0) or for the engine to fail for good (1)."""
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        failed = asyncio.create_task(self.client.until(State.FAILED))
        stopped = asyncio.create_task(self._stop.wait())
        started = asyncio.create_task(self._announce(service, address))
        await asyncio.wait({failed, stopped}, return_when=asyncio.FIRST_COMPLETED)
        for task in (failed, stopped, started):
            task.cancel()
        if self.client.state is State.FAILED:
            print(f"error: {self.client.failure}", file=sys.stderr)
            return 1
        await self._drain(service)
        return 0

    async def _announce(self, service: Service, address: str) -> None:
        """Say where the server listens, and what is in force once the model is loaded."""
        console = Console(stderr=True, highlight=False)
        console.print(f"kvarn {__version__} on {address}, loading {service.model}", soft_wrap=True)
        await self.client.until(State.READY)
        info = self.client.info
        assert info is not None
        console.print(options_table(info.resolved))
        ready = f"{service.model} is ready after {info.seconds:.1f} s; try"
        console.print(f"{ready}: {example(address, service)}", soft_wrap=True, markup=False)

    async def _drain(self, service: Service) -> None:
        """Refuse new requests and let open ones finish; a second signal cuts that short."""
        service.draining = True
        if self.client.n_open:
            log.info("draining: %d requests are open", self.client.n_open)
        patience = asyncio.create_task(asyncio.sleep(self.options.drain_timeout))
        while self.client.n_open and not patience.done() and self._signals < 2:
            await asyncio.sleep(0.02)
        patience.cancel()
        if self.client.n_open:
            log.warning("giving up on %d open requests", self.client.n_open)

    def _signalled(self) -> None:
        self._signals += 1
        self._stop.set()
