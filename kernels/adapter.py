"""The hot path of every stage as one operator: PCA projection + adapter matmul + RMS-norm matching.

The equation, per token (N tokens, LLM width d, code width k):

    z   = (x - mean) @ components              [N, d] -> [N, k]     the sender: PCA codes
    y   = z @ weight + bias                    [N, k] -> [N, d]     the receiver: a linear adapter
    out = y * target_rms / sqrt(mean(y^2) + eps)                    the receiver: the norm that the LLM expects

What it must move and compute, in s-byte numbers. Codes to embeddings: read N k s (codes) + k d s (weight), write N d s;
2 N k d FLOPs. From x, N d s and 2 N d k more. An eager implementation moves [N, d] six times (write y, read y, write
and read its square, read y for the scale, write out); the floor moves it once. Three ways to come near it:

    fused        one kernel; z and the row's norm never leave the chip. Every program reads the whole weight, twice:
                 right where the weight is small (a small reader: d 192, k 24), at any N. Read this one first.
    code space   |y|^2 = [z 1] G [z 1]^T with G = [weight; bias] [weight; bias]^T, k+1 wide: the scale of a row is
                 known before any of its d columns exists, so the rest is one GEMM that scales as it stores. Large N.
    rows         a library GEMM, then one kernel that reads y once and scales it in place. Small N, or k near d.

`choose_form` says which, and why. Further levers need no kernel: x is a row of a frozen table, so the codes are a
[V, k] table made once and the projection is a gather (`ids`); a token decodes to the same embedding wherever it stands,
so training decodes the unique ids only. -mean @ components is a bias of the projection.

Backward, g = dL/dout, s = target_rms / sqrt(mean(y^2) + eps), so dL/dy = s g - alpha y with alpha = <g, out> s^2 / (d
target_rms^2) per row. y is never needed: W = g weight^T, q = [z 1] G,

    dz      = s W - alpha q
    dweight = (s z)^T g - (z^T alpha z) weight - (sum of alpha z) (x) bias
    dbias   = sum of s g - (sum of alpha z) weight - (sum of alpha) bias

which is two small GEMMs for a pass over y. Where those cost more (few rows, wide codes), dL/dy is formed instead.
Nothing of size [N, d] is saved but `out`, which the caller holds anyway. `target_rms` gets no gradient.

The MLP adapter ends in the same matmul: y = [z, h] @ [weight; weight2] + bias with h the hidden layer. The codebook
adapter does too, with k = V (softmax weights; of a large V, the tokens that a batch blends at all) and the frozen
embedding table as weight. It looks like attention, softmax(z keys^T) @ table, and gets no kernel of its own: a value
row is d = 4096 wide, so a fused program cannot hold its output and would score all keys again for every 512 columns,
which doubles the FLOPs (scores are k/d = 1/8 of them) to save 4 passes over [N, V]: 62 us beside 195 us of matmuls at
N = 512, V = 32k on an H200, by arithmetic. What it takes on a CPU is in results/README.md.

Where it runs: Triton on CUDA (compute capability 8.0 and later; float16, bfloat16, float32), plain torch everywhere
else (CPU, MPS, float64, Windows and macOS, where triton is not even imported). Products accumulate in float32. The
fused and code-space forms give a row the same bits whatever else is in its batch; a library GEMM may not.

The idea of the norm from per-row sums beside a GEMM: QuACK (gemm_rms); of one small file from equation to
registration: Liger-Kernel and the Triton tutorials.
"""

from __future__ import annotations  # tl.constexpr below is not looked up where there is no triton

import importlib.util
import os

import torch
from torch import Tensor

# of mean(y^2). Real embeddings have an RMS near 1e-2, a mean square of 1e-4: the usual 1e-6 would be an error of 0.5%
EPS = 1e-12


# ---------------------------------------------------------------------------------------------------------------------
# the reference: the equation as one would first write it. Tests and benchmarks compare with it, stages never call it.


def reference(x: Tensor, mean: Tensor, components: Tensor, weight: Tensor, bias: Tensor, target_rms: Tensor) -> Tensor:
    """x: [N, d]; mean, bias: [d]; components: [d, k]; weight: [k, d]; target_rms: scalar or [N, 1]. Returns [N, d]."""
    z = (x - mean) @ components
    y = z @ weight + bias
    return y * target_rms / torch.sqrt(y.square().mean(-1, keepdim=True) + EPS)


# ---------------------------------------------------------------------------------------------------------------------
# plain torch: CPU, MPS, float64; and what the library does best on CUDA


def match_rms(y: Tensor, target_rms: Tensor | float) -> Tensor:
    """Scale each row of y [N, d] to the RMS `target_rms` (a scalar, or [N, 1] one per row). Zero rows stay zero."""
    return y * _row_scale(y, target_rms)


def _row_scale(y: Tensor, target_rms: Tensor | float) -> Tensor:
    """[N, 1], in float32 at least: a square of 1e-3 does not fit into float16, nor does EPS."""
    wide = torch.promote_types(y.dtype, torch.float32)
    # vector_norm reads y once and stores N numbers; square().mean() would store [N, d] on the way: 14x slower on a CPU
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=wide)
    return target_rms * torch.rsqrt(norm.square() / y.shape[-1] + EPS)


