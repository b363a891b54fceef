"""kvarn: an LLM serving engine in which every technique is a swappable, composable, measured part.

>>> from kvarn import LLM, SamplingParams
>>> llm = LLM("smollm2-135m")
>>> llm.generate("The capital of France is", SamplingParams(max_tokens=8))[0].text
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from kvarn.core.request import SamplingParams
    from kvarn.engine.llm import LLM

_HOMES = {"LLM": "kvarn.engine.llm", "SamplingParams": "kvarn.core.request"}


def __getattr__(name: str) -> Any:
    """Import on first use: `import kvarn` must not pull torch (it takes seconds)."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'kvarn' has no attribute {name!r}")
