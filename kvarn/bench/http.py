"""A small HTTP/1.1 client on asyncio: keep-alive, chunked bodies, server-sent events.

The load generator needs little of HTTP and must cost little per chunk, so this is all there is: no
redirects, no compression, no proxies.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kvarn.core.errors import ConfigError

READ_SIZE = 1 << 16


class HTTPError(Exception):
    """The server answered with an error status, or not in HTTP."""


class Stale(Exception):
    """A kept connection was closed by the server before it answered: try on a new one."""


@dataclass(slots=True)
class Connection:
    """One open connection and the bytes that were read ahead on it."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False  #: has carried a request before

    def close(self) -> None:
        """Drop the connection."""
        self.writer.close()


class ChunkedDecoder:
    """Takes the bytes of a chunked body as they come, gives its content."""

    def __init__(self) -> None:
        self.buffer = b""
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """Content that `data` completes; `done` is set after the last chunk."""
        buffer = self.buffer + data
        content, at = [], 0
        while not self.done:
            line_end = buffer.find(b"\r\n", at)
            if line_end < 0:
                break
            head = buffer[at:line_end]
            try:
                size = int(head.split(b";", 1)[0], 16)
            except ValueError:
                raise HTTPError(f"broken chunked body: {head[:40]!r} is no length") from None
            end = line_end + 2 + size
            if size == 0:  # trailers, if any, end with an empty line
                self.done = buffer.find(b"\r\n\r\n", line_end) >= 0
                break
            if len(buffer) < end + 2:
                break
            content.append(buffer[line_end + 2 : end])
            at = end + 2
        self.buffer = buffer[at:]
        return b"".join(content)


class EventSplitter:
    """Takes the bytes of an event stream as they come, gives the data of whole events."""

    def __init__(self) -> None:
        self.buffer = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events that `data` completes; comments and other fields are left out."""
        whole = (self.buffer + data).replace(b"\r\n", b"\n")
        *events, self.buffer = whole.split(b"\n\n")
        found = []
        for event in events:
            lines = [line[5:].lstrip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                found.append(b"\n".join(lines))
        return found


@dataclass(slots=True)
class Client:
    """Requests to one server over connections that are kept open."""

    base_url: str
    headers: dict[str, str] = field(default_factory=dict)
    host: str = ""
    port: int = 0
    prefix: str = ""  #: path of the base URL, before that of a request
    tls: ssl.SSLContext | None = None
    idle: list[Connection] = field(default_factory=list)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{self.base_url!r} is no http:// or https:// address")
        secure = parts.scheme == "https"
        self.host = parts.hostname
        self.port = parts.port or (443 if secure else 80)
        self.prefix = parts.path.rstrip("/")
        self.tls = ssl.create_default_context() if secure else None

    def close(self) -> None:
        """Close every idle connection."""
        while self.idle:
            self.idle.pop().close()

    async def get(self, path: str) -> Any:
        """JSON of a GET."""
        body = b"".join([piece async for piece in self._exchange("GET", path, b"")])
        return json.loads(body)

    async def events(self, path: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """Data of each event that a POST of `body` streams back, until `[DONE]` or the end."""
        splitter = EventSplitter()
        async for piece in self._exchange("POST", path, json.dumps(body).encode()):
            for event in splitter.feed(piece):
                if event != b"[DONE]":
                    yield event

    async def _exchange(self, method: str, path: str, body: bytes) -> AsyncIterator[bytes]:
        """Send a request and yield pieces of its answer's body; an error status raises."""
        connection, status, fields = await self._open(method, path, body)
        kept = False
        try:
            pieces = _body(connection, fields)
            if status != 200:
                text = b"".join([piece async for piece in pieces]).decode(errors="replace")
                raise HTTPError(f"HTTP {status}: {text[:500]}")
            async for piece in pieces:
                yield piece
            kept = fields.get("connection", "").lower() != "close"
        finally:
            if kept:
                self.idle.append(connection)
            else:
                connection.close()

    async def _open(
        self, method: str, path: str, body: bytes
    ) -> tuple[Connection, int, dict[str, str]]:
        """Send on a kept connection, or on a new one where the server has closed the kept one."""
        while True:
            connection = await self._connection()
            try:
                return connection, *await self._send(connection, method, path, body)
            except Stale:
                connection.close()
            except BaseException:
                connection.close()
                raise

    async def _connection(self) -> Connection:
        while self.idle:
            connection = self.idle.pop()
            if not connection.reader.at_eof() and not connection.writer.is_closing():
                return connection
            connection.close()
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls)
        return Connection(reader, writer)

    async def _send(
        self, connection: Connection, method: str, path: str, body: bytes
    ) -> tuple[int, dict[str, str]]:
        """Write the request and read the head of the answer: (status, header fields)."""
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if body:
            lines += ["Content-Type: application/json"]
        lines += [f"Content-Length: {len(body)}", "", ""]
        used, connection.used = connection.used, True
        try:
            connection.writer.write("\r\n".join(lines).encode() + body)
            await connection.writer.drain()
            head = await connection.reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            nothing = not getattr(error, "partial", b"")
            if used and nothing:
                raise Stale from None
            raise HTTPError("the server closed the connection without an answer") from None
        first, *rest = head.decode("latin-1").split("\r\n")
        words = first.split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            raise HTTPError(f"the server does not speak HTTP/1.1: {first[:60]!r}")
        fields = [line.partition(":") for line in rest if line]
        return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in fields}


async def _body(connection: Connection, fields: dict[str, str]) -> AsyncIterator[bytes]:
    """Pieces of a body: chunked, of a known length, or up to the end of the connection."""
    reader = connection.reader
    if "chunked" in fields.get("transfer-encoding", "").lower():
        decoder = ChunkedDecoder()
        while not decoder.done:
            data = await reader.read(READ_SIZE)
            if not data:
                raise HTTPError("the answer was cut off")
            piece = decoder.feed(data)
            if piece:
                yield piece
    elif "content-length" in fields:
        left = int(fields["content-length"])
        while left:
            data = await reader.read(min(left, READ_SIZE))
            if not data:
                raise HTTPError("the answer was cut off")
            left -= len(data)
            yield data
    else:
        fields["connection"] = "close"
        while data := await reader.read(READ_SIZE):
            yield data
