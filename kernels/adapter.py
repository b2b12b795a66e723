"""The hot path of stages 1 and 2 as one operator: PCA projection + adapter matmul + RMS-norm matching.

The equation, per token (N tokens, LLM width d, code width k):

    z   = (x - mean) @ components              [N, d] -> [N, k]     the sender: PCA codes
    y   = z @ weight + bias                    [N, k] -> [N, d]     the receiver: a linear adapter
    out = y * target_rms / sqrt(mean(y^2) + eps)                    the receiver: the norm that the LLM expects

What it must move and compute, in s-byte numbers. From codes: read N k s (codes) + k d s (weight), write N d s; 2 N k d
FLOPs. From x, N d s + k d s and 2 N d k more. On an H200 in bfloat16 (4.3 TB/s, 790 TFLOP/s), d 4096, k 512: 44 us
for 8,192 tokens from codes and 87 from x. An eager implementation passes over [N, d] six times more. Two forms:

    fused     one kernel (kernels/fused.py) from x, from codes, or from a table of codes by token id. z never leaves the
              chip, y comes back from the cache once. Every 64 tokens (32 in float32) read the whole weight.
    library   a matmul of torch, then one kernel that scales y in place.

Which form where (`choose_form`; results/README.md has the times on an H200):

    small reader: the table's projection   fused: x -> codes, once for the V tokens of the vocabulary
    small reader: a linear adapter         fused: its weight [24, 192] has 18 KB; codes gathered by token id. By
                                           arithmetic: no GPU has measured a weight so small
    llama-7b, from codes or from x         library: fused, 512 tokens take 7 times as long from x, 17 times from codes,
                                           400 times in float32. A program reads the whole weight for its 64 tokens,
                                           4 MB at the speed of one multiprocessor. The projection alone takes 1.1 to
                                           1.9 times as long as torch's
    mlp, codebook                          library. mlp: y = [z, hidden layer] @ [weight; weight2] + bias, 512 wider.
                                           codebook: its softmax over n tokens @ their embeddings, so k is n

At llama-7b (2,048 tokens, 900 different ones, a step of 100 ms) all of it is 0.1 to 0.3% of a step: what counts is that
it is right. Two levers need no kernel: x is a row of a frozen table, so its codes are a table [V, k] made once; a token
decodes to the same embedding wherever it stands, so training decodes the different ones only.

Backward, g = dL/dout, s = target_rms / sqrt(mean(y^2) + eps), so y = out / s:

    dL/dy  = s g - slope out,   slope = <g, out> s / (d target_rms^2)                      one kernel, a row at a time
    dz     = dL/dy weight^T,    dweight = z^T dL/dy,    dbias = sum of dL/dy               the library

Nothing of size [N, d] is saved but `out`, which the caller holds anyway, and the x of `reconstruct`. `target_rms` gets
no gradient.

Where it runs: Triton on CUDA (compute capability 8.0 and later; float16, bfloat16, float32), plain torch everywhere
else (CPU, MPS, float64, Windows and macOS, where triton is not even imported). Products accumulate in float32. The
fused form gives a row the same bits whatever else is in its batch; the library may not.

The idea of one small file from equation to registration: Liger-Kernel and the Triton tutorials.
"""

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


def _row_scale(y: Tensor, target_rms: Tensor | float) -> Tensor:
    """What scales each row of y [N, d] to its target: [N, 1], in float32 at least, for float16 cannot hold EPS."""
    wide = torch.promote_types(y.dtype, torch.float32)
    # vector_norm reads y once and stores N numbers; square().mean() would store [N, d] on the way: 14x slower on a CPU
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True, dtype=wide)
    return target_rms * torch.rsqrt(norm.square() / y.shape[-1] + EPS)


# ---------------------------------------------------------------------------------------------------------------------
# where Triton runs. It is imported on CUDA only, or where TRITON_INTERPRET is set: 1 runs the kernels on the CPU, one
# program after another (the tests), 0 only defines them (kernels/aot.py compiles them with no GPU at hand).

