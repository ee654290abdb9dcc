"""LoRA and its two smallest relatives, rsLoRA and LoRA+.

    y = W x + s · B A x,    A [rank, in],  B [out, rank]

    LoRA    (Hu et al., arXiv 2106.09685, eq. 3)      s = alpha / rank,       A ~ Kaiming uniform,  B = 0
    rsLoRA  (Kalajdzievski, arXiv 2312.03732, thm 3.2) s = alpha / sqrt(rank)
    LoRA+   (Hayou et al., arXiv 2402.12354, sec. 4)   the learning rate of B is `lr_ratio_b` times that of A
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from suite.method import Adapter, Layer, Method, Paper, RankConfig, Shapes, Start
from suite.products import project


@dataclass(frozen=True)
class Factors:
    """Where one run starts on one layer: A `[rank, in]`, B `[out, rank]`, the scale s and the lr ratio of B."""

    A: Tensor
    B: Tensor
    scale: float
    lr_ratio_b: float = 1.0


class LowRank(Adapter):
    """`y + s · (x Aᵀ) Bᵀ` for every run of a pack.

    Ranks may differ: smaller factors are padded with zeros to the largest. The padding is exact and stays zero under
    AdamW, since a zero row of A meets a zero column of B and neither has a gradient.
    """

    narrow = True

    def __init__(self, factors: Sequence[Factors]) -> None:
        super().__init__()
        self.ranks = [f.A.shape[0] for f in factors]
        widest = max(self.ranks)
        self.A = nn.Parameter(torch.stack([_pad(f.A, 0, widest) for f in factors]))  # [runs, rank, in]
        self.B = nn.Parameter(torch.stack([_pad(f.B, 1, widest) for f in factors]))  # [runs, out, rank]
        self.scale: Tensor
        scales = torch.tensor([f.scale for f in factors], dtype=torch.float64)
        self.register_buffer("scale", scales[:, None, None])
        self._ratios = torch.tensor([f.lr_ratio_b for f in factors], dtype=torch.float64)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        down = project(x, self.A) * self.scale.to(x.dtype)  # [runs, tokens, rank]
        return project(down, self.B, y)

    def delta(self, run: int) -> Tensor:
        return self.scale[run] * (self.B[run] @ self.A[run])

    def state(self, run: int) -> dict[str, Tensor]:
        rank = self.ranks[run]
        return {"A": self.A.data[run, :rank], "B": self.B.data[run, :, :rank]}

    def lr_ratios(self) -> Mapping[str, Tensor]:
        return {"B": self._ratios}


def kaiming_a(layer: Layer, rank: int, start: Start) -> Tensor:
    """LoRA's A: Kaiming uniform with a = sqrt(5), which is U(-1/sqrt(in), 1/sqrt(in)). `[rank, in]`."""
    bound = 1 / math.sqrt(layer.in_features)
    draw = torch.rand(rank, layer.in_features, generator=start.generator(layer), dtype=torch.float64)
    return ((2 * draw - 1) * bound).float()


class LoRA(Method["LoRA.Config"]):
    """Low-rank adaptation of chosen linear layers."""

    id = "lora"
    size = "rank"
    label = "LoRA"
    paper = Paper("LoRA: Low-Rank Adaptation of Large Language Models", "2106.09685", 2021)

    class Config(RankConfig):
        """`rank`, `alpha` (scale alpha / rank) and `target_modules`."""

    def scale(self, config: Any, rank: int) -> float:
        """s of the equation."""
        return config.alpha / rank

    def lr_ratio_b(self, config: Any) -> float:
        """Learning rate of B over that of A."""
        return 1.0

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over adapted layers of rank · (in + out)."""
        return sum(config.rank * (x.in_features + x.out_features) for x in config.targets(shapes))

    def check(self, config: Any, shapes: Shapes) -> None:
        check_rank(config.rank, config.targets(shapes))

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        return LowRank([self.start(layer, start) for start in starts])

    def start(self, layer: Layer, start: Start) -> Factors:
        """Random A, zero B: the adapted layer begins as the frozen one."""
        config = start.config
        A = kaiming_a(layer, config.rank, start)
        B = torch.zeros(layer.out_features, config.rank)
        return Factors(A, B, self.scale(config, config.rank), self.lr_ratio_b(config))

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        """The same adapter in stock peft."""
        return {"r": config.rank, "lora_alpha": config.alpha, "use_rslora": False,
                "target_modules": [layer.name for layer in config.targets(shapes)]}


class RsLoRA(LoRA):
    """LoRA whose scale falls with the square root of the rank, so that large ranks keep learning."""

    id = "rslora"
    label = "rsLoRA"
    paper = Paper("A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", "2312.03732", 2023)

    def scale(self, config: Any, rank: int) -> float:
        return config.alpha / math.sqrt(rank)

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        return {**super().peft_config(config, shapes, prepared), "use_rslora": True}


class LoRAPlus(LoRA):
    """LoRA with a larger learning rate for B. The paper advises a ratio of about 16."""

    id = "lora-plus"
    label = "LoRA+"
    paper = Paper("LoRA+: Efficient Low Rank Adaptation of Large Models", "2402.12354", 2024)

    class Config(RankConfig):
        """LoRA's hyper-parameters and `lr_ratio_b`, the learning rate of B over that of A."""

        lr_ratio_b: float = Field(default=16.0, gt=0)

    def lr_ratio_b(self, config: Any) -> float:
        return config.lr_ratio_b


def check_rank(rank: int, layers: Sequence[Layer]) -> None:
    """Raise `ValueError` when a rank does not fit into a layer."""
    for layer in layers:
        most = min(layer.in_features, layer.out_features)
        if rank > most:
            raise ValueError(f"rank {rank} is larger than layer {layer.name} "
                             f"({layer.out_features} x {layer.in_features}) allows; use at most {most}")


def _pad(tensor: Tensor, dim: int, size: int) -> Tensor:
    missing = size - tensor.shape[dim]
    return torch.nn.functional.pad(tensor, (0, 0, 0, missing) if dim == 0 else (0, missing))
