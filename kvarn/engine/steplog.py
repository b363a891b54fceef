"""Step logs on disk: JSON lines, compressed where the name ends in .gz.

Written through line by line, so that a killed engine leaves everything up to its last call (a
compressed log: up to the last of its flushes).
"""

import gzip
import zlib
from typing import Any

import msgspec

from kvarn.core.errors import ConfigError
from kvarn.schedule.logged import Write

#: records between two flushes of a compressed log: each costs some compression
FLUSH_EVERY = 64


def open_log(path: str) -> Write:
    """A function that appends one record (plain values and data classes) to a new file."""
    try:  # open as long as the engine lives
        file: Any = gzip.open(path, "wb") if path.endswith(".gz") else open(path, "wb")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"step_log: cannot write {path}: {error.strerror}") from None
    encoder, written = msgspec.json.Encoder(), 0

    def write(record: dict[str, Any]) -> None:
        nonlocal written
        file.write(encoder.encode(record) + b"\n")
        written += 1
        if not isinstance(file, gzip.GzipFile):
            file.flush()
        elif written % FLUSH_EVERY == 0:
            file.flush(zlib.Z_SYNC_FLUSH)

    return write
