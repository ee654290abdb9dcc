"""SpaRTA's unit checks: selection, budgets, gradients, full fine-tuning at density 1, peft's SHiRA, the official step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import ShiraConfig, get_peft_model
from torch import Tensor, nn

from methods.sparta import DOT_PRODUCTS, Sparse, SparseLinear, SpaRTA, counts, effective, gradient, positions, shares, size
from suite import bases, budget, registry
from suite.batches import collate, training_order
from suite.method import Layer, Shapes, Start
from suite.packing import Packed
from suite.specs import Budget
from tests import tiny

METHOD = registry.method("sparta")
LAYERS = (Layer("block.v", 40, 30), Layer("block.mlp", 100, 30), Layer("block.k", 10, 10))


def run(arch: str, folder: Path, runs: int = 1, **facts: Any) -> tuple[tiny.Tiny, list[Start]]:
    base = tiny.build(arch)
    config = SpaRTA.Config.model_validate({"entries": 300} | facts)
    return base, base.starts(METHOD, [config] * runs, folder)


def adapter(weight: Tensor, *numbers: int) -> Sparse:
    """One layer with so many entries per run, moved away from zero."""
    layer = Layer("x", weight.shape[1], weight.shape[0])
    made = Sparse(weight, [positions(layer, n, seed) for seed, n in enumerate(numbers)]).to(torch.promote_types(
        weight.dtype, torch.float32))
    draw = torch.Generator().manual_seed(1)
    for run in range(len(numbers)):
        for tensor in made.state(run).values():
            tensor.copy_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype))
    return made


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Which entries train


@given(seed=st.integers(0, 2**32), total=st.integers(1, 4300), like=st.sampled_from(["like_lora", "uniform"]))
def test_exactly_so_many_different_entries_in_order(seed: int, total: int, like: str) -> None:
    config = SpaRTA.Config(entries=total, allocation=like)
    found = counts(config, LAYERS, total, seed)
    assert sum(found.values()) == total
    for layer in LAYERS:
        chosen = positions(layer, found[layer.name], seed)
        assert chosen.dtype == torch.int32
        assert len(chosen) == found[layer.name] <= size([layer])
        assert (chosen.diff() > 0).all()
        assert len(chosen) == 0 or (chosen[0] >= 0 and chosen[-1] < size([layer]))


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 60)), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_are_in_proportion_but_for_limits_and_rounding(parts: list[tuple[int, int]], filling: float) -> None:
    weights, limits = [w for w, _ in parts], [limit for _, limit in parts]
    total = int(filling * sum(limits))
    found = shares(total, weights, limits)
    assert sum(found) == total
    assert all(0 <= n <= limit for n, limit in zip(found, limits, strict=True))
    open_ = [i for i, n in enumerate(found) if n < limits[i]]
    for i in open_:  # nobody that has room has less, for its weight, than anybody else
        assert all(found[i] + 1 >= weights[i] * (found[j] - 1) / weights[j] for j in range(len(found)))


def test_a_layers_part_is_loras_or_one_density_everywhere() -> None:
    assert counts(SpaRTA.Config(), LAYERS, 2 * 220, 0) == {"block.v": 140, "block.mlp": 260, "block.k": 40}
    assert counts(SpaRTA.Config(allocation="uniform"), LAYERS, 430, 0) == {"block.v": 120, "block.mlp": 300, "block.k": 10}


def test_what_a_small_layer_cannot_hold_goes_to_the_others() -> None:
    found = counts(SpaRTA.Config(), LAYERS, 3600, 0)
    assert found == {"block.v": 1200, "block.mlp": 2300, "block.k": 100}  # k is full first, then, with more to take, v


@pytest.mark.parametrize("seed", range(4))
def test_bernoulli_numbers_lie_within_five_sigma_and_vary(seed: int) -> None:
    layers = [Layer(f"x{i}", 300, 200) for i in range(20)]
    config = SpaRTA.Config(selection="bernoulli", allocation="uniform")
    found = counts(config, layers, 120_000, seed)
    sigma = math.sqrt(60_000 * 0.1 * 0.9)
    assert all(abs(n - 6000) < 5 * sigma for n in found.values())
    assert len(set(found.values())) > 10
    assert 0.4 * sigma < torch.tensor([float(n) for n in found.values()]).std() < 1.8 * sigma
    assert found != counts(config, layers, 120_000, seed + 1)


def test_every_entry_is_equally_likely() -> None:
    layer, times = Layer("x", 12, 10), 3000
    hits = torch.zeros(120)
    for seed in range(times):
        hits[positions(layer, 30, seed).long()] += 1
    assert float((hits / times - 0.25).abs().max()) < 5 * math.sqrt(0.25 * 0.75 / times)


def test_more_entries_extend_fewer_and_layers_and_seeds_differ() -> None:
    few, many = (set(positions(LAYERS[0], n, 3).tolist()) for n in (50, 200))
    assert few < many
    assert not torch.equal(positions(LAYERS[0], 50, 3), positions(LAYERS[0], 50, 4))
    other = Layer("block.other", 40, 30)
    assert not torch.equal(positions(LAYERS[0], 50, 3), positions(other, 50, 3))


@pytest.mark.parametrize("own", [None, 5])
def test_the_selection_seed_alone_decides_where_there_is_one(own: int | None, tmp_path: Path) -> None:
    base, starts = run("bert", tmp_path, runs=2, selection_seed=own)
    packed = base.pack(METHOD, starts)
    first, second = packed.constants(0), packed.constants(1)
    assert all(torch.equal(first[key], second[key]) == (own is not None) for key in first)


def test_entries_are_drawn_alike_for_a_weight_on_any_device(tmp_path: Path) -> None:
    base, starts = run("bert", tmp_path)
    for layer in METHOD.targets(starts[0].config, base.shapes):
        here, there = (METHOD.adapter(layer, torch.zeros(layer.out_features, layer.in_features, device=device), starts)
                       for device in ("cpu", "meta"))
        assert torch.equal(here.indices, there.indices)


# Sparsity, density, budgets


def test_density_follows_sparsity_and_what_is_frozen() -> None:
    """p = (1 - s) n_base / (n_base - n_frozen), and s can be no less than n_frozen / n_base."""
    base = Shapes(LAYERS, parameters=5000)  # 4,300 of which can train, or 1,200 where the rest is frozen
    for targets, trainable in (("all-linear", 4300), (("v",), 1200)):
        config = SpaRTA.Config(sparsity=0.9, target_modules=targets)
        METHOD.check(config, base)
        assert METHOD.trainable(config, base) / size(config.targets(base)) == pytest.approx(0.1 * 5000 / trainable)
        least = 1 - trainable / 5000
        METHOD.check(config.model_copy(update={"sparsity": least}), base)
        with pytest.raises(ValueError, match=rf"sparsity {least:.4f} is the least"):
            METHOD.check(config.model_copy(update={"sparsity": least - 0.001}), base)


def test_gemma_2b_trains_as_many_as_the_authors_notebook() -> None:
    """25,067,043 at s = 0.99, the head's 2 · 2048 among them; Bernoulli, so within five sigma."""
    shapes = bases.shapes(bases.get("gemma-2b"), registry.task("glue-sst2"))
    config = SpaRTA.Config(preset="sparta-official", selection="bernoulli", allocation="uniform")
    layers = config.targets(shapes)
    assert size(layers) == 18 * (2048 * 256 + 2048 * 2048)
    wanted = METHOD.trainable(config, shapes)
    density = wanted / size(layers)
    assert density == pytest.approx(0.295, abs=5e-4)
    sigma = math.sqrt(size(layers) * density * (1 - density))
    assert abs(25_067_043 - 2 * 2048 - wanted) < 5 * sigma
    assert abs(sum(counts(config, layers, wanted, 0).values()) - wanted) < 5 * sigma


