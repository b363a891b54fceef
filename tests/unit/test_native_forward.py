"""All layers in one compiled call: the same bits as an operation at a time, in every family."""

import numpy as np
import pytest
import torch
from golden.checkpoints import CASES, checkpoint, loaded

from kvarn.core.model import ModelSpec
from kvarn.kernels import native
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.native import NativeAttention
from kvarn.kernels.attention.paged import PagedAttend
from kvarn.models.decoder import Decoder
from kvarn.models.quantized.convert import Converted, Source
from kvarn.models.safetensors_file import SafetensorsWeights

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

PAGE = 4
#: (first position, rows) of each span: a chunk with context, decode rows, a fresh prompt
SPANS = [(13, 9), (30, 1), (0, 1), (0, 23), (7, 1)]


def rows_of(spec: ModelSpec, window: int | None) -> tuple[PagedRows, torch.Tensor]:
    """The spans on pages of their own, and the positions of their rows."""
    indptr, page_indptr, pages, slots, positions = [0], [0], [], [], []
    for start, n in SPANS:
        mine = list(range(len(pages), len(pages) + -(-(start + n) // PAGE)))
        pages += mine
        at = list(range(start, start + n))
        slots += [mine[p // PAGE] * PAGE + p % PAGE for p in at]
        positions += at
        indptr.append(len(positions))
        page_indptr.append(len(pages))
    arrays = [indptr, [start for start, _ in SPANS], page_indptr, pages, [0] * len(SPANS), slots]
    rows = PagedRows(
        *(np.array(x, np.int64) for x in arrays), PAGE, spec.scale, window, spec.attn_softcap
    )
    return rows, torch.tensor(positions)


def hidden(decoder: Decoder, one_call: bool) -> torch.Tensor:
    """Final hidden states of the spans' rows, over an earlier context of noise."""
    spec, backend = decoder.spec, NativeAttention()
    torch.manual_seed(3)
    cache = {}
    for i in range(spec.n_layers):
        (cache[i],) = backend.allocate(
            1, 40, PAGE, spec.n_kv_heads, spec.head_dim, decoder.dtype, decoder.device
        )
        cache[i].normal_()
    plans = {}
    for i in range(spec.n_layers):
        rows, positions = rows_of(spec, spec.window(i))
        plans.setdefault(spec.window(i), backend.plan(rows))
    attend = PagedAttend([plans[spec.window(i)] for i in range(spec.n_layers)], cache)
    tokens = torch.randint(0, spec.vocab, (len(positions),))
    assert decoder.native is not None and decoder.native.takes(attend, 0, spec.n_layers)
    held, decoder.native = decoder.native, decoder.native if one_call else None
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote holds NaN
    with torch.inference_mode():
        x = decoder.forward(tokens, positions, attend)
    torch.use_deterministic_algorithms(False)
    decoder.native = held
    return x


@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits_as_an_operation_at_a_time(tmp_path, case, dtype, scheme):
    checkpoint(case, tmp_path)
    spec = loaded(tmp_path)[1]
    weights: Source = SafetensorsWeights(tmp_path)
    if scheme != "none":
        weights = Converted(weights, scheme, torch.device("cpu"))
    decoder = Decoder(spec, weights, dtype=dtype, mode="native", max_len=64)
    assert decoder.obstacle is None
    whole, apart = hidden(decoder, True), hidden(decoder, False)
    assert torch.isfinite(whole).all()
    assert torch.equal(whole, apart)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(tmp_path, threads):
    checkpoint("qwen3", tmp_path)
    spec = loaded(tmp_path)[1]
    decoder = Decoder(spec, SafetensorsWeights(tmp_path), mode="native", max_len=64)
    alone = hidden(decoder, True)
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(hidden(decoder, True), alone)
    finally:
        torch.set_num_threads(1)


def test_says_what_is_in_the_way(tmp_path):
    checkpoint("llama2", tmp_path)
    decoder, spec = loaded(tmp_path)
    assert decoder.native is None
    assert decoder.obstacle == "qkv is a Plain layer, which has no compiled kernel"
    checkpoint("llama2", tmp_path, intermediate_size=90)
    spec = loaded(tmp_path)[1]
    decoder = Decoder(spec, SafetensorsWeights(tmp_path), mode="native", max_len=64)
    assert decoder.obstacle == "the width of the MLP, 90, is not a multiple of 32"
