"""The operator of kernels/ against float64, on every shape and value that it must survive.

pytest test_kernels.py           # natively on a CUDA GPU; without one, the same tests through Triton's interpreter
pytest test_kernels.py -m ""     # the full matrix: also float16, large shapes, and the compiler's report

Every test of the operator runs three times: plain torch, and each of the two forms of the Triton kernels. A test that
cannot run here is skipped with a reason, and the closing summary says how the kernels ran.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from kernels import adapter
from kernels.adapter import EPS, adapt, project, reconstruct, reference

HERE = Path(__file__).resolve().parent
NATIVE = adapter.HAVE_TRITON and torch.cuda.is_available()
MODE = "not at all: triton is not installed"
if adapter.HAVE_TRITON:
    MODE = f"natively on {torch.cuda.get_device_name()}" if NATIVE else "by Triton's interpreter, on the CPU"


def slow(*values):
    """A parameter of the full matrix."""
    return pytest.param(*values, marks=pytest.mark.slow)


ROWS = (0, 1, slow(15), slow(16), 17, slow(33), slow(127), 129, slow(1000))
WIDTHS = (slow(64, 8), (192, 24), slow(200, 64), slow(160, 10), (300, 37))  # (d, k), on and off any tile size
DTYPES = (torch.float32, slow(torch.float16), torch.bfloat16)
FORMS = ("fused", "library")
EMPTY = adapter.fused._empty if adapter.HAVE_TRITON else None


class Summary:
    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.write_line(f"test_kernels.py ran the Triton kernels {MODE}")


@pytest.fixture(scope="session", autouse=True)
def say_which_mode(request):
    request.config.pluginmanager.register(Summary())


@pytest.fixture(scope="session", autouse=True)
def compiled(request, tmp_path_factory):
    """kernels/aot.py, at work on one core from the first test on: it takes a minute, and nothing waits for it."""
    if not adapter.HAVE_TRITON or not any(item.name.startswith("test_compiled") for item in request.session.items):
        yield None
        return
    path = tmp_path_factory.mktemp("aot") / "aot.json"
    with path.open("w") as file:
        process = subprocess.Popen([sys.executable, "kernels/aot.py", "--jobs", "1"], cwd=HERE, stdout=file)
    yield lambda: (process.wait(), json.loads(path.read_text() or "null"))
    process.kill()


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """The output of a kernel starts as NaN, between two guard zones that must stay as they are."""
    guarded = []

    def empty(like, *shape, dtype=None):
        size, guard = int(torch.Size(shape).numel()), 64
        whole = torch.full((size + 2 * guard,), float("nan"), dtype=dtype or like.dtype, device=like.device)
        for zone in (whole[:guard], whole[guard + size :]):
            zone.fill_(123.0)
            guarded.append(zone)
        return whole[guard : guard + size].view(shape)

    if adapter.HAVE_TRITON:
        monkeypatch.setattr(adapter.fused, "_empty", empty)
    yield
    assert all((zone == 123).all() for zone in guarded), "a kernel wrote outside its output"


def use(monkeypatch, form: str) -> str:
    """Force plain torch or one form of the kernels; returns the device."""
    if form == "plain torch":
        return "cpu"
    if not adapter.HAVE_TRITON:
        pytest.skip("triton is not installed")
    monkeypatch.setattr(adapter, "interpret_on_cpu", not NATIVE)
    monkeypatch.setattr(adapter, "choose_form", lambda *sizes: form)
    return "cuda" if NATIVE else "cpu"


@pytest.fixture(params=("plain torch", *FORMS))
def device(request, monkeypatch):
    return use(monkeypatch, request.param)


@pytest.fixture(params=FORMS)
def kernel_device(request, monkeypatch):
    return use(monkeypatch, request.param)


def inputs(rows: int, d: int, k: int, dtype=torch.float64, device="cpu", seed=0):
    """codes, weight, bias, target_rms: rounded to dtype, so that float64 can start from the same numbers."""
    generator = torch.Generator().manual_seed(rows * 1000 + d + seed)
    codes = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(k, d, generator=generator, dtype=torch.float64) / k**0.5
    bias = torch.randn(d, generator=generator, dtype=torch.float64)
    target = torch.rand(rows, 1, generator=generator, dtype=torch.float64) + 0.01
    return [tensor.to(dtype).to(device) for tensor in (codes, weight, bias, target)]


def exact(codes, weight, bias, target_rms):
    """The equation in float64, with no broadcasting to get wrong: sums over j of z_j * weight_j."""
    codes, weight, bias = (tensor.detach().cpu().double() for tensor in (codes, weight, bias))
    target = target_rms.cpu().double() if isinstance(target_rms, torch.Tensor) else target_rms
    y = bias.expand(len(codes), -1).clone()
    for j in range(len(weight)):
        y += codes[:, j : j + 1] * weight[j : j + 1]
    return y * target / torch.sqrt((y * y).sum(1, keepdim=True) / y.shape[1] + EPS)


def eager(codes, weight, bias, target_rms):
    """torch in the same dtype, as carefully as one writes it by hand: the norm in float32."""
    codes, weight, bias = (tensor.cpu() for tensor in (codes, weight, bias))
    target_rms = target_rms.cpu() if isinstance(target_rms, torch.Tensor) else target_rms
    y = torch.addmm(bias, codes, weight)
    wide = y.float() if y.dtype != torch.float64 else y
    return (wide * (target_rms * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS))).to(y.dtype)


def assert_as_good_as_torch(out, ref, torch_out):
    """Error at most twice that of torch in the same dtype, and a relative RMSE of at most 5e-3."""
    assert out.shape == ref.shape and out.dtype == torch_out.dtype
    if not ref.numel():
        return
    error = (out.detach().cpu().double() - ref).abs()
    torch_error = (torch_out.detach().cpu().double() - ref).abs()
    assert error.max() <= 2 * torch_error.max() + 1e-5 * ref.abs().max(), (error.max(), torch_error.max())
    assert error.square().mean().sqrt() <= 5e-3 * ref.square().mean().sqrt()


def assert_right(out, *tensors):
    """`out` is the equation's, to within the error of torch."""
    assert_as_good_as_torch(out, exact(*tensors), eager(*tensors))


