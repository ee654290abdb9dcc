"""DoTA: Weight-Decomposed Tensor Adaptation (Hu et al. 2024, arXiv 2412.20891), and its random counterpart, tt-random.

This follows the description of DoTA: the paper's equation numbers, shapes and settings are not known to us. With
O = o_1 · ... · o_n and I = i_1 · ... · i_n, a matrix product operator (MPO) of n cores stands for a matrix `[O, I]`:

    T_k [r_(k-1), o_k, i_k, r_k],  r_0 = r_n = 1
    MPO(T)[o_1 .. o_n, i_1 .. i_n] = Σ over r_1 .. r_(n-1) of  Π_k T_k[r_(k-1), o_k, i_k, r_k]

    start       T⁰ = the MPO of W, by n-1 singular value decompositions one after the other, each cut at R values:
                r_k = min( R, Π_(j≤k) o_j i_j, Π_(j>k) o_j i_j )
    frozen      W_res = W - MPO(T⁰)
    layer       y = (W_res + MPO(T)) x                              only the cores T are trained
    tt-random   y = (W + MPO(T)) x,  T_n = 0 and the other cores Gaussian: the comparison that the abstract makes

W is never written: the layer computes with `W + (MPO(T) - MPO(T⁰))`, which is W exactly as long as T = T⁰, and the
first cores T⁰ are kept beside the trained ones, since only both together say what has been learnt.

Choices that the abstract leaves open are ours: three cores, balanced factors with the largest last, balanced bonds
(`balance`), no scale (a scale would break W_res + MPO(T⁰) = W).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from suite.method import AdapterConfig, Layer, Method, Paper, Shapes, Start, WholeAdapter
from suite.specs import PositiveInt

Cores = list[Tensor]  # T_1 .. T_n, each [..., r_(k-1), o_k, i_k, r_k]


@cache
def factors(size: int, n: int) -> tuple[int, ...]:
    """n factors of a size whose sum is smallest, the largest last: 4096 = 16·16·16, 11008 = 16·16·43, 7 = 1·1·7."""

    def splits(size: int, n: int, least: int) -> list[tuple[int, ...]]:
        if n == 1:
            return [(size,)]
        return [(d, *rest) for d in range(least, math.isqrt(size) + 1) if size % d == 0 and d**n <= size
                for rest in splits(size // d, n - 1, d)]

    return min(splits(size, n, 1), key=sum)


def core_shapes(layer: Layer, bond: int, n: int) -> list[tuple[int, int, int, int]]:
    """(r_(k-1), o_k, i_k, r_k) of every core, bonds cut at `bond`."""
    o, i = factors(layer.out_features, n), factors(layer.in_features, n)
    sites = [a * b for a, b in zip(o, i, strict=True)]
    r = [min(bond if 0 < k < n else 1, math.prod(sites[:k]), math.prod(sites[k:])) for k in range(n + 1)]
    return [(r[k], o[k], i[k], r[k + 1]) for k in range(n)]


def decompose(W: Tensor, bond: int, n: int, balance: bool = True) -> Cores:
    """The MPO of `W [out, in]`: a sweep of singular value decompositions from left to right, in the type of W.

    The sweep leaves the size of W in the last core alone, and Adam would see cores of very different scale. `balance`
    puts sqrt(S_k) on either side of every bond: T_k · sqrt(S_k) and T_(k+1) / sqrt(S_k), which changes no product.
    Directions that W does not have (S_k ≈ 0) are left as they are.
    """
    shapes = core_shapes(Layer("W", W.shape[1], W.shape[0]), bond, n)
    o, i = [s[1] for s in shapes], [s[2] for s in shapes]
    rest = W.reshape(*o, *i).permute([axis for k in range(n) for axis in (k, n + k)])  # o_1, i_1, o_2, i_2 ...
    cores: Cores = []
    roots: list[Tensor] = []  # sqrt(S_k)
    for r, o_k, i_k, q in shapes[:-1]:
        U, S, Vt = torch.linalg.svd(rest.reshape(r * o_k * i_k, -1), full_matrices=False)
        U, S, Vt = U[:, :q], S[:q], Vt[:q]
        cores.append(U.reshape(r, o_k, i_k, q))
        rest = S[:, None] * Vt
        noise = S[0] * max(W.shape) * torch.finfo(W.dtype).eps
        roots.append(torch.where(noise < S, S, 1.0).sqrt() if balance else torch.ones_like(S))
    cores.append(rest.reshape(shapes[-1]))
    for k, root in enumerate(roots):
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root[:, None, None, None]
    return cores


def reconstruct(cores: Sequence[Tensor]) -> Tensor:
    """MPO(T) `[runs, O, I]` of cores `[runs, r, o, i, s]`: the bonds are contracted from left to right."""
    left = cores[0][:, 0]  # [runs, rows so far, columns so far, bond]
    for core in cores[1:]:
        (runs, rows, columns, r), (o, i, s) = left.shape, core.shape[2:]
        product = left.reshape(runs, rows * columns, r) @ core.reshape(runs, r, o * i * s)
        left = product.view(runs, rows, columns, o, i, s).transpose(2, 3).reshape(runs, rows * o, columns * i, s)
    return left[..., 0]


def sequential(cores: Sequence[Tensor], x: Tensor) -> Tensor:
    """`x MPO(T)ᵀ` without the matrix: `x [runs, tokens, I]` meets one core after the other. `[runs, tokens, O]`."""
    runs, tokens = x.shape[:2]
    z = x.reshape(runs, tokens, 1, 1, -1)  # [runs, tokens, O so far, bond, I still to come]
    for core in cores:
        r, o, i, s = core.shape[1:]
        z = z.reshape(runs, tokens, -1, r, i, z.shape[-1] // i)
        z = torch.einsum("ntprix,nrois->ntposx", z, core).reshape(runs, tokens, z.shape[2] * o, s, -1)
    return z.reshape(runs, tokens, -1)


def products(shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Multiplications of `reconstruct` once, and of `sequential` per token:

        once       Σ_(k≥2)  Π_(j<k) o_j i_j · r_(k-1) · o_k i_k r_k
        per token  Σ_k      Π_(j<k) o_j · r_(k-1) i_k · Π_(j>k) i_j · o_k r_k
    """
    once = per_token = 0
    for k, (r, o, i, s) in enumerate(shapes):
        before, after = shapes[:k], shapes[k + 1:]
        once += math.prod(a * b for _, a, b, _ in before) * r * o * i * s if k else 0
        per_token += math.prod(a for _, a, _, _ in before) * math.prod(b for _, _, b, _ in after) * r * i * o * s
    return once, per_token


