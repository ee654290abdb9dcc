"""Adapters over a base that is held in four bits: QLoRA, and QDoTA.

    Q(W)     W in NF4: per block of 64 scalars the largest magnitude and, for each scalar, the nearest of 16 values,
             the quantiles of a normal distribution (Dettmers et al., arXiv 2305.14314, sec. 3). Double quantisation
             holds the blocks' magnitudes in eight bits: 4.127 bits per scalar in all.
    QLoRA    y = Q(W) x + s · B A x                                                     (ibid., eq. 5)
    QDoTA    y = (Q(W_res) + MPO(T)) x,   W_res = W - MPO(T⁰)         (Hu et al., arXiv 2412.20891, by description)

W_res is quantised, not W: whatever MPO(T⁰) holds of W is held exactly. `rounds` (ours, in the manner of LoftQ) lets the
cores take up what quantisation loses, T⁰ ← MPO of W - Q(W_res), W_res ← W - MPO(T⁰), as long as the error falls.

Four bits become a dense matrix for the moment in which x goes through it, in forward and again in backward. The base's
own weights are let go, so memory falls for good, and nothing is merged: the model that was trained is the one evaluated.
The quantisation is that of bitsandbytes. Cores and factors are float32 (QDoTA's paper trains its cores in bfloat16).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from methods.dota import Cores, DoTA, KeepsInitial, decompose, reconstruct
from methods.lora import Factors, LoRA, LowRank
from suite.method import Layer, Paper, RankConfig, Start, WholeAdapter

Block = Literal[64, 128, 256, 512, 1024, 2048, 4096]  # what bitsandbytes knows


class NF4(nn.Module):
    """A frozen matrix `[out, in]` in 4-bit NormalFloat.

    It is handed to bitsandbytes as one row: 0.50.2 on the CPU reads a matrix whose rows are no whole number of blocks
    back wrongly (its blocks run over row ends when it writes, and stop there when it reads).
    """

    def __init__(self, W: Tensor, block: int = 64, double: bool = True) -> None:
        super().__init__()
        self.codes: Tensor
        self.shape = W.shape
        codes, self.statistics = _bitsandbytes().quantize_4bit(
            W.float().reshape(1, -1), blocksize=block, quant_type="nf4", compress_statistics=double)
        self.register_buffer("codes", codes, persistent=False)  # as large as the base, and made again alike

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix that the codes stand for."""
        return _bitsandbytes().dequantize_4bit(self.codes, self.statistics).view(self.shape).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """`x Q(W)ᵀ`; between forward and backward only the codes are held."""
        return checkpoint(lambda x: x @ self.dense(x.dtype).mT, x, use_reentrant=False, preserve_rng_state=False)

    def bytes(self) -> int:
        """Memory of codes and statistics."""
        held = [self.codes, self.statistics.absmax, self.statistics.code]
        if self.statistics.nested:
            held += [self.statistics.offset, self.statistics.state2.absmax, self.statistics.state2.code]
        return sum(tensor.nbytes for tensor in held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Codes move like any buffer, and the statistics with them; both keep their own type."""
        super()._apply(fn, recurse)
        self.statistics.to(self.codes.device)
        return self


class QuantisedLowRank(WholeAdapter):
    """QLoRA's layer: `x Q(W)ᵀ + s · (x Aᵀ) Bᵀ`; the runs of a pack share Q(W)."""

    mergeable = False

    def __init__(self, base: NF4, low_rank: LowRank) -> None:
        super().__init__()
        self.base = base
        self.low_rank = low_rank

    def whole(self, x: Tensor) -> Tensor:
        return self.low_rank(x, self.base(x))

    def weight(self, run: int) -> Tensor:
        """What one run multiplies with, `[out, in]`."""
        return self.base.dense(self.low_rank.A.dtype) + self.low_rank.delta(run)

    def delta(self, run: int) -> Tensor:
        raise TypeError("a base in four bits has no W to add to; `weight` gives what is applied")

    def state(self, run: int) -> dict[str, Tensor]:
        return self.low_rank.state(run)

    def alone(self, run: int) -> QuantisedLowRank:
        own = self.state(run)
        return QuantisedLowRank(self.base, LowRank([Factors(own["A"], own["B"], float(self.low_rank.scale[run]))]))


class QuantisedTrain(KeepsInitial):
    """QDoTA's layer: `x (Q(W_res) + MPO(T))ᵀ`; the runs of a pack share Q(W_res)."""

    mergeable = False

    def __init__(self, residual: NF4, starts: Sequence[Cores]) -> None:
        super().__init__(residual.dense, starts)
        self.residual = residual

    def weight(self, run: int) -> Tensor:
        """What one run multiplies with, `[out, in]`."""
        return self.residual.dense(self.cores[0].dtype) + super().delta(run)

    def delta(self, run: int) -> Tensor:
        raise TypeError("a base in four bits has no W to add to; `weight` gives what is applied")

    def alone(self, run: int) -> QuantisedTrain:
        return QuantisedTrain(self.residual, [list(self.constants(run).values())])


class QLoRA(LoRA):
    """LoRA over an NF4 base."""

    id = "qlora"
    label = "QLoRA"
    paper = Paper("QLoRA: Efficient Finetuning of Quantized LLMs", "2305.14314", 2023)
    spoils_base = True
    frees_weights = True

    class Config(RankConfig):
        """LoRA's hyper-parameters; `block` scalars share one magnitude, `double_quantisation` holds those in eight bits."""

        block: Block = 64
        double_quantisation: bool = True

    def structure(self, config: Any) -> Hashable:
        """Ranks may differ in a pack, the quantised base may not."""
        return config.target_modules, config.block, config.double_quantisation

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> WholeAdapter:
        config = starts[0].config
        base = NF4(weight, config.block, config.double_quantisation)
        return QuantisedLowRank(base, LowRank([self.start(layer, start) for start in starts]))


class QDoTA(DoTA):
    """DoTA whose frozen part is held in NF4."""

    id = "qdota"
    label = "QDoTA"
    spoils_base = True
    frees_weights = True

    class Config(DoTA.Config):
        """DoTA's and QLoRA's hyper-parameters, and `rounds` of alternation between cores and quantisation, at most."""

        block: Block = 64
        double_quantisation: bool = True
        rounds: int = Field(default=0, ge=0)

    def structure(self, config: Any) -> Hashable:
        """The quantised residual depends on everything that decides T⁰."""
        return config

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> WholeAdapter:
        W = weight.to(torch.promote_types(weight.dtype, torch.float32))
        residual, cores, _ = split(W, starts[0].config)
        return QuantisedTrain(residual, [cores] * len(starts))


def split(W: Tensor, config: Any) -> tuple[NF4, Cores, list[float]]:
    """Q(W_res), T⁰ and the errors ‖Q(W_res) + MPO(T⁰) - W‖ of the rounds: of the first, and of each that lowered it."""

    def around(cores: Cores) -> tuple[NF4, Cores, float]:
        whole = reconstruct([core[None] for core in cores])[0]
        residual = NF4(W - whole, config.block, config.double_quantisation)
        return residual, cores, float((residual.dense(W.dtype) + whole - W).norm())

    def mpo(W: Tensor) -> Cores:
        return decompose(W, config.bond, config.cores, config.balance)

    residual, cores, error = around(mpo(W))
    errors = [error]
    for _ in range(config.rounds):
        found = around(mpo(W - residual.dense(W.dtype)))
        if found[2] >= error:
            break
        residual, cores, error = found
        errors.append(error)
    return residual, cores, errors


def _bitsandbytes() -> Any:
    """bitsandbytes' functions, imported when they are first needed."""
    import bitsandbytes.functional

    return bitsandbytes.functional
