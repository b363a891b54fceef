"""Linear layers of the GPU against fp64 products of the same operands."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from torch.nn.functional import silu

from kvarn.kernels.linear import quantize
from kvarn.kernels.linear.fp8 import Fp8Cuda
from kvarn.kernels.linear.invariant_cuda import InvariantCuda
from kvarn.kernels.linear.small_m import SmallM
from kvarn.kernels.linear.tiles import Tile, tile_for
from kvarn.kernels.linear.tuned import H100
from kvarn.kernels.linear.weight_only import WeightOnly
from kvarn.kernels.triton.launch import Matrix, multiply

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPE = torch.float32 if INTERPRETED else torch.bfloat16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device"),
]
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")

TILES = [
    Tile("dot", 16, 16, 64, 1, 2),
    Tile("dot", 16, 64, 64, 4, 3, splits=2, ahead=1),
    Tile("dot", 32, 64, 128, 4, 3, splits=3),
    Tile("dot", 16, 64, 64, 4, 3, segments=3),
    Tile("tma", 64, 128, 64, 8, 3, splits=2),
]


@pytest.fixture(autouse=True)
def scalars(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter of Triton 3.6 keeps integers in arrays of one element; NumPy 2.4 minds."""
    if INTERPRETED:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):  # type: ignore[no-untyped-def]
            patch(tensor, scope)
            tensor.__index__ = lambda self: int(self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
    yield


def operands(m: int, n: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(m * 31 + n)
    x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
    return tuple(t.to(DTYPE).to(DEVICE) for t in (x, weight, bias))  # type: ignore[return-value]


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ weight.double().t()
    return y if bias is None else y + bias.double()


def near(found: Tensor, wanted: Tensor, bound: float) -> None:
    assert not found.isnan().any()
    assert (found.double() - wanted).abs().max() <= bound * wanted.abs().max()


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(1, 40, 104), (3, 70, 200), (17, 129, 512), (70, 96, 1032)])
def test_tiles(tile: Tile, shape: tuple[int, int, int]) -> None:
    x, weight, bias = operands(*shape)
    matrix = Matrix.of(weight, bias)
    tile = tile if shape[2] >= 512 else Tile("dot", 16, 16, 64, 1, 2, splits=2)
    near(multiply(x, matrix, tile, dtype=torch.float32), product(x, weight, bias), 2e-5)
    assert not matrix.arrived.any()


@pytest.mark.parametrize("n", [32, 100])
def test_gated(n: int) -> None:
    x, weight, bias = operands(3, 2 * n, 512)
    gate, up = product(x, weight, bias).chunk(2, 1)
    for tile in (*TILES[:2], Tile("gemv", 1, 4, 128, 2, 2)):
        rows = x[:1] if tile.kernel == "gemv" else x
        found = multiply(rows, Matrix.of(weight, bias), tile, dtype=torch.float32, gate="silu")
        near(found, (silu(gate) * up)[: len(rows)], 2e-5)


@pytest.mark.parametrize("shape", [(37, 96), (64, 520), (9, 1000)])
def test_one_row(shape: tuple[int, int]) -> None:
    x, weight, bias = operands(1, *shape)
    for tile in (Tile("gemv", 1, 4, 128, 2, 1), Tile("gemv", 1, 8, 64, 2, 3)):
        found = multiply(x, Matrix.of(weight, bias), tile, dtype=torch.float32)
        near(found, product(x, weight, bias), 2e-5)


@on_gpu
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 16, 31, 64, 100, 200, 300])
@pytest.mark.parametrize("shape", [(4096, 1024), (1000, 776), (33, 65)])
def test_small_m(rows: int, shape: tuple[int, int]) -> None:
    x, weight, bias = operands(rows, *shape)
    layer = SmallM(weight, bias)
    assert layer(x).shape == (rows, shape[0]) and layer(x).dtype == DTYPE
    if rows:
        near(layer(x), product(x, weight, bias), 1e-2)
        near(layer.wide(x), product(x, weight, bias), 3e-5)
        assert torch.equal(layer(x.repeat(1, 2)[:, : shape[1]]), layer(x))