def learnt(saved: Mapping[str, Tensor]) -> Tensor:
    """MPO(T) - MPO(T⁰) `[out, in]`, from what a run leaves behind: `core1` ... and `initial1` ....

    Raises `ValueError` without the initial cores: a decomposition on another machine may differ in signs and order.
    """
    n = sum(name.startswith("core") for name in saved)
    missing = [f"initial{k + 1}" for k in range(n) if f"initial{k + 1}" not in saved]
    if missing:
        raise ValueError(f"trained cores say nothing without those they started from; {missing[0]} is missing")
    now, then = ([saved[f"{kind}{k + 1}"][None] for k in range(n)] for kind in ("core", "initial"))
    return (reconstruct(now) - reconstruct(then))[0]


class TensorTrain(WholeAdapter):
    """`x (F + MPO(T))ᵀ` for every run of a pack; `frozen(dtype)` gives F `[out, in]`, here W.

    The matrix is made once and the tokens go through it together; backward makes it again, so that none is held from
    one to the other. A few tokens go through the cores one by one instead, when that takes fewer multiplications.

    Bonds may differ: smaller ones are padded with zeros. That is exact and stays so under AdamW: an entry of T_k at a
    padded index meets zeros in the neighbour on that side, and so do the entries there, hence neither has a gradient.
    """

    def __init__(self, frozen: Callable[[torch.dtype], Tensor], starts: Sequence[Cores]) -> None:
        super().__init__()
        self.frozen = frozen
        self.shapes = [[core.shape for core in cores] for cores in starts]
        self.cores = nn.ParameterList(stack([cores[k] for cores in starts]) for k in range(len(starts[0])))
        self.once, self.per_token = products([core.shape[1:] for core in self.cores])

    def whole(self, x: Tensor) -> Tensor:
        if x.shape[1] * self.per_token < self.once:
            return x @ self.frozen(x.dtype).mT + self.through_cores(x)
        if torch.is_grad_enabled():
            y: Tensor = checkpoint(self.through_matrix, x, use_reentrant=False, preserve_rng_state=False)
            return y
        return self.through_matrix(x)

    def through_matrix(self, x: Tensor) -> Tensor:
        """The adapted output, by the matrix `[runs, out, in]`."""
        return x @ (self.frozen(x.dtype) + self.matrix()).mT

    def matrix(self) -> Tensor:
        """What is added to F, `[runs, out, in]`."""
        return reconstruct(list(self.cores))

    def through_cores(self, x: Tensor) -> Tensor:
        """What is added to x Fᵀ, core by core."""
        return sequential(list(self.cores), x)

    def delta(self, run: int) -> Tensor:
        return reconstruct([core[None] for core in self.state(run).values()])[0]

    def state(self, run: int) -> dict[str, Tensor]:
        return self.cut("core", [core.data for core in self.cores], run)

    def cut(self, kind: str, cores: Sequence[Tensor], run: int) -> dict[str, Tensor]:
        """One run's cores without padding, by name."""
        cuts = zip(cores, self.shapes[run], strict=True)
        return {f"{kind}{k + 1}": core[run, :r, :, :, :s] for k, (core, (r, _, _, s)) in enumerate(cuts)}


