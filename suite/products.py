"""Products of long activations with the small matrices of adapters, made in the type of the activations.

    z = x Wᵀ        ∂x = g W,   ∂W = gᵀ x

Beside a bfloat16 base, x is bfloat16 and W float32: W is rounded for the product and gets its gradient in its own type,
as under autocast. On a CPU the products of the backward pass are then put in the order in which they are quick: with W of
a few rows or a few columns, autograd's own order takes up to five times as long (docs/performance.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def project(x: Tensor, W: Tensor, onto: Tensor | None = None) -> Tensor:
    """`x Wᵀ` of every run, added to `onto` if given: `x [runs, tokens, in]`, `W [runs, out, in]`, `onto` and the result
    `[runs, tokens, out]`."""
    if x.dtype == W.dtype or x.device.type != "cpu":
        W = W.to(x.dtype)
        return torch.bmm(x, W.mT) if onto is None else torch.baddbmm(onto, x, W.mT)
    z: Tensor = _Project.apply(x, W, onto)
    return z


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, onto: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, W)
        W = W.to(x.dtype)
        return torch.bmm(x, W.mT) if onto is None else torch.baddbmm(onto, x, W.mT)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,), (x, W) = upstream, ctx.saved_tensors
        tall = W.shape[1] > W.shape[2]
        of_x = of_W = None
        if ctx.needs_input_grad[0]:
            narrow = W.to(x.dtype)
            of_x = torch.bmm(g, narrow.mT.contiguous().mT if tall else narrow)
        if ctx.needs_input_grad[1]:
            of_W = (torch.bmm(x.mT, g).mT if tall else torch.bmm(g.mT, x)).to(W.dtype)
        return of_x, of_W, g if ctx.needs_input_grad[2] else None
