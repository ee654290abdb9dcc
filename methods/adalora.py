"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023, arXiv 2303.10512).

LoRA in the form of a singular value decomposition, whose singular values are cut by a ranking over all layers of the
run:

    y = W x + s · P (lambda ∘ (Q x)),    s = alpha / rank,  P [out, rank], Q [rank, in] ~ N(0, 0.02²),  lambda = 0
    loss = task + gamma · mean over all P and Q of ‖Pᵀ P - I‖_F, ‖Q Qᵀ - I‖_F                              (eq. 3-4)

After step t of T, while t < T - t_f, every scalar w with gradient g has a smoothed sensitivity and its uncertainty:

    I = |w g|      Ī ← β1 Ī + (1 - β1) I      U ← β2 U + (1 - β2) |I - Ī|      e(w) = Ī · U                (eq. 8-11)
    S_ki = e(lambda_ki) + mean_j e(P_k,ji) + mean_j e(Q_k,ij)      for triple i of layer k                    (eq. 7)

Every `interval` steps after t_i, and at T - t_f, all lambda but those of the b(t) largest S of the model are set to
zero (eq. 6); they may grow again until T - t_f, when the choice is fixed. The budget b falls from b₀ = layers · rank
to b_T = layers · target:

    b(t) = ⌊ b_T + (b₀ - b_T) (1 - (t - t_i) / (T - t_f - t_i))³ ⌋    between t_i and T - t_f

(Eq. 12 prints t - t_i - t_f in the numerator, with which b begins above b₀; the official code is as here. Eq. 4
prints squared norms; both the official code and peft take plain ones.) w is the value after the update and g, before
any clipping, the one that made it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from methods.lora import check_rank
from suite.method import Adapter, Layer, Method, Paper, RankConfig, Shapes, Start
from suite.products import project
from suite.specs import NonNegativeFloat, PositiveFloat, PositiveInt


class SVDForm(Adapter):
    """`y + s · P (lambda ∘ (Q x))` for every run of a pack, and its part in the ranking of all layers.

    Smaller ranks are padded with zeros, which have no gradient, count as no triple and keep no budget.
    """

    def __init__(self, layer: Layer, starts: Sequence[Start]) -> None:
        super().__init__()
        configs: list[AdaLoRA.Config] = [start.config for start in starts]
        self.schedule = configs[0]  # what runs of a pack have in common (AdaLoRA.structure)
        self.ranks = [config.rank for config in configs]
        runs, widest = len(starts), max(self.ranks)
        P, Q = torch.zeros(runs, layer.out_features, widest), torch.zeros(runs, widest, layer.in_features)
        for run, (start, rank) in enumerate(zip(starts, self.ranks, strict=True)):
            draw = start.generator(layer)
            Q[run, :rank] = 0.02 * torch.randn(rank, layer.in_features, generator=draw)
            P[run, :, :rank] = 0.02 * torch.randn(rank, layer.out_features, generator=draw).mT
        self.P = nn.Parameter(P)
        self.values = nn.Parameter(torch.zeros(runs, widest))  # lambda
        self.Q = nn.Parameter(Q)
        self.scale: Tensor
        self.gamma: Tensor
        self.targets: Tensor
        self.real_triples: Tensor
        self.kept: Tensor
        self.register_buffer("scale", torch.tensor([c.alpha / c.rank for c in configs], dtype=torch.float64)[:, None])
        self.register_buffer("gamma", torch.tensor([c.gamma for c in configs], dtype=torch.float64))
        self.register_buffer("targets", torch.tensor([c.final_rank for c in configs], dtype=torch.float64))
        self.register_buffer("real_triples", torch.arange(widest) < torch.tensor(self.ranks)[:, None])  # [runs, rank]
        self.register_buffer("kept", self.real_triples.clone())
        for name, parameter in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        down = project(x, self.Q) * (self.scale * self.values)[:, None]  # [runs, tokens, rank]
        return project(down, self.P, y)

    def penalty(self) -> Tensor:
        """gamma times the mean distance of Pᵀ P and Q Qᵀ from the identity, `[runs]`."""
        identity = torch.diag_embed(self.real_triples.to(self.P.dtype))
        grams = torch.stack([torch.bmm(self.P.mT, self.P), torch.bmm(self.Q, self.Q.mT)])
        return self.gamma * torch.linalg.matrix_norm(grams - identity).mean(0)

    def stepped(self, step: int, steps: int) -> None:
        t, first, last = step + 1, self.schedule.first(steps), self.schedule.last(steps)
        if t < last:
            self.smooth()
        if self is not self.peers[-1]:
            return
        layers = [layer for layer in self.peers if isinstance(layer, SVDForm)]
        if t == last or (first < t < last and t % self.schedule.every(steps) == 0):
            allocate(layers, self.schedule.remaining(t, steps))
        if t >= last:
            for layer in layers:
                layer.cut()

    @torch.no_grad()
    def smooth(self) -> None:
        """Ī and U of every scalar, from the gradients at hand."""
        for name, parameter in self.named_parameters():
            assert parameter.grad is not None
            mean, spread = self.get_buffer(f"sensitivity_{name}"), self.get_buffer(f"uncertainty_{name}")
            now = (parameter * parameter.grad).abs()
            mean.lerp_(now, 1 - self.schedule.beta1)
            spread.lerp_((now - mean).abs(), 1 - self.schedule.beta2)

    def scores(self) -> Tensor:
        """S of every triple, `[runs, rank]`; infinite where there is none."""
        e = {name: self.get_buffer(f"sensitivity_{name}") * self.get_buffer(f"uncertainty_{name}")
             for name, _ in self.named_parameters()}
        return (e["values"] + e["P"].mean(1) + e["Q"].mean(2)).masked_fill(~self.real_triples, torch.inf)

    @torch.no_grad()
    def cut(self) -> None:
        """Zero every lambda that is not kept."""
        self.values.masked_fill_(~self.kept & self.real_triples, 0)

    def delta(self, run: int) -> Tensor:
        return self.scale[run] * (self.P[run] * self.values[run]) @ self.Q[run]

    def factors(self, run: int) -> tuple[Tensor, Tensor]:
        """Q and s · P diag(lambda)."""
        own = self.state(run)
        return own["Q"], self.scale[run] * own["P"] * own["values"]

    def state(self, run: int) -> dict[str, Tensor]:
        rank = self.ranks[run]
        return {"P": self.P.data[run, :, :rank], "values": self.values.data[run, :rank], "Q": self.Q.data[run, :rank]}


