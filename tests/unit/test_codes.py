"""The compiled layer of quantised weights: against fp32, in any batch, whatever lay in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.config import resolve
from kvarn.core.errors import ConfigError
from kvarn.kernels import native
from kvarn.kernels.linear import make_linear
from kvarn.kernels.linear.codes import GROUP, NativeCodes
from kvarn.kernels.linear.stored import Affine
from kvarn.models.precision import choose_quantization

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(not native.available(), reason=native.reason())

DTYPES = [torch.float32, torch.bfloat16]


def affine(n: int, k: int, bits: int, offset: str, group: int = GROUP) -> Affine:
    """A random matrix; scales and offsets are such as half precision holds."""
    low, high, kind = (0, 16, torch.uint8) if bits == 4 else (-128, 128, torch.int8)
    codes = torch.randint(low, high, (n, k)).to(kind)
    scale = (torch.rand(n, k // group) * 0.02 + 1e-3).half().float()
    offsets = {
        "none": None,
        "symmetric": -8 * scale,
        "free": (torch.randn(n, k // group) * 0.1).half().float(),
    }
    return Affine(codes, scale, offsets[offset], bits, group)


def as_quantised(x: torch.Tensor) -> torch.Tensor:
    """x [T, K] as the kernel sees it: 8 bits by row and group of 32, the scale from the largest."""
    groups = x.float().view(len(x), x.shape[1] // GROUP, GROUP)
    top = groups.abs().amax(-1, keepdim=True)
    inverse = torch.where(top > 0, torch.full_like(top, 127) / top, 0.0)
    return (torch.round(groups.double() * inverse.double()) * (top / 127)).flatten(1).float()


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "offset"),
    [(8, "none"), (8, "free"), (4, "none"), (4, "symmetric"), (4, "free")],
)
@pytest.mark.parametrize(("n", "k"), [(1, 32), (31, 64), (33, 96), (192, 576)])
def test_against_fp32(dtype, bits, offset, n, k):
    """Only the order of sums and the rounding of the result differ from exact arithmetic."""
    torch.manual_seed(n + k)
    weight, bias = affine(n, k, bits, offset), torch.randn(n)
    linear = make_linear(weight, bias.to(dtype))
    assert isinstance(linear, NativeCodes)
    for t in (0, 1, 2, 5, 6, 7, 13, 121):
        x = torch.randn(t, k).to(dtype)
        want = as_quantised(x) @ weight.dense().T + bias.to(dtype).float()
        wide, y = linear.wide(x), linear(x)
        assert wide.dtype == torch.float32 and y.dtype == dtype and y.shape == (t, n)
        scale = want.abs().max().item() if t else 1.0
        torch.testing.assert_close(wide, want, atol=1e-5 * scale, rtol=1e-5)
        torch.testing.assert_close(y, wide.to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [64, 128, 576])
def test_wider_groups_are_repeated(bits, group):
    n, k = 40, 576 if group == 576 else 512
    weight = affine(n, k, bits, "free", group)
    x = torch.randn(9, k)
    want = as_quantised(x) @ weight.dense().T
    bound = 1e-5 * want.abs().max().item()
    torch.testing.assert_close(make_linear(weight)(x), want, atol=bound, rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(1, 300),
    n=st.integers(1, 100),
    groups=st.integers(1, 20),
    bits=st.sampled_from([4, 8]),
    bf16=st.booleans(),
    seed=st.integers(0, 1 << 20),
)
def test_a_row_is_the_same_in_any_batch(t, n, groups, bits, bf16, seed):
    torch.manual_seed(seed)
    linear = make_linear(affine(n, groups * GROUP, bits, "free"))
    x = torch.randn(t, groups * GROUP).to(DTYPES[bf16])
    row = seed % t
    assert torch.equal(linear(x)[row], linear(x[row : row + 1])[0])


def test_rows_of_zeros_and_of_one_large_value():
    weight = affine(64, 96, 4, "free")
    x = torch.zeros(3, 96)
    x[1, 40] = 1e30
    x[2, 5] = 1e-30
    want = x @ weight.dense().T
    torch.testing.assert_close(make_linear(weight)(x), want, rtol=1e-4, atol=0)


def test_a_slice_of_a_fused_row():
    linear = make_linear(affine(64, 96, 8, "none"))
    x = torch.randn(5, 200)
    for view in (x[:, :96], x[:, 3:99], x[:, :192:2]):
        assert torch.equal(linear(view), linear(view.contiguous()))


def test_what_it_cannot_take_is_said():
    odd = affine(8, 48, 4, "free", 16)
    assert not NativeCodes.takes(odd)
    with pytest.raises(ConfigError, match="multiple of 32"):
        NativeCodes(odd, None)
    with pytest.raises(ConfigError, match=r"float16"):
        make_linear(affine(8, 64, 4, "free"))(torch.zeros(1, 64, dtype=torch.float16))


def test_float16_with_codes_on_a_cpu_is_refused_at_start():
    resolved = resolve({"dtype": "float16", "quantization": "int8"})
    with pytest.raises(ConfigError, match=r"dtype=float32 or bfloat16, not float16"):
        choose_quantization(resolved, torch.device("cpu"), None)
