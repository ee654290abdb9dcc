"""LoRASC (Li et al. 2024, arXiv 2407.01491) and COLA (Xia et al. 2024, arXiv 2401.04151): LoRA in cascades.

Training is cut into T cascades, one per epoch unless `cascades` says otherwise. Cascade t runs on the backbone W_t,
which begins as the frozen W:

    fast     y = x (W_t + E_t)ᵀ + s · (x A_fᵀ) B_fᵀ             A_f ~ Kaiming uniform, B_f = 0, fresh; s = alpha / rank
    noise    E_t = λ · std(W_t) · U(-1/2, 1/2)                  `uniform`, NoisyTune's law
             E_t,ij ~ N(0, λ²/in · ‖W_t,i‖²)                    `filter_gaussian`, Flat-LoRA's law; row i of W_t
    slow     A_s, B_s = A_f, α B_f                              `product`
             A_s, B_s ← (1-α) A_s + α A_f, (1-α) B_s + α B_f    `factor_ema`
    merge    W_{t+1} = W_t + s · B_s A_s                        E_t is dropped first; optimiser and schedule restart

COLA is α = 1 and no noise. The result is W with a change of rank T · rank; W itself is never written: the merged pairs
ride beside it as frozen factors, which is exact, and stacked they are one ordinary LoRA.

This follows the description of LoRASC: its abstract, and the caption of its figure 1, which names the three stages
(noisy fast training, slow merging with factor α, update of the backbone) without their equations. Our choices, not the
paper's: both laws of the noise and their scale 0.15, drawn once per cascade; both readings of the slow update; a
schedule per cascade with its own warm-up; α has no default, since none is known.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from methods.lora import Factors, LoRA, LowRank, kaiming_a
from suite.method import Adapter, Layer, Paper, RankConfig, Shapes, Start, WholeAdapter, seeded
from suite.products import project
from suite.specs import NonNegativeFloat, PositiveInt

SlowMode = Literal["product", "factor_ema"]
Noise = Literal["uniform", "filter_gaussian", "none"]


class Law(NamedTuple):
    """How cascades close (α and the slow update) and what noise they train in (its law and λ)."""

    slow_alpha: float = 1.0
    slow_mode: SlowMode = "product"
    noise: Noise = "none"
    noise_scale: float = 0.0


class Cascade(LowRank):
    """The fast pair of the cascade at hand on W and all merged pairs. Without cascades it is LoRA, bit for bit.

    While a cascade trains, the fast pair counts in full; once training is over, the pair that its slow update makes.
    """

    def __init__(self, layer: Layer, starts: Sequence[Start], laws: Sequence[Law],
                 fast: Callable[[Layer, Start], Factors]) -> None:
        super().__init__([fast(layer, start) for start in starts])
        self.layer, self.starts, self.laws = layer, starts, laws
        self.training_cascade: int | None = None  # None: nothing is being trained
        self.merged_A: Tensor  # [runs, cascades, rank, in]
        self.merged_B: Tensor  # [runs, cascades, rank, out], without the scale s
        self.slow_A: Tensor  # [runs, rank, in]: where A_s starts; B_s starts at zero
        self.slow_alpha: Tensor  # [runs, 1, 1]
        self.register_buffer("merged_A", self.A.data[:, None][:, :0])
        self.register_buffer("merged_B", self.B.data.mT[:, None][:, :0])
        self.register_buffer("slow_A", self.drawn("slow"))
        alphas = torch.tensor([law.slow_alpha for law in laws], dtype=torch.float64)
        self.register_buffer("slow_alpha", alphas[:, None, None])

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale = self.scale.to(x.dtype)
        if self.merged_A.shape[1]:
            down = project(x, self.merged_A.flatten(1, 2)) * scale
            y = project(down, self.merged_B.flatten(1, 2).mT, y)
        A, B = self.slow() if self.training_cascade is None else (self.A, self.B)
        return project(project(x, A) * scale, B, y)

    def slow(self) -> tuple[Tensor, Tensor]:
        """The pair that the slow update makes of the fast one: A_s `[runs, rank, in]`, B_s `[runs, out, rank]`."""
        alpha = self.slow_alpha.to(self.A.dtype)
        if self.laws[0].slow_mode == "product":
            return self.A, alpha * self.B
        A, B = self.slow_A, torch.zeros_like(self.B)
        if self.merged_A.shape[1]:
            A, B = self.merged_A[:, -1], self.merged_B[:, -1].mT
        return (1 - alpha) * A + alpha * self.A, (1 - alpha) * B + alpha * self.B

    @torch.no_grad()
    def begin(self, stage: int, stages: int) -> None:
        """Merge the slow pair of the cascade that ends, and start a fresh fast pair."""
        if stage > 0:
            A, B = self.slow()
            self.merged_A = torch.cat([self.merged_A, A[:, None]], 1)
            self.merged_B = torch.cat([self.merged_B, B.mT[:, None]], 1)
            self.A.copy_(self.drawn(stage))
            self.B.zero_()
        self.training_cascade = stage

    def end(self) -> None:
        self.training_cascade = None

    def get_extra_state(self) -> Tensor:
        return torch.tensor(-1 if self.training_cascade is None else self.training_cascade)

    def set_extra_state(self, state: Tensor) -> None:
        self.training_cascade = None if state < 0 else int(state)

    def drawn(self, moment: int | str) -> Tensor:
        """An A for every run, drawn from a seed of the run, the layer and the moment: `[runs, rank, in]`."""
        A = torch.zeros_like(self.A.data)
        for run, (start, rank) in enumerate(zip(self.starts, self.ranks, strict=True)):
            again = replace(start, seed=seeded(start.seed, "cascade", moment).initial_seed())
            A[run, :rank] = kaiming_a(self.layer, rank, again)
        return A

    def stacked(self, run: int) -> tuple[Tensor, Tensor]:
        """All merged pairs and the last slow one as one: A `[cascades · rank, in]`, B `[out, cascades · rank]`."""
        rank = self.ranks[run]
        (A, B), merged = self.slow(), self.constants(run)
        return torch.cat([merged["merged_A"], A[run, :rank]]), torch.cat([merged["merged_B"], B[run, :, :rank]], 1)

    def delta(self, run: int) -> Tensor:
        A, B = self.stacked(run)
        return self.scale[run] * (B @ A)

    def factors(self, run: int) -> tuple[Tensor, Tensor]:
        A, B = self.stacked(run)
        return A.detach(), (self.scale[run] * B).detach()

    def constants(self, run: int) -> dict[str, Tensor]:
        """The merged pairs, one below (beside) the other, oldest first; B without the scale s."""
        rank = self.ranks[run]
        return {"merged_A": self.merged_A[run, :, :rank].flatten(0, 1),
                "merged_B": self.merged_B[run, :, :rank].flatten(0, 1).mT}

    @torch.no_grad()
    def load(self, run: int, state: Mapping[str, Tensor]) -> None:
        """Put back the fast pair and the merged ones; runs of the pack that have fewer of these get zeros."""
        for name, tensor in self.state(run).items():
            tensor.copy_(state[name])
        rank = self.ranks[run]
        for name in ("merged_A", "merged_B"):
            pairs = (state[name] if name == "merged_A" else state[name].mT).unflatten(0, (-1, rank))
            held = getattr(self, name)
            grown = held.new_zeros(held.shape[0], max(held.shape[1], len(pairs)), *held.shape[2:])
            grown[:, :held.shape[1]] = held
            grown[run] = 0
            grown[run, :len(pairs), :rank] = pairs
            setattr(self, name, grown)


class NoisyCascade(Cascade, WholeAdapter):
    """A cascade whose backbone has noise while it trains, and none when it is scored or merged.

    W + E is one product, and E lives only as long as it takes: it is drawn from its seed in the forward pass of every
    step, and again in the backward pass. On one CPU core an adapted layer takes 1.3 times (480 tokens) to 1.5 times (240)
    as long as without noise; the draws, not the products, are the difference.
    """

    def __init__(self, layer: Layer, weight: Tensor, *rest: Any) -> None:
        super().__init__(layer, *rest)
        self.weight = weight  # the base's own, neither copied nor moved
        self.spreads: Tensor  # [runs, out or 1, 1], measured when a cascade begins
        self.register_buffer("spreads", None)

    def whole(self, x: Tensor) -> Tensor:
        if self.training_cascade is None:
            y = torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        else:
            y = Redrawn.apply(x, self.noisy)
        return self.forward(x, y)

    def begin(self, stage: int, stages: int) -> None:
        super().begin(stage, stages)
        self.measure()

    def load(self, run: int, state: Mapping[str, Tensor]) -> None:
        super().load(run, state)
        self.measure()

    def measure(self) -> None:
        """The spread of the noise of each run, from the backbone W_t as it is merged now."""
        spreads = []
        for run, law in enumerate(self.laws):
            merged = self.constants(run)
            change = self.scale[run] * (merged["merged_B"] @ merged["merged_A"])
            spreads.append(spread(self.weight.to(change.dtype) + change, law))
        self.spreads = torch.stack(spreads)

    def noisy(self) -> Tensor:
        """W + E of every run, `[runs, out, in]`, equal at every call within a cascade."""
        E = torch.empty(len(self.laws), *self.weight.shape, device=self.weight.device)
        for draw, start, law in zip(E, self.starts, self.laws, strict=True):
            seed = seeded(start.seed, self.layer.name, "noise", self.training_cascade).initial_seed()
            generator = torch.Generator(E.device).manual_seed(seed)
            if law.noise == "uniform":
                draw.uniform_(-0.5, 0.5, generator=generator)
            else:
                draw.normal_(generator=generator)
        return E.to(self.A.dtype).mul_(self.spreads).add_(self.weight)


class Redrawn(torch.autograd.Function):
    """`x Vᵀ` for x `[runs, tokens, in]` and V = `draw()` `[runs, out, in]`, which the backward pass draws again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        ctx.draw = draw
        return torch.bmm(x, draw().mT)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.bmm(gradient, ctx.draw()), None


