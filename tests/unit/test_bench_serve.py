"""The load generator against a small server of its own: streams, failures, several processes."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvarn.bench import serve
from kvarn.bench.backends import Asking, Chat, Completions, SGLang
from kvarn.bench.http import ChunkedDecoder, Client, EventSplitter, HTTPError
from kvarn.bench.options import Load, Workload
from kvarn.bench.prompts import Turn
from kvarn.core.errors import ConfigError, KvarnError

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class Server:
    """An OpenAI-like server that streams `max_tokens` tokens; it fails where told to."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.connections = 0
        self.now = self.most = 0  # requests in flight
        self.delay = 0.0
        self.fail_at: set[int] = set()  # by number of the request
        self.cut_at: set[int] = set()
        self.close_after_each = False

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if line.startswith(b"content-length")
                )
                body = await reader.readexactly(length)
                if head.startswith(b"GET"):
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n")
                    writer.write(b'{"data": [{"id": "tiny"}]}')
                else:
                    await self.answer(json.loads(body), writer)
                await writer.drain()
                if self.close_after_each:
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, body: dict, writer: asyncio.StreamWriter) -> None:
        number = len(self.bodies)
        self.bodies.append(body)
        if number in self.fail_at:
            writer.write(b"HTTP/1.1 429 Too Many\r\nContent-Length: 4\r\n\r\nbusy")
            return
        self.now += 1
        self.most = max(self.most, self.now)
        writer.write(HEAD)
        n = body["max_tokens"]
        for i in range(n):
            await asyncio.sleep(self.delay)
            writer.write(chunk(event({"choices": [{"text": f"w{i} "}]})))
            await writer.drain()
            if number in self.cut_at:
                writer.close()
                self.now -= 1
                return
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": n}
        usage["prompt_tokens_details"] = {"cached_tokens": 2}
        writer.write(chunk(event({"choices": [], "usage": usage})))
        writer.write(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        self.now -= 1


@contextmanager
def running(server: Server) -> Iterator[str]:
    """The address of `server`, running in a thread."""
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def test_chunked_bodies_survive_any_cut():
    whole = chunk(b"hello ") + chunk(b"world") + b"0\r\n\r\n"
    for size in (1, 2, 3, 7, len(whole)):
        decoder = ChunkedDecoder()
        pieces = [decoder.feed(whole[i : i + size]) for i in range(0, len(whole), size)]
        assert b"".join(pieces) == b"hello world"
        assert decoder.done


def test_broken_chunks_are_an_error():
    with pytest.raises(HTTPError, match="no length"):
        ChunkedDecoder().feed(b"zz\r\nabc")


def test_events_survive_any_cut_and_comments_are_skipped():
    whole = b': ping\n\ndata: {"a": 1}\n\ndata: x\r\n\r\ndata: [DONE]\n\n'
    for size in (1, 5, len(whole)):
        splitter = EventSplitter()
        found = [e for i in range(0, len(whole), size) for e in splitter.feed(whole[i : i + size])]
        assert found[0] == b'{"a": 1}'
        assert found[-1] == b"[DONE]"


def test_a_run_counts_and_times_every_request():
    server = Server()
    server.delay = 0.01
    with running(server) as url:
        work = Workload(num_prompts=8, input_len=5, output_len=4)
        seen = []
        result = serve.run(
            work,
            Load(base_url=url, detailed=True, goodput=("ttft:60000",)),
            lambda done, total: seen.append((done, total)),
        )
    assert (result["completed"], result["failed"]) == (8, 0)
    assert result["model_id"] == "tiny"
    assert result["total_output_tokens"] == 32
    assert result["total_input_tokens"] == 40
    assert result["total_cached_tokens"] == 16
    assert result["output_lens"] == [4] * 8
    assert [len(gaps) for gaps in result["itls"]] == [3] * 8
    assert result["generated_texts"][0] == "w0 w1 w2 w3 "
    assert result["median_ttft_ms"] >= 10
    assert result["request_goodput"] == pytest.approx(result["request_throughput"])
    assert seen[-1] == (8, 8)
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in server.bodies)
    json.dumps(result)


def test_failures_are_counted_and_kept():
    server = Server()
    server.fail_at, server.cut_at = {2}, {3}
    with running(server) as url:
        work = Workload(num_prompts=5, input_len=3, output_len=3)
        result = serve.run(work, Load(base_url=url, processes=1, max_concurrency=1, detailed=True))
    assert (result["completed"], result["failed"]) == (3, 2)
    assert result["error_counts"] == {"HTTP 429: busy": 1, "the answer was cut off": 1}
    assert result["output_lens"].count(0) == 2


