"""Servers as real processes, and clients for them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent
PATIENCE = 60.0  #: for a server to become ready or to end [s]


class Running:
    """A server process: its address, its log, and a client."""

    def __init__(self, *options: str, command: Sequence[str] = (str(HERE / "launch.py"),)) -> None:
        root = HERE.parent.parent
        env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{root}"}
        command = [sys.executable, *command, *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.url = self._address()
        except AssertionError:
            self.process.kill()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def _address(self) -> str:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            found = re.search(r"on (http://[\d.]+:\d+), loading", self.log)
            if found:
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"the server did not start:\n{self.log}")

    def wait_ready(self) -> None:
        self.wait(lambda: self.http.get("/health").status_code == 200)

    def wait(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited too long:\n{self.log}"
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            time.sleep(0.02)

    @property
    def info(self) -> dict:
        return self.http.get("/server_info").json()

    def end(self) -> int:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(PATIENCE)
        finally:
            self.process.kill()


@pytest.fixture(scope="session")
def server() -> Iterator[Running]:
    """One server for all tests that do it no harm."""
    running = Running()
    running.wait_ready()
    yield running
    assert running.end() == 0


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    """Start servers of one's own; what still runs afterwards is ended."""
    started: list[Running] = []

    def run(*options: str, ready: bool = True) -> Running:
        running = Running(*options)
        started.append(running)
        if ready:
            running.wait_ready()
        return running

    yield run
    for running in started:
        running.end()


@pytest.fixture(scope="session")
def http(server: Running) -> httpx.Client:
    return server.http
