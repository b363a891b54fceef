"""Attention kernels alone: kvarn's beside those of torch and whichever other peers are there.

    PYTHONPATH=. python benchmarks/gpu/attention.py [--only kvarn,cudnn] [--peer-path FOLDER]

Decodes of 64 sequences over 8192 positions, and causal prompts of 4 x 8192; bf16, 32 query and 8 KV
heads, pages of 16 in random order where the kernel takes pages (contiguous KV otherwise). kvarn is
timed as a layer calls it: KV write, attention and merges.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from triton.testing import do_bench

from benchmarks.gpu.limits import read_gb_s
from kvarn.bench.record import header, write
from kvarn.kernels.attention import PagedRows
from kvarn.kernels.attention.triton import TritonAttention

HEADS, KV_HEADS, PAGE = 32, 8, 16
RESULT = Path(__file__).parents[1] / "results" / "gpu_attention.json"
CASES = {"decode": (64, 8192, 1), "prefill": (4, 8192, 8192)}  #: batch, context, rows of each

Call = Callable[[], Tensor]


def rows_of(batch: int, context: int, length: int, dim: int) -> PagedRows:
    """The last `length` positions of equal sequences over pages in random order."""
    pages = np.random.default_rng(0).permutation(batch * context // PAGE)
    each = context // PAGE
    position = np.arange(context - length, context)
    slots = [pages[i * each + position // PAGE] * PAGE + position % PAGE for i in range(batch)]
    return PagedRows(
        indptr=np.arange(batch + 1) * length, start=np.full(batch, context - length),
        page_indptr=np.arange(batch + 1) * each, pages=pages, base=np.zeros(batch, np.int64),
        slots=np.concatenate(slots), page_size=PAGE, scale=dim**-0.5,
    )  # fmt: skip


class Case:
    """A batch of equal spans with its own cache, and the same KV in the peers' layouts."""

    def __init__(self, batch: int, context: int, length: int, dim: int) -> None:
        self.batch, self.context, self.length, self.dim = batch, context, length, dim
        self.rows = rows_of(batch, context, length, dim)
        self.attention = TritonAttention()
        n_pages = batch * context // PAGE
        self.cache = self.attention.allocate(
            1, n_pages, PAGE, KV_HEADS, dim, torch.bfloat16, torch.device("cuda")
        )[0].normal_()
        kind: Any = {"dtype": torch.bfloat16, "device": "cuda"}
        self.q = torch.randn(batch * length, HEADS, dim, **kind)
        self.k, self.v = (torch.randn(batch * length, KV_HEADS, dim, **kind) for _ in range(2))
        kvarn(self)()  # writes k and v, which the peers see too
        self.table = torch.from_numpy(self.rows.pages).int().cuda().view(batch, -1)

    @property
    def unit(self) -> str:
        """What `rate` counts: KV read by decodes, arithmetic of prompts."""
        return "GB/s" if self.length == 1 else "TFLOP/s"

    def rate(self, ms: float) -> float:
        """In `unit`."""
        if self.length == 1:
            return 2 * self.batch * self.context * KV_HEADS * self.dim * 2 / ms / 1e6
        return 4 * self.batch * HEADS * self.context**2 * self.dim / 2 / ms / 1e9

    def pages(self) -> tuple[Tensor, Tensor]:
        """K and V [pages, page, Hkv, d]."""
        k, v = self.cache.permute(2, 0, 3, 1, 4).contiguous()
        return k, v

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, L, d]."""
        seen = self.cache[self.table.long()].permute(3, 0, 2, 1, 4, 5).flatten(3, 4).contiguous()
        q = self.q.view(self.batch, self.length, HEADS, -1).transpose(1, 2).contiguous()
        return q, seen[0], seen[1]

    def offsets(self) -> Tensor:
        """First row of each span, and the end of the last."""
        step = self.length
        return torch.arange(0, self.batch * step + 1, step, dtype=torch.int32, device="cuda")


def kvarn(case: Case) -> Call:
    """One layer's call on pages, planned before."""
    plan = case.attention.plan(case.rows)
    return lambda: plan.run(case.cache, case.q, case.k, case.v)[0]


def cudnn(case: Case) -> Call:
    """torch's SDPA through cuDNN on contiguous KV."""
    q, k, v = case.contiguous()

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(q, k, v, is_causal=case.length > 1, enable_gqa=True).transpose(1, 2)

    return call