def test_concurrency_is_bounded_over_all_processes():
    server = Server()
    server.delay = 0.005
    with running(server) as url:
        work = Workload(num_prompts=12, input_len=3, output_len=4)
        result = serve.run(work, Load(base_url=url, max_concurrency=3))
    assert result["completed"] == 12
    assert server.most <= 3
    assert result["max_concurrency"] == 3


def test_requests_leave_when_they_are_due():
    server = Server()
    with running(server) as url:
        work = Workload(num_prompts=6, input_len=3, output_len=2)
        load = Load(base_url=url, request_rate=20.0, burstiness=float("inf"), detailed=True)
        result = serve.run(work, load)
    due = [0.05 * (i + 1) for i in range(6)]
    for start, wanted in zip(result["start_times"], due, strict=True):
        assert wanted - 1e-3 <= start < wanted + 1.0
    assert result["burstiness"] == "inf"


def test_turns_follow_the_answer_before():
    server = Server()
    with running(server) as url:
        work = Workload("multi-turn", num_prompts=4, turns=2, input_len=3, output_len=2)
        result = serve.run(work, Load(base_url=url, warmups=0, detailed=True))
    assert result["completed"] == 4
    assert sorted(result["input_lens"]) == [3, 3, 8, 8]
    prompts = sorted((body["prompt"] for body in server.bodies), key=len)
    assert {tuple(p[:3]) for p in prompts[2:]} == {tuple(p) for p in prompts[:2]}


def test_later_turns_of_a_failed_conversation_count_as_failed():
    server = Server()
    server.fail_at = {0}
    with running(server) as url:
        work = Workload("multi-turn", num_prompts=3, turns=3, input_len=3, output_len=2)
        result = serve.run(work, Load(base_url=url, warmups=0))
    assert (result["completed"], result["failed"]) == (0, 3)


def test_no_server_is_one_clear_error():
    with pytest.raises(KvarnError, match="Connect"):
        serve.run(Workload(num_prompts=1), Load(base_url="http://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (Load(backend="openia"), "did you mean 'openai'"),
        (Load(processes=0), "processes must be at least 1"),
        (Load(percentiles=(101.0,)), "percentile"),
        (Load(header=("x",)), "NAME=VALUE"),
        (Load(goodput=("x:1",)), "goodput"),
        (Load(base_url="localhost:8000"), "http://"),
    ],
)
def test_wrong_loads_say_what_is_wrong(load, message):
    with pytest.raises(ConfigError, match=message):
        serve.run(Workload(num_prompts=1), load)


def test_connections_are_kept_and_stale_ones_replaced():
    server = Server()

    async def ask_thrice(url: str) -> int:
        client = Client(url)
        n = 0
        for _ in range(3):
            body = {"max_tokens": 2, "prompt": [1]}
            n += len([e async for e in client.events("/v1/completions", body)])
            time.sleep(0.02)
        client.close()
        return n

    with running(server) as url:
        assert asyncio.run(ask_thrice(url)) == 9
        assert server.connections == 1
        server.close_after_each = True
        assert asyncio.run(ask_thrice(url)) == 9
        assert server.connections == 4


def test_chat_ignores_the_chunk_that_only_names_the_role():
    chat = Chat()
    role = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    assert not chat.read(json.dumps(role).encode()).tokens
    empty = {"choices": [{"delta": {"content": ""}, "finish_reason": None}]}
    assert chat.read(json.dumps(empty).encode()).tokens
    body = chat.body(Asking("m"), [(Turn([1, 2], 3), "yes")], Turn([3], 4))
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["max_completion_tokens"] == 4


def test_sglang_events_hold_the_whole_text():
    sglang = SGLang()
    first = {"text": "ab", "meta_info": {"completion_tokens": 1, "prompt_tokens": 4}}
    second = {"text": "abc", "meta_info": {"completion_tokens": 3, "cached_tokens": 2}}
    assert sglang.read(json.dumps(first).encode()).text == "ab"
    piece = sglang.read(json.dumps(second).encode())
    assert (piece.text, piece.n_output, piece.n_cached, piece.tokens) == ("c", 3, 2, True)
    assert sglang.body(Asking("m"), [], Turn([5, 6], 7))["input_ids"] == [5, 6]


def test_an_error_inside_a_stream_is_an_error():
    piece = Completions().read(b'{"error": {"message": "the engine died"}}')
    assert piece.error == "the engine died"


def test_secrets_stay_out_of_results():
    server = Server()
    with running(server) as url:
        load = Load(base_url=url, api_key="hush", header=("X-Key=quiet",))
        result = json.dumps(serve.run(Workload(num_prompts=1, output_len=2), load))
    assert "hush" not in result
    assert "quiet" not in result
    assert "Infinity" not in result
