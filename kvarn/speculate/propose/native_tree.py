"""The suffix tree in C++ (suffix_tree.cpp), built at first use where there is a compiler.

It takes the place of `suffix_tree.SuffixTree` and gives the same drafts, token for token.
"""

import ctypes
import functools
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarn.core.errors import ConfigError
from kvarn.kernels.compile import BuildError, shared_library
from kvarn.speculate.propose.suffix_tree import Drafting, Found

#: contraction would round scores otherwise than Python does
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-ffp-contract=off")

_P, _I = ctypes.c_void_p, ctypes.c_int64
SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "new": ([_I], _P),
    "free": ([_P], None),
    "extend": ([_P, _I, _P, _I], _I),
    "close": ([_P, _I], None),
    "remove": ([_P, _I], _I),
    "count": ([_P, _P, _I], _I),
    "nodes": ([_P], _I),
    "speculate": ([_P, _P, _I, _P, _P, _P, _P, _P], _I),
}


def available() -> bool:
    """Whether the compiled tree can be had (see `reason`)."""
    return _outcome()[0] is not None


def reason() -> str:
    """Why the compiled tree is, or is not, in force."""
    return _outcome()[1]


@functools.cache
def _outcome() -> tuple[dict[str, Any] | None, str]:
    """C functions by name."""
    try:
        built = shared_library("suffix_tree", [Path(__file__).with_name("suffix_tree.cpp")], FLAGS)
        code = ctypes.CDLL(str(built.path))
    except (BuildError, OSError) as error:
        return None, str(error)
    functions = {}
    for name, (arguments, result) in SIGNATURES.items():
        functions[name] = function = getattr(code, f"kvarn_tree_{name}")
        function.argtypes, function.restype = arguments, result
    return functions, f"built with {built.compiler}"


def _ids(tokens: Sequence[int]) -> tuple["array[int]", int, int]:
    """Tokens as C has them: the array (to be kept alive), its address, their number."""
    ids = array("i", tokens)
    return ids, *ids.buffer_info()


class NativeTree:
    """Counts of all runs of at most `depth` tokens, and drafts by them."""

    __slots__ = ("_call", "_tree", "depth", "tokens")

    def __init__(self, depth: int = 64) -> None:
        self._tree: int | None = None
        functions, why = _outcome()
        if functions is None:
            raise ConfigError(f"no compiled suffix tree: {why}; suffix_tree.SuffixTree needs none")
        if depth < 2:
            raise ConfigError(f"a suffix tree of depth {depth}; it takes at least 2")
        self._call = functions
        self._tree = functions["new"](depth)
        self.depth = depth
        self.tokens = 0  #: of the sequences in it

    def __del__(self) -> None:
        if self._tree is not None:
            self._call["free"](self._tree)

    def extend(self, key: int, tokens: Sequence[int]) -> None:
        """Append tokens to the sequence `key`; a new one begins at its first call."""
        _ids_kept, address, n = _ids(tokens)
        if not self._call["extend"](self._tree, key, address, n):
            raise ValueError(f"sequence {key} of the suffix tree is closed")
        self.tokens += n

    def close(self, key: int) -> None:
        """Nothing more will be appended to this sequence."""
        self._call["close"](self._tree, key)

    def remove(self, key: int) -> None:
        """Take a sequence out, with all it was counted for."""
        removed = self._call["remove"](self._tree, key)
        if removed < 0:
            raise KeyError(key)
        self.tokens -= removed

    def count(self, run: Sequence[int]) -> int:
        """Places where a run of 1 to `depth` tokens occurs."""
        _ids_kept, address, n = _ids(run)
        return int(self._call["count"](self._tree, address, n))

    def speculate(self, context: Sequence[int], how: Drafting) -> Found:
        """The best draft over all lengths of match with the end of `context`; ties: the longest."""
        _ids_kept, address, n = _ids(context[-self.depth :])
        settings = array("d", (how.cap, how.factor, how.offset, how.min_prob, how.tree))
        tokens, parents = array("i", bytes(4 * how.cap)), array("i", bytes(4 * how.cap))
        confidence, said = array("d", bytes(8 * how.cap)), array("d", (0.0, 0.0))
        arrays = (settings, tokens, parents, confidence, said)
        addresses = [one.buffer_info()[0] for one in arrays]
        drafted = self._call["speculate"](self._tree, address, n, *addresses)
        return Found(
            tokens[:drafted].tolist(),
            parents[:drafted].tolist(),
            confidence[:drafted].tolist(),
            said[0],
            int(said[1]),
        )

    def nodes(self) -> int:
        """Nodes of the tree, the root aside."""
        return int(self._call["nodes"](self._tree))