HAVE_TRITON = (
    (torch.version.cuda is not None and torch.cuda.is_available()) or "TRITON_INTERPRET" in os.environ
) and importlib.util.find_spec("triton") is not None
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
interpret_on_cpu = False  # a test sets it: CPU tensors go through the kernels, by the interpreter

if HAVE_TRITON:
    from kernels import fused


def _on_triton(tensor: Tensor) -> bool:
    if not HAVE_TRITON or tensor.dtype not in DTYPES or not tensor.numel():
        return False
    if tensor.is_cuda:
        return torch.cuda.get_device_capability(tensor.device) >= (8, 0)  # bfloat16, and 99 KB of shared memory
    return interpret_on_cpu


WIDEST = {2: 512, 4: 64}  # k by bytes a number: z must stay on the chip; three TF32 products for one float32 spill it
# A multiprocessor reads 64 bytes a clock, about 110 GB/s on an H200: 128 KiB in 1.2 us, what a second launch costs
SMALL_WEIGHT = 128 * 1024


def choose_form(d: int, k: int, itemsize: int) -> str:
    """Which of the two forms computes [N, d] fastest on CUDA."""
    return "fused" if k <= WIDEST[itemsize] and d * k * itemsize <= SMALL_WEIGHT else "library"


# ---------------------------------------------------------------------------------------------------------------------
# forward and backward