def spread(W: Tensor, law: Law) -> Tensor:
    """What a draw from U(-1/2, 1/2) or N(0, 1) is multiplied with: `[1, 1]` or, a row each, `[out, 1]`."""
    if law.noise == "uniform":
        return law.noise_scale * W.std().reshape(1, 1)
    return law.noise_scale * W.norm(dim=1, keepdim=True) / W.shape[1] ** 0.5


class COLA(LoRA):
    """LoRA that is merged, and begun anew with a fresh optimiser, at every cascade."""

    id = "cola"
    label = "COLA"
    paper = Paper("Chain of LoRA: Efficient Fine-tuning of Language Models via Residual Learning", "2401.04151", 2024)

    class Config(RankConfig):
        """LoRA's hyper-parameters and `cascades`, the chain length T (None: one per epoch)."""

        cascades: PositiveInt | None = None

    def law(self, config: Any) -> Law:
        """How the method's cascades close and what noise they train in."""
        return Law()

    def structure(self, config: Any) -> Hashable:
        law = self.law(config)
        return (config.target_modules, config.cascades, law.slow_mode, law.noise)

    def stages(self, config: Any, epochs: int) -> int:
        return config.cascades or epochs

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        laws = [self.law(start.config) for start in starts]
        if any(law.noise != "none" and law.noise_scale for law in laws):
            return NoisyCascade(layer, weight, starts, laws, self.start)
        return Cascade(layer, starts, laws, self.start)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> None:  # type: ignore[override]
        """None: the rank grows with the cascades. `Cascade.factors` is the ordinary LoRA."""


class LoRASC(COLA):
    """Cascades with slow merging and noise on the backbone."""

    id = "lorasc"
    label = "LoRASC"
    paper = Paper("LoRASC: Expressive and Generalizable Low-rank Adaptation for Large Models via Slow Cascaded Learning",
                  "2407.01491", 2024)

    class Config(COLA.Config):
        """COLA's hyper-parameters, and those of the slow update and the noise.

        `slow_alpha`: α, to be given. `slow_mode`: the reading of the slow update; averaging factors is not averaging
        products, so `factor_ema` mixes factors of unrelated bases. `noise` and `noise_scale` λ: the law of E_t (0: off).
        """

        slow_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
        slow_mode: SlowMode = "product"
        noise: Noise = "uniform"
        noise_scale: NonNegativeFloat = 0.15

    def law(self, config: Any) -> Law:
        return Law(config.slow_alpha, config.slow_mode, config.noise, config.noise_scale)

    def check(self, config: Any, shapes: Shapes) -> None:
        super().check(config, shapes)
        if config.slow_alpha is None:
            raise ValueError("slow_alpha must be given, from 0 to 1: the paper's value is not known")