@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("base", ["minilm", "smollm2-135m", "t5-base", "gemma-2b", "llama-3.1-8b"])
def test_a_rank_gives_loras_count_to_the_scalar(base: str, rank: int) -> None:
    shapes, lora = bases.shapes(bases.get(base), registry.task("movie-sentiment")), registry.method("lora")
    wanted = lora.trainable(lora.Config(rank=rank), shapes)
    for facts in ({}, {"preset": "sparta-official", "allocation": "uniform"}):
        config = budget.fit(METHOD, SpaRTA.Config(**facts), Budget(rank=rank), shapes)
        assert METHOD.trainable(config, shapes) == wanted
        METHOD.check(config, shapes)
    each = counts(SpaRTA.Config(), shapes.layers, wanted, 0)
    assert all(each[x.name] == rank * (x.in_features + x.out_features) for x in shapes.layers)


def test_a_share_of_the_base_is_one_minus_the_sparsity() -> None:
    shapes = bases.shapes(bases.get("gemma-2b"), registry.task("glue-sst2"))
    config = budget.fit(METHOD, SpaRTA.Config(), Budget(share=0.01), shapes)
    assert config.entries == METHOD.trainable(SpaRTA.Config(sparsity=0.99), shapes)


def test_a_budget_beyond_all_entries_takes_them_all() -> None:
    assert METHOD.solve(SpaRTA.Config(), Shapes(LAYERS, 5000), 4400).entries == 4300


