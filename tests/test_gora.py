"""GoRA's unit checks: identity, descent, norm, budget, ranks, T5-base's vectors, and export to peft."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from methods.gora import GoRA, Prepared, allocate, importance
from suite import bases, registry
from suite.batches import collate
from suite.method import Layer, Shapes, Start
from tests import stock, tiny

METHOD = registry.method("gora")
ARCHITECTURES = ("bert", "llama", "t5", "gpt2")
SAMPLE = {"batches": 4, "batch_size": 4}


def run(arch: str, folder: Path, seed: int = 0, **facts: Any) -> tuple[tiny.Tiny, Start]:
    base = tiny.build(arch)
    config = GoRA.Config(**({"rank": 4, "alpha": 8.0} | SAMPLE | facts))
    prepared = METHOD.prepare(config, base.context(folder))
    return base, Start(config, seed, prepared.data)


def layer_start(G: Tensor, rank: int, seed: int = 0, **facts: Any) -> tuple[Tensor, Tensor]:
    """s B A and A for one layer with the given gradient."""
    layer = Layer("x", G.shape[1], G.shape[0])
    config = GoRA.Config(rank=rank, **facts)
    factors = METHOD.start(layer, Start(config, seed, Prepared({"x": rank}, {"x": G})))
    return factors.scale * (factors.B.double() @ factors.A.double()), factors.A.double()


def gaussian(out: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(out, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("rank", "alpha", "gamma"), [(1, 16.0, 0.05), (4, 16.0, 0.08), (12, 3.0, 1.0)])
def test_the_start_is_the_step_projected_on_the_rows_of_a(rank: int, alpha: float, gamma: float) -> None:
    G = gaussian(12, 20)
    delta, A = layer_start(G, rank, alpha=alpha, gamma=gamma)
    projection = A.mT @ torch.linalg.inv(A @ A.mT) @ A
    expected = -(gamma * math.sqrt(20) / math.sqrt(rank)) * G @ projection
    assert float((delta - expected).norm() / expected.norm()) < 1e-6
    assert float((delta @ projection - delta).norm() / delta.norm()) < 1e-6


@given(seed=st.integers(0, 2**32), rank=st.integers(1, 10), out=st.integers(10, 20), size=st.integers(10, 20))
def test_the_paper_descends_and_the_official_code_climbs(seed: int, rank: int, out: int, size: int) -> None:
    G = gaussian(out, size, seed)
    down, _ = layer_start(G, rank, seed)
    up, _ = layer_start(G, rank, seed, variant="official_code")
    assert float((G * down).sum()) < 0
    assert torch.equal(up, -down)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_small_step_lowers_the_loss_on_the_calibration_batches_and_climbing_raises_it(
        arch: str, tmp_path: Path) -> None:
    whole_set = {"batches": 1, "batch_size": tiny.ITEMS}

    def loss(**facts: Any) -> float:
        base, start = run(arch, tmp_path, gamma=1e-3, **whole_set, **facts)
        packed = base.pack(METHOD, [start])
        with torch.no_grad():
            return float(base.loss_of(packed)(collate(base.data, [range(tiny.ITEMS)], tiny.CPU)))

    bare = tiny.build(arch)
    batch = collate(bare.data, [range(tiny.ITEMS)], tiny.CPU)
    with torch.no_grad():
        before = float(bare.loss(bare.model, bare.head(), 1)(batch))
    assert loss() < before
    assert loss(variant="official_code") > before


def test_the_start_has_norm_gamma_g_on_average() -> None:
    for rank in (2, 8):
        ratios = []
        for seed in range(200):
            G = gaussian(30, 64, seed)
            delta, _ = layer_start(G, rank, seed, gamma=0.05)
            ratios.append(float(delta.norm() / G.norm()))
        assert sum(ratios) / len(ratios) == pytest.approx(0.05, rel=0.03)


def test_a_rank_one_gradient_scatters_as_one_over_root_two_r() -> None:
    ratios = []
    for seed in range(400):
        G = gaussian(30, 1, seed) @ gaussian(1, 512, seed + 1)
        delta, _ = layer_start(G, 8, seed, gamma=1.0)
        ratios.append(float(delta.norm() / G.norm()))
    found = torch.tensor(ratios)
    assert float(found.square().mean()) == pytest.approx(1.0, rel=0.07)
    assert float(found.std()) == pytest.approx(0.25, rel=0.15)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gamma_zero_is_rank_adaptive_lora(arch: str, tmp_path: Path) -> None:
    base, start = run(arch, tmp_path, gamma=0.0)
    bare = tiny.build(arch)
    packed = base.pack(METHOD, [start])
    assert len(set(start.prepared.ranks.values())) > 1
    assert not any(adapter.delta(0).any() for adapter in packed.adapters.values())
    with torch.no_grad():
        found, expected = (one.outputs(one.model, one.batch()) for one in (base, bare))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("facts", [{"rank_min": 4, "rank_max": 4}, {"allocation": "uniform"}])
def test_equal_bounds_or_uniform_allocation_give_the_shapes_of_plain_lora(facts: dict[str, Any],
                                                                          tmp_path: Path) -> None:
    base, start = run("llama", tmp_path, **facts)
    lora = registry.method("lora")
    assert set(start.prepared.ranks.values()) == {4}
    expected = lora.trainable(lora.Config(rank=4), base.shapes)
    assert METHOD.trained(start.config, base.shapes, start.prepared) == expected
    assert METHOD.trainable(start.config, base.shapes) == expected


def layers(sizes: list[tuple[int, int]]) -> list[Layer]:
    return [Layer(str(i), size, out) for i, (size, out) in enumerate(sizes)]


sizes = st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=20)


@given(sizes=sizes, rank=st.integers(1, 64), data=st.data())
def test_without_clipping_the_weighted_budget_is_met_to_half_a_rank(sizes: list[tuple[int, int]], rank: int,
                                                                    data: st.DataObject) -> None:
    made = layers(sizes)
    shares = data.draw(st.lists(st.floats(1e-9, 1e3), min_size=len(made), max_size=len(made)))
    config = GoRA.Config(rank=rank, rank_min=0, rank_max=10**9)
    # Layers wide enough never to clip: the rule itself is looked at.
    free = [Layer(x.name, x.in_features * 10**6, x.out_features * 10**6) for x in made]
    ranks = allocate(config, free, {x.name: share for x, share in zip(free, shares, strict=True)})
    c = {x.name: math.sqrt(x.in_features + x.out_features) for x in free}
    budget = rank * sum(c.values())
    assert abs(sum(ranks[x.name] * c[x.name] for x in free) - budget) <= sum(c.values()) / 2 * (1 + 1e-9)


@given(sizes=sizes, rank=st.integers(1, 64), data=st.data())
def test_ranks_stay_within_bounds_and_layers(sizes: list[tuple[int, int]], rank: int,
                                             data: st.DataObject) -> None:
    made = layers(sizes)
    shares = data.draw(st.lists(st.floats(0, 1e3), min_size=len(made), max_size=len(made)))
    low = data.draw(st.integers(0, rank))
    config = GoRA.Config(rank=rank, rank_min=low, rank_max=data.draw(st.integers(max(low, 1), 100)))
    ranks = allocate(config, made, {x.name: share for x, share in zip(made, shares, strict=True)})
    for x in made:
        smallest = min(x.in_features, x.out_features)
        assert min(low, smallest) <= ranks[x.name] <= min(config.bounds[1], smallest)


def test_what_clipping_takes_is_not_handed_on() -> None:
    made = layers([(100, 100)] * 3)
    config = GoRA.Config(rank=8)
    assert config.bounds == (4, 32)
    assert allocate(config, made, {"0": 1.0, "1": 0.0, "2": 0.0}) == {"0": 24, "1": 4, "2": 4}
    assert allocate(config, made * 2, {"0": 1.0, "1": 0.0, "2": 0.0}) == {"0": 24, "1": 4, "2": 4}
    assert allocate(GoRA.Config(rank=8, rank_max=10), made, {"0": 1.0, "1": 0.0, "2": 0.0})["0"] == 10
    assert allocate(GoRA.Config(rank=8, rank_min=0), made, {"0": 1.0, "1": 0.0, "2": 0.0})["1"] == 0


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(ValueError, match="rank_min 9 is larger than rank_max 8"):
        GoRA.Config(rank=8, rank_min=9, rank_max=8)
    with pytest.raises(ValueError, match="rank_min 4 is larger than rank_max 3"):
        GoRA.Config(rank=8, rank_max=3)


@given(power=st.integers(-20, 20), seed=st.integers(0, 100))
def test_scaling_every_gradient_leaves_the_ranks(power: int, seed: int) -> None:
    made = layers([(20, 30), (30, 20), (20, 20), (10, 40)])
    W = {x.name: gaussian(x.out_features, x.in_features, seed) for x in made}
    G = {x.name: gaussian(x.out_features, x.in_features, seed + 1) * 3.0**i for i, x in enumerate(made)}
    config = GoRA.Config(rank=4)
    plain = allocate(config, made, {name: importance(W[name], G[name]) for name in W})
    assert allocate(config, made, {name: importance(W[name], 2.0**power * G[name]) for name in W}) == plain
    assert len(set(plain.values())) > 1


def test_importance_is_the_mean_of_absolute_products() -> None:
    W, G = torch.tensor([[1.0, -2.0], [3.0, 0.5]]), torch.tensor([[-1.0, 1.0], [2.0, 0.0]])
    assert importance(W, G) == pytest.approx((1 + 2 + 6 + 0) / 4)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_preparing_never_writes_the_base(arch: str, tmp_path: Path) -> None:
    base, _ = run(arch, tmp_path)
    bare = tiny.build(arch).model.state_dict()
    assert all(torch.equal(tensor, bare[name]) for name, tensor in base.model.state_dict().items())


def test_the_report_says_ranks_and_importances_of_every_layer(tmp_path: Path) -> None:
    base = tiny.build("bert")
    config = GoRA.Config(rank=4, **SAMPLE)
    preparation = METHOD.prepare(config, base.context(tmp_path))
    names = [x.name for x in base.shapes.layers]
    assert list(preparation.report["ranks"]) == names
    assert list(preparation.report["importances"]) == names
    assert preparation.report["ranks"] == preparation.data.ranks


@pytest.fixture(scope="module")
def t5_base() -> Shapes:
    return bases.shapes(bases.get("t5-base"), registry.task("bigram-shift"))


def test_t5_base_has_192_layers_and_the_published_count_at_rank_8(t5_base: Shapes) -> None:
    assert len(t5_base.layers) == 192
    lora = registry.method("lora")
    assert lora.trainable(lora.Config(rank=8), t5_base) == 3_244_032


@pytest.mark.parametrize(("variant", "square", "wide", "total"), [("paper", 9, 6, 3_096_576),
                                                                  ("official_code", 11, 4, 3_170_304)])
def test_t5_base_vectors_at_equal_importance(t5_base: Shapes, variant: Any, square: int, wide: int,
                                             total: int) -> None:
    config = GoRA.Config(rank=8, variant=variant)
    ranks = allocate(config, t5_base.layers, {x.name: 1.0 for x in t5_base.layers})
    assert {ranks[x.name] for x in t5_base.layers if x.in_features == x.out_features} == {square}
    assert {ranks[x.name] for x in t5_base.layers if x.in_features != x.out_features} == {wide}
    assert METHOD.trainable(config, t5_base) == total


def test_t5_base_before_clipping_ranges_from_83_to_132_percent(t5_base: Shapes) -> None:
    config = GoRA.Config(rank=8, rank_min=0, rank_max=768)
    for square, percent in [(True, -17), (False, 32)]:
        importances = {x.name: float((x.in_features == x.out_features) == square) for x in t5_base.layers}
        ranks = allocate(config, t5_base.layers, importances)
        count = METHOD.trained(config, t5_base, Prepared(ranks, {}))
        assert 100 * (count / 3_244_032 - 1) == pytest.approx(percent, abs=4)


@pytest.mark.parametrize("facts", [{}, {"variant": "official_code", "rank": 1, "rank_min": 0}], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_trained_run_gives_the_same_outputs_in_stock_peft(arch: str, facts: dict[str, Any],
                                                            tmp_path: Path) -> None:
    base, start = run(arch, tmp_path, **facts)
    packed = base.pack(METHOD, [start])
    base.train(packed, [base.spec(METHOD, start.config)])
    fields = METHOD.peft_config(start.config, base.shapes, start.prepared)
    theirs = stock.attach(arch, fields, packed.state(0))
    assert len(set(start.prepared.ranks.values())) > 1
    assert (0 in start.prepared.ranks.values()) == (start.config.rank_min == 0)
    with torch.no_grad():
        torch.testing.assert_close(base.outputs(base.model, base.batch()),
                                   theirs.outputs(theirs.model, base.batch()), rtol=1e-11, atol=1e-11)