def _project(x: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    if _on_triton(x) and choose_form(*components.shape, x.itemsize) == "fused":
        return fused.fused(x, None, None, mean, components, None, None, None, EPS)[0]
    return (x - mean) @ components


def _codes(x: Tensor, ids: Tensor | None, code_scale: Tensor | None, mean: Tensor | None, components: Tensor | None):
    """z [N, k]."""
    if components is not None:
        return torch.ops.latentwire.project(x, mean, components)  # the operator: torch.compile traces the backward
    z = x if ids is None else x[ids]
    return z if code_scale is None else z / code_scale


def _adapt(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
    ids: Tensor | None, code_scale: Tensor | None, mean: Tensor | None, components: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x: codes if there are no components; target: [1] or [N], float32 at least.

    Returns out [N, d] and its scale [N, 1], which the backward needs.
    """
    (k, d), N = weight.shape, len(x if ids is None else ids)
    if _on_triton(x) and N and choose_form(d, k, x.itemsize) == "fused":
        return fused.fused(x, ids, code_scale, mean, components, weight, bias, target, EPS)
    y = torch.addmm(bias, _codes(x, ids, code_scale, mean, components), weight)
    if _on_triton(y):
        return y, fused.match_rms_(y, target, EPS)
    scale = _row_scale(y, target[:, None])
    return y.mul_(scale), scale


def _adapt_fake(x, weight, bias, target, ids, code_scale, mean, components):
    N = (x if ids is None else ids).shape[0]
    return x.new_empty(N, weight.shape[1]), x.new_empty(N, 1, dtype=target.dtype)


def _adapt_backward(g: Tensor, out: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """dL/dy [N, d]."""
    if _on_triton(g):
        return fused.unmatch_rms(g, out, target, scale)
    dots = torch.einsum("nd,nd->n", g, out)[:, None].to(scale.dtype)  # [N, 1], and no [N, d] product on the way
    target = target[:, None]
    alpha = torch.where(target == 0, 0, dots * (scale / target).square() / g.shape[1])
    slope = torch.where(scale == 0, 0, alpha / scale)
    return (g * scale).addcmul_(out, slope, value=-1).to(g.dtype)


def _setup_context(ctx, inputs, output):
    x, weight, _, target, *rest = inputs
    ctx.save_for_backward(*output, target, weight, x, *rest)


def _backward(ctx, g, _):
    out, scale, target, weight, *source = ctx.saved_tensors
    for_x, for_weight, for_bias, *_ = ctx.needs_input_grad
    dy = torch.ops.latentwire.adapt_backward(g, out, target, scale)
    d_codes = dy @ weight.T if for_x else None
    d_weight = _codes(*source).T @ dy if for_weight else None
    return d_codes, d_weight, dy.sum(0) if for_bias else None, *[None] * 5


# registered with torch.library: torch.compile(fullgraph=True) and CUDA graphs take them whole. `define` and `impl`, not
# `custom_op`: that one imports torch._dynamo, and with it triton, at the first call (2 s)
OPERATORS = {
    "adapt(Tensor x, Tensor weight, Tensor bias, Tensor target, Tensor? ids, Tensor? code_scale, Tensor? mean, "
    "Tensor? components) -> (Tensor, Tensor)": (_adapt, _adapt_fake),
    "adapt_backward(Tensor g, Tensor out, Tensor target, Tensor scale) -> Tensor": (
        _adapt_backward, lambda g, *_: g.new_empty(g.shape),
    ),
    "project(Tensor x, Tensor mean, Tensor components) -> Tensor": (
        _project, lambda x, mean, components: x.new_empty(x.shape[0], components.shape[1]),
    ),
}  # fmt: skip
if not hasattr(torch.ops.latentwire, "adapt"):  # else this file was imported before, under another name
    for signature, (function, fake) in OPERATORS.items():
        name = "latentwire::" + signature.split("(")[0]
        torch.library.define(name, signature[signature.index("(") :])
        torch.library.impl(name, "CompositeExplicitAutograd", function)  # one function for all devices
        torch.library.register_fake(name, fake)
    torch.library.register_autograd("latentwire::adapt", _backward, setup_context=_setup_context)


# ---------------------------------------------------------------------------------------------------------------------
# what is called: `project` and `adapt` by the stages, `reconstruct` by tests and the benchmark


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


@torch.no_grad()
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
    code_scale: Tensor | None = None,
) -> Tensor:
    """Embeddings from codes: a matmul, then the norm that the LLM expects.

    codes: [N, k], or with ids [N] (int32 or int64, in range) a table [V, k] of which token i reads row ids[i];
    weight: [k, d]; bias: [d]; target_rms: scalar or [N, 1], in the unit of the embeddings; code_scale: a scalar that
    codes are divided by. Any strides; float32, float16, bfloat16, float64 (plain torch).
    Returns [N, d] in that dtype, each row with RMS target_rms (to within eps). Differentiable in codes, weight and
    bias, once. Raises ValueError for shapes, dtypes or devices that do not match.
    """
    rows = "V" if ids is not None else "N"
    _check(codes=(codes, (rows, "k")), weight=(weight, ("k", "d")), bias=(bias, ("d",)))
    if ids is not None and (
        ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64) or ids.device != codes.device
    ):
        raise ValueError(f"ids must be [N], int32 or int64 on {codes.device}, not {list(ids.shape)} {ids.dtype}")
    if code_scale is not None and (code_scale.dim() or code_scale.device != codes.device or code_scale.requires_grad):
        raise ValueError(f"code_scale must be a frozen scalar on {codes.device}, not {list(code_scale.shape)}")
    if codes.requires_grad:  # autograd has the gradients of a gather and of a division
        codes, ids, code_scale = _codes(codes, ids, code_scale, None, None), None, None
    target = _flat_target(target_rms, codes, len(codes if ids is None else ids))
    return torch.ops.latentwire.adapt(codes, weight, bias, target, ids, code_scale, None, None)[0]


def reconstruct(
    x: Tensor, mean: Tensor, components: Tensor, weight: Tensor, bias: Tensor, target_rms: Tensor | float
) -> Tensor:
    """adapt(project(x)): what the wire makes of embeddings x [N, d], in one kernel where the weight is small.

    Shapes, dtypes and errors as in `project` and `adapt`; differentiable in weight and bias.
    """
    _check(
        x=(x, ("N", "d")), mean=(mean, ("d",)), components=(components, ("d", "k")),
        weight=(weight, ("k", "d")), bias=(bias, ("d",)),
    )  # fmt: skip
    target = _flat_target(target_rms, x, len(x))
    return torch.ops.latentwire.adapt(x.detach(), weight, bias, target, None, None, mean, components)[0]
