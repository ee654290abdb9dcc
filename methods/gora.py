"""GoRA: Gradient-driven Adaptive Low Rank Adaptation (He et al. 2025, arXiv 2502.12171, eq. 5-10, algorithm 1).

One pass of gradients over the frozen base does two jobs before ordinary LoRA training begins. With
`G_i = dL/dW_i [out, in]`, the mean over N training batches:

    importance   I_i = mean |W_i ∘ G_i|                     a_i = I_i / Σ_j I_j                        (eq. 5)
    rank         r_i = clip( round( b · a_i / c_i ), r_min, r_max )
                 c_i = sqrt(in_i + out_i)                   b = r_ref · Σ_i c_i
    start        A_i ~ U(-1/sqrt(in_i), 1/sqrt(in_i))  [r_i, in_i]
                 B_i = -(gamma · sqrt(in_i) / alpha) · G_i A_iᵀ (A_i A_iᵀ)⁻¹
    layer        y = W_i x + (alpha / sqrt(r_i)) · B_i A_i x        W_i is never changed

so that the adapter begins as about one descent step of length gamma: the step -G_i, projected on the rows of A_i.
(The paper writes weights as in x out; its m is `in` here, as in the official code.)

The official code (hhnqqq/MyTransformers at 4037d4d6) differs in three choices; `variant: official_code` takes them:
it climbs (B has no minus sign), weighs layers by c_i = in_i + out_i, and rounds down: floor(round(b · a_i) / c_i).
Its scripts also train with LoRA+ (`lr_ratio_b: 16`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from methods.lora import Factors, LowRank, check_rank, kaiming_a
from suite.method import (
    Adapter,
    Context,
    GradientRequest,
    Layer,
    Method,
    Paper,
    Preparation,
    RankConfig,
    Shapes,
    Start,
)
from suite.specs import NonNegativeFloat, PositiveFloat, PositiveInt


class Choices(NamedTuple):
    """What the paper and the official code decide differently."""

    sign: int  # of B's start: -1 descends
    size: Callable[[Layer], float]  # c_i
    rank: Callable[[float, float], int]  # (b · a_i, c_i) -> rank before clipping


VARIANTS: dict[str, Choices] = {
    "paper": Choices(-1, lambda x: math.sqrt(x.in_features + x.out_features), lambda share, c: round(share / c)),
    "official_code": Choices(+1, lambda x: x.in_features + x.out_features, lambda share, c: int(round(share) // c)),
}


class Prepared(NamedTuple):
    """What the gradient pass decided: ranks by layer name, and where to read G again."""

    ranks: Mapping[str, int]
    gradients: Mapping[str, Tensor]


class GoRA(Method["GoRA.Config"]):
    """Ranks and starting point of LoRA from one pass of gradients."""

    id = "gora"
    size = "rank"
    label = "GoRA"
    paper = Paper("GoRA: Gradient-driven Adaptive Low Rank Adaptation", "2502.12171", 2025)

    class Config(RankConfig):
        """`rank` is the reference rank r_ref.

        `gamma`: length of the first step (0: B starts at zero, ranks only; the paper's best on MetaMath is 0.08, its
        scripts use 0.05). `rank_min`, `rank_max`: bounds of r_i; None takes half and four times r_ref, the paper's
        4 and 32 at r_ref 8. `allocation`: `importance`, or `uniform` for r_i = r_ref everywhere (start only).
        `batches`, `batch_size`, `gradient_seed`: the sample behind G (the paper takes 64 batches).
        `lr_ratio_b`: learning rate of B over A; 16 in the official scripts, 1 in the paper's equations.
        """

        gamma: NonNegativeFloat = 0.05
        rank_min: int | None = Field(default=None, ge=0)
        rank_max: PositiveInt | None = None
        allocation: Literal["importance", "uniform"] = "importance"
        variant: Literal["paper", "official_code"] = "paper"
        lr_ratio_b: PositiveFloat = 1.0
        batches: PositiveInt = 64
        batch_size: PositiveInt = 32
        gradient_seed: int = Field(default=0, ge=0)

        @property
        def bounds(self) -> tuple[int, int]:
            """(r_min, r_max)."""
            low = self.rank_min if self.rank_min is not None else max(1, self.rank // 2)
            return low, self.rank_max if self.rank_max is not None else 4 * self.rank

        @model_validator(mode="after")
        def _bounds_hold_the_reference(self) -> GoRA.Config:
            low, high = self.bounds
            if low > high:
                raise ValueError(f"rank_min {low} is larger than rank_max {high}")
            return self

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Count at equal importance everywhere; the gradients decide the true one (`trained`)."""
        layers = config.targets(shapes)
        return count(layers, allocate(config, layers, dict.fromkeys([x.name for x in layers], 1.0)))

    def trained(self, config: Any, shapes: Shapes, prepared: Prepared) -> int:
        """Sum of r_i · (in_i + out_i) over the allocated ranks."""
        return count(config.targets(shapes), prepared.ranks)

    def check(self, config: Any, shapes: Shapes) -> None:
        check_rank(config.rank, config.targets(shapes))

    def prepare(self, config: Any, context: Context) -> Preparation:
        layers = config.targets(context.shapes)
        request = GradientRequest(config.batches, config.batch_size, config.gradient_seed)
        gradients = context.gradients(request)
        importances = {x.name: importance(context.weight(x.name), gradients[x.name]) for x in layers}
        ranks = allocate(config, layers, importances)
        return Preparation(Prepared(ranks, gradients), {"ranks": ranks, "importances": importances})

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return LowRank([self.start(layer, start) for start in starts])

    def start(self, layer: Layer, start: Start) -> Factors:
        """A random, B the projected step."""
        config = start.config
        rank = start.prepared.ranks[layer.name]
        A = kaiming_a(layer, rank, start)
        B = projected_step(start.prepared.gradients[layer.name], A, config.gamma, config.alpha)
        sign = VARIANTS[config.variant].sign
        return Factors(A, sign * B, config.alpha / math.sqrt(max(rank, 1)), config.lr_ratio_b)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Prepared) -> dict[str, Any]:
        """An ordinary LoRA with a rank per layer: scale alpha / sqrt(r_i) is rsLoRA's."""
        names = [x.name for x in config.targets(shapes) if prepared.ranks[x.name] > 0]
        return {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": True, "target_modules": names,
                "rank_pattern": {name: prepared.ranks[name] for name in names},
                "alpha_pattern": dict.fromkeys(names, config.alpha)}


