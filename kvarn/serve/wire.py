"""What crosses between the API process and the engine process: messages, and frames on a socket.

A frame is a length (4 bytes, little-endian) and a msgpack body. All outputs of one step go in one
frame. Either side that finds the socket closed knows that the other one is gone.
"""

import socket
import struct
from typing import Any, Literal

import msgspec

from kvarn.core.config import Resolved
from kvarn.core.errors import QueueFull, RequestError
from kvarn.core.model import ModelSpec
from kvarn.core.output import Output
from kvarn.core.request import Request

_LENGTH = struct.Struct("<I")
Question = Literal["stats", "explain", "reset_prefix_cache"]


class Start(msgspec.Struct, tag=True):
    """First message to the engine process: build this engine (`factory` is "module:Class")."""

    resolved: Resolved
    factory: str


class Add(msgspec.Struct, tag=True):
    """Take in a request; answered by `Taken` or `Refused`."""

    request: Request


class Abort(msgspec.Struct, tag=True):
    """Forget these requests; nothing more is sent for them."""

    ids: list[str]


class Ask(msgspec.Struct, tag=True):
    """A question; answered by `Answer` with the same number."""

    number: int
    what: Question


class Ready(msgspec.Struct, tag=True):
    """The model is loaded."""

    resolved: Resolved
    spec: ModelSpec
    explain: dict[str, Any]
    seconds: float  #: from process start to here


class Failed(msgspec.Struct, tag=True):
    """The engine cannot start, or a step went wrong; the process ends after this."""

    message: str


class Taken(msgspec.Struct, tag=True):
    """The request is in the queue."""

    id: str


class Refused(msgspec.Struct, tag=True):
    """The request was not taken; the fields are those of `RequestError`."""

    id: str
    message: str
    param: str | None
    code: str
    status: int
    retry_after: float | None

    @classmethod
    def of(cls, id: str, error: RequestError) -> "Refused":
        """The message for an error."""
        retry_after = error.retry_after if isinstance(error, QueueFull) else None
        return cls(id, error.message, error.param, error.code, error.status, retry_after)

    def error(self) -> RequestError:
        """The error again, on the other side."""
        if self.retry_after is not None:
            return QueueFull(self.message, self.retry_after)
        return RequestError(self.message, param=self.param, code=self.code, status=self.status)


class Outputs(msgspec.Struct, tag=True):
    """What one step gave."""

    outputs: list[Output]


class Answer(msgspec.Struct, tag=True):
    """The answer to an `Ask`; a dict for "stats" and "explain", a bool for a reset."""

    number: int
    value: Any


ToEngine = Start | Add | Abort | Ask
FromEngine = Ready | Failed | Taken | Refused | Outputs | Answer

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def frame(message: ToEngine | FromEngine) -> bytes:
    """The bytes of one message."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def to_engine(body: bytes) -> ToEngine:
    """Decode a frame's body on the engine's side."""
    message: ToEngine = _to_engine.decode(body)
    return message


def from_engine(body: bytes) -> FromEngine:
    """Decode a frame's body on the API's side."""
    message: FromEngine = _from_engine.decode(body)
    return message


class Frames:
    """Cuts a byte stream into frame bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The bodies that are complete after `data`."""
        self._buffer += data
        bodies = []
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            end = at + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[at + _LENGTH.size : end]))
            at = end
        del self._buffer[:at]
        return bodies


class Closed(Exception):
    """The other process is gone."""


class Link:
    """The engine's end of the socket: blocking, used between steps."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._frames = Frames()

    def receive(self, wait: bool) -> list[ToEngine]:
        """Messages that have come in; with `wait`, sleeps until there is at least one.

        Raises `Closed` when the API process is gone.
        """
        messages: list[ToEngine] = []
        while True:
            flags = 0 if wait and not messages else socket.MSG_DONTWAIT
            try:
                data = self._socket.recv(1 << 20, flags)
            except BlockingIOError:
                return messages
            except ConnectionError:
                raise Closed from None
            if not data:
                raise Closed
            messages += [to_engine(body) for body in self._frames.feed(data)]

    def send(self, message: FromEngine) -> None:
        """Send one message; raises `Closed` when the API process is gone."""
        try:
            self._socket.sendall(frame(message))
        except ConnectionError:
            raise Closed from None
