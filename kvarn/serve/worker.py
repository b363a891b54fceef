"""The engine process: takes messages, steps the engine, sends what came out.

Started as `python -m kvarn.serve.worker FD` with one end of a socket pair. It sleeps on the socket
while there is no work, and ends when the API process is gone.
"""

import logging
import os
import signal
import socket
import sys
import time
from dataclasses import asdict
from importlib import import_module
from typing import Any, Protocol

from kvarn.core.config import Resolved
from kvarn.core.errors import KvarnError, RequestError
from kvarn.core.model import ModelSpec
from kvarn.core.output import EngineStats, Output
from kvarn.core.request import Request
from kvarn.engine.garbage import paced
from kvarn.serve import wire

log = logging.getLogger("kvarn.worker")


class Engine(Protocol):
    """What the worker needs of an engine."""

    resolved: Resolved
    spec: ModelSpec

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Output]: ...
    def stats(self) -> EngineStats: ...
    def reset_prefix_cache(self) -> bool: ...
    def explain(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def build(start: wire.Start) -> Engine:
    """The engine that `start` names."""
    module, _, name = start.factory.partition(":")
    engine: Engine = getattr(import_module(module), name)(start.resolved)
    return engine


def answer(engine: Engine, question: wire.Question) -> Any:
    """Answer one question about the engine."""
    if question == "stats":
        return asdict(engine.stats())
    if question == "explain":
        return engine.explain()
    return engine.reset_prefix_cache()


def handle(engine: Engine, link: wire.Link, message: wire.ToEngine) -> None:
    """Act on one message from the API process."""
    match message:
        case wire.Add(request):
            try:
                engine.add(request)
            except RequestError as error:
                link.send(wire.Refused.of(request.id, error))
            else:
                link.send(wire.Taken(request.id))
        case wire.Abort(ids):
            for id in ids:
                engine.abort(id)
        case wire.Ask(number, what):
            link.send(wire.Answer(number, answer(engine, what)))
        case wire.Start():
            raise RuntimeError("the engine has already started")


def loop(engine: Engine, link: wire.Link) -> None:
    """Serve until the API process is gone (`Closed`)."""
    with paced() as stepped:
        while True:
            for message in link.receive(wait=not engine.has_work):
                handle(engine, link, message)
            outputs = engine.step()
            if outputs:
                link.send(wire.Outputs(outputs))
            stepped()


def run(link: wire.Link) -> None:
    """Load the model, say so, and serve; failures are told to the API process before the end."""
    began = time.monotonic()
    (start,) = link.receive(wait=True)
    assert isinstance(start, wire.Start)
    try:
        engine = build(start)
    except KvarnError as error:
        link.send(wire.Failed(str(error)))
        raise SystemExit(1) from None
    except Exception as error:
        log.exception("the engine cannot start")
        link.send(wire.Failed(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None
    seconds = time.monotonic() - began
    link.send(wire.Ready(engine.resolved, engine.spec, engine.explain(), seconds))
    try:
        loop(engine, link)
    except wire.Closed:
        raise
    except Exception as error:
        log.exception("a step went wrong; the engine process ends")
        link.send(wire.Failed(f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None
    finally:
        engine.close()


def main() -> None:
    """Entry point of the engine process."""
    # The API process decides when this one ends: Ctrl-C and a service manager's SIGTERM reach the
    # whole group, and open requests still have to be drained then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(
        level=os.environ.get("KVARN_WORKER_LOG", "INFO"),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    link = wire.Link(socket.socket(fileno=int(sys.argv[1])))
    try:
        run(link)
    except wire.Closed:
        log.info("the API process is gone; the engine process ends")


if __name__ == "__main__":
    main()