class KeepsInitial(TensorTrain):
    """A tensor train that keeps the cores it started from, T⁰."""

    def __init__(self, frozen: Callable[[torch.dtype], Tensor], starts: Sequence[Cores]) -> None:
        super().__init__(frozen, starts)
        for k, core in enumerate(self.cores):
            self.register_buffer(f"initial{k + 1}", core.detach().clone())

    @property
    def initial(self) -> Cores:
        """T⁰ of all runs."""
        return [self.get_buffer(f"initial{k + 1}") for k in range(len(self.cores))]

    def constants(self, run: int) -> dict[str, Tensor]:
        return self.cut("initial", self.initial, run)


class WeightDecomposed(KeepsInitial):
    """DoTA's layer: `x (W - MPO(T⁰) + MPO(T))ᵀ`."""

    def matrix(self) -> Tensor:
        return super().matrix() - reconstruct(self.initial)

    def through_cores(self, x: Tensor) -> Tensor:
        return super().through_cores(x) - sequential(self.initial, x)

    def delta(self, run: int) -> Tensor:
        return learnt(self.state(run) | self.constants(run))


class DoTA(Method["DoTA.Config"]):
    """The cores of an MPO of W are trained, what it leaves of W is frozen."""

    id = "dota"
    size = "bond"
    bytes_per_scalar = 20  # with the initial core
    label = "DoTA"
    paper = Paper("DoTA: Weight-Decomposed Tensor Adaptation for Large Language Models", "2412.20891", 2024)

    class Config(AdapterConfig):
        """`bond` is R, the largest bond; `cores` is n. `balance`: bonds are balanced after the sweep (ours).

        No value of the paper is known: R = 16 and n = 3 are starting points.
        """

        bond: PositiveInt = 16
        cores: int = Field(default=3, ge=2, le=8)
        balance: bool = True

    def trainable(self, config: Any, shapes: Shapes) -> int:
        """Sum over layers and cores of r_(k-1) · o_k · i_k · r_k."""
        return sum(math.prod(core) for layer in config.targets(shapes)
                   for core in core_shapes(layer, config.bond, config.cores))

    def structure(self, config: Any) -> Hashable:
        """Bonds may differ in a pack, the number of cores may not."""
        return config.target_modules, config.cores

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> WholeAdapter:
        W = weight.to(torch.promote_types(weight.dtype, torch.float32))  # the type that the cores are trained in
        made = {start.config: decompose(W, start.config.bond, start.config.cores, start.config.balance)
                for start in starts}
        return WeightDecomposed(weight.to, [made[start.config] for start in starts])


class RandomTensorTrain(DoTA):
    """The same cores, started at random beside a whole W."""

    id = "tt-random"
    bytes_per_scalar = 16
    label = "Random tensor train"

    class Config(AdapterConfig):
        """`bond` and `cores` as DoTA's."""

        bond: PositiveInt = 16
        cores: int = Field(default=3, ge=2, le=8)

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> WholeAdapter:
        made = [random_cores(core_shapes(layer, s.config.bond, s.config.cores), s.generator(layer)) for s in starts]
        return TensorTrain(weight.to, [[core.to(weight.device) for core in cores] for cores in made])


def random_cores(shapes: Sequence[tuple[int, ...]], generator: torch.Generator) -> Cores:
    """T_n = 0; the others Gaussian with deviation 1 / sqrt(r_(k-1) · i_k), which keeps the size of what goes through
    them (the paper's deviation is not known)."""
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) / math.sqrt(shape[0] * shape[2])
             for shape in shapes]
    return [*(core.float() for core in drawn[:-1]), torch.zeros(shapes[-1])]


def stack(cores: Sequence[Tensor]) -> Tensor:
    """Cores of several runs as one tensor `[runs, r, o, i, s]`, bonds padded with zeros to the largest."""
    r, s = max(core.shape[0] for core in cores), max(core.shape[3] for core in cores)
    return torch.stack([nn.functional.pad(core, (0, s - core.shape[3], 0, 0, 0, 0, 0, r - core.shape[0]))
                        for core in cores])
