"""Linear, norm, rope and activation: every form against fp32, and which are batch-invariant."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarn.core.errors import ConfigError
from kvarn.core.model import RopeScaling
from kvarn.kernels import activation, native, norm, rope
from kvarn.kernels.linear import make_linear
from kvarn.kernels.linear.quantize import to_int8

torch.set_num_threads(1)

DTYPES = [torch.float32, torch.bfloat16]
NEEDS_NATIVE = pytest.mark.skipif(not native.available(), reason=native.reason())
NATIVE = pytest.param("native", marks=NEEDS_NATIVE)
BF16_PACKS = torch.ops.mkldnn._is_mkldnn_bf16_supported()
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=["torch", NATIVE])
def forms(request, monkeypatch):
    """Both forms of the operations that dispatch to the compiled kernels."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_outcome", lambda: (None, "off in this test"))
    return request.param


def packs(mode, dtype):
    """Skip what oneDNN cannot pack on this CPU (and the engine therefore does not choose)."""
    if mode == "packed" and dtype == torch.bfloat16 and not BF16_PACKS:
        pytest.skip("this CPU cannot pack bf16 matrices")


def close(got, want, dtype):
    torch.testing.assert_close(got.float(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("mode", ["plain", "packed", NATIVE, "invariant"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("n", "k"), [(1, 2), (31, 64), (33, 70), (192, 576), (577, 96)])
def test_linear(mode, dtype, bias, n, k):
    packs(mode, dtype)
    torch.manual_seed(n)
    weight = (torch.randn(n, k) * k**-0.5).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    linear = make_linear(weight, b, mode)
    assert (linear.n_out, linear.n_in) == (n, k)
    assert linear.weight_bytes >= weight.numel() * weight.element_size()
    for t in (0, 1, 2, 7, 12, 13, 25, 121):
        x = torch.randn(t, k).to(dtype)
        want = x.float() @ weight.float().T + (0 if b is None else b.float())
        y = linear(x)
        assert y.shape == (t, n) and y.dtype == dtype
        close(y, want, dtype)


@pytest.mark.parametrize("mode", ["plain", "packed", NATIVE, "invariant", "int8"])
def test_linear_of_a_slice(mode):
    """Rows with a stride, as in a fused projection."""
    weight = torch.randn(64, 96) * 0.1
    linear = make_linear(to_int8(weight)) if mode == "int8" else make_linear(weight, None, mode)
    x = torch.randn(5, 200)
    for view in (x[:, :96], x[:, 3:99], x[:, :192:2]):
        assert torch.equal(linear(view), linear(view.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [0, 1, 4, 5, 40])
def test_int8(dtype, t):
    """Within what eight bits for weights and activations leave: 1.5 % of the outputs' size."""
    torch.manual_seed(t)
    weight, bias = torch.randn(192, 576) / 24, torch.randn(192)
    x = torch.randn(t, 576).to(dtype)
    y = make_linear(to_int8(weight.to(dtype)), bias.to(dtype))(x)
    assert y.shape == (t, 192) and y.dtype == dtype
    want = x.float() @ weight.T + bias
    if t:
        assert (y.float() - want).square().mean().sqrt() < 0.015 * want.square().mean().sqrt()


def test_unknown_mode_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'packed'"):
        make_linear(torch.zeros(2, 2), None, "paked")


def test_native_says_what_it_cannot_take():
    with pytest.raises(ConfigError, match="mode 'packed' or 'plain' works"):
        make_linear(torch.zeros(2, 2, dtype=torch.float16), None, "native")


@pytest.mark.parametrize("mode", [NATIVE, "invariant"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(192, 576), (96, 1536), (1000, 64)])
def test_linear_is_batch_invariant(mode, dtype, n, k):
    """A row's bits are the same alone, in any batch and at any place in it."""
    torch.manual_seed(k)
    rng = np.random.default_rng(k)
    linear = make_linear(torch.randn(n, k).to(dtype), torch.randn(n).to(dtype), mode)
    x = torch.randn(300, k).to(dtype)
    alone = torch.cat([linear(row.unsqueeze(0)) for row in x])
    assert torch.equal(linear(x), alone)
    for _ in range(12):
        picked = torch.from_numpy(rng.permutation(300)[: rng.integers(1, 300)])
        assert torch.equal(linear(x[picked]), alone[picked])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 64, 100, 576])
def test_rms_norm(forms, dtype, dim):
    torch.manual_seed(dim)
    weight = torch.randn(dim)
    for shape in ((0, dim), (1, dim), (50, dim), (4, 3, dim)):
        x = (torch.randn(shape) * 3).to(dtype)
        y = norm.rms_norm(x, weight.to(dtype), 1e-5)
        assert y.dtype == dtype
        close(y, norm.reference(x, weight.to(dtype), 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_in_a_fused_row(forms, dtype):
    qkv, weight = torch.randn(7, 15, 64).to(dtype), torch.randn(64).to(dtype)
    for view in (qkv[:, :9], qkv[:, 9:12], qkv[:, 3]):
        assert torch.equal(
            norm.rms_norm(view, weight, 1e-6), norm.rms_norm(view.contiguous(), weight, 1e-6)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(forms, dtype):
    x, residual = torch.randn(2, 33, 576).to(dtype)
    weight = torch.randn(576).to(dtype)
    y, total = norm.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.rms_norm(total, weight, 1e-5))


def test_gradients_keep_to_torch():
    x = torch.randn(3, 64, requires_grad=True)
    norm.rms_norm(x, torch.ones(64), 1e-5).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated(forms, dtype, kind):
    for t, f in ((0, 16), (1, 17), (40, 1536)):
        x = (torch.randn(t, 2 * f) * 4).to(dtype)
        y = activation.gated(x, kind)
        assert y.shape == (t, f) and y.dtype == dtype
        close(y, activation.reference(x, kind), dtype)


@pytest.mark.parametrize("kind", ["silu", "gelu_tanh"])
def test_gated_of_extremes(forms, kind):
    gate = torch.tensor([-1e4, -200.0, -90.0, -1e-3, 0.0, 1e-6, 90.0, 1e4]).repeat(2, 4)
    x = torch.cat((gate, torch.ones_like(gate)), 1)
    close(activation.gated(x, kind), activation.reference(x, kind), torch.float32)


@pytest.mark.parametrize("operation", ["norm", "gated", "rope"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_glue_is_batch_invariant(forms, operation, dtype):
    rng = np.random.default_rng(0)
    x, weight = torch.randn(200, 1152).to(dtype), torch.randn(1152).to(dtype)
    turn = rope.Rope(64, 1e4, None, 256, dtype, "cpu")

    def compute(rows):
        if operation == "norm":
            return norm.rms_norm(x[rows], weight, 1e-5)
        if operation == "gated":
            return activation.gated(x[rows], "silu")
        heads = x[rows].view(-1, 18, 64)
        return torch.cat(rope.apply(heads[:, :12], heads[:, 12:], turn.at(rows)), 1)

    alone = torch.cat([compute(torch.tensor([row])) for row in range(200)])
    for _ in range(8):
        rows = torch.from_numpy(rng.permutation(200)[: rng.integers(1, 200)])
        assert torch.equal(compute(rows), alone[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 16, 64, 80, 128])
@pytest.mark.parametrize("fused", [True, False])
def test_rope(forms, dtype, dim, fused):
    turn = rope.Rope(dim, 1e4, None, 500, dtype, "cpu")
    positions = torch.randint(0, 500, (9,))
    qkv = torch.randn(9, 8, dim).to(dtype)
    q, k = qkv[:, :5], qkv[:, 5:7]
    before = qkv.clone()
    views = (q, k) if fused else (q.contiguous(), k.contiguous())
    got = rope.apply(*views, turn.at(positions))
    assert torch.equal(qkv, before)
    inverse = rope.frequencies(dim, 1e4, None)
    for x, y in zip((q, k), got, strict=True):
        assert y.dtype == dtype
        want = rope.reference(x, positions, inverse)
        tolerance = 2e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(y.float(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
def test_frequencies_are_those_of_transformers(scaling):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": scaling, "factor": 8.0, "rope_theta": 5e5}
    if scaling == "llama3":
        parameters |= {
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }  # fmt: skip
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=65536,
        rope_parameters=parameters,
    )  # fmt: skip
    want, _ = ROPE_INIT_FUNCTIONS[scaling](config, device="cpu")
    got = rope.frequencies(128, 5e5, RopeScaling(scaling, 8.0))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)


@NEEDS_NATIVE
@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(0, 40), n=st.integers(1, 130), half=st.integers(1, 60), bf16=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_native_linear_of_any_shape(t, n, half, bf16, seed):
    dtype = torch.bfloat16 if bf16 else torch.float32
    torch.manual_seed(seed)
    weight, x = torch.randn(n, 2 * half).to(dtype), torch.randn(t, 2 * half).to(dtype)
    want = x.float() @ weight.float().T
    y = make_linear(weight, None, "native")(x).float()
    torch.testing.assert_close(y, want, atol=1e-4, rtol=1e-2 if bf16 else 1e-4)


def test_the_reason_says_what_is_in_force(monkeypatch):
    assert native.reason()
    native._outcome.cache_clear()
    monkeypatch.setenv("KVARN_NATIVE", "off")
    try:
        assert not native.available()
        assert native.reason() == "turned off by KVARN_NATIVE=off"
        with pytest.raises(ConfigError, match="KVARN_NATIVE"):
            make_linear(torch.zeros(2, 2), None, "native")
    finally:
        native._outcome.cache_clear()


def test_a_broken_compiler_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setenv("KVARN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    native._outcome.cache_clear()
    try:
        assert not native.available()
        assert "/bin/false failed" in native.reason()
    finally:
        native._outcome.cache_clear()


@pytest.mark.parametrize("mode", ["plain", "packed", NATIVE])
@pytest.mark.parametrize("rows", [0, 1, 5, 13])
def test_wide_products_are_fp32(mode, rows):
    """The compiled form does not round the sums to bf16 on the way; the others may."""
    packs(mode, torch.bfloat16)
    torch.manual_seed(1)
    weight, x = torch.randn(70, 64).bfloat16(), torch.randn(rows, 64).bfloat16()
    y = make_linear(weight, None, mode).wide(x)
    exact = x.float() @ weight.float().T
    assert y.dtype == torch.float32
    tolerance = 1e-4 if mode == "native" else 1e-1
    torch.testing.assert_close(y, exact, rtol=tolerance, atol=tolerance)