# ---------------------------------------------------------------------------------------------------------------------
# forward


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_error_for_any_number_of_rows(device, rows, dtype):
    codes, weight, bias, target = inputs(rows, 200, 24, dtype, device)
    assert_right(adapt(codes, weight, bias, target), codes, weight, bias, target)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d,k", WIDTHS)
def test_error_for_any_width_and_a_scalar_target(device, d, k, dtype):
    codes, weight, bias, _ = inputs(33, d, k, dtype, device)
    for target in (0.02, torch.tensor(0.02, device=device)):
        assert_right(adapt(codes, weight, bias, target), codes, weight, bias, 0.02)


@pytest.mark.parametrize("dtype", (torch.float32, slow(torch.float16), slow(torch.bfloat16)))
@pytest.mark.parametrize(
    "rows,d,k",
    ((9, 5000, 20), (5, 8192, 16), slow(1100, 64, 8), slow(4096, 64, 8), (33, 100, 1), (33, 200, 100), (9, 640, 512)),
)
def test_shapes_of_real_models(kernel_device, rows, d, k, dtype):
    """Several blocks of every dimension, in a token's norm too; codes of one number, and of a 7B model's 512."""
    codes, weight, bias, target = inputs(rows, d, k, dtype, kernel_device)
    assert_right(adapt(codes, weight, bias, target), codes, weight, bias, target)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))  # float16 has no numbers as small as these y
def test_rows_so_small_that_eps_shows(device, dtype):
    """mean(y^2) is near EPS: it is added to the mean, not to the sum, and not forgotten."""
    codes, weight, bias, target = inputs(33, 200, 24)
    codes, weight, bias, target = (t.to(dtype).to(device) for t in (codes, 1e-6 * weight, 0 * bias, target))
    assert (exact(codes, weight, bias, target).square().mean(1).sqrt() / target[:, 0].cpu() < 0.9).all()
    assert_right(adapt(codes, weight, bias, target), codes, weight, bias, target)


