"""DoTA's unit checks: decomposition, counts, balancing, the two ways through a layer, padding, what is saved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.dota import (
    Cores,
    TensorTrain,
    WeightDecomposed,
    core_shapes,
    decompose,
    factors,
    learnt,
    products,
    random_cores,
    reconstruct,
)
from suite import budget, registry
from suite.method import Layer, Shapes, Start
from suite.optimiser import PackedAdamW
from suite.packing import Packed
from suite.specs import Budget, Recipe
from tests import tiny

#: The table of counts: out x in, cores, then R and the count.
COUNTS = [
    (4096, 4096, 3, {4: 6_144, 8: 20_480, 16: 73_728, 32: 278_528, 64: 1_081_344}),
    (4096, 4096, 4, {4: 2_560, 8: 9_216, 16: 34_816, 32: 135_168, 64: 532_480}),
    (1024, 4096, 3, {4: 3_584, 8: 11_264, 16: 38_912, 32: 143_360, 64: 548_864}),
    (11008, 4096, 3, {4: 7_872, 8: 23_936, 16: 80_640, 32: 292_352, 64: 1_108_992}),
    (14336, 4096, 3, {4: 10_240, 8: 34_816, 16: 126_976, 32: 483_328, 64: 1_884_160}),
    (2048, 2048, 3, {4: 5_376, 8: 18_944, 16: 70_656, 32: 272_384, 64: 1_069_056}),
]
FULL = 10**6


def matrix(out: int, into: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mpo(cores: Cores) -> Tensor:
    return reconstruct([core[None] for core in cores])[0]


def elementwise(cores: Cores) -> Tensor:
    """MPO(T) of three cores from its definition, entry by entry."""
    a, b, c = cores
    (_, o1, i1, _), (_, o2, i2, _), (_, o3, i3, _) = a.shape, b.shape, c.shape
    found = torch.zeros(o1 * o2 * o3, i1 * i2 * i3, dtype=a.dtype)
    for row in range(found.shape[0]):
        p, q, s = row // (o2 * o3), row // o3 % o2, row % o3
        for column in range(found.shape[1]):
            u, v, w = column // (i2 * i3), column // i3 % i2, column % i3
            found[row, column] = (a[:, p, u] @ b[:, q, v] @ c[:, s, w]).squeeze()
    return found


def layer(runs: int = 2, bond: int = 3, out: int = 12, into: int = 30, seed: int = 5) -> WeightDecomposed:
    """A layer in float64 whose cores have moved away from where they started."""
    W = matrix(out, into)
    made = WeightDecomposed(W.to, [decompose(W, bond + run, 3) for run in range(runs)])
    generator = torch.Generator().manual_seed(seed)
    for core in made.cores:
        core.data += (core.data != 0) * 0.1 * torch.randn(core.shape, generator=generator, dtype=torch.float64)
    return made


@pytest.mark.parametrize(("size", "n", "expected"), [
    (4096, 3, (16, 16, 16)), (1024, 3, (8, 8, 16)), (11008, 3, (16, 16, 43)), (14336, 3, (16, 28, 32)),
    (2048, 3, (8, 16, 16)), (43, 3, (1, 1, 43)), (7, 2, (1, 7)), (1, 3, (1, 1, 1))])
def test_factors_are_balanced_and_rise(size: int, n: int, expected: tuple[int, ...]) -> None:
    assert factors(size, n) == expected


@pytest.mark.parametrize(("out", "into", "n", "counts"), COUNTS)
def test_counts_are_those_of_the_table(out: int, into: int, n: int, counts: dict[int, int]) -> None:
    shapes = Shapes((Layer("a", into, out), Layer("b", into, out)), 0)
    for name in ("dota", "tt-random", "qdota"):
        method = registry.method(name)
        for bond, count in counts.items():
            assert method.trainable(method.Config(bond=bond, cores=n), shapes) == 2 * count


@pytest.mark.parametrize(("out", "into"), [(12, 30), (43, 7), (7, 7), (86, 16), (1, 5)])
@pytest.mark.parametrize("n", [2, 3, 4])
def test_full_bonds_give_the_matrix_back(out: int, into: int, n: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        W = matrix(out, into, dtype=dtype)
        cores = decompose(W, FULL, n)
        assert [tuple(core.shape) for core in cores] == core_shapes(Layer("", into, out), FULL, n)
        assert (mpo(cores) - W).norm() <= tolerance * W.norm()


def test_reconstruction_is_the_definition() -> None:
    cores = random_cores(core_shapes(Layer("", 12, 18), 3, 3), torch.Generator().manual_seed(1))
    cores[-1] = torch.randn(cores[-1].shape, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(mpo(cores), elementwise(cores))


def test_a_kronecker_product_has_bond_one() -> None:
    parts = [matrix(o, i, seed) for seed, (o, i) in enumerate([(2, 2), (2, 3), (3, 5)])]
    W = torch.kron(torch.kron(*parts[:2]), parts[2])
    assert W.shape == (12, 30)
    assert factors(12, 3) == (2, 2, 3)
    assert factors(30, 3) == (2, 3, 5)
    torch.testing.assert_close(mpo(decompose(W, 1, 3)), W, rtol=0, atol=1e-12)


def test_error_does_not_rise_with_the_bond() -> None:
    W = matrix(48, 30)
    errors = [float((mpo(decompose(W, bond, 3)) - W).norm()) for bond in (1, 2, 3, 5, 8, 13, FULL)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[3] > errors[-1]


def test_balancing_changes_no_product_and_evens_the_norms() -> None:
    W = matrix(192, 128)
    plain, balanced = decompose(W, 5, 3, balance=False), decompose(W, 5, 3)
    torch.testing.assert_close(mpo(balanced), mpo(plain), rtol=0, atol=1e-12)
    spread = [max(norms) / min(norms) for norms in ([float(core.norm()) for core in cores] for cores in (plain, balanced))]
    assert spread[1] < 0.6 * spread[0]
    assert float(plain[0].norm()) == pytest.approx(math.sqrt(5))  # all of W is in the last core


def test_directions_that_a_matrix_does_not_have_are_balanced_without_division_by_nothing() -> None:
    W = torch.kron(torch.kron(matrix(2, 2), matrix(2, 3, 1)), matrix(3, 5, 2))
    for given in (W, torch.zeros(12, 30, dtype=torch.float64)):
        cores = decompose(given, 8, 3)
        assert all(core.isfinite().all() for core in cores)
        torch.testing.assert_close(mpo(cores), given, rtol=0, atol=1e-12)


def test_the_products_are_those_of_the_note() -> None:
    once, per_token = products(core_shapes(Layer("", 4096, 4096), 16, 3))
    assert 2 * once == pytest.approx(570e6, rel=2e-3)
    assert 2 * per_token == pytest.approx(37.7e6, rel=2e-3)
    assert once // per_token == 15


def gradients(made: TensorTrain, y: Tensor, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(),
                                    [x, *made.cores]))


def test_both_ways_through_a_layer_agree_in_output_and_gradients() -> None:
    made = layer()
    x = torch.randn(2, 9, 30, dtype=torch.float64, requires_grad=True)
    dense = x @ made.frozen(x.dtype).mT + x @ (reconstruct(list(made.cores)) - reconstruct(made.initial)).mT
    one_by_one = x @ made.frozen(x.dtype).mT + made.through_cores(x)
    torch.testing.assert_close(made.through_matrix(x), dense)
    torch.testing.assert_close(one_by_one, dense)
    torch.testing.assert_close(gradients(made, one_by_one, x), gradients(made, dense, x))


@pytest.mark.parametrize("tokens", [1, 200])
def test_fewer_multiplications_decide_the_way(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = layer()
    few = tokens * made.per_token < made.once
    assert few == (tokens == 1)
    x = torch.randn(2, tokens, 30, dtype=torch.float64)
    expected = made.whole(x)
    monkeypatch.setattr(made, "through_matrix" if few else "through_cores", lambda x: pytest.fail("the dearer way"))
    torch.testing.assert_close(made.whole(x), expected, rtol=0, atol=0)


def test_the_matrix_is_made_again_in_backward_and_not_held() -> None:
    made = layer()
    x = torch.randn(2, 200, 30, dtype=torch.float64, requires_grad=True)
    held: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(tuple(t.shape)) or t, lambda t: t):
        y = made.whole(x)
        recomputed = list(held)
        plain = made.through_matrix(x)
    assert not any(shape[-2:] in ((12, 30), (30, 12)) for shape in recomputed)
    assert any(shape[-2:] in ((12, 30), (30, 12)) for shape in held)
    for found, expected in zip(gradients(made, y, x), gradients(made, plain, x), strict=True):
        assert torch.equal(found, expected)


def test_step_zero_is_the_base_and_every_core_has_a_gradient() -> None:
    W = matrix(12, 30)
    x = torch.randn(1, 200, 30, dtype=torch.float64)
    made = WeightDecomposed(W.to, [decompose(W, 4, 3)])
    torch.testing.assert_close(made.whole(x), x @ W.mT, rtol=0, atol=1e-13)
    torch.testing.assert_close(made.whole(x[:, :1]), x[:, :1] @ W.mT, rtol=0, atol=1e-13)
    residual = W - reconstruct(made.initial)[0]
    torch.testing.assert_close(residual + reconstruct(list(made.cores))[0], W, rtol=0, atol=1e-13)
    made.whole(x).square().sum().backward()
    assert all(core.grad is not None and core.grad.any() for core in made.cores)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_narrow_base_is_exact_at_step_zero(dtype: torch.dtype) -> None:
    W = matrix(12, 30, dtype=dtype)
    start = Start(registry.method("dota").Config(bond=3), 0)
    made: Any = registry.method("dota").adapter(Layer("a", 30, 12), W, [start])
    x = torch.randn(1, 200, 30)
    assert all(core.dtype == torch.float32 for core in made.cores)
    torch.testing.assert_close(made.whole(x), x @ W.float().mT, rtol=0, atol=1e-5)


def test_a_random_train_moves_its_last_core_first() -> None:
    W = matrix(12, 30)
    method = registry.method("tt-random")
    made: Any = method.adapter(Layer("a", 30, 12), W, [Start(method.Config(bond=3), 0)])
    made.double()
    x = torch.randn(1, 200, 30, dtype=torch.float64)
    torch.testing.assert_close(made.whole(x), x @ W.mT, rtol=0, atol=1e-13)
    made.whole(x).square().sum().backward()
    assert [bool(core.grad.any()) for core in made.cores] == [False, False, True]
    other: Any = method.adapter(Layer("a", 30, 12), W, [Start(method.Config(bond=3), 1)])
    assert not torch.equal(other.cores[0], made.cores[0].float())


def test_padding_of_bonds_stays_zero_under_adamw() -> None:
    made = layer(runs=3, bond=2)
    outside = [core.data == 0 for core in made.cores]
    assert any(mask.any() for mask in outside)
    recipe = Recipe(learning_rate=1e-2, epochs=1, batch_size=1, weight_decay=0.1)
    adamw = PackedAdamW([(core, None) for core in made.cores], 3, [1e-2] * 3, recipe)
    for step in range(4):
        x = torch.randn(3, 200, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        losses = made.whole(x).square().mean((1, 2))
        losses.sum().backward()
        for core, mask in zip(made.cores, outside, strict=True):
            assert core.grad is not None
            assert not core.grad[mask].any()
        adamw.step(losses.detach(), 1.0)
        adamw.drop_gradients()
    assert all(not core[mask].any() for core, mask in zip(made.cores, outside, strict=True))


def test_what_is_saved_gives_the_change_and_fails_without_the_start() -> None:
    made = layer()
    for run in range(2):
        kept = made.state(run) | made.constants(run)
        assert [tuple(t.shape) for t in made.state(run).values()] == core_shapes(Layer("", 30, 12), 3 + run, 3)
        torch.testing.assert_close(learnt(kept), (reconstruct(list(made.cores)) - reconstruct(made.initial))[run])
        with pytest.raises(ValueError, match="initial2 is missing"):
            learnt({name: tensor for name, tensor in kept.items() if name != "initial2"})


def test_a_saved_run_is_right_where_decomposition_gives_other_signs() -> None:
    made = layer(runs=1)
    kept = {name: tensor.clone() for name, tensor in (made.state(0) | made.constants(0)).items()}
    elsewhere = decompose(matrix(12, 30), 3, 3)
    elsewhere[0], elsewhere[1] = -elsewhere[0], -elsewhere[1]
    other = WeightDecomposed(matrix(12, 30).to, [elsewhere])
    other.load(0, kept)
    x = torch.randn(1, 200, 30, dtype=torch.float64)
    assert torch.equal(other.whole(x), made.whole(x))


def test_runs_with_another_number_of_cores_do_not_share_a_pack(tmp_path: Path) -> None:
    method = registry.method("dota")
    base = tiny.build("llama")
    starts = base.starts(method, [method.Config(bond=2), method.Config(bond=2, cores=2)], tmp_path)
    with pytest.raises(ValueError, match="differ"):
        Packed(base.model, method, base.shapes, starts)


@pytest.mark.parametrize("name", ["dota", "tt-random"])
@pytest.mark.parametrize("rank", [1, 4])
def test_a_rank_is_met_within_a_tenth_on_minilm(name: str, rank: int) -> None:
    layers = [Layer(f"{part}{i}", into, out) for i in range(6) for part, into, out in
              [("q", 384, 384), ("k", 384, 384), ("v", 384, 384), ("o", 384, 384), ("up", 384, 1536), ("down", 1536, 384)]]
    method = registry.method(name)
    shapes = Shapes(tuple(layers), 22_713_216)
    found = budget.fit(method, method.Config(), Budget(rank=rank), shapes)
    wanted = budget.target(Budget(rank=rank), shapes)
    assert abs(method.trainable(found, shapes) - wanted) <= 0.1 * wanted