def test_a_tile_is_a_function_of_shapes() -> None:
    for (n, k, gated), buckets in H100.items():
        for most, entry in buckets.items():
            assert tile_for(n, k, gated, most) == (None if entry is None else Tile(*entry))  # type: ignore[arg-type]
    assert tile_for(4096, 4100, False, 1) is None  # rows not aligned to 16 bytes
    assert tile_for(4096, 4096, False, 5000) is None


@pytest.mark.parametrize("shape", [(70, 520), (256, 2048)])
def test_a_row_does_not_see_its_batch(shape: tuple[int, int]) -> None:
    x, weight, bias = operands(20 if INTERPRETED else 300, *shape)
    layer = InvariantCuda(weight, bias)
    near(layer.wide(x), product(x, weight, bias), 3e-5)
    whole, wide = layer(x), layer.wide(x)
    for rows in (1, 2, 15, 17) if INTERPRETED else (1, 2, 15, 17, 33, 64, 65, 129):
        assert torch.equal(layer(x[:rows]), whole[:rows])
        assert torch.equal(layer.wide(x[-rows:]), wide[-rows:])
    assert layer(x[:0]).shape == (0, shape[0])


@on_gpu
@pytest.mark.parametrize("rows", [0, 1, 5, 16, 40, 64, 65, 300])
def test_fp8(rows: int) -> None:
    x, weight, bias = operands(rows, 528, 1040)
    stored = quantize.to_float8(weight)
    layer = Fp8Cuda(stored, bias)
    assert Fp8Cuda.takes(stored) and layer(x).shape == (rows, 528)
    if rows:
        codes, scale = layer._quantize(x)
        used = codes.double() * scale[:, None]
        near(used, x.double(), 0.04)
        near(layer(x), product(used, stored.dense(), bias), 1e-2)
        near(layer.wide(x), product(used, stored.dense(), bias), 1e-2)


@on_gpu
@pytest.mark.parametrize("rows", [1, 5, 64, 65])
def test_fp8_gated(rows: int) -> None:
    x, weight, _ = operands(rows, 512, 1024)
    layer = Fp8Cuda(quantize.to_float8(weight), None)
    gate, up = layer.wide(x).double().chunk(2, 1)
    near(layer.gated(x, "silu"), silu(gate) * up, 2e-2)


@pytest.mark.parametrize("form", ["int8", "int4/32", "int4/128", "int8/64"])
@pytest.mark.parametrize("shape", [(70, 256), (130, 1024)])
def test_weight_only(form: str, shape: tuple[int, int]) -> None:
    x, weight, bias = operands(70, *shape)
    if form == "int8":
        stored = quantize.to_int8(weight)
    elif form == "int8/64":
        four = quantize.to_int4(weight, 64)
        codes = (four.codes.int() * 9 - 67).to(torch.int8)
        stored = quantize.Affine(codes, four.scale / 9, None, 8, 64)
    else:
        stored = quantize.to_int4(weight, int(form.split("/")[1]))
    layer = WeightOnly(stored, bias)
    near(layer._codes.dense(torch.float32), stored.dense().double(), 1e-6)
    for rows in (0, 1, 9) if INTERPRETED else (0, 1, 5, 16, 33, 64, 70):
        found = layer.wide(x[:rows])
        assert found.shape == (rows, shape[0])
        if rows:
            near(found, product(x[:rows], stored.dense(), bias), 1e-3 if rows < 33 else 1e-2)


@on_gpu
def test_in_a_graph() -> None:
    x, weight, _ = operands(4, 1024, 1024)
    layers = [
        SmallM(weight, None),
        InvariantCuda(weight, None),
        Fp8Cuda(quantize.to_float8(weight), None),
        WeightOnly(quantize.to_int4(weight), None),
    ]

    def run() -> list[Tensor]:
        return [layer(layer(x)) for layer in layers]

    wanted = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
