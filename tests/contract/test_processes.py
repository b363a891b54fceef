"""Two real processes: death, restart, drain, cancellation, the bounded queue, idleness."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

URL = "/v1/completions"
SLOW = {"prompt": "slow", "max_tokens": 400}


class Background(threading.Thread):
    """A request in a thread of its own."""

    def __init__(self, url: str, **body) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, body
        self.response: httpx.Response | None = None
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        with (
            httpx.Client(timeout=30) as client,
            client.stream("POST", self.url + URL, json=self.body) as response,
        ):
            for line in response.iter_lines():
                self.lines.append(line)
            self.response = response

    def end(self) -> tuple[int, list[str]]:
        self.join(30)
        assert self.response is not None
        return self.response.status_code, [line for line in self.lines if line]


def running(server) -> int:
    return server.info["stats"]["running"]


def test_killed_engine(start) -> None:
    server = start()
    whole = Background(server.url, **SLOW)
    stream = Background(server.url, **SLOW, stream=True)
    server.wait(lambda: running(server) == 2)
    first = server.info["engine_pid"]
    os.kill(first, signal.SIGKILL)
    status, lines = whole.end()
    assert status == 503
    assert "engine process ended" in json.loads(lines[0])["error"]["message"]
    status, lines = stream.end()
    assert status == 200
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_unavailable"
    assert server.http.get("/health").status_code == 503
    refused = server.http.post(URL, json={"prompt": "x"})
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    server.wait_ready()
    info = server.info
    assert info["engine_pid"] != first
    assert info["restarts"] == 1
    assert server.http.post(URL, json={"prompt": "say:again|"}).status_code == 200
    assert server.end() == 0


def test_engine_that_dies_of_a_request(start) -> None:
    server = start()
    response = server.http.post(URL, json={"prompt": "die!"})
    assert response.status_code == 503
    server.wait_ready()
    message = server.http.post(URL, json={"prompt": "break!"}).json()["error"]["message"]
    assert "the script says break!" in message
    server.wait_ready()
    assert server.end() == 0


def test_engine_that_dies_again_and_again(start) -> None:
    server = start()
    for _ in range(4):
        server.wait_ready()
        server.http.post(URL, json={"prompt": "die!"})
    assert server.process.wait(20) == 1
    assert "error: the engine process ended" in server.log


def test_drain(start) -> None:
    server = start()
    open_one = Background(server.url, prompt="slow say:" + "x" * 60 + "|", max_tokens=100)
    server.wait(lambda: running(server) == 1)
    server.process.send_signal(signal.SIGTERM)
    server.wait(lambda: server.http.get("/health").status_code == 503)
    late = server.http.post(URL, json={"prompt": "x"})
    assert late.status_code == 503
    assert late.json()["error"]["code"] == "shutting_down"
    status, lines = open_one.end()
    assert status == 200
    assert json.loads(lines[0])["choices"][0]["text"] == "x" * 60
    assert server.process.wait(10) == 0


def test_drain_gives_up(start) -> None:
    server = start("drain_timeout=0.3")
    open_one = Background(server.url, **SLOW, stream=True)
    server.wait(lambda: running(server) == 1)
    server.process.send_signal(signal.SIGTERM)
    _, lines = open_one.end()
    assert "shutting down" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
    assert server.process.wait(10) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_frees_its_pages(server, stream: bool) -> None:
    before = server.info["stats"]["finished"].get("abort", 0)
    body = {**SLOW, "max_tokens": 4000, "stream": stream}
    client = httpx.Client(timeout=0.5)
    with pytest.raises(httpx.ReadTimeout), client.stream("POST", server.url + URL, json=body) as r:
        if stream:
            next(r.iter_bytes())
            raise httpx.ReadTimeout("enough")
        r.read()
    client.close()
    server.wait(lambda: server.info["stats"]["finished"].get("abort", 0) == before + 1)
    assert server.info["stats"]["kv_pages_used"] == 0


def test_full_queue(start) -> None:
    server = start("max_queue=2", "max_seqs=1")
    busy = Background(server.url, **SLOW)
    server.wait(lambda: running(server) == 1)
    waiting = [Background(server.url, **SLOW) for _ in range(2)]
    server.wait(lambda: server.info["stats"]["waiting"] == 2)
    refused = server.http.post(URL, json={**SLOW, "stream": True})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "rate_limit_error"
    os.kill(server.info["engine_pid"], signal.SIGKILL)
    for request in [busy, *waiting]:
        assert request.end()[0] == 503


def test_idle_processes_use_no_time(server) -> None:
    processes = [psutil.Process(server.process.pid), psutil.Process(server.info["engine_pid"])]
    server.http.post(URL, json={"prompt": "say:x|"})
    time.sleep(0.2)
    before = [p.cpu_times() for p in processes]
    time.sleep(1.0)
    for process, then in zip(processes, before, strict=True):
        now = process.cpu_times()
        assert (now.user + now.system) - (then.user + then.system) <= 0.05


def test_engine_ends_with_its_server(start) -> None:
    server = start()
    engine = psutil.Process(server.info["engine_pid"])
    server.process.kill()
    engine.wait(10)


def test_port_in_use() -> None:
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{here.parent.parent}"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, str(here / "launch.py"), f"port={port}"],
            env=env, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_engine_that_cannot_start(start) -> None:
    server = start("model=missing", ready=False)
    assert server.process.wait(20) == 1
    assert "error: there is no model 'missing'; did you mean 'fake'?" in server.log
    assert "Traceback" not in server.log
