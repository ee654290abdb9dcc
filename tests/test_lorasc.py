"""LoRASC and COLA against their description, plain LoRA, stock peft and plain torch, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.lora import LowRank
from methods.lorasc import Cascade, Law, NoisyCascade, Redrawn, spread
from suite import registry
from suite.batches import collate, training_order
from suite.method import Layer, Shapes, Start
from suite.packing import Packed
from suite.training import Trained
from tests import stock, tiny

LAYER, RANK, SCALE = Layer("block.q", 12, 8), 3, 7.0 / 3
W = torch.randn(8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
X = torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def adapter(seed: int = 0, **options: Any) -> Cascade:
    """A cascade of rank 3, alpha 7 on W, in float64."""
    method = registry.method("lorasc")
    config = method.Config(**{"rank": RANK, "alpha": 7.0, "slow_alpha": 0.4, "noise": "none"} | options)
    return method.adapter(LAYER, W, [Start(config, seed)]).double()


def stir(cascade: Cascade, seed: int) -> None:
    """The fast pair moved at random, as training moves it."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in (cascade.A, cascade.B):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)


def applied(cascade: Cascade) -> Tensor:
    """The layer's output on X, `[1, 5, 8]`."""
    return cascade.whole(X) if isinstance(cascade, NoisyCascade) else cascade(X, X @ W.mT)


@dataclass
class Run:
    base: tiny.Tiny
    packed: Packed
    trained: Trained


def run(method_id: str, arch: str = "llama", recipe: dict[str, Any] | None = None, **options: Any) -> Run:
    """One run of eight steps in two epochs, rank 3, trained."""
    base, method = tiny.build(arch), registry.method(method_id)
    start = Start(method.Config(rank=RANK, alpha=7.0, **options), 0)
    packed = base.pack(method, [start])
    trained = base.train(packed, [base.spec(method, start.config, learning_rate=5e-3, **recipe or {})])
    return Run(base, packed, trained)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["product", "factor_ema"])
@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_one_cascade_with_alpha_one_and_no_noise_is_lora_bit_for_bit(arch: str, mode: str) -> None:
    lora = run("lora", arch)
    ours = run("lorasc", arch, cascades=1, slow_alpha=1.0, noise_scale=0.0, slow_mode=mode)
    assert torch.equal(ours.trained.losses, lora.trained.losses)
    assert torch.equal(ours.trained.norms, lora.trained.norms)
    for name, tensor in lora.packed.state(0).items():
        assert torch.equal(ours.packed.state(0)[name], tensor)
    for name, expected in lora.packed.adapters.items():
        assert torch.equal(ours.packed.adapters[name].delta(0), expected.delta(0))
    with torch.no_grad():
        batch = lora.base.batch()
        assert torch.equal(ours.base.outputs(ours.base.model, batch), lora.base.outputs(lora.base.model, batch))


def test_alpha_one_and_no_noise_is_cola() -> None:
    cola, ours = run("cola"), run("lorasc", slow_alpha=1.0, noise="none")
    assert torch.equal(cola.trained.losses, ours.trained.losses)
    for name, expected in cola.packed.adapters.items():
        assert expected.constants(0)["merged_A"].shape[0] == RANK
        assert torch.equal(ours.packed.adapters[name].delta(0), expected.delta(0))


def test_cola_is_stock_peft_merged_and_begun_anew_with_a_fresh_adamw_and_schedule() -> None:
    method = registry.method("cola")
    cola = run("cola", recipe={"batch_size": 4, "schedule": "linear", "warmup_ratio": 0.5, "clip": None})
    fields = {"r": RANK, "lora_alpha": 7.0, "target_modules": list(cola.packed.adapters)}
    fresh = tiny.build("llama")
    new = fresh.pack(method, [Start(method.Config(rank=RANK, alpha=7.0), 0)])
    weights = {name: fresh.model.get_submodule(name).base.weight.clone() for name in new.adapters}
    batches = training_order(cola.base.data, 4, 2, 0)
    losses = []
    for stage, order in enumerate((batches[:4], batches[4:])):
        new.begin(stage, 2)
        theirs = stock.attach("llama", fields, new.state(0))
        for name, weight in weights.items():
            theirs.model.get_submodule(name).base_layer.weight.data.copy_(weight)
        adamw = torch.optim.AdamW(stock.parameters(theirs).values(), lr=5e-3, eps=1e-4, weight_decay=0.01)
        for factor, indices in zip([0.5, 1.0, 1.0, 0.5], order, strict=True):
            adamw.param_groups[0]["lr"] = 5e-3 * factor
            adamw.zero_grad()
            loss = theirs.loss(theirs.model, None, 1)(collate(theirs.data, [indices], tiny.CPU)).sum()
            loss.backward()
            adamw.step()
            losses.append(loss.detach())
        for name in weights:
            module = theirs.model.get_submodule(name)
            module.merge()
            weights[name] = module.base_layer.weight.detach().clone()
    close(cola.trained.losses[:, 0], torch.stack(losses))
    for name, weight in weights.items():
        ours = cola.packed.adapters[name]
        close(cola.base.model.get_submodule(name).base.weight + ours.delta(0).detach(), weight)


