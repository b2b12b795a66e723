"""The hot path of every stage as one operator: PCA projection + adapter matmul + RMS-norm matching.

The equation, per token (N tokens, LLM width d, code width k):

    z   = (x - mean) @ components              [N, d] -> [N, k]     the sender: PCA codes
    y   = z @ weight + bias                    [N, k] -> [N, d]     the receiver: a linear adapter
    out = y * target_rms / sqrt(mean(y^2) + eps)                    the receiver: the norm that the LLM expects

What it must move and compute from codes to embeddings, in s-byte numbers: read N k s (codes) + k d s (weight), write
N d s; 2 N k d FLOPs for the matmul and about 4 N d for the norm. An eager implementation moves [N, d] six times
(write y, read y, write and read its square, read y for the scale, write out); the floor moves it once.
From x it reads N d s more and computes another 2 N d k FLOPs. But x is always a row of a frozen table here, so the
codes are a [V, k] table made once and the projection is a gather: `project` runs once per run, `adapt` in every step.

The MLP adapter ends in the same matmul: y = [z, h] @ [weight; weight2] + bias with h the hidden layer.

This file holds the plain-torch reference, which every stage calls. It runs on CPU, CUDA and MPS; its gradients are
autograd's.
"""

import torch
from torch import Tensor

# of mean(y^2). Real embeddings have an RMS near 1e-2, a mean square of 1e-4: the usual 1e-6 would be an error of 0.5%
EPS = 1e-12


def project(x: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """PCA codes of embeddings.

    x: [..., d] embeddings; mean: [d]; components: [d, k] with orthonormal columns. Returns [..., k] in the dtype of x.
    """
    return (x - mean) @ components


def match_rms(y: Tensor, target_rms: Tensor | float) -> Tensor:
    """Scale each row of y [N, d] to the RMS `target_rms` (a scalar, or [N, 1] one per row). Zero rows stay zero."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))  # a square of 1e-3 does not fit into float16, nor does EPS
    return (wide * (target_rms * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS))).to(y.dtype)


def adapt(codes: Tensor, weight: Tensor, bias: Tensor, target_rms: Tensor | float) -> Tensor:
    """Embeddings from codes: a matmul, then the norm that the LLM expects.

    codes: [N, k]; weight: [k, d]; bias: [d]; target_rms: scalar or [N, 1], in the unit of the embeddings.
    Returns [N, d], each row with RMS target_rms (to within eps). Differentiable in codes, weight and bias.
    """
    return match_rms(torch.addmm(bias, codes, weight), target_rms)
