"""PiSSA: Principal Singular Values and Singular Vectors Adaptation (Meng et al. 2024, arXiv 2404.02948, eq. 2-4).

LoRA that trains the principal part of W and freezes the rest. With `W = U diag(S) Vᵀ`, S falling, and s = alpha / rank:

    B₀ = U[:, :r] · sqrt(S[:r] / s)  [out, r]        A₀ = sqrt(S[:r] / s) · V[:, :r]ᵀ  [r, in]
    W_res = W - s · B₀ A₀            y = W_res x + s · B A x,    A, B from A₀, B₀

W is never written: the same layer is `y = W x + s · (B A - B₀ A₀) x`, which begins exactly as the base. After
training it is an ordinary LoRA of rank 2r on the untouched base, `[B, -B₀] [A; A₀]`. The decomposition depends on W
alone, not on the run's seed. (The paper has s = 1, and writes weights as in x out.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from methods.lora import Factors, LoRA, LowRank
from suite.method import Adapter, AdapterConfig, Layer, Paper, Shapes, Start, seeded
from suite.products import project
from suite.specs import PositiveInt


class Departing(LowRank):
    """`y + s · (B A - B₀ A₀) x` for every run of a pack: what low-rank factors have become, less what they began as."""

    def __init__(self, factors: Sequence[Factors]) -> None:
        super().__init__(factors)
        self.A0: Tensor
        self.B0: Tensor
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype)
        now = project(project(x, self.A) * scale, self.B)
        then = project(project(x, self.A0) * scale, self.B0)
        return y + (now - then)  # the same sums in the same order: exactly y at the start

    def delta(self, run: int) -> Tensor:
        return self.scale[run] * (self.B[run] @ self.A[run] - self.B0[run] @ self.A0[run])

    def constants(self, run: int) -> dict[str, Tensor]:
        """Where the run began: another machine may give a singular vector the other sign."""
        rank = self.ranks[run]
        return {"A0": self.A0[run, :rank], "B0": self.B0[run, :, :rank]}

    def factors(self, run: int) -> tuple[Tensor, Tensor]:
        """`[A; A₀]` and `s · [B, -B₀]`, of rank 2r."""
        rank = self.ranks[run]
        A = torch.cat([self.A.detach()[run, :rank], self.A0[run, :rank]])
        B = torch.cat([self.B.detach()[run, :, :rank], -self.B0[run, :, :rank]], 1)
        return A, self.scale[run] * B


class PiSSA(LoRA):
    """LoRA from the principal singular triples of W, the rest of W frozen."""

    id = "pissa"
    label = "PiSSA"
    paper = Paper("PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
                  "2404.02948", 2024)

    class Config(AdapterConfig):
        """`rank`, and `alpha` of the scale alpha / rank (None: the rank, so that the scale is the paper's 1).

        `iterations`: power iterations of a randomised decomposition, about equal to the exact one from 16 on and much
        faster for a wide W (None: exact). Its draws depend on the layer, not on the run.
        """

        rank: PositiveInt = 128
        alpha: float | None = Field(default=None, gt=0)
        iterations: int | None = Field(default=None, ge=0)

    def scale(self, config: Any, rank: int) -> float:
        return 1.0 if config.alpha is None else config.alpha / rank

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        found: dict[tuple[int, int | None], tuple[Tensor, Tensor, Tensor]] = {}
        for config in [start.config for start in starts]:  # once per layer, not once per run
            key = (config.rank, config.iterations)
            found[key] = found.get(key) or leading(weight, *key, layer)
        return Departing([self.principal(found[x.config.rank, x.config.iterations], x.config) for x in starts])

    def principal(self, triples: tuple[Tensor, Tensor, Tensor], config: Any) -> Factors:
        """A₀ and B₀ of one run."""
        U, S, Vh = triples
        scale = self.scale(config, config.rank)
        root = (S / scale).sqrt()
        return Factors(root[:, None] * Vh, U * root, scale)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        return doubled(config, shapes)


def doubled(config: Any, shapes: Shapes) -> dict[str, Any]:
    """Stock peft's LoRA of rank 2r that holds what `Departing.factors` gives."""
    return {"r": 2 * config.rank, "lora_alpha": 2 * config.rank, "use_rslora": False,
            "target_modules": [layer.name for layer in config.targets(shapes)]}


def leading(M: Tensor, count: int, iterations: int | None, layer: Layer,
            width: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triples of `M [out, in]`: `U [out, count]`, `S [count]`, `Vh [count, in]`, float64.

    With `iterations`, a randomised range finder of `width` columns (None: `count` + 10) and as many power iterations
    (Halko et al. 2011, arXiv 0909.4061, algorithms 4.4 and 5.1), drawn by the layer's name alone.
    """
    wide = M.double()
    if iterations is None:
        U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
    else:
        width = min(count + 10 if width is None else width, *M.shape)
        draw = torch.randn(M.shape[1], width, generator=seeded("range", layer.name), dtype=torch.float64)
        Q = torch.linalg.qr(wide @ draw.to(wide.device)).Q
        for _ in range(iterations):
            Q = torch.linalg.qr(wide @ torch.linalg.qr(wide.mT @ Q).Q).Q
        U, S, Vh = torch.linalg.svd(Q.mT @ wide, full_matrices=False)
        U = Q @ U
    return U[:, :count], S[:count], Vh[:count]