def gram_matrix(weight: Tensor, bias: Tensor) -> Tensor:
    """G = [weight; bias] [weight; bias]^T, which turns codes into the squared norms of their embeddings.

    weight: [k, d]; bias: [d]. Returns [k', k'] with k' = k + 1 rounded up to 16 (zeros; aligned rows load faster), in
    float32 at least: of a cancelling row, bfloat16 entries would leave nothing. It must be computed again after every
    update of weight or bias: `adapt` does so when it is given none. A receiver with a frozen adapter computes it once.
    """
    k, d = weight.shape
    padded = torch.cat([weight, bias[None], weight.new_zeros(-(k + 1) % 16, d)])
    if padded.is_cuda and padded.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(padded, padded.T, out_dtype=torch.float32)  # products of halves are exact in float32
    padded = padded.to(torch.promote_types(weight.dtype, torch.float32))
    return padded @ padded.T


# ---------------------------------------------------------------------------------------------------------------------
# where Triton runs. It is imported on CUDA only, or where TRITON_INTERPRET is set: 1 runs the kernels on the CPU, one
# program after another (the tests), 0 only defines them (kernels/aot.py compiles them with no GPU at hand).

HAVE_TRITON = (
    (torch.version.cuda is not None and torch.cuda.is_available()) or "TRITON_INTERPRET" in os.environ
) and importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
interpret_on_cpu = False  # a test sets it: CPU tensors go through the kernels, by the interpreter

if HAVE_TRITON:
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
else:

    def jit(function):
        return function  # never called


def _on_triton(tensor: Tensor) -> bool:
    if not HAVE_TRITON or tensor.dtype not in DTYPES:
        return False
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device) >= (8, 0)  # bfloat16, and 99 KB of shared memory
    return interpret_on_cpu


# ---------------------------------------------------------------------------------------------------------------------
# the kernels. BM rows (tokens) by BN columns by BK of the contracted width at a time. Loads outside a matrix give 0.
#
# The interpreter gets bfloat16 wrong (triton 3.6-3.9): dot multiplies bit patterns, and float32 -> bfloat16 truncates.
# `_dot` and `_round` do it right there; on a GPU they are the plain operations.


@jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if INTERPRET:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def _dot_gram(z, g, acc, PRECISION: tl.constexpr):
    """acc + z @ g for float32 g, of which one bfloat16 keeps too little: high and low half, 16 bits together."""
    if z.dtype == tl.bfloat16:
        if INTERPRET:
            high = _round(g, tl.bfloat16)
            return _dot(z, _round(g - high.to(tl.float32), tl.bfloat16), _dot(z, high, acc, PRECISION), PRECISION)
        high = g.to(tl.bfloat16)
        low = (g - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(z, low, tl.dot(z, high, acc))
    return _dot(z.to(tl.float32), g, acc, PRECISION)  # float16 could overflow where float32 does not


@jit
def _round(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # NaN stays NaN
        return (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@jit
def _source_rows(ids, rows, live, GATHER: tl.constexpr):
    """Which row of the codes each of these tokens reads: its own, or the one that its id names. 64 bits: N d > 2^31."""
    if GATHER:
        rows = tl.load(ids + rows, mask=live, other=0)
    return rows.to(tl.int64)


@jit
def _fused_kernel(
    x, ids, mean, components, weight, bias, target, out, scale,
    N, d, k, eps, x_row, x_col, components_row, components_col, weight_row, weight_col, target_row,
    FROM_X: tl.constexpr, GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x (embeddings if FROM_X, else codes) -> out, scale. One program: BM tokens, all d columns; BK >= k.

    z [BM, BK] and the sums of squares stay in registers. The second sweep computes y again: the weight is small, so
    that costs less than storing y and reading it back.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < N
    source = _source_rows(ids, rows, live, GATHER)
    inner = tl.arange(0, BK)
    if FROM_X:
        z = tl.zeros((BM, BK), tl.float32)
        for start in range(0, d, BN):
            columns = start + tl.arange(0, BN)
            part = tl.load(
                x + source[:, None] * x_row + columns[None, :] * x_col,
                mask=live[:, None] & (columns[None, :] < d), other=0.0,
            ).to(tl.float32)  # fmt: skip
            part -= tl.load(mean + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
            basis = tl.load(
                components + columns[:, None] * components_row + inner[None, :] * components_col,
                mask=(columns[:, None] < d) & (inner[None, :] < k), other=0.0,
            )  # fmt: skip
            z = _dot(_round(part, basis.dtype), basis, z, PRECISION)
        z = _round(z, x.dtype.element_ty)  # what the wire would carry
    else:
        z = tl.load(
            x + source[:, None] * x_row + inner[None, :] * x_col,
            mask=live[:, None] & (inner[None, :] < k), other=0.0,
        )  # fmt: skip

    squares = tl.zeros((BM,), tl.float32)
    for start in range(0, d, BN):
        columns = start + tl.arange(0, BN)
        part = tl.load(
            weight + inner[:, None] * weight_row + columns[None, :] * weight_col,
            mask=(inner[:, None] < k) & (columns[None, :] < d), other=0.0,
        )  # fmt: skip
        y = _dot(z, part, tl.zeros((BM, BN), tl.float32), PRECISION)
        y += tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        squares += tl.sum(y * y, axis=1)

    s = tl.load(target + rows * target_row, mask=live, other=0.0) * tl.rsqrt(squares / d + eps)
    tl.store(scale + rows, s, mask=live)

    for start in range(0, d, BN):
        columns = start + tl.arange(0, BN)
        part = tl.load(
            weight + inner[:, None] * weight_row + columns[None, :] * weight_col,
            mask=(inner[:, None] < k) & (columns[None, :] < d), other=0.0,
        )  # fmt: skip
        y = _dot(z, part, tl.zeros((BM, BN), tl.float32), PRECISION)
        y += tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out + rows.to(tl.int64)[:, None] * d + columns[None, :],
            _round(y * s[:, None], out.dtype.element_ty),
            mask=live[:, None] & (columns[None, :] < d),
        )


@jit
def _code_norm_kernel(
    codes, ids, gram, weight, bias, target, scale,
    N, d, k, eps, cancelled, codes_row, codes_col, gram_row, weight_row, weight_col, target_row,
    GATHER: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """scale = target_rms / sqrt(|y|^2 / d + eps) from codes and G alone.

    G is symmetric: blocks below its diagonal count twice, blocks above are not read. Where bias and codes cancel, so do
    the terms of z G z^T, and float32 keeps too few digits: rows whose |y|^2 is below `cancelled` times the sum of the
    squared terms that make it up get it from y itself. Other rows keep their bits: no row depends on its neighbours.
    """
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    live = rows < N
    start = codes + _source_rows(ids, rows, live, GATHER)[:, None] * codes_row
    squares = tl.zeros((BM,), tl.float32)
    terms = tl.zeros((BM,), tl.float32)
    for j in range(0, k, BK):
        across = j + tl.arange(0, BK)
        z = tl.load(start + across[None, :] * codes_col, mask=live[:, None] & (across[None, :] < k), other=0.0)
        q = tl.zeros((BM, BK), tl.float32)
        for i in range(j + BK, k, BK):
            down = i + tl.arange(0, BK)
            below = tl.load(start + down[None, :] * codes_col, mask=live[:, None] & (down[None, :] < k), other=0.0)
            block = tl.load(
                gram + down[:, None] * gram_row + across[None, :],
                mask=(down[:, None] < k) & (across[None, :] < k), other=0.0,
            )  # fmt: skip
            q = _dot_gram(below, block, q, PRECISION)
        block = tl.load(
            gram + across[:, None] * gram_row + across[None, :],
            mask=(across[:, None] < k) & (across[None, :] < k), other=0.0,
        )  # fmt: skip
        q = _dot_gram(z, block, 2.0 * q, PRECISION)
        z = z.to(tl.float32)
        with_bias = tl.load(gram + k * gram_row + across, mask=across < k, other=0.0)  # weight @ bias
        squares += tl.sum(z * (q + 2.0 * with_bias[None, :]), axis=1)
        diagonal = tl.load(gram + across * (gram_row + 1), mask=across < k, other=0.0)
        terms += tl.sum(z * z * diagonal[None, :], axis=1)
    bias_square = tl.load(gram + k * gram_row + k)
    squares += bias_square
    lost = live & (squares < cancelled * (terms + bias_square))
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        exact = tl.zeros((BM,), tl.float32)
        for n in range(0, d, BK):
            columns = n + tl.arange(0, BK)
            y = tl.zeros((BM, BK), tl.float32)
            for i in range(0, k, BK):
                down = i + tl.arange(0, BK)
                z = tl.load(start + down[None, :] * codes_col, mask=live[:, None] & (down[None, :] < k), other=0.0)
                part = tl.load(
                    weight + down[:, None] * weight_row + columns[None, :] * weight_col,
                    mask=(down[:, None] < k) & (columns[None, :] < d), other=0.0,
                )  # fmt: skip
                y = _dot(z, part, y, PRECISION)
            y += tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
            exact += tl.sum(y * y, axis=1)
        squares = tl.where(lost, exact, squares)
    s = tl.load(target + rows * target_row, mask=live, other=0.0) * tl.rsqrt(squares / d + eps)
    tl.store(scale + rows, s, mask=live)


@jit
def _matmul_kernel(
    a, ids, b, bias, scale, out,
    N, n, k, a_row, a_col, b_row, b_col,
    GATHER: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [N, n] = (a [N, k] @ b [k, n] + bias [n]) * scale [N]. A GEMM whose epilogue costs no pass over out."""
    # programs that run together share rows and columns: GROUP row blocks by all column blocks (Triton's tutorial 3)
    program, column_blocks = tl.program_id(0), tl.cdiv(n, BN)
    group = program // (GROUP * column_blocks)
    group_rows = tl.minimum(tl.cdiv(N, BM) - group * GROUP, GROUP)
    row_block = group * GROUP + (program % (GROUP * column_blocks)) % group_rows
    column_block = (program % (GROUP * column_blocks)) // group_rows

    rows = row_block * BM + tl.arange(0, BM)
    columns = column_block * BN + tl.arange(0, BN)
    live = rows < N
    source = _source_rows(ids, rows, live, GATHER)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, k, BK):
        inner = start + tl.arange(0, BK)
        left = tl.load(
            a + source[:, None] * a_row + inner[None, :] * a_col,
            mask=live[:, None] & (inner[None, :] < k), other=0.0,
        )  # fmt: skip
        right = tl.load(
            b + inner.to(tl.int64)[:, None] * b_row + columns[None, :] * b_col,
            mask=(inner[:, None] < k) & (columns[None, :] < n), other=0.0,
        )  # fmt: skip
        acc = _dot(left, right, acc, PRECISION)
    acc += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    if SCALED:
        acc *= tl.load(scale + rows, mask=live, other=0.0)[:, None]
    tl.store(
        out + rows.to(tl.int64)[:, None] * n + columns[None, :],
        _round(acc, out.dtype.element_ty),
        mask=live[:, None] & (columns[None, :] < n),
    )


@jit
def _match_rms_kernel(y, target, scale, d, eps, target_row, BN: tl.constexpr):
    """One program: one row of y [N, d], scaled in place. The second read comes from the cache."""
    row = tl.program_id(0)
    start = y + row.to(tl.int64) * d
    squares = tl.zeros((BN,), tl.float32)
    for n in range(0, d, BN):
        columns = n + tl.arange(0, BN)
        part = tl.load(start + columns, mask=columns < d, other=0.0).to(tl.float32)
        squares += part * part
    s = tl.load(target + row * target_row) * tl.rsqrt(tl.sum(squares, axis=0) / d + eps)
    tl.store(scale + row, s)
    for n in range(0, d, BN):
        columns = n + tl.arange(0, BN)
        part = tl.load(start + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(start + columns, _round(part * s, y.dtype.element_ty), mask=columns < d)


@jit
def _grad_rows_kernel(
    g, out, scale, dots, column_sums, N, d, g_row, g_col, BM: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """One pass over g and out: <g, out> of each row, and the sum of scale * g over each program's BM rows."""
    program = tl.program_id(0)
    rows = program * BM + tl.arange(0, BM)
    live = rows < N
    s = tl.load(scale + rows, mask=live, other=0.0)
    dot = tl.zeros((BM,), tl.float32)
    for n in range(0, d, BN):
        columns = n + tl.arange(0, BN)
        inside = live[:, None] & (columns[None, :] < d)
        wide = rows.to(tl.int64)[:, None]
        grad = tl.load(g + wide * g_row + columns[None, :] * g_col, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(out + wide * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dot += tl.sum(grad * value, axis=1)
        tl.store(column_sums + program.to(tl.int64) * d + columns, tl.sum(grad * s[:, None], axis=0), mask=columns < d)
    tl.store(dots + rows, dot, mask=live)


@jit
def _grad_codes_kernel(
    g, codes, ids, gram, weight, scale, alpha, out,
    N, d, k, g_row, g_col, codes_row, codes_col, gram_row, weight_row, weight_col,
    GATHER: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dz [N, k] = scale * g @ weight^T - alpha * (z @ G + weight @ bias): two GEMMs, two accumulators, one store."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    across = tl.program_id(1) * BN + tl.arange(0, BN)
    live = rows < N
    start = codes + _source_rows(ids, rows, live, GATHER)[:, None] * codes_row
    q = tl.zeros((BM, BN), tl.float32)
    for i in range(0, k, BK):
        inner = i + tl.arange(0, BK)
        z = tl.load(start + inner[None, :] * codes_col, mask=live[:, None] & (inner[None, :] < k), other=0.0)
        block = tl.load(
            gram + inner[:, None] * gram_row + across[None, :],
            mask=(inner[:, None] < k) & (across[None, :] < k), other=0.0,
        )  # fmt: skip
        q = _dot_gram(z, block, q, PRECISION)
    q += tl.load(gram + k * gram_row + across, mask=across < k, other=0.0)[None, :]
    w = tl.zeros((BM, BN), tl.float32)
    for n in range(0, d, BK):
        columns = n + tl.arange(0, BK)
        grad = tl.load(
            g + rows.to(tl.int64)[:, None] * g_row + columns[None, :] * g_col,
            mask=live[:, None] & (columns[None, :] < d), other=0.0,
        )  # fmt: skip
        part = tl.load(
            weight + across[None, :] * weight_row + columns[:, None] * weight_col,
            mask=(across[None, :] < k) & (columns[:, None] < d), other=0.0,
        )  # fmt: skip
        w = _dot(grad, part, w, PRECISION)
    s = tl.load(scale + rows, mask=live, other=0.0)[:, None]
    slope = tl.load(alpha + rows, mask=live, other=0.0)[:, None]
    tl.store(
        out + rows.to(tl.int64)[:, None] * k + across[None, :],
        _round(s * w - slope * q, out.dtype.element_ty),
        mask=live[:, None] & (across[None, :] < k),
    )


# ---------------------------------------------------------------------------------------------------------------------
# launches. One configuration per kernel and dtype, no autotuning: timing noise would choose the tiles, and with them
# the rounding, and the interpreter takes one only. kernels/aot.py compiles exactly these for sm_80, sm_89 and sm_90 and
# counts registers.


def _options(kernel: str, like: Tensor, rows: int = 0) -> dict[str, int]:
    """Tile sizes and launch options of a kernel for the dtype and the GPU of a tensor, and this many rows."""
    half = like.itemsize == 2
    hopper = (
        _shared_bytes(like) >= 200 * 1024
    )  # else A100 (163 KB) or a consumer GPU (99 KB): smaller tiles, or they spill
    if kernel == "match_rms":
        return {"BN": 4096, "num_warps": 8, "num_stages": 1}
    if kernel == "grad_rows":
        return {"BM": 64, "BN": 128, "num_warps": 8, "num_stages": 2}
    if kernel == "fused":  # few rows: small blocks, to use more multiprocessors. Many: the weight is read less often
        tile = {"BM": 16, "BN": 64 if half else 32}
        if rows >= 8192:
            tile["BM"] = 64 if half or hopper else 32
        return tile | {"num_warps": 4 if half or rows < 8192 else 8, "num_stages": 2}
    inner = 64 if like.dtype == torch.bfloat16 else 32  # float16 codes meet a float32 G (see _dot_gram): 64 would spill
    if kernel == "code_norm":
        return {"BM": 64, "BK": inner, "num_warps": 4 if hopper else 8, "num_stages": 3}
    if kernel == "matmul":
        tile = {"BM": 128, "BN": 256 if half and hopper else 128, "BK": 64 if half else 32}
        return tile | {"GROUP": 8, "num_warps": 8, "num_stages": 3}
    if kernel == "grad_codes":
        return {"BM": 64, "BN": 128 if hopper else 64, "BK": inner, "num_warps": 8, "num_stages": 3}
    raise KeyError(kernel)


# The fused kernel streams its weight through one multiprocessor: 64 bytes a clock, about 110 GB/s on an H200, twice. At
# 128 KiB that is 2.4 us, what the second launch of the other forms costs; at d 4096, k 512 (4 MB) it would be 77 us.
FUSED_BYTES = 128 * 1024
FUSED_ROW_BYTES = 256  # of z [BM, k], which stays in registers: k 128 in halves, 64 in float32. Twice that spills
# Code space saves a pass over [N, d], read and write: 4 d bytes a row in halves, 3.8 ns at d 4096 on an H200. It costs
# 2 N k^2 FLOPs (half of G, in two halves; 1.3 ns a row at k 512 and half the peak) and G itself, 2 k^2 d FLOPs and a
# launch: 5 us. So it pays from N = 5 us / 2.5 ns = 2,000 rows on, for k up to a quarter of d. Arithmetic, not measured.
CODE_SPACE_ROWS = 2048
# |y|^2 below this share of its terms is computed again: their rounding, 2^-17 and 2^-24, then stays below that of out
CANCELLED = {torch.bfloat16: 2**-6, torch.float16: 2**-2, torch.float32: 2**-2}


def choose_form(N: int, d: int, k: int, itemsize: int) -> str:
    """Which of the three forms computes codes [N, k] -> embeddings [N, d] fastest on CUDA."""
    if d * k * itemsize <= FUSED_BYTES and k * itemsize <= FUSED_ROW_BYTES:
        return "fused"
    if N >= CODE_SPACE_ROWS and 4 * k <= d:
        return "code space"
    return "rows"


def _shared_bytes(tensor: Tensor) -> int:
    """Shared memory that a block may have on the tensor's GPU; for a tensor that is on none, an H200's."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
    return 227 * 1024


def _precision() -> str:
    """How float32 products are made on tensor cores: as torch.set_float32_matmul_precision says. Halves: no matter."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _near(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if its columns are 2^31 numbers apart: kernels count rows in 64 bits, columns in 32."""
    return tensor.contiguous() if tensor.stride(1) * (tensor.shape[1] - 1) >= 2**31 else tensor


def _target_row(target: Tensor) -> int:
    return 0 if target.numel() == 1 else 1


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def _launch_fused(x, ids, mean, components, weight, bias, target) -> tuple[Tensor, Tensor]:
    """From x if mean and components are given, else from codes."""
    k, d = weight.shape
    x, N = _near(x), len(x) if ids is None else len(ids)
    out, scale = _empty(x, N, d), _empty(x, N, 1, dtype=torch.float32)
    from_x = mean is not None
    options = _options("fused", x, N)
    grid = (triton.cdiv(N, options["BM"]),)
    with _on_device(x):
        _fused_kernel[grid](
            x, ids, mean, components, weight, bias, target, out, scale,
            N, d, k, EPS, *x.stride(), *(components.stride() if from_x else (0, 0)), *weight.stride(),
            _target_row(target), FROM_X=from_x, GATHER=ids is not None, PRECISION=_precision(),
            BK=max(16, triton.next_power_of_2(k)), **options,
        )  # fmt: skip
    return out, scale


def _launch_code_norm(codes, ids, gram, weight, bias, target) -> Tensor:
    k, d = weight.shape
    codes, N = _near(codes), len(codes) if ids is None else len(ids)
    scale = _empty(codes, N, 1, dtype=torch.float32)
    options = _options("code_norm", codes)
    with _on_device(codes):
        _code_norm_kernel[(triton.cdiv(N, options["BM"]),)](
            codes, ids, gram, weight, bias, target, scale,
            N, d, k, EPS, CANCELLED[codes.dtype], *codes.stride(), gram.stride(0), *weight.stride(),
            _target_row(target), GATHER=ids is not None, PRECISION=_precision(), **options,
        )  # fmt: skip
    return scale


def _launch_matmul(a, ids, b, bias, scale) -> Tensor:
    """(a[ids] @ b + bias) * scale; ids and scale may be None. bias may have another dtype than a."""
    k, n = b.shape
    a, N = _near(a), len(a) if ids is None else len(ids)
    out = _empty(a, N, n)
    options = _options("matmul", a)
    grid = (triton.cdiv(N, options["BM"]) * triton.cdiv(n, options["BN"]),)
    with _on_device(a):
        _matmul_kernel[grid](
            a, ids, b, bias, scale, out, N, n, k, *a.stride(), *b.stride(),
            GATHER=ids is not None, SCALED=scale is not None, PRECISION=_precision(), **options,
        )  # fmt: skip
    return out


def _launch_match_rms(y, target) -> Tensor:
    """Scales contiguous y [N, d] in place; returns the scale [N, 1]."""
    scale = _empty(y, len(y), 1, dtype=torch.float32)
    with _on_device(y):
        _match_rms_kernel[(len(y),)](
            y, target, scale, y.shape[1], EPS, _target_row(target), **_options("match_rms", y)
        )  # fmt: skip
    return scale


def _launch_grad_rows(g, out, scale) -> tuple[Tensor, Tensor]:
    """(<g, out> [N, 1], sum of scale * g [d]), both float32."""
    g, (N, d) = _near(g), g.shape
    options = _options("grad_rows", g)
    programs = triton.cdiv(N, options["BM"])
    dots, column_sums = _empty(g, N, 1, dtype=torch.float32), _empty(g, programs, d, dtype=torch.float32)
    with _on_device(g):
        _grad_rows_kernel[(programs,)](g, out, scale, dots, column_sums, N, d, *g.stride(), **options)
    return dots, column_sums.sum(0)


def _launch_grad_codes(g, codes, ids, gram, weight, scale, alpha) -> Tensor:
    k, d = weight.shape
    g, codes, N = _near(g), _near(codes), len(g)
    out = _empty(g, N, k)
    options = _options("grad_codes", g)
    with _on_device(g):
        _grad_codes_kernel[(triton.cdiv(N, options["BM"]), triton.cdiv(k, options["BN"]))](
            g, codes, ids, gram, weight, scale, alpha, out,
            N, d, k, *g.stride(), *codes.stride(), gram.stride(0), *weight.stride(),
            GATHER=ids is not None, PRECISION=_precision(), **options,
        )  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------------------------
# forward and backward, registered with torch.library: torch.compile(fullgraph=True) and CUDA graphs take them whole


def _adapt(
    codes: Tensor, weight: Tensor, bias: Tensor, target: Tensor, ids: Tensor | None, gram: Tensor | None
) -> tuple[Tensor, Tensor]:
    """target: [1] or [N], float32 at least. Returns out [N, d] and its scale [N, 1], which the backward needs."""
    k, d = weight.shape
    N = len(codes) if ids is None else len(ids)
    if _on_triton(codes) and N:
        form = choose_form(N, d, k, codes.itemsize)
        if form == "fused":
            return _launch_fused(codes, ids, None, None, weight, bias, target)
        if form == "code space":
            gram = gram_matrix(weight, bias) if gram is None else gram
            scale = _launch_code_norm(codes, ids, gram, weight, bias, target)
            return _launch_matmul(codes, ids, weight, bias, scale), scale
    y = torch.addmm(bias, codes if ids is None else codes[ids], weight)
    if _on_triton(y) and N:
        return y, _launch_match_rms(y, target)
    scale = _row_scale(y, target[:, None])
    return y.mul_(scale), scale


def _adapt_fake(codes, weight, bias, target, ids, gram):
    N = codes.shape[0] if ids is None else ids.shape[0]
    wide = torch.promote_types(codes.dtype, torch.float32)
    return codes.new_empty(N, weight.shape[1]), codes.new_empty(N, 1, dtype=wide)


def _adapt_backward(
    g: Tensor, out: Tensor, codes: Tensor, weight: Tensor, bias: Tensor, target: Tensor, scale: Tensor,
    ids: Tensor | None, gram: Tensor | None, need_codes: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of codes [N, k], weight [k, d], bias [d]; an empty tensor for one that is not needed."""
    k, d = weight.shape
    N, dtype = len(g), g.dtype
    on_triton = _on_triton(g) and N > 0
    # what code space adds, 2 k^2 (N + d) FLOPs, must be less than what it saves, a few passes over [N, d]
    code_space = 4 * k <= d and choose_form(N, d, k, g.itemsize) != "rows"
    if on_triton:
        dots, scaled_sum = _launch_grad_rows(g, out, scale)
    else:
        dots = torch.einsum("nd,nd->n", g, out)[:, None].to(scale.dtype)  # [N, 1], and no [N, d] product on the way
        scaled_sum = (scale[:, 0].to(dtype) @ g).to(scale.dtype) if need_bias and code_space else None
    target = target[:, None]
    # dL/dy = scale g - alpha y, and y = out / scale
    alpha = torch.where(target == 0, 0, dots * (scale / target).square() / d)  # [N, 1]
    if not code_space:  # form dL/dy
        slope = torch.where(scale == 0, 0, alpha / scale)
        dy = torch.addcmul(g * scale, out, slope, value=-1).to(dtype)
        z = codes if ids is None else codes[ids]
        return (
            dy @ weight.T if need_codes else _empty(g, 0),
            z.T @ dy if need_weight else _empty(g, 0),
            dy.sum(0) if need_bias else _empty(g, 0),
        )
    d_codes, d_weight, d_bias = (_empty(g, 0) for _ in range(3))  # outputs of a custom operator must not be one tensor
    z = codes
    if ids is not None and (need_weight or need_bias or not on_triton):
        z = codes[ids]
    if need_codes:
        gram = gram_matrix(weight, bias) if gram is None else gram
        if on_triton:
            d_codes = _launch_grad_codes(g, codes, ids, gram, weight, scale, alpha)
        else:
            q = z.to(gram.dtype) @ gram[:k, :k] + gram[k, :k]
            d_codes = ((g @ weight.T) * scale - alpha * q).to(dtype)
    if need_weight or need_bias:
        alpha_z = z * alpha  # [N, k], in the dtype of alpha
        alpha_z_sum = alpha_z.sum(0)  # [k]
        if need_weight:
            moment = alpha_z.to(dtype).T @ z  # [k, k]
            d_weight = torch.addmm(torch.outer(alpha_z_sum.to(dtype), bias), moment, weight)
            d_weight = torch.addmm(d_weight, (z * scale).to(dtype).T, g, beta=-1)
        if need_bias:
            d_bias = scaled_sum - alpha_z_sum @ weight.to(alpha_z.dtype) - alpha.sum() * bias
            d_bias = d_bias.to(dtype)
    return d_codes, d_weight, d_bias


def _adapt_backward_fake(g, out, codes, weight, bias, target, scale, ids, gram, need_codes, need_weight, need_bias):
    return (
        g.new_empty((g.shape[0], weight.shape[0]) if need_codes else 0),
        g.new_empty(weight.shape if need_weight else 0),
        g.new_empty(bias.shape if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    codes, weight, bias, target, ids, gram = inputs
    out, scale = output
    ctx.save_for_backward(out, codes, weight, bias, target, scale, ids, gram)


def _backward(ctx, g, _):
    out, codes, weight, bias, target, scale, ids, gram = ctx.saved_tensors
    need = ctx.needs_input_grad[:3]
    gradients = torch.ops.latentwire.adapt_backward(g, out, codes, weight, bias, target, scale, ids, gram, *need)
    return *(grad if wanted else None for grad, wanted in zip(gradients, need, strict=True)), None, None, None


def _project(x: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    if _on_triton(x) and len(x):
        offset = -(mean.float() @ components.float())  # [k], float32: a rounded one would shift every code
        return _launch_matmul(x, None, components, offset, None)
    return (x - mean) @ components


def _project_fake(x, mean, components):
    return x.new_empty(x.shape[0], components.shape[1])


def _reconstruct(x: Tensor, mean: Tensor, components: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return _launch_fused(x, None, mean, components, weight, bias, target)[0]


def _reconstruct_fake(x, mean, components, weight, bias, target):
    return x.new_empty(x.shape[0], weight.shape[1])


# `define` and `impl`, not `custom_op`: that one imports torch._dynamo, and with it triton, at the first call (2 s)
torch.library.define(
    "latentwire::adapt",
    "(Tensor codes, Tensor weight, Tensor bias, Tensor target, Tensor? ids, Tensor? gram) -> (Tensor, Tensor)",
)
torch.library.define(
    "latentwire::adapt_backward",
    "(Tensor g, Tensor out, Tensor codes, Tensor weight, Tensor bias, Tensor target, Tensor scale, Tensor? ids, "
    "Tensor? gram, bool need_codes, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("latentwire::project", "(Tensor x, Tensor mean, Tensor components) -> Tensor")
torch.library.define(
    "latentwire::reconstruct",
    "(Tensor x, Tensor mean, Tensor components, Tensor weight, Tensor bias, Tensor target) -> Tensor",
)
for name, function, fake in (
    ("adapt", _adapt, _adapt_fake),
    ("adapt_backward", _adapt_backward, _adapt_backward_fake),
    ("project", _project, _project_fake),
    ("reconstruct", _reconstruct, _reconstruct_fake),
):
    torch.library.impl(f"latentwire::{name}", "CompositeExplicitAutograd", function)  # one function for all devices
    torch.library.register_fake(f"latentwire::{name}", fake)
torch.library.register_autograd("latentwire::adapt", _backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------------------
# what the stages call


def _check(**tensors: tuple[Tensor, tuple]) -> None:
    """Shapes, dtypes and devices: a kernel that is handed the wrong ones reads memory that is not there."""
    sizes: dict[str, int] = {}
    (first_name, (first, _)) = next(iter(tensors.items()))
    for name, (tensor, letters) in tensors.items():
        if tensor.dim() != len(letters):
            raise ValueError(f"{name} must be [{', '.join(letters)}], not {list(tensor.shape)}")
        for letter, size in zip(letters, tensor.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{name} is {list(tensor.shape)}, but {letter} is {sizes[letter]} in another argument")
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, {first_name} is {first.dtype} on {first.device}"
            )


def _flat_target(target_rms: Tensor | float, like: Tensor, N: int) -> Tensor:
    """[1] or [N], in float32 at least."""
    wide = torch.promote_types(like.dtype, torch.float32)
    if not isinstance(target_rms, Tensor):
        return torch.full((1,), target_rms, dtype=wide, device=like.device)
    if target_rms.requires_grad:
        raise ValueError("target_rms gets no gradient here: to learn a gain, multiply the result by it")
    if target_rms.dim() and tuple(target_rms.shape) != (N, 1):
        raise ValueError(f"target_rms must be a scalar or [N, 1] with N {N}, not {list(target_rms.shape)}")
    return target_rms.to(device=like.device, dtype=wide).reshape(-1).contiguous()


def project(x: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """PCA codes of embeddings.

    x: [N, d] embeddings; mean: [d]; components: [d, k] with orthonormal columns. Returns [N, k] in the dtype of x.
    Without gradients: x, mean and components are frozen. Raises ValueError for shapes or dtypes that do not match.
    """
    _check(x=(x, ("N", "d")), mean=(mean, ("d",)), components=(components, ("d", "k")))
    return torch.ops.latentwire.project(x, mean, components)


def adapt(
    codes: Tensor,
    weight: Tensor,
    bias: Tensor,
    target_rms: Tensor | float,
    ids: Tensor | None = None,
    gram: Tensor | None = None,
) -> Tensor:
    """Embeddings from codes: a matmul, then the norm that the LLM expects.

    codes: [N, k], or with ids [N] (int32 or int64, in range) a table [V, k] of which token i reads row ids[i];
    weight: [k, d]; bias: [d]; target_rms: scalar or [N, 1], in the unit of the embeddings; gram: `gram_matrix(weight,
    bias)`, if weight and bias have not changed since. Any strides; float32, float16, bfloat16, float64 (plain torch).
    Returns [N, d] in that dtype, each row with RMS target_rms (to within eps). Differentiable in codes, weight and
    bias, once. Raises ValueError for shapes, dtypes or devices that do not match.
    """
    rows = "V" if ids is not None else "N"
    _check(codes=(codes, (rows, "k")), weight=(weight, ("k", "d")), bias=(bias, ("d",)))
    if ids is not None:
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or ids.device != codes.device:
            raise ValueError(f"ids must be [N], int32 or int64 on {codes.device}, not {list(ids.shape)} {ids.dtype}")
        if codes.requires_grad:  # the gradient of a gather is a scatter: autograd has one
            codes, ids = codes[ids], None
    N = codes.shape[0] if ids is None else ids.shape[0]
    return torch.ops.latentwire.adapt(codes, weight, bias, _flat_target(target_rms, codes, N), ids, gram)[0]


def reconstruct(
    x: Tensor, mean: Tensor, components: Tensor, weight: Tensor, bias: Tensor, target_rms: Tensor | float
) -> Tensor:
    """adapt(project(x)): what the wire makes of embeddings x [N, d]. One kernel where the weight is small.

    Shapes, dtypes and errors as in `project` and `adapt`; differentiable in weight and bias.
    """
    _check(
        x=(x, ("N", "d")), mean=(mean, ("d",)), components=(components, ("d", "k")),
        weight=(weight, ("k", "d")), bias=(bias, ("d",)),
    )  # fmt: skip
    k, d = weight.shape
    small = choose_form(len(x), d, k, x.itemsize) == "fused" and len(x) > 0
    learning = torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad)
    if _on_triton(x) and small and not learning:
        return torch.ops.latentwire.reconstruct(x, mean, components, weight, bias, _flat_target(target_rms, x, len(x)))
    return adapt(project(x, mean, components), weight, bias, target_rms)