def test_product_with_alpha_zero_leaves_w_as_it_is() -> None:
    ours, bare = run("lorasc", slow_alpha=0.0), tiny.build("llama")
    assert not any(cascade.delta(0).any() for cascade in ours.packed.adapters.values())
    batch = bare.batch()
    with torch.no_grad():
        assert torch.equal(ours.base.outputs(ours.base.model, batch), bare.outputs(bare.model, batch))


@pytest.mark.parametrize("mode", ["product", "factor_ema"])
def test_three_cascades_are_the_equations_on_a_dense_w(mode: str) -> None:
    alpha, dense = 0.4, W.clone()
    cascade = adapter(slow_alpha=alpha, slow_mode=mode)
    slow_A, slow_B = cascade.slow_A[0].clone(), torch.zeros(8, RANK, dtype=torch.float64)
    assert slow_A.any()
    for stage in range(3):
        cascade.begin(stage, 3)
        assert not cascade.B.any()
        close(applied(cascade).data, X @ dense.mT)  # a cascade begins at the merged model
        stir(cascade, stage)
        A, B = cascade.A.data[0].clone(), cascade.B.data[0].clone()
        close(applied(cascade).data, X @ (dense + SCALE * B @ A).mT)
        if mode == "product":
            slow_A, slow_B = A, alpha * B
        else:
            slow_A, slow_B = (1 - alpha) * slow_A + alpha * A, (1 - alpha) * slow_B + alpha * B
        dense = dense + SCALE * slow_B @ slow_A
    cascade.end()
    close(W + cascade.delta(0).data, dense)
    close(applied(cascade).data, X @ dense.mT)
    assert torch.linalg.matrix_rank(cascade.delta(0)) <= 8
    A, B = cascade.factors(0)
    assert (A.shape, B.shape) == ((3 * RANK, 12), (8, 3 * RANK))
    close(W + B @ A, dense)


def test_every_cascade_adds_at_most_its_rank() -> None:
    for cascade in run("lorasc", slow_alpha=0.7).packed.adapters.values():
        least = min(cascade.layer.in_features, cascade.layer.out_features)
        assert torch.linalg.matrix_rank(cascade.delta(0)) == min(2 * RANK, least)


def test_factor_ema_with_alpha_one_is_product_with_alpha_one() -> None:
    one, other = run("lorasc", slow_alpha=1.0), run("lorasc", slow_alpha=1.0, slow_mode="factor_ema")
    assert torch.equal(one.trained.losses, other.trained.losses)
    for name, cascade in one.packed.adapters.items():
        assert torch.equal(cascade.delta(0), other.packed.adapters[name].delta(0))


def test_the_stacked_pairs_are_an_ordinary_lora_of_stock_peft() -> None:
    for mode in ("product", "factor_ema"):
        ours = run("lorasc", slow_alpha=0.6, slow_mode=mode)
        pairs = {name: cascade.factors(0) for name, cascade in ours.packed.adapters.items()}
        fields = {"r": 2 * RANK, "lora_alpha": 2 * RANK, "target_modules": list(pairs)}
        state = {f"{name}.{key}": pair[i] for name, pair in pairs.items() for i, key in enumerate("AB")}
        theirs, batch = stock.attach("llama", fields, state), ours.base.batch()
        with torch.no_grad():
            close(ours.base.outputs(ours.base.model, batch), theirs.outputs(theirs.model, batch))


