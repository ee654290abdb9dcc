"""LoRA-GA: Low-Rank Adaptation with Gradient Approximation (Wang et al. 2024, arXiv 2407.05000, sec. 3, and its code).

LoRA whose factors start on singular vectors of the gradient, so that the first step of B A is as near as rank 2r can
be to the step of full fine-tuning. With the mean gradient `G = dL/dW [out, in]` of a few training examples, m = out,
s = alpha / sqrt(r):

    G ≈ U diag(S) Vᵀ                    randomised, 4r columns and 4 power iterations, S falling
    A₀ = V[:, :r]ᵀ · c   [r, in]        B₀ = U[:, r:2r] · c   [out, r]        c = m^(1/4) / sqrt(gamma)
    y = (W - s · B₀ A₀) x + s · B A x,  A, B from A₀, B₀

A and B take disjoint sets of singular vectors, so that the gradients of B (`s · G A₀ᵀ`, on triples 1..r) and of A
(`s · B₀ᵀ G`, on triples r+1..2r) do not overlap. Written as in PiSSA, `y = W x + s · (B A - B₀ A₀) x`: W untouched, the
export a LoRA of rank 2r.

The paper prints gamma where its authors say that sqrt(gamma) is meant; m is the output width for both factors. This
is the formula of the authors' code; the `lora_ga` of peft is another (it multiplies B, and B alone, by singular
values). The authors take the first examples of the training set; here they are drawn by `gradient_seed`, as for every
method that looks at gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from pydantic import Field
from torch import Tensor

from methods.lora import Factors, LoRA
from methods.pissa import Departing, doubled, leading
from suite.method import Adapter, Context, GradientRequest, Layer, Paper, Preparation, RankConfig, Shapes, Start
from suite.specs import PositiveFloat, PositiveInt

Directions: TypeAlias = Literal["ArB2r", "A2rBr", "ArBr"]


class LoRAGA(LoRA):
    """LoRA from singular vectors of the gradient."""

    id = "lora-ga"
    label = "LoRA-GA"
    paper = Paper("LoRA-GA: Low-Rank Adaptation with Gradient Approximation", "2407.05000", 2024)

    class Config(RankConfig):
        """`rank` r, and `alpha` of the scale s = alpha / sqrt(r).

        `directions`: which of the first 2r singular vectors start A and B: `ArB2r` as above, `A2rBr` the other way
        round, `ArBr` in turns (A the even ones, B the odd ones, counted from 1). `scale`: the factor c: `stable` as
        above with `gamma`; `unit` 1; `gd` 1/s; `weightS` the mean of sqrt(S_W / s) over the r largest singular values
        of W. `batches`, `batch_size`, `gradient_seed`: the examples behind G (the paper's scripts take 8, one at a
        time). `iterations`: power iterations of the randomised decomposition (None: exact).
        """

        directions: Directions = "ArB2r"
        scale: Literal["stable", "unit", "gd", "weightS"] = "stable"
        gamma: PositiveFloat = 16.0
        batches: PositiveInt = 8
        batch_size: PositiveInt = 1
        gradient_seed: int = Field(default=0, ge=0)
        iterations: int | None = Field(default=4, ge=0)

        @property
        def request(self) -> GradientRequest:
            """The sample behind G."""
            return GradientRequest(self.batches, self.batch_size, self.gradient_seed)

    def scale(self, config: Any, rank: int) -> float:
        return config.alpha / math.sqrt(rank)

    def check(self, config: Any, shapes: Shapes) -> None:
        """A and B need 2r singular vectors."""
        for x in config.targets(shapes):
            most = min(x.in_features, x.out_features) // 2
            if config.rank > most:
                raise ValueError(f"rank {config.rank}: LoRA-GA needs twice as many singular vectors of layer {x.name} "
                                 f"({x.out_features} x {x.in_features}); use at most {most}")

    def prepare(self, config: Any, context: Context) -> Preparation:
        return Preparation(context.gradients(config.request))

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        found: dict[object, tuple[Tensor, Tensor]] = {}  # runs that differ in alpha, rate or seed share a decomposition
        factors = []
        for config, gradients in [(start.config, start.prepared) for start in starts]:
            key = (config.request, config.rank, config.iterations, config.directions)
            found[key] = found.get(key) or directions(gradients[layer.name].to(weight.device), config, layer)
            A, B = found[key]
            s = self.scale(config, config.rank)
            c = size(config, s, weight, layer)
            factors.append(Factors(c * A, c * B, s))
        return Departing(factors)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        return doubled(config, shapes)


def directions(G: Tensor, config: Any, layer: Layer) -> tuple[Tensor, Tensor]:
    """Orthonormal rows `[r, in]` for A and columns `[out, r]` for B, out of the first 2r singular vectors of `G [out,
    in]`."""
    r = config.rank
    U, _, Vh = leading(G, 2 * r, config.iterations, layer, width=4 * r)
    first, second = slice(0, r), slice(r, 2 * r)
    of_A, of_B = {"ArB2r": (first, second), "A2rBr": (second, first),
                  "ArBr": (slice(1, 2 * r, 2), slice(0, 2 * r, 2))}[config.directions]
    return Vh[of_A], U[:, of_B]


def size(config: Any, s: float, W: Tensor, layer: Layer) -> float:
    """c, the length of every row of A and column of B at the start."""
    if config.scale == "stable":
        return layer.out_features**0.25 / math.sqrt(config.gamma)
    if config.scale == "weightS":
        _, S, _ = leading(W, config.rank, config.iterations, layer, width=4 * config.rank)
        return float((S / s).sqrt().mean())
    return 1.0 if config.scale == "unit" else 1 / s