def test_float64_on_plain_torch():
    codes, weight, bias, target = inputs(33, 200, 24)
    torch.testing.assert_close(adapt(codes, weight, bias, target), exact(codes, weight, bias, target))


@pytest.mark.parametrize("index_dtype", (torch.int32, torch.int64))
def test_ids_gather_from_a_table_of_codes(device, index_dtype):
    table, weight, bias, _ = inputs(50, 200, 24, torch.float32, device)
    ids = torch.tensor([49, 0, 7, 7, 7, 31] * 7, dtype=index_dtype, device=device)  # duplicates, first and last row
    target = torch.rand(len(ids), 1, device=device) + 0.1
    out = adapt(table, weight, bias, target, ids=ids)
    assert_right(out, table[ids], weight, bias, target)
    assert torch.equal(out, adapt(table[ids], weight, bias, target))
    scaled = adapt(table, weight, bias, target, ids=ids, code_scale=torch.tensor(3.0, device=device))
    torch.testing.assert_close(scaled, adapt(table[ids] / 3.0, weight, bias, target))


def inside_nan(tensor, transposed: bool):
    """The same numbers as an offset, strided or transposed view of a buffer that is NaN everywhere else."""
    shape = [size + 5 for size in (tensor.T if transposed else tensor).shape]
    buffer = torch.full(shape, float("nan"), dtype=tensor.dtype, device=tensor.device)
    if tensor.dim() == 1:
        view = buffer[3 : 3 + len(tensor)]
    elif transposed:
        view = buffer.T[2 : 2 + tensor.shape[0], 3 : 3 + tensor.shape[1]]
    else:
        view = buffer[2 : 2 + tensor.shape[0], 3 : 3 + tensor.shape[1]]
    return view.copy_(tensor)


