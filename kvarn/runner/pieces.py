"""Steps with prompts, captured piecewise: what lies between two layers' attention is one replay.

Attention takes launches that depend on the step's spans; everything else depends on the number of
rows alone. So the forward pass is captured in pieces that end where attention begins, for a few
numbers of rows; a step fills up to the next of them with idle rows. It pays where launching
kernels one by one would take the host longer than the device needs.
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvarn.kernels.attention import Rotary
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.kernels.upload import upload
from kvarn.models.decoder import Decoder
from kvarn.runner.batch import Batch
from kvarn.runner.graphs import CudaCapture
from kvarn.runner.state import DeviceState

SIZES = [16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]


@dataclass(slots=True)
class _Recorder(PagedAttend):
    """Ends a piece where a layer attends, and begins the next."""

    qkv: Tensor = field(default_factory=lambda: torch.empty(0))  #: what attention takes, [T, ...]
    z: Tensor = field(default_factory=lambda: torch.empty(0))  #: what it leaves, [T, Hq, d]
    pool: Any = None  #: memory of the graphs; None: nothing is captured
    graphs: list[torch.cuda.CUDAGraph] = field(default_factory=list)
    holes: list[tuple[int, Rotary]] = field(default_factory=list)  #: between the graphs: the layer

    def begin(self) -> None:
        """Capture from here on."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        self.graphs.append(graph)

    def fused(self, layer: int, qkv: Tensor, rotary: Rotary) -> Tensor:
        """See `PagedAttend`; nothing attends."""
        self.qkv.copy_(qkv)  # out of memory that other steps use too
        if self.pool is not None:
            self.graphs[-1].capture_end()
            self.holes.append((layer, rotary))
            self.begin()
        return self.z


@dataclass(slots=True)
class _Steps:
    """The captured pieces for one number of rows."""

    inputs: Tensor  #: int32 [3, rows]: tokens as in `feed`, image rows, positions
    recorder: _Recorder
    hidden: Tensor


@dataclass(slots=True)
class Pieces:
    """Captured pieces of a runner's forward pass, by number of rows.

    `qkv` and `z` are what attention takes and leaves, for all of them.
    """

    decoder: Decoder
    state: DeviceState
    capture: CudaCapture
    qkv: Tensor = field(init=False)
    z: Tensor = field(init=False)
    found: dict[int, _Steps] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec, kind = self.decoder.spec, self.decoder.dtype
        width = (spec.n_heads + 2 * spec.n_kv_heads) * spec.head_dim
        device = self.decoder.device
        self.qkv = torch.zeros(SIZES[-1], width, dtype=kind, device=device)
        self.z = torch.zeros(SIZES[-1], spec.n_heads, spec.head_dim, dtype=kind, device=device)

    def take(self, n_rows: int) -> bool:
        """Whether a step of so many rows is captured."""
        return 0 < n_rows <= SIZES[-1]

    def run(self, batch: Batch, attend: PagedAttend) -> Tensor:
        """Final hidden states [T, hidden] of a batch, attention through `attend`."""
        n = len(batch.tokens)
        size = SIZES[bisect_left(SIZES, n)]
        steps = self.found.get(size)
        if steps is None:
            steps = self.found[size] = self._record(size)
        said = np.stack((batch.tokens, batch.row_of, batch.angles))
        steps.inputs[:, :n] = upload([said], torch.int32, self.decoder.device)[0]
        recorder = steps.recorder
        for graph, (layer, rotary) in zip(recorder.graphs, recorder.holes):
            graph.replay()
            rotary.positions = steps.inputs[2, :n]
            recorder.z[:n] = attend.fused(layer, recorder.qkv[:n], rotary)
        recorder.graphs[-1].replay()
        return steps.hidden[:n]

    def _record(self, size: int) -> _Steps:
        """Run once without attention, so that kernels are compiled, then capture."""
        from kvarn.kernels.triton.feed import feed

        decoder, device = self.decoder, self.decoder.device
        inputs = torch.zeros(3, size, dtype=torch.int32, device=device)
        inputs[1] = -1
        recorder = _Recorder([], {}, True, self.qkv[:size], self.z[:size])

        def body() -> Tensor:
            tokens = feed(inputs[0], inputs[1], self.state.last)
            return decoder.forward(tokens, inputs[2], recorder)

        stream = self.capture.stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            body()
            recorder.pool = self.capture.pool
            recorder.begin()
            try:
                hidden = body()
            finally:
                recorder.graphs[-1].capture_end()
        torch.cuda.current_stream(device).wait_stream(stream)
        return _Steps(inputs, recorder, hidden)