@pytest.mark.parametrize(("arch", "names", "count"), [
    ("bert", ("attention.self.value", "attention.output.dense"), 4), ("llama", ("self_attn.v_proj", "self_attn.o_proj"), 4),
    ("gemma", ("self_attn.v_proj", "self_attn.o_proj"), 4),
    ("t5", ("SelfAttention.v", "SelfAttention.o", "EncDecAttention.v", "EncDecAttention.o"), 12)])
def test_the_official_modules_are_value_and_output(arch: str, names: tuple[str, ...], count: int) -> None:
    found = [x.name for x in SpaRTA.Config(preset="sparta-official").targets(tiny.build(arch).shapes)]
    assert len(found) == count
    assert all(any(name.endswith(f".{ending}") for name in found) for ending in names)
    assert all(name.endswith(tuple(f".{ending}" for ending in names)) for name in found)


def test_the_official_modules_of_gpt2_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"c_attn holds query, key and value.*name target_modules among c_attn, c_fc"):
        SpaRTA.Config(preset="sparta-official").targets(tiny.build("gpt2").shapes)


def test_the_preset_and_target_modules_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="preset sparta-official chooses the layers"):
        SpaRTA.Config(preset="sparta-official", target_modules=("v",))


def test_the_report_says_what_was_drawn(tmp_path: Path) -> None:
    base = tiny.build("llama")
    config = SpaRTA.Config(entries=100, selection="bernoulli")
    made = METHOD.prepare(config, base.context(tmp_path, seed=3))
    drawn = METHOD.trained(config, base.shapes, made.data)
    assert drawn == sum(made.report["entries"].values()) != METHOD.trainable(config, base.shapes)
    assert made.report["sparsity"] == 1 - drawn / base.shapes.parameters
    assert made.report["density"] == drawn / size(base.shapes.layers)


# The layer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_layer_starts_as_the_frozen_one_bit_for_bit(dtype: torch.dtype) -> None:
    weight, x = gaussian(30, 40, dtype=dtype), gaussian(2, 5, 40, seed=1, dtype=dtype)
    made = adapter(weight, 100, 200)
    made.values.data.zero_()
    assert torch.equal(effective(weight, made.indices, made.values), weight.expand(2, -1, -1))
    assert torch.equal(made.whole(x), torch.bmm(x, weight.mT.expand(2, -1, -1)))


