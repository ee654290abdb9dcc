"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, arXiv 2402.09353, eq. 5-6 and 11, sec. 4.3).

The weight is taken apart into a length per output and a direction; the length is trained, the direction learns by LoRA:

    y = g ∘ (W x + s · B A x),    g_i = mu_i / ‖(W + s · B A)_i‖₂,    s = alpha / rank
    A [rank, in] as LoRA's, B [out, rank] = 0, mu_i = ‖W_i‖₂  [out], so that g = 1 at the start

The norm counts as a constant in the backward pass (sec. 4.3). (The paper writes weights as in x out: its columns are
our rows.)

The norms are computed without the dense matrix of each run: with one product W Aᵀ [out, rank] for the pack,

    ‖(W + s B A)_i‖² = ‖W_i‖² + 2 s (W Aᵀ)_i · B_i + s² B_i (A Aᵀ) B_iᵀ

which costs the flops of forming B A but a share rank / in of its memory traffic, and is exactly ‖W_i‖² while B is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from methods.lora import Factors, LoRA, LowRank
from suite.method import Adapter, AdapterConfig, Layer, Paper, Shapes, Start
from suite.specs import PositiveInt


class Decomposed(LowRank):
    """`g ∘ (y + s · B A x)` for every run of a pack. A run of smaller rank is padded, as in LoRA."""

    def __init__(self, factors: Sequence[Factors], W: Tensor) -> None:
        super().__init__(factors)
        self.W = W  # the base's own frozen weight, not a copy
        wide = torch.promote_types(W.dtype, torch.float32)
        self.squares: Tensor
        self.register_buffer("squares", W.to(wide).square().sum(1)[:, None])  # [out, 1]
        self.magnitude = nn.Parameter(self.squares.sqrt().mT.repeat(len(factors), 1))  # mu, [runs, out]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """The length of every row of W + s · B A, `[runs, out]`."""
        A, B, scale = self.A, self.B, self.scale.to(self.A.dtype)
        WA = (self.W.to(A.dtype) @ A.flatten(0, 1).mT).unflatten(1, A.shape[:2]).movedim(1, 0)  # [runs, out, rank]
        added = (2 * scale * WA + scale**2 * torch.bmm(B, torch.bmm(A, A.mT))) * B
        squares = self.squares + added.sum(-1, keepdim=True)
        return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()[..., 0]  # a row of zeros stays one

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (self.magnitude / self.norms())[:, None] * super().forward(x, y)

    def delta(self, run: int) -> Tensor:
        W = self.W.to(self.A.dtype)
        return (self.magnitude[run] / self.norms()[run])[:, None] * (W + super().delta(run)) - W

    def state(self, run: int) -> dict[str, Tensor]:
        return super().state(run) | {"magnitude": self.magnitude.data[run]}


class DoRA(LoRA):
    """LoRA of the direction of each row of W, and a trained length."""

    id = "dora"
    label = "DoRA"
    paper = Paper("DoRA: Weight-Decomposed Low-Rank Adaptation", "2402.09353", 2024)

    class Config(AdapterConfig):
        """`rank`, and `alpha` of the scale alpha / rank (None: twice the rank, as in the paper at its ranks 16 and
        32)."""

        rank: PositiveInt = 32
        alpha: float | None = Field(default=None, gt=0)

    def scale(self, config: Any, rank: int) -> float:
        return 2.0 if config.alpha is None else config.alpha / rank

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of rank · (in + out) + out."""
        return super().trainable(config, shapes) + sum(x.out_features for x in config.targets(shapes))

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return Decomposed([self.start(layer, start) for start in starts], weight)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        return {"r": config.rank, "lora_alpha": self.scale(config, config.rank) * config.rank, "use_rslora": False,
                "use_dora": True, "target_modules": [layer.name for layer in config.targets(shapes)]}
