"""MALoRA: Mixture of Asymmetric Low-Rank Adaptation (Wang et al. 2024, arXiv 2410.22782), and the paper's baselines.

With N experts on a linear layer, gates from a router of its own, per token, and K experts kept (sec. 2, eq. 3-5):

    g = softmax(W_g x),  T = the K largest g              W_g [N, in]
    MoLoRA      y = W x + (alpha / r) · Σ_{t in T} g_t · B_t A_t x              A_t [r, in],  B_t [out, r]
    MoAsyLoRA   the same with every A_t frozen
    AsyLoRA     y = W x + (alpha / r) · B A x with A frozen, no router          (arXiv 2402.16842)
    MALoRA      y = W x + (alpha / r̄) · Σ_{t in T} g_t · B_t P_t S_A x          (eq. 6-7)

The experts' A_t resemble one another and their B_t do not. MALoRA has one basis S_A [d, in] for all of them and
coefficients P_t [r̄, d], and spends what that saves on a larger rank (sec. 3.3): d = λ r N, r̄ = r + (1 - λ) r.
It starts from one Kaiming draw K_t per expert (eq. 8-10):

    U_t Σ_t V_t = SVD(K_t),  K_t [d, in]        S_A = beta · V_0        P_t = (U_t Σ_t)[:r̄] / beta        B_t = 0

so that P_t S_A is distributed as A_t, and beta parts the scale, hence the pace of learning, between S_A and P_t. The
gates are balanced by `coefficient · N · Σ_t F_t · mean(g_t)` per router, F_t the share of tokens sent to expert t.

The paper does not decide: the form of the balance (here the Switch form, as MixLoRA prints it, arXiv 2404.15159 eq.
8-9; its coefficient is 0.001 in sec. 4.1 and 0.01 in tables 8 and 9), whether kept gates are divided by their sum
(eq. 4 says no), and the router's start. Each is an option. Its dropout of 0.05 on x is left out: no method here has one.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methods.lora import Factors, check_rank, kaiming_a
from methods.lora_fa import FrozenA, LoRAFA
from suite.method import Adapter, AdapterConfig, Layer, Method, Paper, Shapes, Start, seeded
from suite.products import project
from suite.specs import NonNegativeFloat, PositiveFloat, PositiveInt

_MALORA = Paper("MALoRA: Mixture of Asymmetric Low-Rank Adaptation for Enhanced Multi-Task Learning", "2410.22782", 2024)


class ScaledConfig(AdapterConfig):
    """`rank` of an adapter or expert; `alpha`: None is twice the rank, as in every row of the paper's tables 8 and 9."""

    rank: PositiveInt = 8
    alpha: PositiveFloat | None = None

    @property
    def scale(self) -> float:
        return 2.0 if self.alpha is None else self.alpha / self.inner

    @property
    def inner(self) -> int:
        """The rank that alpha is divided by."""
        return self.rank


class MixtureConfig(ScaledConfig):
    """`rank` is one expert's. `top_k`: experts kept per token (all of them: the dense MoLoRA of arXiv 2309.05444).

    `renormalise`: divide the kept gates by their sum, which at the start multiplies the output by about experts / top_k.
    `router`: W_g starts as N(0, 0.02), or Kaiming uniform like A. `aux_coefficient`: of the balance. `aux_counting`:
    F_t counts tokens that keep t (Σ F = top_k), those whose first choice is t, or the former over top_k.
    `aux_reduction`: of the routers' balances, `mean` or `sum`.
    """

    experts: PositiveInt = 8
    top_k: PositiveInt = 2
    renormalise: bool = False
    router: Literal["normal", "kaiming"] = "normal"
    aux_coefficient: NonNegativeFloat = 0.01
    aux_counting: Literal["kept", "first", "share"] = "kept"
    aux_reduction: Literal["mean", "sum"] = "mean"

    @model_validator(mode="after")
    def _enough_experts(self) -> MixtureConfig:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is larger than experts {self.experts}")
        return self