@pytest.mark.parametrize("transposed", [False, True])
def test_the_effective_weight_is_the_sum_and_w_stays(transposed: bool) -> None:
    stored = gaussian(40, 30) if transposed else gaussian(30, 40)
    weight = stored.mT if transposed else stored
    before, made = weight.clone(), adapter(weight, 100, 0, 700)
    full = effective(weight, made.indices, made.values)
    for run in range(3):
        expected = weight.clone().contiguous()
        for index, value in zip(made.indices[run].tolist(), made.values[run].tolist(), strict=True):
            expected[index // 40, index % 40] += value
        torch.testing.assert_close(full[run], expected, rtol=0, atol=0)
        torch.testing.assert_close(weight + made.delta(run), expected, rtol=0, atol=1e-15)
    assert torch.equal(weight, before)


def test_a_bfloat16_weight_is_changed_in_float32_and_cast_once() -> None:
    weight, x = gaussian(30, 40, dtype=torch.bfloat16), gaussian(1, 5, 40, seed=1, dtype=torch.bfloat16)
    made = adapter(weight, 100)
    assert made.values.dtype == torch.float32
    expected = (weight.float() + made.delta(0)).to(torch.bfloat16)
    y = made.whole(x.float())
    assert torch.equal(effective(weight, made.indices, made.values)[0], expected)
    assert torch.equal(y, torch.bmm(x, expected.mT[None]))
    y.sum().backward()
    assert made.values.grad is not None
    dense = x.float().sum((0, 1)).expand(30, -1).flatten()[made.indices[0].long()]
    torch.testing.assert_close(made.values.grad[0], dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("numbers", [(20,), (700,), (20, 31), (20, 700)])
def test_gradients_are_those_of_autograd(numbers: tuple[int, ...]) -> None:
    weight = gaussian(30, 40)
    made = adapter(weight, *numbers)
    x = gaussian(len(numbers), 4, 40, seed=1).requires_grad_()
    made.values.grad = None
    made.whole(x).square().sum().backward()
    assert x.grad is not None
    assert made.values.grad is not None
    for run, count in enumerate(numbers):
        dense = (weight + made.delta(run)).requires_grad_()
        own = x.detach()[run].requires_grad_()
        (own @ dense.mT).square().sum().backward()
        assert dense.grad is not None
        torch.testing.assert_close(x.grad[run], own.grad, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made.values.grad[run, :count], dense.grad.flatten()[made.indices[run, :count].long()],
                                   rtol=1e-12, atol=1e-12)
        assert not made.values.grad[run, count:].any()


@pytest.mark.parametrize("numbers", [(12,), (6, 12)])
def test_gradcheck(numbers: tuple[int, ...]) -> None:
    made = adapter(gaussian(8, 16), *numbers)
    x = gaussian(len(numbers), 3, 16, seed=1).requires_grad_()
    free = made.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: SparseLinear.apply(x, v, made.indices, None, made.weight), (x, free))


def test_entry_by_entry_and_by_way_of_the_dense_gradient_are_the_same() -> None:
    few, g, x = int(DOT_PRODUCTS * 1200), gaussian(3, 7, 30), gaussian(3, 7, 40, seed=1)
    for count in (1, few, few + 1, 1200):  # on both sides of the switch
        indices = torch.stack([positions(LAYERS[0], count, seed) for seed in range(3)])
        dense = torch.einsum("rto,rti->roi", g, x).flatten(1).gather(1, indices.long())
        torch.testing.assert_close(gradient(g, x, indices, x.dtype), dense, rtol=1e-13, atol=1e-13)
        for run in range(3):
            alone = gradient(g[run, None], x[run, None], indices[run, None], x.dtype)
            torch.testing.assert_close(alone[0], dense[run], rtol=1e-13, atol=1e-13)


def test_nothing_dense_is_kept_between_the_passes() -> None:
    weight, x = gaussian(30, 40), gaussian(1, 5, 40, seed=1)
    made, kept = adapter(weight, 100), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made.whole(x)
    own = {t.data_ptr() for t in kept} - {weight.data_ptr()}
    assert own == {x.data_ptr(), made.values.data_ptr(), made.indices.data_ptr()}


# Training


def test_a_layer_without_entries_is_left_alone(tmp_path: Path) -> None:
    base, starts = run("bert", tmp_path, entries=3)
    packed = base.pack(METHOD, starts)
    assert 1 <= len(packed.adapters) <= 3
    base.train(packed, [base.spec(METHOD, starts[0].config)])
    for name, module in base.model.named_modules():
        if bases.adaptable(module) and name.removesuffix(".base") not in packed.adapters:
            assert not module.weight.requires_grad
            assert module.weight.grad is None
    first = next(iter(bases.linear_layers(tiny.build("bert").model)))
    if first not in packed.adapters:
        assert not base.model.get_submodule(first)(gaussian(1, 2, 16)).requires_grad


@pytest.mark.parametrize("arch", ["bert", "gpt2"])
def test_training_changes_the_chosen_entries_alone(arch: str, tmp_path: Path) -> None:
    base, starts = run(arch, tmp_path)
    bare = tiny.build(arch).model
    packed = base.pack(METHOD, starts)
    base.train(packed, [base.spec(METHOD, starts[0].config)])
    first: dict[str, Tensor] = {}
    for _ in range(2):  # merged, taken apart and merged again
        with packed.merged(0) as model:
            for name, part in packed.adapters.items():
                assert isinstance(part, Sparse)
                old, new = bases.weight_of(bare.get_submodule(name)), bases.weight_of(model.get_submodule(name))
                changed = (old != new).contiguous().flatten().nonzero().flatten()
                assert torch.equal(changed.int(), part.indices[0])
                assert torch.equal(first.setdefault(name, new.clone()), new)
    packed.detach()
    assert all(torch.equal(a, b) for a, b in zip(bare.state_dict().values(), base.model.state_dict().values(), strict=True))


def test_adding_and_taking_off_again_in_bfloat16_drifts() -> None:
    """What the official code does to W; the reason why W is not written here."""
    weight = (0.02 * gaussian(20_000)).to(torch.bfloat16)
    kept = weight.clone()
    for step in range(200):
        delta = (1e-3 * step / 200 * gaussian(20_000, seed=1)).to(torch.bfloat16)
        weight += delta
        weight -= delta
    assert float((weight != kept).double().mean()) > 0.3


def learn(base: tiny.Tiny, model: Any, parameters: list[nn.Parameter], head: Any, seed: int) -> list[Tensor]:
    """Five steps of torch's own AdamW."""
    adamw = torch.optim.AdamW([*parameters, *([] if head is None else head.parameters())], lr=5e-3, eps=1e-4,
                              weight_decay=0.0)
    losses = []
    for indices in training_order(base.data, 3, 1, seed):
        adamw.zero_grad()
        loss = base.loss(model, head, 1)(collate(base.data, [indices], tiny.CPU)).sum()
        loss.backward()
        adamw.step()
        losses.append(loss.detach())
    return losses


def ours(base: tiny.Tiny, starts: list[Start]) -> tuple[Packed, Tensor]:
    """The same five steps here."""
    packed = base.pack(METHOD, starts)
    spec = base.spec(METHOD, starts[0].config, learning_rate=5e-3, batch_size=3, epochs=1, schedule="constant",
                     warmup_ratio=0, clip=None, weight_decay=0.0)
    return packed, base.train(packed, [spec]).losses[:, 0]


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_all_entries_are_full_fine_tuning_of_those_layers(arch: str, tmp_path: Path) -> None:
    base, plain = tiny.build(arch), tiny.build(arch)
    base, starts = run(arch, tmp_path, entries=size(base.shapes.layers), selection_seed=1)
    packed, losses = ours(base, starts)
    weights = [m.weight.requires_grad_() for m in bases.linear_layers(plain.model).values()]
    expected = learn(plain, plain.model, weights, plain.head(), 0)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)
    with packed.merged(0) as model:
        for name, module in bases.linear_layers(plain.model).items():
            torch.testing.assert_close(bases.weight_of(model.get_submodule(name)), bases.weight_of(module).detach(),
                                       rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:Argument self.mask_type", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_five_steps_are_those_of_pefts_shira_on_the_same_entries(arch: str, tmp_path: Path) -> None:
    lora, base = registry.method("lora"), tiny.build(arch)
    base, starts = run(arch, tmp_path, entries=lora.trainable(lora.Config(rank=2), base.shapes))
    packed, losses = ours(base, starts)
    theirs = tiny.build(arch)
    masks = {}
    for name, module in bases.linear_layers(theirs.model).items():
        masks[id(module)] = mask = torch.zeros(module.weight.numel())
        mask[packed.constants(0)[f"{name}.indices"].long()] = 1
    config = ShiraConfig(r=2, mask_type="ours", target_modules=[x.name for x in base.shapes.layers])
    config.mask_fn = lambda layer, r, **_: masks[id(layer)].view(layer.weight.shape)
    wrapped = get_peft_model(theirs.model, config).double()
    values = {name: p for name, p in wrapped.named_parameters() if "shira" in name}
    expected = learn(theirs, theirs.model, list(values.values()), theirs.head(), 0)
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)
    for name, found in values.items():
        own = packed.state(0)[f"{name.removeprefix('base_model.model.').split('.shira')[0]}.values"]
        torch.testing.assert_close(own, found.detach(), rtol=1e-9, atol=1e-12)