def test_fresh_pairs_differ_between_cascades_seeds_and_layers_but_not_between_draws() -> None:
    cascade = adapter()
    draws = [cascade.drawn(0), cascade.drawn(1), cascade.drawn("slow"), adapter(seed=1).drawn(1), cascade.A.data]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])
    assert torch.equal(cascade.drawn(1), adapter().drawn(1))
    assert float(cascade.drawn(1).abs().max()) <= 1 / math.sqrt(12)


@pytest.mark.parametrize("noise", ["uniform", "filter_gaussian"])
def test_noise_follows_its_law(noise: Any) -> None:
    big, law = Layer("big", 400, 300), Law(0.5, "product", noise, 0.15)
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight *= torch.linspace(0.5, 2, 300, dtype=torch.float64)[:, None]
    cascade = NoisyCascade(big, weight, [Start(None, 4)], [law], lambda layer, start: registry.method("lora").start(
        layer, Start(registry.method("lora").Config(rank=2), start.seed))).double()
    cascade.begin(0, 1)
    E = cascade.noisy()[0] - weight
    if noise == "uniform":
        std = float(weight.std())
        assert float(E.abs().max()) <= 0.15 / 2 * std + 1e-12
        assert float(E.mean()) == pytest.approx(0, abs=5 * 0.15 * std / math.sqrt(12 * E.numel()))
        assert float(E.std()) == pytest.approx(0.15 * std / math.sqrt(12), rel=0.01)
    else:
        expected = 0.15 * weight.norm(dim=1) / math.sqrt(400)
        torch.testing.assert_close(E.std(1) / expected, torch.ones(300, dtype=torch.float64), rtol=0, atol=0.2)
        assert float((E.std(1) / expected).mean()) == pytest.approx(1, abs=0.01)
        assert spread(weight, law).shape == (300, 1)


def test_noise_is_one_draw_per_cascade_layer_and_seed() -> None:
    def drawn(stage: int, seed: int = 0, layer: Layer = LAYER) -> Tensor:
        method = registry.method("lorasc")
        cascade = method.adapter(layer, W, [Start(method.Config(rank=RANK, slow_alpha=0.5), seed)]).double()
        for at in range(stage + 1):
            cascade.begin(at, 3)
        again = cascade.noisy()
        assert torch.equal(cascade.noisy(), again)
        return again

    draws = [drawn(0), drawn(1), drawn(0, seed=1), drawn(0, layer=Layer("block.k", 12, 8))]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@pytest.mark.parametrize("noise", ["uniform", "filter_gaussian"])
def test_a_noisy_cascade_is_lora_on_w_plus_e_with_its_gradients(noise: str) -> None:
    cascade = adapter(noise=noise, noise_scale=0.5)
    cascade.begin(0, 2)
    stir(cascade, 0)
    cascade.begin(1, 2)
    E = cascade.noisy()[0] - W
    assert E.any()
    merged = W + SCALE * cascade.constants(0)["merged_B"] @ cascade.constants(0)["merged_A"]
    close(applied(cascade).data, X @ (merged + E).mT)  # a cascade begins at the merged model with E
    stir(cascade, 1)
    plain = LowRank([registry.method("lora").start(LAYER, Start(registry.method("lora").Config(rank=3, alpha=7.0), 0))])
    plain = plain.double()
    plain.load(0, cascade.state(0))
    found, expected = X.clone().requires_grad_(), X.clone().requires_grad_()
    ours, theirs = cascade.whole(found), plain(expected, expected @ (merged + E).mT)
    close(ours, theirs)
    ours.sin().sum().backward()
    theirs.sin().sum().backward()
    close(found.grad, expected.grad)
    close(cascade.A.grad, plain.A.grad)
    close(cascade.B.grad, plain.B.grad)


def test_gradients_through_the_noise_are_numerically_right_and_it_is_never_stored() -> None:
    cascade = adapter(noise="uniform", noise_scale=0.5)
    cascade.begin(0, 1)
    stir(cascade, 0)
    assert torch.autograd.gradcheck(lambda x: Redrawn.apply(x, cascade.noisy), (X.clone().requires_grad_(),))
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        cascade.whole(X.clone().requires_grad_())
    assert kept
    assert all(shape[-2:] not in ((8, 12), (12, 8)) for shape in kept)


