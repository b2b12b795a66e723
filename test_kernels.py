"""The operator of kernels/ against float64, on every shape and value that it must survive.

pytest test_kernels.py
"""

import pytest
import torch

from kernels.adapter import EPS, adapt, match_rms, project

ROWS = (0, 1, 15, 16, 17, 33, 127, 129, 1000)
WIDTHS = ((64, 8), (192, 24), (200, 64), (160, 10))  # (d, k), on and off any tile size
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def inputs(rows: int, d: int, k: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(rows * 1000 + d)
    codes = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64) / k**0.5
    bias = torch.randn(d, generator=generator, dtype=torch.float64)
    target = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.01
    return [tensor.to(dtype) for tensor in (codes, weight, bias, target)]


def adapt_float64(codes, weight, bias, target_rms):
    """The equation, row by row and with no broadcasting to get wrong."""
    codes, weight, bias = codes.double(), weight.double(), bias.double()
    out = torch.empty(len(codes), weight.shape[1], dtype=torch.float64)
    for i, z in enumerate(codes):
        y = sum((z[j] * weight[j] for j in range(len(z))), start=bias.clone())
        target = target_rms if isinstance(target_rms, float) else target_rms[i].double()
        out[i] = y * target / torch.sqrt((y * y).sum() / len(y) + EPS)
    return out


@pytest.mark.parametrize("d,k", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_adapt_equals_the_equation(rows, d, k):
    codes, weight, bias, target = inputs(rows, d, k)
    torch.testing.assert_close(adapt(codes, weight, bias, target), adapt_float64(codes, weight, bias, target))
    torch.testing.assert_close(adapt(codes, weight, bias, 0.02), adapt_float64(codes, weight, bias, 0.02))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_rounding(dtype):
    codes, weight, bias, target = inputs(129, 192, 24, dtype)
    out = adapt(codes, weight, bias, target)
    exact = adapt_float64(codes, weight, bias, target)
    assert out.dtype == dtype
    # four roundings on the way (matmul, mean square, scale, product), each of at most eps / 2 of a value of order 1
    assert (out.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()


def test_every_row_has_its_target_rms():
    codes, weight, bias, target = inputs(1000, 192, 24, torch.float32)
    rms = adapt(codes, weight, bias, target).square().mean(1, keepdim=True).sqrt()
    assert ((rms / target - 1).abs() < 2**-8).all()


def test_project_then_pca_inverse_is_the_identity_at_full_width():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator, dtype=torch.float64)
    mean = torch.randn(64, generator=generator, dtype=torch.float64)
    components, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    rms = x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(adapt(project(x, mean, components), components.T, mean, rms), x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_rows_and_zero_rows_in_half_precision(dtype):
    y = torch.tensor([[3e-4, -3e-4], [0.0, 0.0], [6e4, 6e4]], dtype=dtype)  # their squares leave float16 on both sides
    out = match_rms(y, 0.5)
    torch.testing.assert_close(out, torch.tensor([[0.5, -0.5], [0.0, 0.0], [0.5, 0.5]], dtype=dtype))


def test_zero_rows_stay_zero_and_bad_rows_stay_alone():
    y = torch.ones(4, 16)
    y[0] = 0
    y[1, 3] = float("inf")
    y[2, 5] = float("nan")
    out = match_rms(y, 0.5)
    assert (out[0] == 0).all()
    assert not torch.isfinite(out[1]).all() and not torch.isfinite(out[2]).all()
    torch.testing.assert_close(out[3], torch.full((16,), 0.5))


def test_a_bias_that_cancels_the_codes():
    codes, weight, _, target = inputs(17, 64, 8, torch.float32)
    bias = -(codes[3] @ weight)  # row 3 is nothing but rounding
    exact = adapt_float64(codes, weight, bias, target)
    others = [i for i in range(17) if i != 3]
    torch.testing.assert_close(adapt(codes, weight, bias, target)[others].double(), exact[others], rtol=1e-4, atol=1e-5)


def test_strided_and_transposed_inputs():
    codes, weight, bias, target = inputs(33, 64, 8, torch.float32)
    wide = torch.zeros(33, 20)
    wide[:, 5:13] = codes
    torch.testing.assert_close(
        adapt(wide[:, 5:13], weight.T.contiguous().T, bias, target), adapt(codes, weight, bias, target)
    )


def test_a_row_does_not_depend_on_its_batch():
    codes, weight, bias, target = inputs(129, 192, 24, torch.float64)
    torch.testing.assert_close(
        adapt(codes, weight, bias, target)[77:78],
        adapt(codes[77:78], weight, bias, target[77:78]),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gradients_of_codes_weight_bias_and_target():
    tensors = [tensor.requires_grad_() for tensor in inputs(3, 6, 4)]
    assert torch.autograd.gradcheck(adapt, tensors)
