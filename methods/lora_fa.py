"""LoRA-FA: LoRA whose A is frozen where it starts (Zhang et al. 2023, arXiv 2308.03303, sec. 3).

    y = W x + s · B A x,    s = alpha / rank,    A [rank, in] ~ Kaiming uniform, frozen    B [out, rank] = 0, trained

Only B has a gradient, g_B = s · (dL/dy) (A x)ᵀ, so of the input of width `in` nothing need be kept for the backward
pass but A x of width `rank`. What is trained is rank · out per layer, about half of LoRA.

`projected`: later versions of the paper, and peft's optimiser, correct the gradient before Adam sees it,

    g_B ← (1/s²) · g_B (A Aᵀ)⁻¹,

with which s · g_B A is the gradient of W projected on the rows of A. A random A of width far above its rank has A Aᵀ
close to I/3, so that Adam, which does not see the scale of a gradient, trains about the same with and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from methods.lora import Factors, LoRA, LowRank
from suite.method import Adapter, Layer, Paper, RankConfig, Shapes, Start
from suite.products import project


class FrozenA(LowRank):
    """LoRA's layer with A a buffer. `projected`: for each run, whether the gradient of B is corrected."""

    def __init__(self, factors: Sequence[Factors], projected: Sequence[bool]) -> None:
        super().__init__(factors)
        A = self.A.detach()  # [runs, rank, in]
        del self.A
        self.register_buffer("A", A)
        self.correction: Tensor | None
        correction = None  # [runs, rank, rank]
        if any(projected):
            inverse = torch.linalg.pinv(A.double() @ A.double().mT, hermitian=True) / self.scale**2
            chosen = torch.tensor(projected)[:, None, None]
            correction = torch.where(chosen, inverse, torch.eye(A.shape[1], dtype=torch.float64))
        self.register_buffer("correction", correction)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        down = project(x, self.A) * self.scale.to(x.dtype)  # [runs, tokens, rank]
        B = self.B.view_as(self.B)
        correction = self.correction
        if correction is not None and B.requires_grad:
            B.register_hook(lambda gradient: gradient @ correction)
        return project(down, B, y)

    def state(self, run: int) -> dict[str, Tensor]:
        return {"B": super().state(run)["B"]}

    def factors(self, run: int) -> tuple[Tensor, Tensor]:
        """The frozen A, which the seed gives, and s · B."""
        rank = self.ranks[run]
        return self.A[run, :rank], self.scale[run] * self.B.detach()[run, :, :rank]


class LoRAFA(LoRA):
    """LoRA with a frozen random A."""

    id = "lora-fa"
    label = "LoRA-FA"
    paper = Paper("LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning",
                  "2308.03303", 2023)

    class Config(RankConfig):
        """LoRA's hyper-parameters; the scale is alpha / rank.

        `projected`: correct the gradient of B (later versions of the paper); off, as in the method first published.
        """

        projected: bool = False

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of rank · out."""
        return sum(config.rank * x.out_features for x in config.targets(shapes))

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return FrozenA([self.start(layer, start) for start in starts], [start.config.projected for start in starts])

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        """An ordinary LoRA with the scale folded into B."""
        return {**super().peft_config(config, shapes, prepared), "lora_alpha": config.rank}
