"""kvarn: an LLM serving engine in which every technique is a swappable, composable, measured part.

>>> from kvarn import LLM, SamplingParams
>>> llm = LLM("smollm2-135m")
>>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from kvarn.core.request import SamplingParams
    from kvarn.engine.llm import LLM

# OpenMP threads that wait by spinning lose whole scheduler slices as soon as anything else wants a
# core (a client of the server, say): decoding was seen to fall from 70 to 5 tokens/s. A shorter
# spin before sleeping costs an idle machine nothing. It counts only when set before torch is
# imported; set the variable yourself to choose otherwise.
os.environ.setdefault("GOMP_SPINCOUNT", "6000")

_HOMES = {"LLM": "kvarn.engine.llm", "SamplingParams": "kvarn.core.request"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import kvarn` must not pull torch (it takes seconds)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvarn' has no attribute {name!r}")