class Mixture(Adapter):
    """`y + s · Σ_t g_t B_t (A_t x)` over the kept experts, for every run of a pack.

    All experts are one product of rank experts · rank with the gates as a mask between the factors. A token costs what
    all experts cost, but two large products beat gathering its experts (benchmarks/dispatch.py). `tensors` are each
    run's, by name, padded with zeros to the largest; those in `frozen` are not trained.
    """

    mergeable = False
    A: Tensor  # [runs, experts, rank, in]
    B: Tensor  # [runs, out, experts, rank]
    W_g: Tensor  # [runs, experts, in]
    scale: Tensor
    coefficient: Tensor

    def __init__(self, tensors: Sequence[Mapping[str, Tensor]], configs: Sequence[MixtureConfig],
                 frozen: Collection[str] = ()) -> None:
        super().__init__()
        self.config = configs[0]  # only what the runs of a pack have in common is read from it
        self.sizes = [{name: tuple(slice(n) for n in tensor.shape) for name, tensor in own.items() if name not in frozen}
                      for own in tensors]
        for name in tensors[0]:
            stacked = _stack([own[name] for own in tensors])
            if name in frozen:
                self.register_buffer(name, stacked)
            else:
                self.register_parameter(name, nn.Parameter(stacked))
        self.register_buffer("scale", torch.tensor([c.scale for c in configs], dtype=torch.float64)[:, None, None])
        self.register_buffer("coefficient", torch.tensor([c.aux_coefficient for c in configs], dtype=torch.float64))
        self._balance: Tensor | None = None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gates = self.scale.to(x.dtype) * self.gates(x)  # [runs, tokens, experts]
        down = gates[..., None] * self.down(x)  # [runs, tokens, experts, rank]
        return project(down.flatten(2), self.B.flatten(2), y)

    def down(self, x: Tensor) -> Tensor:
        """A_t x of every expert, `[runs, tokens, experts, rank]`."""
        return _product(x, self.A)

    def gates(self, x: Tensor) -> Tensor:
        """g, zero where an expert is not kept, `[runs, tokens, experts]`; x is float32 or wider, so the softmax is."""
        config = self.config
        g = project(x, self.W_g).softmax(-1)
        best = g.topk(config.top_k).indices
        kept = torch.zeros_like(g).scatter(-1, best, 1.0)
        counted = kept if config.aux_counting != "first" else torch.zeros_like(g).scatter(-1, best[..., :1], 1.0)
        share = 1 / config.top_k if config.aux_counting == "share" else 1.0
        self._balance = self.coefficient.to(x.dtype) * share * balance(g, counted, self.real(x))
        gates = g * kept
        return gates / gates.sum(-1, keepdim=True) if config.renormalise else gates

    def penalty(self) -> Tensor | None:
        if self._balance is None or self.config.aux_reduction == "mean":
            return self._balance
        return self.siblings * self._balance  # the layers' penalties are averaged

    def delta(self, run: int) -> Tensor:
        raise TypeError("a mixture has no ΔW: which experts a token gets depends on the token")

    def state(self, run: int) -> dict[str, Tensor]:
        return {name: getattr(self, name).data[run][own] for name, own in self.sizes[run].items()}


def balance(g: Tensor, counted: Tensor, real: Tensor) -> Tensor:
    """`N · Σ_t F_t · mean(g_t)` over real tokens, `[runs]`, from g and counts `[runs, tokens, N]`, real `[runs, tokens]`.
    """
    weights = (real / real.sum(1, keepdim=True).clamp(min=1))[:, None]  # [runs, 1, tokens]
    return g.shape[-1] * (torch.bmm(weights, counted) * torch.bmm(weights, g)).sum((1, 2))