@pytest.mark.parametrize("transposed", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_offset_and_transposed_views(device, transposed, dtype):
    codes, weight, bias, target = inputs(33, 200, 24, dtype, device)
    views = [inside_nan(tensor, transposed) for tensor in (codes, weight)]
    views.append(bias.repeat_interleave(2)[::2] if transposed else inside_nan(bias, False))
    assert_right(adapt(*views, target), codes, weight, bias, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_has_its_target_rms(device, dtype):
    codes, weight, bias, target = inputs(129, 200, 24, dtype, device)
    rms = adapt(codes, weight, bias, target).double().square().mean(1, keepdim=True).sqrt()
    assert ((rms / target.double() - 1).abs() < 2**-8).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with numpy, which talks about NaN
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_stay_zero_and_bad_rows_stay_alone(device, dtype):
    codes, weight, bias, target = inputs(33, 200, 24, dtype, device)
    bias = torch.zeros_like(bias)
    codes[0] = 0
    codes[1, 3] = float("inf")
    codes[2, 5] = float("nan")
    out, ref = adapt(codes, weight, bias, target), exact(codes, weight, bias, target)
    assert (out[0] == 0).all()
    assert not torch.isfinite(out[1]).any() and not torch.isfinite(out[2]).any()
    assert_as_good_as_torch(out[3:], ref[3:], eager(codes, weight, bias, target)[3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", (slow(0.13), 1e-3))
def test_a_bias_that_cancels_the_codes(device, left, dtype):
    """b = -zA (1 - left): of |y|^2 hardly anything is left."""
    codes, weight, bias, target = inputs(33, 200, 24, torch.float64)
    cancelling = (codes[3] @ weight) * (left - 1) + left * bias
    tensors = [tensor.to(dtype) for tensor in (codes, weight, cancelling, target)]
    assert_right(adapt(*(tensor.to(device) for tensor in tensors)), *tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_that_cancel_each_other(device, dtype):
    """Rows of the weight that are nearly equal, with codes of opposite sign: no bias is in it."""
    codes, weight, bias, target = inputs(33, 200, 24)
    weight[1::2] = weight[::2] + 0.01 * weight[1::2]
    codes[5, 1::2] = -codes[5, ::2]
    tensors = [tensor.to(dtype) for tensor in (codes, weight, 0.01 * bias, target)]
    assert_right(adapt(*(tensor.to(device) for tensor in tensors)), *tensors)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides by the zero, and takes the other branch
def test_a_target_of_zero(device):
    codes, weight, bias, target = inputs(17, 64, 8, torch.float32, device)
    target[4] = 0
    weight.requires_grad_()
    out = adapt(codes, weight, bias, target)
    assert (out[4] == 0).all() and (out[5] != 0).all()
    out.sum().backward()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_rows_and_zero_rows_in_half_precision(dtype):
    y = torch.tensor([[3e-4, -3e-4], [0.0, 0.0], [6e4, 6e4]], dtype=dtype)  # their squares leave float16 on both sides
    out = (y * adapter._row_scale(y, 0.5)).to(dtype)
    torch.testing.assert_close(out, torch.tensor([[0.5, -0.5], [0.0, 0.0], [0.5, 0.5]], dtype=dtype))


# ---------------------------------------------------------------------------------------------------------------------
# from embeddings


def embeddings(rows, d, k, dtype, device):
    """x, mean, components, weight, bias, target_rms, with a mean that is not small."""
    generator = torch.Generator().manual_seed(rows + d)
    x = torch.randn(rows, d, generator=generator) * 0.02 + 0.01
    mean = torch.randn(d, generator=generator) * 0.005 + 0.01
    components, _ = torch.linalg.qr(torch.randn(d, k, generator=generator))
    target = torch.full((rows, 1), 0.02)
    return [tensor.to(dtype).to(device) for tensor in (x, mean, components, components.T.contiguous(), mean, target)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,d,k", ((0, 64, 8), (1, 64, 8), (33, 200, 24), slow(129, 300, 37)))
def test_project_and_reconstruct(device, rows, d, k, dtype):
    tensors = embeddings(rows, d, k, dtype, device)
    x, mean, components, weight, bias, target = (tensor.cpu().double() for tensor in tensors)
    cpu = [tensor.cpu() for tensor in tensors]
    codes = project(*tensors[:3])
    assert_as_good_as_torch(codes, (x - mean) @ components, (cpu[0] - cpu[1]) @ cpu[2])
    assert_as_good_as_torch(
        reconstruct(*tensors), reference(x, mean, components, weight, bias, target), reference(*cpu)
    )


@pytest.mark.parametrize("k", (16, 24))
def test_components_that_are_a_transposed_view(device, k):
    """Those of a singular value decomposition are; k 16 fills a block, and is not padded."""
    x, mean, components, weight, bias, target = embeddings(17, 64, k, torch.float32, device)
    view = components.T.contiguous().T
    torch.testing.assert_close(project(x, mean, view), (x - mean) @ components)
    wanted = reference(x, mean, components, weight, bias, target)
    torch.testing.assert_close(reconstruct(x, mean, view, weight, bias, target), wanted)


def test_gradients_from_embeddings(device):
    x, mean, components, weight, bias, target = embeddings(17, 64, 8, torch.float32, device)
    wanted = gradients(
        lambda *pair: adapt(project(x, mean, components), *pair), (weight, bias), target, x, (True, True)
    )
    got = gradients(lambda *pair: reconstruct(x, mean, components, *pair), (weight, bias), target, x, (True, True))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_project_then_pca_inverse_is_the_identity_at_full_width():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=generator, dtype=torch.float64)
    mean = torch.randn(64, generator=generator, dtype=torch.float64)
    components, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    rms = x.square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(reconstruct(x, mean, components, components.T, mean, rms), x)


# ---------------------------------------------------------------------------------------------------------------------
# backward


def test_gradcheck_of_the_formulas():
    codes, weight, bias, target = inputs(5, 6, 5)
    for tensor in (codes, weight, bias):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda *tensors: adapt(*tensors, target), (codes, weight, bias))
    ids = torch.tensor([4, 0, 0, 2])
    assert torch.autograd.gradcheck(lambda *tensors: adapt(*tensors, 0.3, ids=ids), (codes, weight, bias))
    frozen = codes.detach()
    assert torch.autograd.gradcheck(lambda *tensors: adapt(frozen, *tensors, 0.3, ids=ids), (weight, bias))


def gradients(function, tensors, target, g, needed):
    leaves = [t.detach().clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]
    function(*leaves, target).backward(g)
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,d,k", ((1, 64, 8), slow(70, 600, 140), (33, 200, 130)))
def test_gradients_of_codes_weight_and_bias(device, rows, d, k, dtype):
    *tensors, target = inputs(rows, d, k, dtype, device)
    g = inputs(rows, d, k, dtype, device, seed=1)[0] @ tensors[1]
    double, cpu = [t.cpu().double() for t in tensors], [t.cpu() for t in tensors]
    for needed in ((True, True, True), (False, True, False), (True, False, True)):
        ours = gradients(adapt, tensors, target, g, needed)
        refs = gradients(eager, double, target.cpu().double(), g.cpu().double(), needed)
        torchs = gradients(eager, cpu, target.cpu(), g.cpu(), needed)
        for our, ref, torch_grad, need in zip(ours, refs, torchs, needed, strict=True):
            assert (our is not None) == need
            if need:
                assert_as_good_as_torch(our, ref, torch_grad)


@pytest.mark.parametrize("device", ("library",), indirect=True)
def test_gradients_over_several_blocks(device):
    """The backward kernel takes two blocks of a row: a fault in the second one must show."""
    test_gradients_of_codes_weight_and_bias(device, 9, 5000, 20, torch.float32)


@pytest.mark.parametrize("transposed", (False, True))
def test_strided_gradients(device, transposed):
    *tensors, target = inputs(33, 200, 24, torch.float32, device)
    g = inputs(33, 200, 24, torch.float32, device, seed=1)[0] @ tensors[1]
    wanted = gradients(adapt, tensors, target, g, (True, True, True))
    got = gradients(adapt, tensors, target, inside_nan(g, transposed), (True, True, True))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_gradients_through_ids_and_expanded_gradients(device):
    table, weight, bias, _ = inputs(50, 200, 24, torch.float32, device)
    ids = torch.tensor([3, 3, 0, 49], device=device)
    scale = torch.tensor(3.0, device=device)
    for learn_codes in (False, True):
        leaves = [t.clone().requires_grad_(t is not table or learn_codes) for t in (table, weight, bias)]
        adapt(leaves[0], *leaves[1:], 0.3, ids, scale).sum().backward()  # a gradient of strides 0
        doubles = [t.cpu().double().requires_grad_() for t in (table, weight, bias)]
        eager(doubles[0][ids.cpu()] / 3, *doubles[1:], 0.3).sum().backward()
        for leaf, double in zip(leaves, doubles, strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad.cpu().double(), double.grad, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# promises beside the numbers


@pytest.mark.parametrize("dtype", (torch.float32, slow(torch.float16), slow(torch.bfloat16)))
def test_the_same_bits_ten_times(device, dtype):
    rows, d, k = (1000, 600, 70) if NATIVE else (17, 100, 20)  # no two programs at once in the interpreter
    *tensors, target = inputs(rows, d, k, dtype, device)
    g = torch.ones(rows, d, dtype=dtype, device=device)
    first = [adapt(*tensors, target), *gradients(adapt, tensors, target, g, (True, True, True))]
    for _ in range(9):
        again = [adapt(*tensors, target), *gradients(adapt, tensors, target, g, (True, True, True))]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch(monkeypatch, dtype):
    device = use(monkeypatch, "fused")
    if not NATIVE:  # tl.dot is numpy's matmul there, and some BLAS round a row by its place in the tile: row by row
        matmul = np.matmul
        monkeypatch.setattr(np, "matmul", lambda a, b, **more: np.stack([matmul(row[None], b, **more)[0] for row in a]))
    codes, weight, bias, target = inputs(70, 200, 24, dtype, device)
    whole = adapt(codes, weight, bias, target)
    for rows in (slice(0, 1), slice(5, 8), slice(33, 70)):
        assert torch.equal(adapt(codes[rows], weight, bias, target[rows]), whole[rows])


def test_a_row_of_plain_torch_hardly_depends_on_its_batch():
    codes, weight, bias, target = inputs(129, 192, 24)
    alone = adapt(codes[77:78], weight, bias, target[77:78])
    torch.testing.assert_close(adapt(codes, weight, bias, target)[77:78], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_opcheck(monkeypatch, device, dtype):
    if adapter.HAVE_TRITON:
        monkeypatch.setattr(adapter.fused, "_empty", EMPTY)  # it compares the layout of outputs too
    codes, weight, bias, target = inputs(17, 64, 8, dtype, device)
    ids, scale = torch.tensor([0, 16, 3], device=device), torch.tensor(2.0, device=device)
    flat = target[:, 0].float()
    leaves = [tensor.clone().requires_grad_() for tensor in (codes, weight, bias)]
    op = torch.ops.latentwire
    torch.library.opcheck(op.adapt, (*leaves, flat, None, None, None, None))
    torch.library.opcheck(op.adapt, (codes, *leaves[1:], flat[:3], ids, scale, None, None))
    out, scale = op.adapt(codes, weight, bias, flat, None, None, None, None)
    torch.library.opcheck(op.adapt_backward, (torch.ones_like(out), out, flat, scale))
    x, mean, components, *_ = embeddings(17, 64, 8, dtype, device)
    torch.library.opcheck(op.project, (x, mean, components))
    torch.library.opcheck(op.adapt, (x, *leaves[1:], flat[:1], None, None, mean, components))


def test_compile_fullgraph(device):
    codes, weight, bias, target = inputs(17, 64, 8, torch.float32, device)
    weight.requires_grad_()

    def step(codes, weight, bias, target):
        return (adapt(codes * 2, weight, bias, target) + adapt(codes, weight, bias, 0.1)).sin().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if NATIVE else "aot_eager")
    (wanted,) = torch.autograd.grad(step(codes, weight, bias, target), weight)
    (got,) = torch.autograd.grad(compiled(codes, weight, bias, target), weight)
    torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(not NATIVE, reason="CUDA graphs need a CUDA GPU")
def test_cuda_graph(kernel_device):
    codes, weight, bias, target = inputs(33, 200, 24, torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        adapt(codes, weight, bias, target)  # compiled before it is captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = adapt(codes, weight, bias, target)
    codes.neg_()
    graph.replay()
    assert torch.equal(out, adapt(codes, weight, bias, target))


@pytest.mark.skipif(not NATIVE, reason="2^31 numbers need a CUDA GPU")
@pytest.mark.parametrize("form", FORMS)
def test_more_than_two_to_the_31_numbers(monkeypatch, form):
    monkeypatch.undo()  # a poisoned copy of this output would double it
    monkeypatch.setattr(adapter, "choose_form", lambda *sizes: form)
    rows, d, k = 2**19 + 200, 4096, 16
    codes, weight, bias, _ = inputs(300, d, k, torch.bfloat16, "cuda")
    many = codes.repeat(rows // 300 + 1, 1)[:rows]
    last = slice(rows - 100, rows)
    assert_right(adapt(many, weight, bias, 0.02)[last], many[last], weight, bias, 0.02)


def test_which_form_where():
    assert adapter.choose_form(192, 24, 4) == "fused"  # the embedded reader
    assert adapter.choose_form(192, 24, 2) == "fused"
    assert adapter.choose_form(4096, 512, 4) == "library"  # a linear adapter of llama-7b
    assert adapter.choose_form(4096, 512, 2) == "library"
    assert adapter.choose_form(192, 536, 4) == "library"  # an mlp adapter
    assert adapter.choose_form(4096, 32000, 2) == "library"  # a codebook
    assert adapter.choose_form(64, 128, 4) == "library"  # it would spill


def test_a_large_projection_is_a_matmul_of_torch(monkeypatch):
    """On an H200 the kernel lost to it at d 4096."""
    chosen = adapter.choose_form
    device = use(monkeypatch, "fused")
    monkeypatch.setattr(adapter, "choose_form", chosen)
    monkeypatch.setattr(adapter.fused, "fused", lambda *args: pytest.fail("the kernel was launched"))
    x, mean, components, *_ = embeddings(3, 4096, 16, torch.float32, device)
    assert torch.equal(project(x, mean, components), (x - mean) @ components)


def test_a_projection_has_no_gradient(device):
    x, mean, components, *_ = embeddings(17, 64, 8, torch.float32, device)
    assert not project(x.requires_grad_(), mean, components.requires_grad_()).requires_grad


def test_float32_products_follow_either_way_to_set_their_precision(monkeypatch):
    use(monkeypatch, "fused")
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for precision, kind in (("ieee", "tf32x3"), ("tf32", "tf32")):
            settings.fp32_precision = precision
            assert adapter.fused._precision() == kind
    finally:
        settings.fp32_precision = before
    torch.set_float32_matmul_precision("high")
    assert adapter.fused._precision() == "tf32"
    torch.set_float32_matmul_precision("highest")


def test_a_second_import_under_another_name():
    specification = importlib.util.spec_from_file_location("another_name", adapter.__file__)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    codes, weight, bias, target = inputs(3, 6, 5)
    assert torch.equal(module.adapt(codes, weight, bias, target), adapt(codes, weight, bias, target))


def far_rows(tensor, path):
    """The same numbers [3, n], 2^30 numbers from row to row, in a file that is empty elsewhere."""
    buffer = torch.from_file(str(path), shared=True, size=2**31 + tensor.shape[1], dtype=tensor.dtype)
    return buffer.as_strided(tensor.shape, (2**30, 1)).copy_(tensor)


def test_rows_that_are_far_apart(monkeypatch, tmp_path):
    """A row's offset does not fit into 32 bits: 2^31 is negative there."""
    if NATIVE:
        pytest.skip("test_more_than_two_to_the_31_numbers does it on a GPU")
    use(monkeypatch, "fused")
    codes, weight, bias, target = inputs(3, 64, 8, torch.float16)
    far, out = far_rows(codes, tmp_path / "codes"), adapt(codes, weight, bias, target)
    assert torch.equal(adapt(far, weight, bias, target), out)
    assert torch.equal(adapt(far, weight, bias, target[[2]], ids=torch.tensor([2])), out[2:])
    y, flat = torch.addmm(bias, codes, weight), target[:, 0].float()
    far = far_rows(y, tmp_path / "y")
    scale = adapter.fused.match_rms_(far, flat, EPS)
    assert torch.equal(adapter.fused.match_rms_(y, flat, EPS), scale) and torch.equal(far, y)
    wanted = adapter.fused.unmatch_rms(y, y, flat, scale)
    assert torch.equal(adapter.fused.unmatch_rms(far, far, flat, scale), wanted)


def test_tensor_cores_get_blocks_of_16_at_least(monkeypatch):
    use(monkeypatch, "fused")
    for k in (1, 10, 16, 24, 100, 512):
        tiles = adapter.fused._tiles(k, torch.empty(1, dtype=torch.bfloat16))
        assert all(tiles[name] >= 16 for name in ("BM", "BN", "BK")) and tiles["BK"] >= k


@pytest.mark.skipif(not adapter.HAVE_TRITON, reason="triton is not installed")
def test_one_compiled_kernel_serves_every_number_of_rows():
    code = (
        "import torch; from kernels import aot\n"
        "def compiled(N):\n"
        "    launches = aot.record(90, torch.bfloat16, N)\n"
        "    named = [(kernel, dict(zip(kernel.arg_names, args)) | options) for _, kernel, args, options in launches]\n"
        "    return [aot.specialise(kernel, values) for kernel, values in named]\n"
        "assert all(str(compiled(N)) == str(compiled(900)) for N in (1, 16, 2048))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


@pytest.mark.parametrize(
    "change,words",
    (
        ({"codes": torch.zeros(3)}, "codes must be"),
        ({"codes": torch.zeros(3, 5)}, "weight is"),
        ({"bias": torch.zeros(7)}, "bias is"),
        ({"weight": torch.zeros(4, 6, dtype=torch.float16)}, "weight is torch.float16"),
        ({"target_rms": torch.zeros(3)}, "target_rms must be a scalar or"),
        ({"target_rms": torch.ones((), requires_grad=True)}, "gets no gradient"),
        ({"ids": torch.zeros(3)}, "ids must be"),
        ({"code_scale": torch.ones(4)}, "code_scale must be"),
    ),
)
def test_wrong_arguments_are_refused(change, words):
    good = {"codes": torch.zeros(3, 4), "weight": torch.zeros(4, 6), "bias": torch.zeros(6), "target_rms": 1.0}
    with pytest.raises(ValueError, match=words):
        adapt(**(good | change))


def test_triton_is_not_imported_without_cuda():
    code = (
        "import sys, torch; from kernels.adapter import adapt\n"
        "adapt(torch.ones(2, 3), torch.ones(3, 4), torch.zeros(4), 0.1)\n"
        "assert 'triton' not in sys.modules or torch.cuda.is_available()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=HERE, env=environment, check=True)


# ---------------------------------------------------------------------------------------------------------------------
# the interpreter's bfloat16 is wrong: the shim that repairs it is under test like the kernels that need it

if adapter.HAVE_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def round_kernel(x, out, N, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(out + at, adapter.fused._round(tl.load(x + at, mask=at < N), out.dtype.element_ty), mask=at < N)

    @triton.jit
    def dot_kernel(a, b, out, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        acc = adapter.fused._dot(tl.load(a + at), tl.load(b + at), tl.zeros((BLOCK, BLOCK), tl.float32), "ieee")
        tl.store(out + at, acc)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even(monkeypatch, dtype):
    device = use(monkeypatch, "library")
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4000,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(-500, 500, dtype=torch.int32) << 16) + 0x8000 + (127 << 23)  # halfway between two bfloat16
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 1e-45, 65519.0])
    x = torch.cat([bits.view(torch.float32), ties.view(torch.float32), special]).to(device)
    out = torch.empty(len(x), dtype=dtype, device=device)
    round_kernel[(1,)](x, out, len(x), BLOCK=8192)
    torch.testing.assert_close(out.float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dot_multiplies_values(monkeypatch, dtype):
    device = use(monkeypatch, "library")
    a, b = (torch.randn(32, 32, generator=torch.Generator().manual_seed(i)).to(dtype).to(device) for i in (0, 1))
    out = torch.empty(32, 32, device=device)
    dot_kernel[(1,)](a, b, out, BLOCK=32)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# ahead of time: the compiler's report, for GPUs that need not be here


@pytest.mark.slow
@pytest.mark.skipif(not adapter.HAVE_TRITON, reason="triton is not installed")
def test_compiled_kernels_fit_the_hardware(compiled):
    code, result = compiled()
    assert code == 0
    rows = result["kernels"]
    launches = {(row["arch"], row["dtype"], row["launch"]) for row in rows}
    assert len(launches) == len(rows) == 3 * (2 * 16 + 10)  # architectures, launches in halves and in float32
    for row in rows:
        assert row["stack_bytes"] == 0 and row["spill_stores"] == 0, row
        assert row["shared_bytes"] <= row["shared_limit"] and row["blocks_per_multiprocessor"] >= 1, row
        if row["arch"] == "sm_90" and row["dtype"] != "float32" and row["launch"].startswith(("project", "fused")):
            assert row["wgmma"], row
    committed = json.loads((HERE / "results" / "kernels" / "aot.json").read_text())
    if committed["triton"] == result["triton"]:
        assert committed == result, (
            "the table in results/README.md is of other kernels: run python results/run_kernels.py"
        )
