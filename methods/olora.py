"""OLoRA: Orthonormal Low-Rank Adaptation (Büyükakyüz 2024, arXiv 2406.01775, sec. 3).

LoRA whose factors start from the thin QR decomposition of the weight, `W = Q R`, without pivoting:

    B₀ = Q[:, :r]  [out, r], orthonormal        A₀ = R[:r, :]  [r, in], upper trapezoidal
    W_res = W - s · B₀ A₀                       y = W_res x + s · B A x,    s = alpha / rank

Written as in PiSSA: `y = W x + s · (B A - B₀ A₀) x`, W untouched, the export a LoRA of rank 2r. B₀ spans the first r
columns of W, not its principal directions: with s = 1 the first r columns of W_res are zero. All of the magnitude is
in A₀.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from methods.lora import Factors, LoRA
from methods.pissa import Departing, doubled
from suite.method import Adapter, Layer, Paper, RankConfig, Shapes, Start


class OLoRA(LoRA):
    """LoRA from the QR decomposition of W."""

    id = "olora"
    label = "OLoRA"
    paper = Paper("OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", "2406.01775", 2024)

    class Config(RankConfig):
        """`rank`, and `alpha` of the scale alpha / rank (LoRA's defaults: the paper's own could not be verified)."""

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        wide = weight.double()
        ranks = [start.config.rank for start in starts]
        Q = torch.linalg.qr(wide[:, :max(ranks)]).Q  # the first columns of Q depend on the first columns of W alone
        R = (Q.mT @ wide).triu()
        return Departing([Factors(R[:rank], Q[:, :rank], self.scale(start.config, rank))
                          for rank, start in zip(ranks, starts, strict=True)])

    def peft_config(self, config: Any, shapes: Shapes, prepared: Any) -> dict[str, Any]:
        return doubled(config, shapes)
