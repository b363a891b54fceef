"""An engine in its own process, asked for one load after the other."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.workloads import Requests, Setting
from kvarn.core.errors import KvarnError
from kvarn.models.shapes import SHAPES

DRIVERS = Path(__file__).resolve().parent / "peers"
ROOT = DRIVERS.parents[2]


@dataclass(slots=True)
class Kind:
    """An engine to compare, and how its driver starts."""

    name: str
    driver: str  #: file in peers/, without `_driver.py`
    options: dict[str, Any] = field(default_factory=dict)
    path: list[str] = field(default_factory=list)  #: folders of its own packages

    def importable(self) -> bool:
        """Whether its package is there; found in a process of its own."""
        code = f"import importlib.util as i, sys; sys.exit(i.find_spec({self.driver!r}) is None)"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=self.environ(), check=False).returncode == 0

    def environ(self) -> dict[str, str]:
        """The environment of its process."""
        folders = [*self.path, str(ROOT), os.environ.get("PYTHONPATH", "")]
        return os.environ | {"PYTHONPATH": os.pathsep.join(f for f in folders if f)}


class Running:
    """An engine's process. It imports what its driver imports at once, and loads at `start`."""

    def __init__(self, kind: Kind, setting: Setting, device: str) -> None:
        said = {name: value for name, value in asdict(_plain(setting)).items() if name != "loads"}
        given = said | {
            "device": device, "options": kind.options, "shape": SHAPES[setting.model],
        }  # fmt: skip
        self.kind, self.setting = kind, setting
        self.log = Path(tempfile.gettempdir()) / f"bench-{kind.name}-{setting.name}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(DRIVERS / f"{kind.driver}_driver.py"), json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=kind.environ(), start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self, within: float) -> dict[str, Any]:
        """Load; what the engine says of it once its first token is out."""
        self._tell({})
        return self._answer(within)

    def seconds(self, asked: Requests, within: float) -> float:
        """How long a load takes."""
        self._tell(asdict(asked))
        return float(self._answer(within)["seconds"])

    def close(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _tell(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answer` says so
            print(json.dumps(message), file=self.process.stdin, flush=True)

    def _answer(self, within: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        late = threading.Timer(max(within, 1.0), self.close)
        late.start()
        line = self.process.stdout.readline()
        late.cancel()
        if not line:
            last = [text for text in self.log.read_text().splitlines() if text.strip()][-3:]
            raise KvarnError(f"{self.kind.name} ended without an answer: {' | '.join(last)}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise KvarnError(f"{self.kind.name}: {found['error']}")
        return found


def _plain(setting: Setting) -> Setting:
    """The setting without its loads, which no process is told of."""
    return Setting(**{name: getattr(setting, name) for name in Setting.__slots__} | {"loads": []})