@torch.no_grad()
def allocate(layers: Sequence[SVDForm], share: float) -> None:
    """Choose, in every run, the triples to keep: those of the largest S of all layers, as many as the budget allows,
    and cut the others. `share` is how much of the way from b_T to b₀ is left. A run that has stopped (S is no number)
    keeps all."""
    scores = torch.cat([layer.scores() for layer in layers], 1)  # [runs, layers · rank]
    start = torch.stack([layer.real_triples.sum(1) for layer in layers]).sum(0)  # b₀, [runs]
    end = torch.round(layers[0].targets * len(layers))
    budget = torch.floor(end + (start - end) * share)
    place = scores.argsort(dim=1, stable=True).argsort(dim=1)  # 0: the smallest
    kept = (place >= (start - budget)[:, None]) | scores.isnan().any(1, keepdim=True)
    for layer, own in zip(layers, kept.chunk(len(layers), 1), strict=True):
        layer.kept = own
        layer.cut()


class AdaLoRA(Method["AdaLoRA.Config"]):
    """LoRA in SVD form whose rank budget moves between layers while it trains."""

    id = "adalora"
    size = "rank"
    label = "AdaLoRA"
    paper = Paper("AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "2303.10512", 2023)

    class Config(RankConfig):
        """`rank` is the rank that training begins with in every layer: what is trained, what a budget counts and what
        divides alpha. The paper's tables count what is left at the end: its row of 8 is `rank` 12 here.

        `target`: mean rank at the end (None: rank / 1.5, the paper's b₀ = 1.5 b_T). `gamma`: weight of the
        orthogonality penalty (the paper's 0.1 to 0.5 by task; peft's default). `warm_share`, `final_share`: t_i and
        t_f as shares of T (our choice: the paper sets steps by task). `interval`: steps between two
        cuts (None: T / 500, at least 1; the paper 1 to 100). `beta1`, `beta2`: of the smoothing.
        """

        rank: PositiveInt = 12
        target: PositiveFloat | None = None
        gamma: NonNegativeFloat = 0.5
        warm_share: float = Field(default=0.1, ge=0, lt=1)
        final_share: float = Field(default=0.3, ge=0, lt=1)
        interval: PositiveInt | None = None
        beta1: float = Field(default=0.85, gt=0, lt=1)
        beta2: float = Field(default=0.85, gt=0, lt=1)

        @property
        def final_rank(self) -> float:
            """b_T over the number of layers."""
            return self.rank / 1.5 if self.target is None else self.target

        def first(self, steps: int) -> int:
            """t_i: after it values are cut."""
            return int(self.warm_share * steps)

        def last(self, steps: int) -> int:
            """T - t_f: the last choice."""
            return steps - int(self.final_share * steps)

        def every(self, steps: int) -> int:
            """Steps between two choices."""
            return self.interval or max(1, steps // 500)

        def remaining(self, t: int, steps: int) -> float:
            """(b(t) - b_T) / (b₀ - b_T): 1 until t_i, 0 from T - t_f on."""
            first, last = self.first(steps), self.last(steps)
            return (1 - min(max((t - first) / (last - first), 0), 1)) ** 3

        @model_validator(mode="after")
        def _cuts(self) -> AdaLoRA.Config:
            if self.final_rank > self.rank:
                raise ValueError(f"target {self.final_rank:g} is larger than rank {self.rank}")
            if self.warm_share + self.final_share >= 1:
                raise ValueError("warm_share and final_share leave no step in which the budget could fall")
            return self

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of rank · (in + out + 1): what is trained at first, and all that the optimiser ever
        holds."""
        return sum(config.rank * (x.in_features + x.out_features + 1) for x in config.targets(shapes))

    def check(self, config: Any, shapes: Shapes) -> None:
        check_rank(config.rank, config.targets(shapes))

    def structure(self, config: Any) -> Hashable:
        """The schedule is one for the pack; budgets are each run's own."""
        return (config.target_modules, config.warm_share, config.final_share, config.interval, config.beta1,
                config.beta2)

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return SVDForm(layer, starts)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        """An ordinary LoRA, lambda and the scale folded into B."""
        return {"r": config.rank, "lora_alpha": config.rank, "use_rslora": False,
                "target_modules": [layer.name for layer in config.targets(shapes)]}
