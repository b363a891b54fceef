"""Step logs on disk: JSON lines, compressed where the name ends in .gz.

Written through line by line, so that a killed engine leaves everything up to its last call (a
compressed log: up to the last of its flushes).
"""

import gzip
import logging
import zlib
from typing import Any

import msgspec

from kvarn.core.errors import ConfigError

#: records between two flushes of a compressed log: each costs some compression
FLUSH_EVERY = 64

log = logging.getLogger("kvarn.engine")


class StepLog:
    """Appends records (plain values and data classes) to a new file, until `close`.

    A disk that fails later ends the log, and says so; it does not end the engine.
    """

    def __init__(self, path: str) -> None:
        """Start the file anew; `ConfigError` where it cannot be written."""
        self.path = path
        self._encoder, self._written = msgspec.json.Encoder(), 0
        opened: Any = gzip.open if path.endswith(".gz") else open
        try:  # open as long as the engine lives
            self._file = opened(path, "wb")
        except OSError as error:
            raise ConfigError(f"step_log: cannot write {path}: {error.strerror}") from None

    def __call__(self, record: dict[str, Any]) -> None:
        """Append one record."""
        if self._file is None:
            return
        line = self._encoder.encode(record) + b"\n"
        self._written += 1
        try:
            self._file.write(line)
            if not isinstance(self._file, gzip.GzipFile):
                self._file.flush()
            elif self._written % FLUSH_EVERY == 0:
                self._file.flush(zlib.Z_SYNC_FLUSH)
        except OSError as error:
            self._broken(error)

    def close(self) -> None:
        """End the file; later records are not written."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._broken(error)

    def _broken(self, error: OSError) -> None:
        self._file = None
        log.error("the step log %s ends at record %d: %s", self.path, self._written, error.strerror)
