"""SpaRTA: Sparse Random parameTer Adaptation (Rios et al., EMNLP 2025 Findings, arXiv 2502.15975).

A random set φ of the entries of the adapted weights W [out, in] is trained, everything else stays:

    θ(φ) = θ_PT(φ) + Δφ,   Δφ = 0 at the start         W_eff = W + scatter(Δφ),   y = W_eff x
    dL/dΔφ = (dL/dW_eff)(φ) = (gᵀ x)(φ)                g = dL/dy, summed over tokens

There is no scale and no latency once merged. With n_base scalars in the base, n_frozen of them in tensors that never
train, sparsity s and density p (the share of the adapted weights that trains) are tied by

    s = 1 - |φ| / n_base                               p = (1 - s) n_base / (n_base - n_frozen) < 1

The official code (IBM/SpaRTA at 64c8566) keeps each entry with probability p, adds Δφ into W for every forward pass and
takes it off again, in W's own type; its successor (peft-sparta 0.0.3) holds Δφ in float32. Here W is never written: W_eff
is formed in float32 per layer and pass, cast to W's type once, and dropped. An entry costs 20 bytes: a flat int32 index,
and value, gradient and two moments in float32. Only weights of linear layers are drawn from: no biases, no norms.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from suite.method import (
    AdapterConfig,
    Context,
    Layer,
    Method,
    Paper,
    Preparation,
    Shapes,
    Start,
    WholeAdapter,
    seeded,
)
from suite.specs import PositiveInt

#: What the official code trains beside the head, value and output projections, as BERT, T5 and Llama's kin name them.
OFFICIAL = (("v_proj", "o_proj"), ("attention.self.value", "attention.output.dense"), ("v", "o"))

#: Up to this density a weight's gradient is computed entry by entry. Measured on one core with the shapes of MiniLM and
#: SmolLM2-135M, 120 to 640 tokens, packs of 1 and 4: 2 to 10 times as fast up to 2 %, 1.1 to 1.9 at 10 %, level at 15 to 20.
DOT_PRODUCTS = 0.1
with warnings.catch_warnings(action="ignore"):  # torch says once per process that its CSR tensors are young
    torch.sparse_csr_tensor([0, 1], [0], [0.0], check_invariants=False)


class SpaRTA(Method["SpaRTA.Config"]):
    """Training of entries of W that are drawn at random."""

    id = "sparta"
    bytes_per_scalar = 20  # with the index
    size = "entries"
    label = "SpaRTA"
    paper = Paper("Sparsity May Be All You Need: Sparse Random Parameter Adaptation", "2502.15975", 2025)

    class Config(AdapterConfig):
        """`entries`: |φ| over all adapted layers, what a budget sets; None: (1 - `sparsity`) · n_base, the paper's measure.

        `selection`: `exact` draws exactly that many, `bernoulli` each entry on its own, as the official code does, so that
        |φ| is random. `allocation`: a layer's part is in proportion to in + out, as LoRA's is (`like_lora`), or to in · out,
        one density everywhere (`uniform`, the official code). The first of each is the default, for comparisons at equal
        budgets (the convention of peft's `shira`). `selection_seed`: the seed that φ is drawn with (None: the run's).
        `preset: sparta-official` takes the official code's value and output projections as `target_modules`.
        """

        entries: PositiveInt | None = None
        sparsity: float = Field(default=0.99, gt=0, lt=1)
        selection: Literal["exact", "bernoulli"] = "exact"
        allocation: Literal["like_lora", "uniform"] = "like_lora"
        selection_seed: int | None = Field(default=None, ge=0)
        preset: Literal["sparta-official"] | None = None

        @model_validator(mode="after")
        def _one_choice_of_layers(self) -> SpaRTA.Config:
            if self.preset is not None and self.target_modules != "all-linear":
                raise ValueError(f"preset {self.preset} chooses the layers: leave target_modules out, or the preset")
            return self

        def targets(self, shapes: Shapes) -> list[Layer]:
            """The adapted layers. Raises `ValueError` when the preset finds no value and output projections."""
            if self.preset is None:
                return super().targets(shapes)
            for names in OFFICIAL:
                chosen = AdapterConfig(target_modules=names)
                if all(any(f".{x.name}".endswith(f".{name}") for x in shapes.layers) for name in names):
                    return chosen.targets(shapes)
            kinds = ", ".join(sorted({x.kind for x in shapes.layers}))
            raise ValueError(f"preset {self.preset}: this base has no value and output projections of their own (GPT-2's "
                             f"c_attn holds query, key and value); name target_modules among {kinds}")

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """|φ|; with `bernoulli`, its expectation."""
        return config.entries or max(1, round((1 - config.sparsity) * shapes.parameters))

    def trained(self, config: Any, shapes: Shapes, prepared: Mapping[str, int]) -> int:
        """|φ| as drawn."""
        return sum(prepared.values())

    def solve(self, config: Any, shapes: Shapes, parameters: int) -> Any:
        """Any number of entries can be had, up to all of them."""
        return self.resized(config, min(parameters, size(config.targets(shapes))))

    def structure(self, config: Any) -> Hashable:
        return config.target_modules, config.preset

    def check(self, config: Any, shapes: Shapes) -> None:
        layers = config.targets(shapes)
        wanted, most = self.trainable(config, shapes), size(layers)
        if wanted > most:
            raise ValueError(f"{wanted:,} entries are more than the {most:,} of the adapted layers; with them, sparsity "
                             f"{1 - most / shapes.parameters:.4f} is the least")
        for layer in layers:
            if size([layer]) >= 2**31:
                raise ValueError(f"layer {layer.name} is too large for 32-bit indices")

    def prepare(self, config: Any, context: Context) -> Preparation:
        layers = config.targets(context.shapes)
        found = counts(config, layers, self.trainable(config, context.shapes), selection_seed(config, context.seed))
        total = sum(found.values())
        return Preparation(found, {"entries": found, "sparsity": 1 - total / context.shapes.parameters,
                                   "density": total / size(layers)})

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Sparse | None:
        """None where no run has an entry: the layer then computes no gradient at all."""
        drawn = [positions(layer, start.prepared[layer.name], selection_seed(start.config, start.seed))
                 for start in starts]
        return Sparse(weight, drawn) if any(len(x) for x in drawn) else None


class Sparse(WholeAdapter):
    """`x (W + scatter(Δφ))ᵀ` for every run of a pack.

    Numbers of entries may differ: shorter rows are padded with zeros at the last index, which keeps them sorted. Padding
    adds nothing and gets no gradient.
    """

    def __init__(self, weight: Tensor, indices: Sequence[Tensor]) -> None:
        super().__init__()
        self.weight = weight  # no buffer: it is the base's own, and stays in the base's type
        self.lengths = [len(x) for x in indices]
        longest, last = max(self.lengths), weight.numel() - 1
        self.values = nn.Parameter(torch.zeros(len(indices), longest))  # [runs, entries]
        self.indices: Tensor
        padded = [nn.functional.pad(x, (0, longest - len(x)), value=last) for x in indices]
        self.register_buffer("indices", torch.stack(padded))
        self.counts: Tensor | None
        ragged = min(self.lengths) < longest
        self.register_buffer("counts", torch.tensor(self.lengths)[:, None] if ragged else None)

    def whole(self, x: Tensor) -> Tensor:
        y: Tensor = SparseLinear.apply(x.to(self.weight.dtype), self.values, self.indices, self.counts, self.weight)
        return y

    def delta(self, run: int) -> Tensor:
        values = self.state(run).get("values", self.values.data[run, :0])
        flat = values.new_zeros(self.weight.numel())
        return flat.index_add_(0, self.indices[run, :len(values)], values).view(self.weight.shape)

    def state(self, run: int) -> dict[str, Tensor]:
        count = self.lengths[run]
        return {"values": self.values.data[run, :count]} if count else {}

    def constants(self, run: int) -> dict[str, Tensor]:
        """φ could be drawn again, but only by a torch that draws alike."""
        count = self.lengths[run]
        return {"indices": self.indices[run, :count]} if count else {}


class SparseLinear(torch.autograd.Function):
    """`y = x W_effᵀ` that keeps x and references between its passes; W_eff is formed anew in the backward pass.

    `x [runs, tokens, in]`, `values` and `indices` `[runs, entries]`, `counts [runs, 1]` or None where no row is padded,
    `weight [out, in]`; returns `[runs, tokens, out]`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, indices: Tensor, counts: Tensor | None, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, values, indices, counts, weight)
        return torch.bmm(x, effective(weight, indices, values).mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, values, indices, counts, weight = ctx.saved_tensors
        of_x = torch.bmm(g, effective(weight, indices, values)) if ctx.needs_input_grad[0] else None
        of_values = gradient(g, x, indices, values.dtype)
        if counts is not None:
            padding = torch.arange(indices.shape[1], device=counts.device) >= counts
            of_values = of_values.masked_fill_(padding, 0.0)
        return of_x, of_values, None, None, None


def effective(weight: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """W + scatter(Δφ) of every run, formed in the type of Δφ and cast to W's: `[runs, out, in]`."""
    full = weight.expand(len(values), -1, -1).to(values.dtype, copy=True, memory_format=torch.contiguous_format)
    full.flatten(1).scatter_add_(1, indices.long(), values)
    return full.to(weight.dtype)


def gradient(g: Tensor, x: Tensor, indices: Tensor, dtype: torch.dtype) -> Tensor:
    """(gᵀ x)(φ), `[runs, entries]`: by way of the dense gradient, there for a moment, or by as many dot products as there
    are entries. On a CPU these win by far where few entries train; on a GPU they are not measured."""
    if g.device.type != "cpu" or indices.shape[1] > DOT_PRODUCTS * g.shape[2] * x.shape[2]:
        return torch.bmm(g.mT, x).flatten(1).gather(1, indices.long()).to(dtype)
    g, x = g.to(dtype), x.to(dtype)
    runs, out, columns = len(indices), g.shape[2], x.shape[2]
    starts = columns * torch.arange(out + 1, dtype=torch.int32).expand(runs, -1)
    rows = torch.searchsorted(indices, starts.contiguous(), out_int32=True)  # where each row's entries begin: CSR
    shape = (runs, out, columns) if runs > 1 else (out, columns)  # torch knows no batch of one here
    pattern = torch.sparse_csr_tensor(rows.squeeze(0), (indices % columns).squeeze(0), g.new_zeros(indices.shape).squeeze(0),
                                      size=shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, g.mT.squeeze(0), x.squeeze(0)).values().view(runs, -1)


def size(layers: Sequence[Layer]) -> int:
    """Scalars of the layers' weights."""
    return sum(x.in_features * x.out_features for x in layers)


def selection_seed(config: SpaRTA.Config, seed: int) -> int:
    """The seed that φ is drawn with."""
    return seed if config.selection_seed is None else config.selection_seed


def counts(config: SpaRTA.Config, layers: Sequence[Layer], entries: int, seed: int) -> dict[str, int]:
    """How many entries of every layer train, by name."""
    sizes = [size([x]) for x in layers]
    weights = [x.in_features + x.out_features for x in layers] if config.allocation == "like_lora" else sizes
    parts = shares(entries, weights, sizes)
    if config.selection == "bernoulli":  # given their number, entries kept one by one are a uniform draw
        parts = [binomial(trials, part / trials, seeded("count", seed, x.name))
                 for x, trials, part in zip(layers, sizes, parts, strict=True)]
    return {x.name: part for x, part in zip(layers, parts, strict=True)}


def binomial(trials: int, chance: float, generator: torch.Generator) -> int:
    """How many of the trials succeed."""
    n, p = torch.tensor([trials, chance], dtype=torch.float64)
    return int(torch.binomial(n, p, generator=generator))


def positions(layer: Layer, count: int, seed: int) -> Tensor:
    """`count` different flat indices into `[out, in]`, sorted, int32; more of them extend fewer. Drawn on the CPU."""
    generator = seeded("positions", seed, layer.name)
    return torch.randperm(size([layer]), generator=generator, dtype=torch.int32)[:count].sort().values


def shares(total: int, weights: Sequence[int], limits: Sequence[int]) -> list[int]:
    """Whole numbers that sum to `total` (at most the sum of `limits`), in proportion to `weights` but for rounding. What
    would go beyond a limit goes to the others."""
    found, free = [0] * len(weights), list(range(len(weights)))
    while True:
        left, whole = total - sum(found), sum(weights[i] for i in free)
        full = [i for i in free if left * weights[i] >= limits[i] * whole]
        if not full:
            break
        for i in full:
            found[i] = limits[i]
        free = [i for i in free if i not in full]
    for i in free:
        found[i] = left * weights[i] // whole
    by_remainder = sorted(free, key=lambda i: -(left * weights[i] % whole))
    for i in by_remainder[:total - sum(found)]:
        found[i] += 1
    return found