class MoLoRA(Method["MoLoRA.Config"]):
    """A LoRA per expert and a router, on every adapted layer, as MALoRA's paper has it: sparse, 2 of 8."""

    id = "molora"
    size = "rank"
    label = "MoLoRA"
    paper = Paper("Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
                  "2309.05444", 2023)

    class Config(MixtureConfig):
        """A mixture's hyper-parameters. `same_start`: all A_t of a layer start equal (table 3)."""

        same_start: bool = False

    frozen_names: tuple[str, ...] = ()

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of experts · (rank · (in + out) + in)."""
        return sum(config.experts * (config.rank * (x.in_features + x.out_features) + x.in_features)
                   for x in config.targets(shapes))

    def structure(self, config: Any) -> Hashable:
        return (config.target_modules, config.experts, config.top_k, config.renormalise, config.aux_counting,
                config.aux_reduction)

    def check(self, config: Any, shapes: Shapes) -> None:
        check_rank(config.rank, config.targets(shapes))

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return Mixture([self.start(layer, start) for start in starts], [s.config for s in starts], self.frozen_names)

    def start(self, layer: Layer, start: Start) -> dict[str, Tensor]:
        """Random A_t, zero B_t: the adapted layer begins as the frozen one."""
        config = start.config
        A = draws(layer, config.rank, start)
        if config.same_start:
            A = A[:1].expand_as(A)
        return {"A": A, "B": torch.zeros(layer.out_features, config.experts, config.rank), "W_g": router(layer, start)}


class MoAsyLoRA(MoLoRA):
    """MoLoRA with every A_t frozen at its start: at an equal budget the rank about doubles (appendix A.4)."""

    id = "moasylora"
    label = "MoAsyLoRA"
    paper = _MALORA
    frozen_names = ("A",)

    class Config(MoLoRA.Config):
        """A mixture's hyper-parameters."""

        rank: PositiveInt = 16

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of experts · (rank · out + in)."""
        return sum(config.experts * (config.rank * x.out_features + x.in_features) for x in config.targets(shapes))


class Asymmetric(Mixture):
    """`y + s · Σ_t g_t B_t (P_t S x)`: x is projected once for all experts. S `[runs, 1, d, in]` is shared, or each
    expert has its own, `[runs, experts, d, in]`."""

    S: Tensor
    P: Tensor  # [runs, experts, rank, d]

    def down(self, x: Tensor) -> Tensor:
        z = _product(x, self.S)  # [runs, tokens, 1 or experts, d]
        if z.shape[2] == 1:
            return _product(z.squeeze(2), self.P)
        return torch.einsum("btnd,bnkd->btnk", z, self.P)


class MALoRA(Method["MALoRA.Config"]):
    """Experts that share one trained basis and spend the saving on rank."""

    id = "malora"
    size = "rank"
    label = "MALoRA"
    paper = _MALORA

    class Config(MixtureConfig):
        """`rank` is r, that of the MoLoRA which it is measured against; the experts' own is r̄.

        `beta`: scale of S_A at the start, 1/beta that of P_t (1.0 inter-domain, 1.25 intra-domain). `lambda_`: λ.
        `expand`: False keeps r̄ = r (MALoRA-Small, with λ about 0.34). `subspace`, `expert_rank`: d and r̄ by hand.
        Ablations of table 3: λ = 1 (without asymmetry), `train_shared` False (fixed S_A), `train_coefficients` False
        (fixed P_t), `shared` False: each expert has a basis of its own, of d / N rows. (There P_t has more rows than
        columns, which the paper's start does not cover; K_t is then cut to its d / N largest singular values.)
        """

        beta: PositiveFloat = 1.0
        lambda_: float = Field(default=0.5, gt=0, le=1)
        expand: bool = True
        subspace: PositiveInt | None = None
        expert_rank: PositiveInt | None = None
        shared: bool = True
        train_shared: bool = True
        train_coefficients: bool = True

        @property
        def d(self) -> int:
            """Rows of the shared basis, or of each expert's own."""
            d = self.subspace or round_up_half(self.lambda_ * self.rank * self.experts)
            return d if self.shared else round_up_half(d / self.experts)

        @property
        def inner(self) -> int:
            """r̄."""
            saved = (1 - self.lambda_) * self.rank if self.expand else 0.0
            return self.expert_rank or round_up_half(self.rank + saved)

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of d · in + experts · (r̄ · d + r̄ · out + in), less what is frozen."""
        N, d, inner = config.experts, config.d, config.inner
        bases = (1 if config.shared else N) * d * config.train_shared
        coefficients = N * inner * d * config.train_coefficients
        return sum(bases * x.in_features + coefficients + N * (inner * x.out_features + x.in_features)
                   for x in config.targets(shapes))

    def structure(self, config: Any) -> Hashable:
        return (config.target_modules, config.experts, config.top_k, config.renormalise, config.aux_counting,
                config.aux_reduction, config.shared, config.train_shared, config.train_coefficients)

    def check(self, config: Any, shapes: Shapes) -> None:
        for layer in config.targets(shapes):
            if max(config.d, config.inner) > layer.in_features:
                raise ValueError(f"a subspace of {config.d} and experts of rank {config.inner} do not fit into layer "
                                 f"{layer.name} with {layer.in_features} inputs; use a smaller rank")

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        config = starts[0].config
        frozen = [name for name, trained in (("S", config.train_shared), ("P", config.train_coefficients)) if not trained]
        return Asymmetric([self.start(layer, start) for start in starts], [s.config for s in starts], frozen)

    def start(self, layer: Layer, start: Start) -> dict[str, Tensor]:
        """S_A and P_t of eq. 8-10, zero B_t: the adapted layer begins as the frozen one."""
        config = start.config
        K = draws(layer, max(config.d, config.inner), start).double()
        S, P = decompose(K, config.d, config.inner, config.beta, seeded(start.seed, layer.name, "signs"))
        return {"S": (S[:1] if config.shared else S).float(), "P": P.float(), "W_g": router(layer, start),
                "B": torch.zeros(layer.out_features, config.experts, config.inner)}


def decompose(K: Tensor, d: int, rank: int, beta: float, signs: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bases `beta · V_t [N, d, in]` and coefficients `(U_t Σ_t)[:rank, :d] / beta [N, rank, d]` of K `[N, rows, in]`.

    The sign of a pair of singular vectors is free and differs between libraries: here it is drawn from `signs`.
    """
    U, sigma, V = torch.linalg.svd(K, full_matrices=False)
    drawn = 2.0 * torch.randint(2, sigma.shape, generator=signs) - 1
    sign = U[:, 0].sign() * drawn  # the first row of U is all but surely without zeros
    P = U * (sigma * sign)[:, None]
    S = V * sign[..., None]
    return beta * S[:, :d], P[:, :rank, :d] / beta


class AsyLoRA(LoRAFA):
    """LoRA with A frozen at its random start: at an equal budget the rank about doubles."""

    id = "asylora"
    label = "AsyLoRA"
    paper = Paper("Asymmetry in Low-Rank Adapters of Foundation Models", "2402.16842", 2024)

    class Config(ScaledConfig):
        """`start`: A is drawn as LoRA's (MALoRA's text), or with orthonormal rows (`orthonormal`, AsyLoRA's own code)."""

        rank: PositiveInt = 16
        start: Literal["kaiming", "orthonormal"] = "kaiming"

    def scale(self, config: Any, rank: int) -> float:
        return config.scale

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return FrozenA([self.start(layer, start) for start in starts], [False] * len(starts))

    def start(self, layer: Layer, start: Start) -> Factors:
        """Random frozen A, zero B."""
        factors = super().start(layer, start)
        return factors if start.config.start == "kaiming" else replace(factors, A=orthonormal_a(layer, start))


def orthonormal_a(layer: Layer, start: Start) -> Tensor:
    """A random A with orthonormal rows, `[rank, in]`."""
    draw = torch.randn(layer.in_features, start.config.rank, generator=start.generator(layer), dtype=torch.float64)
    Q, R = torch.linalg.qr(draw)
    return (Q * R.diagonal().sign()).mT.contiguous().float()


def draws(layer: Layer, rows: int, start: Start) -> Tensor:
    """One Kaiming uniform draw (a = sqrt 5, as LoRA's A) per expert, `[experts, rows, in]`."""
    experts = start.config.experts
    return kaiming_a(layer, experts * rows, start).unflatten(0, (experts, rows))


def router(layer: Layer, start: Start) -> Tensor:
    """W_g at its start, `[experts, in]`."""
    shape = start.config.experts, layer.in_features
    generator = seeded(start.seed, layer.name, "router")
    if start.config.router == "normal":
        return 0.02 * torch.randn(shape, generator=generator)
    return (2 * torch.rand(shape, generator=generator) - 1) / layer.in_features**0.5


def round_up_half(value: float) -> int:
    """The nearest whole number, at least 1; halves go up."""
    return max(1, int(value + 0.5))


def _product(x: Tensor, factors: Tensor) -> Tensor:
    """`[runs, tokens, in]` by `[runs, n, rank, in]` to `[runs, tokens, n, rank]`, as one product."""
    return project(x, factors.flatten(1, 2)).unflatten(-1, factors.shape[1:3])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of like shapes on a new first axis, padded with zeros to the largest."""
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *shape)
    for place, tensor in zip(stacked, tensors, strict=True):
        place[tuple(slice(n) for n in tensor.shape)] = tensor
    return stacked