def importance(W: Tensor, G: Tensor) -> float:
    """I = mean |W ∘ G|, the first-order sensitivity of the loss to the entries of W (eq. 5)."""
    return float((W.to(torch.float32) * G.to(W.device, torch.float32)).abs().mean(dtype=torch.float64))


def allocate(config: GoRA.Config, layers: Sequence[Layer], importances: Mapping[str, float]) -> dict[str, int]:
    """Rank of every layer by name. What clipping gives or takes is not handed to other layers."""
    if config.allocation == "uniform":
        return {x.name: config.rank for x in layers}
    choices, (low, high) = VARIANTS[config.variant], config.bounds
    total = sum(importances[x.name] for x in layers) or math.inf
    b = config.rank * sum(choices.size(x) for x in layers)
    ranks = {}
    for x in layers:
        raw = choices.rank(b * importances[x.name] / total, choices.size(x))
        ranks[x.name] = min(max(raw, low), high, x.in_features, x.out_features)
    return ranks


def projected_step(G: Tensor, A: Tensor, gamma: float, alpha: float) -> Tensor:
    """(gamma · sqrt(in) / alpha) · G Aᵀ (A Aᵀ)⁻¹: the factor B with which B A is G projected on A's rows. `[out, r]`."""
    if gamma == 0 or A.shape[0] == 0:
        return G.new_zeros(G.shape[0], A.shape[0], dtype=A.dtype)
    wide = A.double()
    step = G.double() @ wide.mT @ torch.linalg.pinv(wide @ wide.mT, hermitian=True)
    return (gamma * math.sqrt(A.shape[1]) / alpha * step).to(A.dtype)


def count(layers: Sequence[Layer], ranks: Mapping[str, int]) -> int:
    """Trained scalars of low-rank factors at these ranks."""
    return sum(ranks[x.name] * (x.in_features + x.out_features) for x in layers)