def test_five_steps_are_those_of_the_official_code_on_the_same_entries(tmp_path: Path) -> None:
    """Δφ added into W for the forward pass, recorded by autograd, and taken off again after the backward pass."""
    base, starts = run("llama", tmp_path, selection="bernoulli", allocation="uniform")
    packed, losses = ours(base, starts)
    plain = tiny.build("llama")
    deltas = {name: nn.Parameter(torch.zeros(len(packed.constants(0)[f"{name}.indices"]), dtype=torch.float64))
              for name in packed.adapters}

    def merge(sign: float) -> None:
        for name, delta in deltas.items():
            module = plain.model.get_submodule(name)
            where = packed.constants(0)[f"{name}.indices"].long()
            whole = module._parameters["weight"] if sign > 0 else module.weight.detach()
            flat = whole.detach().clone().flatten()
            flat[where] += sign * (delta if sign > 0 else delta.detach())
            module._parameters.pop("weight", None)
            module.weight = flat.view(whole.shape) if sign > 0 else nn.Parameter(flat.view(whole.shape), False)

    adamw = torch.optim.AdamW(deltas.values(), lr=5e-3, eps=1e-4, weight_decay=0.0)
    expected = []
    for indices in training_order(plain.data, 3, 1, 0):
        adamw.zero_grad()
        merge(+1)
        loss = plain.loss(plain.model, None, 1)(collate(plain.data, [indices], tiny.CPU)).sum()
        loss.backward()
        expected.append(loss.detach())
        merge(-1)
        adamw.step()
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-9, atol=1e-12)
    for name, delta in deltas.items():
        torch.testing.assert_close(packed.state(0)[f"{name}.values"], delta.detach(), rtol=1e-9, atol=1e-11)


def test_stored_indices_win_over_drawn_ones(tmp_path: Path) -> None:
    """A torch that draws otherwise still loads the adapter."""
    base, starts = run("bert", tmp_path)
    packed = base.pack(METHOD, starts)
    base.train(packed, [base.spec(METHOD, starts[0].config)])
    kept = {key: tensor.clone() for key, tensor in (packed.state(0) | packed.constants(0)).items()}
    assert sum(t.numel() for key, t in kept.items() if key.endswith(".indices")) == 300
    with torch.no_grad():
        expected = base.outputs(base.model, base.batch())
    other, others = run("bert", tmp_path, selection_seed=99)
    loaded = other.pack(METHOD, others)
    loaded.load(0, kept)
    with torch.no_grad():
        assert torch.equal(other.outputs(other.model, other.batch()), expected)