def flex(case: Case) -> Call:
    """torch's FlexAttention, compiled, on contiguous KV."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = case.contiguous()
    mask = None
    if case.length > 1:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, case.length, case.context, device="cuda"
        )
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)


def flash3(case: Case) -> Call:
    """FlashAttention-3 as vLLM ships it, on pages."""
    from vllm.vllm_flash_attn.flash_attn_interface import flash_attn_varlen_func

    k, v = case.pages()
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    offsets = case.offsets()
    return lambda: flash_attn_varlen_func(
        case.q, k, v, case.length, offsets, case.context, seqused_k=lengths, causal=True,
        block_table=case.table, fa_version=3,
    )  # fmt: skip


def flashinfer(case: Case) -> Call:
    """FlashInfer's FA2 kernels on pages; compiled at first use."""
    import flashinfer

    room = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    each = case.context // PAGE
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * each
    last = torch.full((case.batch,), PAGE, dtype=torch.int32, device="cuda")
    kind: Any = {"q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16}
    pages = case.table.flatten()
    if case.length == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(room, "NHD", use_tensor_cores=True)
        wrapper.plan(starts, pages, last, HEADS, KV_HEADS, case.dim, PAGE, **kind)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(room, "NHD", backend="fa2")
        wrapper.plan(
            case.offsets(), starts, pages, last, HEADS, KV_HEADS, case.dim, PAGE, causal=True,
            **kind,
        )  # fmt: skip
    kv = case.pages()
    return lambda: wrapper.run(case.q, kv)


KERNELS: dict[str, Callable[[Case], Call]] = {
    "kvarn": kvarn, "cudnn": cudnn, "flex": flex, "flash3": flash3, "flashinfer": flashinfer,
}  # fmt: skip


def reference(case: Case) -> tuple[Tensor, Tensor]:
    """Some rows, and what fp32 arithmetic on the same numbers gives for them [R, H, d]."""
    positions = np.unique(np.linspace(case.length // 8, case.length - 1, 5).astype(int))
    k, v = (x[0].float() for x in case.contiguous()[1:])  # of the first sequence
    rows = torch.from_numpy(positions).cuda()
    q = case.q[rows].float().view(len(rows), KV_HEADS, -1, case.dim)
    scores = torch.einsum("rhgd,hsd->rhgs", q, k) * case.rows.scale
    limit = (rows + case.context - case.length)[:, None, None, None]
    scores.masked_fill_(torch.arange(case.context, device="cuda") > limit, -torch.inf)
    wanted = torch.einsum("rhgs,hsd->rhgd", scores.softmax(-1), v)
    return rows, wanted.reshape(len(rows), HEADS, case.dim)


def measure(case: Case, name: str, rows: Tensor, wanted: Tensor) -> dict[str, Any]:
    """Time, rate and relative error of one kernel; why it did not run otherwise."""
    began = time.perf_counter()
    try:
        call = KERNELS[name](case)
        out = call().reshape(-1, HEADS, case.dim)[rows].float()
        first = time.perf_counter() - began
        ms = float(do_bench(call, warmup=25, rep=150, return_mode="median"))
    except Exception as error:
        return {"kernel": name, "why": f"{type(error).__name__}: {str(error)[:200]}"}
    return {
        "kernel": name, "ms": ms, "rate": case.rate(ms), "unit": case.unit,
        "error": float((out - wanted).norm() / wanted.norm()), "first_s": first,
    }  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Every kernel on every case, one JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default=str(RESULT))
    parser.add_argument("--only", help="a comma-separated list of kernels; default: all")
    parser.add_argument("--peer-path", help="folder of the peers' packages")
    options = parser.parse_args(words)
    if options.peer_path:
        sys.path.insert(0, options.peer_path)
    names = options.only.split(",") if options.only else list(KERNELS)
    result = header("gpu_attention", {"heads": HEADS, "kv_heads": KV_HEADS, "page": PAGE}, {})
    result |= {"read_gb_s": read_gb_s(), "results": []}
    for dim in (128, 64):
        for kind, shape in CASES.items():
            gc.collect()
            torch.cuda.empty_cache()
            case = Case(*shape, dim)
            rows, wanted = reference(case)
            for name in names:
                row = {"case": kind, "dim": dim} | measure(case, name, rows, wanted)
                result["results"].append(row)
                print(json.dumps(row), flush=True)
                write(result, options.json)
            del case, rows, wanted
    return 0


if __name__ == "__main__":
    sys.exit(main())
