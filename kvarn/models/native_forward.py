"""All layers of a decoder in one compiled call, for any mixture of rows on the CPU."""

import ctypes
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from kvarn.core.model import ModelSpec
from kvarn.kernels import native
from kvarn.kernels.attention.native import NativePlan
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.linear.base import Linear
from kvarn.kernels.linear.codes import NativeCodes
from kvarn.kernels.linear.compiled import PANEL, Native
from kvarn.kernels.rope import Rope
from kvarn.models.reader import Layer

_P, _I = ctypes.c_void_p, ctypes.c_int64
NORMS = ("attn_norm", "q_norm", "k_norm", "attn_post_norm", "mlp_norm", "mlp_post_norm")
MATRICES = ("qkv", "out", "gate_up", "down")


class CMatrix(ctypes.Structure):
    """`Matrix` of forward.cpp."""

    _fields_: ClassVar = [("n", _I), ("k", _I), ("words", _P), ("codes", _P), ("bias", _P)]


class CLayer(ctypes.Structure):
    """`Layer` of forward.cpp."""

    _fields_: ClassVar = [
        *((name, _P) for name in NORMS),
        *((name, CMatrix) for name in MATRICES),
        ("cos", _P),
        ("sin", _P),
    ]


class CModel(ctypes.Structure):
    """`Model` of forward.cpp."""

    _fields_: ClassVar = [
        *((x, _I) for x in ("layers", "hidden", "ffn", "heads", "kv_heads", "dim", "gelu")),
        ("eps", ctypes.c_float),
        ("layer", _P),
        ("norm", _P),
    ]


class CPass(ctypes.Structure):
    """`Pass` of forward.cpp."""

    _fields_: ClassVar = [
        ("rows", _I),
        *((name, _P) for name in ("positions", "x", "hidden", "step", "cache", "space")),
    ]


def obstacle(spec: ModelSpec, layers: Sequence[Layer], norm: Tensor) -> str | None:
    """Why these layers cannot run in one call; None where they can."""
    if not native.available():
        return native.reason()
    if not norm.is_cpu or norm.dtype not in native.SUFFIXES:
        return f"the model is in {norm.dtype} on {norm.device}"
    if spec.ffn % PANEL:
        return f"the width of the MLP, {spec.ffn}, is not a multiple of {PANEL}"
    for layer in layers:
        for name in MATRICES:
            linear = getattr(layer, name)
            dense = isinstance(linear, Native) and linear.dtype == norm.dtype
            if not dense and not isinstance(linear, NativeCodes):
                return f"{name} is a {type(linear).__name__} layer, which has no compiled kernel"
    return None


class NativeForward:
    """The layers as addresses; the weights stay the property of their `Linear`s, which are kept."""

    def __init__(
        self, spec: ModelSpec, layers: Sequence[Layer], norm: Tensor, tables: Sequence[Rope]
    ) -> None:
        """`tables` has each layer's rotary table. `obstacle` must have found nothing."""
        library = native.library()
        assert library is not None
        self.spec, self.dtype = spec, norm.dtype
        self._keep = (layers, norm, tables)
        self._layers = (CLayer * len(layers))(
            *(_layer(layer, table) for layer, table in zip(layers, tables, strict=True))
        )
        self._model = CModel(
            len(layers), spec.hidden, spec.ffn, spec.n_heads, spec.n_kv_heads, spec.head_dim,
            spec.activation == "gelu_tanh", spec.norm_eps,
            ctypes.addressof(self._layers), norm.data_ptr(),
        )  # fmt: skip
        self._address = ctypes.addressof(self._model)
        self._parts: dict[tuple[int, int], CModel] = {}
        self._run = library.functions["forward"][norm.dtype]
        self._bytes = library.functions["space"][norm.dtype]
        self._space = torch.empty(0, dtype=torch.uint8)

    def takes(self, attend: PagedAttend, first: int, end: int) -> bool:
        """Whether attention in these layers is laid out for the compiled kernel, in this dtype."""
        return all(isinstance(plan, NativePlan) for plan in attend.plans[first:end]) and all(
            attend.cache[i].dtype == self.dtype for i in range(first, end)
        )

    def run(
        self, x: Tensor, positions: Tensor, attend: PagedAttend, first: int, end: int
    ) -> Tensor:
        """Layers `first` to `end` of rows x of the residual stream: [T, hidden], normed.

        The norm is the final one; x is afterwards the stream with what the layers added.
        """
        spec, rows = self.spec, len(x)
        model = self._address if (first, end) == (0, spec.n_layers) else self._part(first, end)
        steps = []
        for plan in attend.plans[first:end]:
            plan.lay_out(spec.n_heads, spec.n_kv_heads, spec.head_dim)
            steps.append(plan.address)
        n = len(steps)
        size = self._bytes(model, rows)
        if len(self._space) < size + 64:
            self._space = torch.empty(size + 64, dtype=torch.uint8)
        hidden = torch.empty_like(x)
        caches = [attend.cache[i].data_ptr() for i in range(first, end)]
        step_array, cache_array = (_P * n)(*steps), (_P * n)(*caches)
        passed = CPass(
            rows, positions.data_ptr(), x.data_ptr(), hidden.data_ptr(),
            ctypes.addressof(step_array), ctypes.addressof(cache_array),
            (self._space.data_ptr() + 63) // 64 * 64,
        )  # fmt: skip
        self._run(model, ctypes.addressof(passed))
        return hidden

    def _part(self, first: int, end: int) -> int:
        """The address of a model of some of the layers."""
        if (first, end) not in self._parts:
            part = CModel.from_buffer_copy(self._model)
            part.layers = end - first
            part.layer = ctypes.addressof(self._layers) + first * ctypes.sizeof(CLayer)
            self._parts[first, end] = part
        return ctypes.addressof(self._parts[first, end])


def _layer(layer: Layer, table: Rope) -> CLayer:
    norms = [getattr(layer, name) for name in NORMS]
    return CLayer(
        *(None if norm is None else norm.data_ptr() for norm in norms),
        *(_matrix(getattr(layer, name)) for name in MATRICES),
        table.cos.data_ptr(),
        table.sin.data_ptr(),
    )


def _matrix(linear: Linear) -> CMatrix:
    assert isinstance(linear, Native | NativeCodes)
    bias = None if linear.wide_bias is None else linear.wide_bias.data_ptr()
    if isinstance(linear, Native):
        return CMatrix(linear.n_out, linear.n_in, linear.packed.data_ptr(), None, bias)
    return CMatrix(linear.n_out, linear.n_in, None, ctypes.addressof(linear.codes), bias)
