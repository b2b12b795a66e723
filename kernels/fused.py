"""The operator's three Triton kernels and their launches: one that fuses all of it, one norm, one backward.

adapter.py has the equation, and imports this where Triton runs. BM rows (tokens) by BN of the d columns at a time; BK
holds all of the k codes. Loads outside a matrix give 0. Rows are counted in 64 bits, because N d may exceed 2^31.

An argument that is None is left out when a kernel is compiled, and with it the code under `if ... is None`. N is not
specialised: every batch has another, and a new kernel in mid-training would take seconds.
"""

import os

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# ---------------------------------------------------------------------------------------------------------------------
# kernels. The interpreter gets bfloat16 wrong (triton 3.6-3.9): dot multiplies bit patterns, and float32 -> bfloat16
# truncates. `_dot` and `_round` do it right there; on a GPU they are the plain operations.


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _round(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # NaN stays NaN
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit(do_not_specialize=["N"])
def _fused_kernel(
    x, ids, code_scale, mean, components, weight, bias, target, out, scale,
    N, d, k, eps, x_row, x_col, components_row, weight_row, weight_col, target_row,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """z = (x - mean) @ components, out = z @ weight + bias scaled to its target: BM tokens, all d columns.

    components have zeros behind column k; None: x are codes [N, k], divided by code_scale. With ids, token i reads row
    ids[i] of x. weight None: out are the codes. z stays on the chip. y is stored while its squares are summed, and the
    same program then scales its rows, which come back from the L2 cache.
    """
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < N
    source = rows if ids is None else tl.load(ids + rows, mask=live, other=0).to(tl.int64)
    inner = tl.arange(0, BK)
    if components is None:
        mask = live[:, None] & (inner[None, :] < k)
        z = tl.load(x + source[:, None] * x_row + inner[None, :] * x_col, mask=mask, other=0.0)
        if code_scale is not None:
            z = _round(z.to(tl.float32) / tl.load(code_scale).to(tl.float32), x.dtype.element_ty)
    else:
        z = tl.zeros((BM, BK), tl.float32)
        for start in range(0, d, BN):
            columns = start + tl.arange(0, BN)
            x_mask = live[:, None] & (columns[None, :] < d)
            part = tl.load(x + source[:, None] * x_row + columns[None, :] * x_col, mask=x_mask, other=0.0)
            centre = tl.load(mean + columns, mask=columns < d, other=0.0)
            part = _round(part.to(tl.float32) - centre.to(tl.float32)[None, :], x.dtype.element_ty)
            at = components + columns[:, None] * components_row + inner[None, :]
            basis = tl.load(at, mask=columns[:, None] < d, other=0.0)
            z = _dot(part, basis, z, PRECISION)
        z = _round(z, x.dtype.element_ty)  # what the wire would carry

    if weight is None:
        tl.store(out + rows[:, None] * k + inner[None, :], z, mask=live[:, None] & (inner[None, :] < k))
    else:
        squares = tl.zeros((BM,), tl.float32)
        for start in range(0, d, BN):
            columns = start + tl.arange(0, BN)
            at = weight + inner[:, None] * weight_row + columns[None, :] * weight_col
            block = tl.load(at, mask=(inner[:, None] < k) & (columns[None, :] < d), other=0.0)
            y = _dot(z, block, tl.zeros((BM, BN), tl.float32), PRECISION)
            y += tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
            squares += tl.sum(y * y, axis=1)
            out_mask = live[:, None] & (columns[None, :] < d)
            tl.store(out + rows[:, None] * d + columns[None, :], _round(y, out.dtype.element_ty), mask=out_mask)

        s = tl.load(target + rows * target_row, mask=live, other=0.0) * tl.rsqrt(squares / d + eps)
        tl.store(scale + rows, s, mask=live)
        tl.debug_barrier()  # the threads of a program read what others of it have stored
        for start in range(0, d, BN):
            columns = start + tl.arange(0, BN)
            out_mask = live[:, None] & (columns[None, :] < d)
            y = tl.load(out + rows[:, None] * d + columns[None, :], mask=out_mask, other=0.0).to(tl.float32)
            y = _round(y * s[:, None], out.dtype.element_ty)
            tl.store(out + rows[:, None] * d + columns[None, :], y, mask=out_mask)


@triton.jit
def _match_rms_kernel(y, target, scale, d, eps, y_row, target_row, BN: tl.constexpr):
    """Scale one row of y [N, d] in place. The second read comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BN,), tl.float32)
    for start in range(0, d, BN):
        columns = start + tl.arange(0, BN)
        part = tl.load(y + row * y_row + columns, mask=columns < d, other=0.0).to(tl.float32)
        squares += part * part
    s = tl.load(target + row * target_row) * tl.rsqrt(tl.sum(squares, axis=0) / d + eps)
    tl.store(scale + row, s)
    for start in range(0, d, BN):
        columns = start + tl.arange(0, BN)
        part = tl.load(y + row * y_row + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(y + row * y_row + columns, _round(part * s, y.dtype.element_ty), mask=columns < d)


@triton.jit
def _unmatch_rms_kernel(g, out, target, scale, dy, d, g_row, g_col, out_row, target_row, BN: tl.constexpr):
    """dy = scale * g - slope * out of one row: the gradient of `match_rms`. adapter.py derives the slope."""
    row = tl.program_id(0).to(tl.int64)
    products = tl.zeros((BN,), tl.float32)
    for start in range(0, d, BN):
        columns = start + tl.arange(0, BN)
        grad = tl.load(g + row * g_row + columns * g_col, mask=columns < d, other=0.0).to(tl.float32)
        value = tl.load(out + row * out_row + columns, mask=columns < d, other=0.0).to(tl.float32)
        products += grad * value
    s, t = tl.load(scale + row), tl.load(target + row * target_row)
    slope = tl.where(t == 0, 0.0, tl.sum(products, axis=0) / d / t * (s / t))
    for start in range(0, d, BN):
        columns = start + tl.arange(0, BN)
        grad = tl.load(g + row * g_row + columns * g_col, mask=columns < d, other=0.0).to(tl.float32)
        value = tl.load(out + row * out_row + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(dy + row * d + columns, _round(s * grad - slope * value, dy.dtype.element_ty), mask=columns < d)


# ---------------------------------------------------------------------------------------------------------------------
# launches. No autotuning: timing noise would choose the tiles, and with them the rounding, and the interpreter takes
# one configuration only. Tiles do not depend on N: a row has the same bits in every batch. kernels/aot.py compiles
# these launches for sm_80, sm_89 and sm_90 and counts registers.


def _tiles(k: int, like: Tensor) -> dict[str, int]:
    """Of the fused kernel. z [BM, BK] and two blocks of the weight [BK, BN] must fit into shared memory."""
    BK = max(16, triton.next_power_of_2(k))  # tensor cores multiply 16 at a time
    if like.itemsize == 4:  # three TF32 products for one, unrolled: larger blocks spill
        return {"BM": 32, "BN": 32, "BK": BK, "num_warps": 4, "num_stages": 2}
    for BM, BN in ((64, 64), (64, 32), (32, 32)):
        if (BM + 2 * BN) * BK * 2 <= _shared_bytes(like) - 2048:
            break
    return {"BM": BM, "BN": BN, "BK": BK, "num_warps": 8 if BK >= 128 else 4, "num_stages": 2}


def _shared_bytes(like: Tensor) -> int:
    """Shared memory that a block may have on the tensor's GPU; for a tensor that is on none, an H200's."""
    if like.is_cuda:
        return torch.cuda.get_device_properties(like.device).shared_memory_per_block_optin
    return 227 * 1024


def _row_tile(d: int) -> dict[str, int]:
    return {"BN": min(4096, triton.next_power_of_2(d)), "num_warps": 8 if d > 1024 else 4, "num_stages": 1}


def _precision() -> str:
    """How float32 products are made on tensor cores: as torch is told to make its own."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _near(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its columns are 2^31 numbers apart: kernels count columns in 32 bits."""
    return tensor.contiguous() if tensor.stride(1) * (tensor.shape[1] - 1) >= 2**31 else tensor


def _row_stride(target: Tensor | None) -> int:
    """Of a target that is one number for all rows, or one for each."""
    return 0 if target is None or target.numel() == 1 else 1


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def fused(x, ids, code_scale, mean, components, weight, bias, target, eps: float) -> tuple[Tensor, Tensor | None]:
    """(out, scale) of adapter.py's equation from x, from codes if components is None; (codes, None) without weight."""
    k, width = (components.shape[1],) * 2 if weight is None else weight.shape
    x, tiles, N = _near(x), _tiles(k, x), len(x) if ids is None else len(ids)
    out, scale = _empty(x, N, width), None if weight is None else _empty(x, N, 1, dtype=torch.float32)
    ids, mean, bias = (None if vector is None else vector.contiguous() for vector in (ids, mean, bias))
    if components is not None:
        components = F.pad(components, (0, -k % tiles["BK"])).contiguous()  # aligned rows, or k 100 loads one by one
    with _on_device(x):
        _fused_kernel[(triton.cdiv(N, tiles["BM"]),)](
            x, ids, code_scale, mean, components, weight, bias, target, out, scale,
            N, x.shape[1] if weight is None else width, k, eps, *x.stride(),
            0 if components is None else components.stride(0), *((0, 0) if weight is None else weight.stride()),
            _row_stride(target), PRECISION=_precision(), **tiles,
        )  # fmt: skip
    return out, scale


def match_rms_(y: Tensor, target: Tensor, eps: float) -> Tensor:
    """Scales y [N, d] in place, its columns next to each other; returns the scale [N, 1]."""
    scale, d = _empty(y, len(y), 1, dtype=torch.float32), y.shape[1]
    with _on_device(y):
        _match_rms_kernel[(len(y),)](y, target, scale, d, eps, y.stride(0), _row_stride(target), **_row_tile(d))
    return scale


def unmatch_rms(g: Tensor, out: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """The gradient [N, d] of what `match_rms_` scaled, from the gradient g of its result `out`."""
    g, dy, d = _near(g), _empty(g, *g.shape), g.shape[1]
    with _on_device(g):
        _unmatch_rms_kernel[(len(g),)](
            g, out, target, scale, dy, d, *g.stride(), out.stride(0), _row_stride(target), **_row_tile(d)
        )  # fmt: skip
    return dy
