"""Run a server around the scripted engine: `python launch.py key=value ...` (see `main`)."""

import sys
from typing import Any

from fake_engine import FakeTokenizer

from kvarn.core.config import resolve
from kvarn.serve.main import serve
from kvarn.serve.options import ServeOptions

ENGINE_OPTIONS = {"model", "max_queue", "max_seqs", "max_len"}


def main() -> int:
    """Options of the engine and of the server; `tokenizer=none` serves without one."""
    given: dict[str, Any] = dict(pair.split("=", 1) for pair in sys.argv[1:])
    tokenizer = None if given.pop("tokenizer", "") == "none" else FakeTokenizer()
    engine = {key: given.pop(key) for key in ENGINE_OPTIONS & set(given)}
    options = ServeOptions(port=0)
    for key, value in given.items():
        kind = type(getattr(options, key))
        setattr(options, key, kind(value) if kind in (int, float) else value)
    if given.get("cors"):
        options.cors = (given["cors"],)
    resolved = resolve({"model": "fake", **engine})
    return serve(resolved, options, lambda _: tokenizer, "fake_engine:FakeEngine")


if __name__ == "__main__":
    sys.exit(main())
