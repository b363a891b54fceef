"""64 streams at once with random cancels: nothing leaks, nothing is lost, the metrics add up."""

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httpx
import psutil
import pytest
from test_ops import scrape

STREAMS = 64


@dataclass
class Tally:
    """What the clients saw."""

    done: int = 0
    cancelled: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)


async def one(client: httpx.AsyncClient, pick: random.Random, tally: Tally) -> None:
    """One streamed request; one in three is given up on the way."""
    length = pick.randint(1, 60)
    patience = pick.randint(0, length) if pick.random() < 0.33 else None
    body = {
        "prompt": "x" * pick.randint(1, 400) + ("slow" if pick.random() < 0.1 else ""),
        "max_tokens": length,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    chunks = 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            tally.wrong.append(f"status {response.status_code}")
            return
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                break
            if line:
                chunk = json.loads(line.removeprefix("data: "))
                chunks += len(chunk.get("choices", []))
                last = chunk
            if chunks == patience:
                tally.cancelled += 1
                tally.tokens += chunks
                return
    tally.tokens += chunks
    if chunks == length == last["usage"]["completion_tokens"]:
        tally.done += 1
    else:
        tally.wrong.append(f"{chunks} of {length} tokens")


async def storm(url: str, seconds: float) -> Tally:
    """Keep `STREAMS` requests open for some time."""
    tally, end = Tally(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)

    async def worker(seed: int) -> None:
        pick = random.Random(seed)
        while time.monotonic() < end:
            await one(client, pick, tally)

    async with httpx.AsyncClient(base_url=url, timeout=30, limits=limits) as client:
        await asyncio.gather(*(worker(seed) for seed in range(STREAMS)))
    return tally


def check_storm(server, seconds: float) -> Tally:
    before = scrape(server.http)
    tally = asyncio.run(storm(server.url, seconds))
    server.wait(lambda: server.info["open_requests"] == 0)
    server.wait(lambda: server.info["stats"]["running"] == 0)
    after = scrape(server.http)
    stats = server.info["stats"]
    assert tally.wrong == []
    assert tally.done > STREAMS
    assert tally.cancelled > STREAMS // 2
    assert (stats["waiting"], stats["kv_pages_used"]) == (0, 0)

    def grew(name: str) -> float:
        return after.get(name, 0.0) - before.get(name, 0.0)

    ended = {r: grew(f"kvarn_requests_total[{r}]") for r in ("length", "abort", "stop", "error")}
    assert ended["stop"] == ended["error"] == 0
    # a client that goes away after the last token may be counted either way
    assert sum(ended.values()) == tally.done + tally.cancelled
    assert ended["length"] >= tally.done
    assert grew("kvarn_output_tokens_total") >= tally.tokens
    assert grew("kvarn_requests_refused_total[queue_full]") == 0
    firsts = grew("kvarn_time_to_first_token_seconds_count")
    assert tally.done <= firsts <= tally.done + tally.cancelled
    assert grew("kvarn_inter_token_latency_seconds_count") == (
        grew("kvarn_output_tokens_total") - firsts
    )
    return tally


def test_short_storm(start) -> None:
    check_storm(start("max_seqs=48"), 5.0)


@pytest.mark.load
def test_long_storm(start) -> None:
    server = start("max_seqs=48")
    check_storm(server, 10.0)  # warm
    processes = [psutil.Process(server.process.pid), psutil.Process(server.info["engine_pid"])]
    before = [(p.memory_info().rss, p.num_fds()) for p in processes]
    check_storm(server, 60.0)
    for process, (memory, files) in zip(processes, before, strict=True):
        assert process.memory_info().rss < memory + (30 << 20)
        assert process.num_fds() <= files + 2
