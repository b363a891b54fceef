"""Driver of llama.cpp: llamacpp_driver.py MODEL.gguf THREADS SERVER_BINARY"""

import json
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from driver import Burst, run

PORT = 8099
SLOTS = 16


def load() -> tuple[Burst, dict[str, Any]]:
    """`llama-server` with 16 slots; token-id prompts over HTTP."""
    path, threads, binary = sys.argv[1:]
    server = subprocess.Popen(
        [binary, "-m", path, "-t", threads, "-tb", threads, "-c", "16384", "-np", str(SLOTS),
         "--host", "127.0.0.1", "--port", str(PORT)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _wait(server)
    pool = ThreadPoolExecutor(SLOTS)

    def one(ids: list[int], n: int) -> int:
        said = _post("/completion", {
            "prompt": ids, "n_predict": n, "temperature": 0, "ignore_eos": True,
        })  # fmt: skip
        return int(said["tokens_predicted"])

    def burst(prompts: list[list[int]], n: int) -> int:
        return sum(pool.map(lambda ids: one(ids, n), prompts))

    return burst, {"version": _version(binary), "model": path}


def _version(binary: str) -> str:
    done = subprocess.run([binary, "--version"], capture_output=True, text=True)
    return (done.stderr or done.stdout).splitlines()[0]


def _wait(server: "subprocess.Popen[bytes]") -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise SystemExit("llama-server ended early")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health") as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("llama-server did not become healthy within a minute")


def _post(path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
        return found


if __name__ == "__main__":
    run(load)