def test_noise_is_gone_when_training_is_over_and_w_was_never_touched() -> None:
    before = W.clone()
    cascade = adapter(noise="uniform", noise_scale=0.5)
    assert isinstance(cascade, NoisyCascade)
    cascade.begin(0, 1)
    assert not torch.equal(applied(cascade), nn.functional.linear(X, W))
    cascade.end()
    assert torch.equal(applied(cascade), nn.functional.linear(X, W))
    assert torch.equal(W, before)
    # What adding noise to W in place, and taking it off again, would have done in bfloat16.
    rounded = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)).bfloat16()
    E = (0.15 * (torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) - 0.5)).bfloat16()
    assert not torch.equal(rounded.clone().add_(E).sub_(E), rounded)


def test_no_noise_takes_no_noisy_path() -> None:
    assert not isinstance(adapter(noise="none"), NoisyCascade)
    assert not isinstance(adapter(noise="uniform", noise_scale=0.0), NoisyCascade)


@pytest.mark.parametrize("mode", ["product", "factor_ema"])
def test_a_run_resumed_in_a_cascade_ends_where_an_uninterrupted_one_does(mode: str) -> None:
    def steps(cascade: Cascade, adamw: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            adamw.zero_grad()
            (applied(cascade) - 1).square().mean().backward()
            adamw.step()

    def optimiser(cascade: Cascade) -> torch.optim.Optimizer:
        return torch.optim.AdamW(cascade.parameters(), lr=1e-2)

    options = {"noise": "uniform", "noise_scale": 0.5, "slow_mode": mode}
    whole = adapter(**options)
    for stage in (0, 1):
        whole.begin(stage, 3)
        adamw = optimiser(whole)
        steps(whole, adamw, 4)
    saved = {name: tensor.clone() for name, tensor in (whole.state(0) | whole.constants(0)).items()}
    moments = {"state": {key: {name: value.clone() for name, value in state.items()}
                         for key, state in adamw.state_dict()["state"].items()},
               "param_groups": adamw.state_dict()["param_groups"]}
    resumed = adapter(**options)
    for stage in (0, 1):
        resumed.begin(stage, 3)
    resumed.load(0, saved)
    again = optimiser(resumed)
    again.load_state_dict(moments)
    for cascade, optimised in ((whole, adamw), (resumed, again)):
        steps(cascade, optimised, 4)
        cascade.begin(2, 3)
        steps(cascade, optimiser(cascade), 4)
        cascade.end()
    assert torch.equal(whole.delta(0), resumed.delta(0))


def test_a_run_that_breaks_leaves_the_same_in_a_pack_that_goes_on() -> None:
    method = registry.method("lorasc")
    starts = [Start(method.Config(rank=RANK, slow_alpha=0.5), seed) for seed in (0, 1)]
    rates = (1e-3, 1e150)

    def left(runs: list[int]) -> dict[str, Tensor]:
        base = tiny.build("llama")
        packed = base.pack(method, [starts[run] for run in runs])
        specs = [base.spec(method, starts[run].config, run, rates[run], epochs=6) for run in runs]
        assert not base.train(packed, specs).alive[-1]
        return packed.state(len(runs) - 1) | packed.constants(len(runs) - 1)

    solo = left([1])
    assert all(tensor.shape[0] == 5 * RANK for name, tensor in solo.items() if name.endswith("merged_A"))
    close(left([0, 1]), solo)


def test_there_is_one_cascade_per_epoch_unless_the_config_says_otherwise() -> None:
    method = registry.method("lorasc")
    assert method.stages(method.Config(), 3) == 3
    assert method.stages(method.Config(cascades=5), 3) == 5
    assert method.structure(method.Config(cascades=5)) != method.structure(method.Config())
    warm = run("cola", recipe={"schedule": "linear", "warmup_ratio": 0.5}).trained.rates[:, 0] / 5e-3
    assert warm.tolist() == pytest.approx([0.5, 1, 1, 0.5] * 2)


def test_alpha_must_be_given() -> None:
    method, shapes = registry.method("lorasc"), Shapes((LAYER,), 96)
    method.check(method.Config(slow_alpha=0.5), shapes)
    with pytest.raises(ValueError, match="slow_alpha must be given"):
        method.check(method.Config(), shapes)
    with pytest.raises(ValueError, match="less than or equal to 1"):
        method.Config(slow_alpha=1.5)
