"""Packs: what is attached to a base, what stays apart, and what is left when it is taken off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from methods.lora import Factors, LoRA, LowRank
from suite import registry
from suite.method import Start
from suite.packing import AdaptedLinear, Head, Packed
from suite.specs import RunSpec
from tests import tiny

METHOD = registry.method("lora")
CAUSAL = ("llama", "qwen2", "gemma", "gpt2")


def starts(*ranks: int, **facts: Any) -> list[Start]:
    return [Start(LoRA.Config(rank=rank, **facts), seed) for seed, rank in enumerate(ranks)]


def stir(packed: Packed, run: int) -> None:
    """Every factor of a run moved at random, the same whatever the pack."""
    draw = torch.Generator().manual_seed(run)
    for tensor in packed.state(run).values():
        tensor.add_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype), alpha=0.1)


def run_outputs(base: tiny.Tiny, runs: int) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return base.outputs(base.model, base.batch(runs)).chunk(runs)


def test_runs_of_different_rank_give_exactly_their_solo_outputs() -> None:
    base = tiny.build("llama")
    packed = base.pack(METHOD, starts(1, 5, 2))
    for run in range(3):
        stir(packed, run)
    together = run_outputs(base, 3)
    for run, start in enumerate(starts(1, 5, 2)):
        alone = tiny.build("llama")
        solo = alone.pack(METHOD, [start])
        solo.load(0, packed.state(run))
        torch.testing.assert_close(together[run], run_outputs(alone, 1)[0], rtol=1e-13, atol=1e-13)


def test_padding_of_smaller_ranks_stays_zero_in_training() -> None:
    base = tiny.build("bert")
    packed = base.pack(METHOD, starts(1, 4))
    base.train(packed, [base.spec(METHOD, start.config, start.seed, 1e-2) for start in starts(1, 4)])
    for adapter in packed.adapters.values():
        assert isinstance(adapter, LowRank)
        assert adapter.A.shape[1] == 4
        assert adapter.A[0, :1].all()
        assert not adapter.A[0, 1:].any()
        assert not adapter.B[0, :, 1:].any()


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_the_loss_of_one_run_sends_no_gradient_to_another(arch: str) -> None:
    base = tiny.build(arch)
    packed = base.pack(METHOD, starts(2, 3))
    for run in range(2):
        stir(packed, run)
    base.loss_of(packed)(base.batch(2))[1].backward()
    for parameter, _ in packed.parameters():
        assert parameter.grad is not None
        assert not parameter.grad[0].any()
        assert parameter.grad[1].any()


def test_every_run_has_a_head_of_its_own_and_all_start_alike() -> None:
    base = tiny.build("bert")
    packed = base.pack(METHOD, starts(2, 2))
    head = packed.head
    assert head is not None
    assert torch.equal(head.weight[0], head.weight[1])
    stir(packed, 1)
    pooled = torch.randn(6, tiny.WIDTH, dtype=torch.float64)
    found = head(pooled)
    assert found.shape == (2, 3, tiny.CLASSES)
    for run in range(2):
        state = head.state(run)
        assert state["weight"].shape == (tiny.CLASSES, tiny.WIDTH)
        expected = pooled[3 * run:3 * run + 3] @ state["weight"].mT + state["bias"]
        torch.testing.assert_close(found[run], expected)


def test_a_heads_start_depends_on_its_key_alone() -> None:
    assert torch.equal(Head(8, 2, 1, ("a", 1)).weight, Head(8, 2, 3, ("a", 1)).weight[2:])
    assert not torch.equal(Head(8, 2, 1, ("a", 1)).weight, Head(8, 2, 1, ("a", 2)).weight)


def test_detach_puts_the_very_same_modules_back_frozen() -> None:
    base = tiny.build("llama")
    before = dict(base.model.named_modules())
    expected = run_outputs(base, 1)[0]
    packed = base.pack(METHOD, starts(2))
    stir(packed, 0)
    assert not torch.equal(run_outputs(base, 1)[0], expected)
    assert isinstance(base.model.get_submodule(base.shapes.layers[0].name), AdaptedLinear)
    packed.detach()
    after = dict(base.model.named_modules())
    assert list(after) == list(before)
    assert all(after[name] is module for name, module in before.items())
    assert torch.equal(run_outputs(base, 1)[0], expected)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_detaching_freezes_a_base_that_was_fully_trained() -> None:
    base, full = tiny.build("bert"), registry.method("full")
    packed = base.pack(full, [Start(full.Config(), 0)])
    assert all(p.requires_grad for p in base.model.parameters())
    packed.detach()
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_base_can_be_packed_again_after_detaching() -> None:
    base, fresh = tiny.build("bert"), tiny.build("bert")
    first = base.pack(METHOD, starts(2, 4))
    base.train(first, [base.spec(METHOD, start.config, start.seed) for start in starts(2, 4)])
    first.detach()
    spec = base.spec(METHOD, LoRA.Config(rank=3))
    found = base.train(base.pack(METHOD, starts(3)), [spec])
    expected = fresh.train(fresh.pack(METHOD, starts(3)), [spec])
    assert torch.equal(found.losses, expected.losses)


def test_merging_leaves_the_pack_as_it_was_also_after_a_failure() -> None:
    base = tiny.build("llama")
    packed = base.pack(METHOD, starts(2, 3))
    stir(packed, 1)
    before = run_outputs(base, 2)
    with pytest.raises(RuntimeError, match="stop"), packed.merged(1):
        raise RuntimeError("stop")
    assert all(torch.equal(a, b) for a, b in zip(run_outputs(base, 2), before, strict=True))


class Faulty(LoRA):
    """LoRA that cannot make its third adapter."""

    id = "faulty"

    def start(self, layer: Any, start: Start) -> Factors:
        if layer.kind == "value":
            raise ValueError("cannot be made")
        return super().start(layer, start)


def test_a_pack_that_cannot_be_made_leaves_the_base_untouched() -> None:
    base = tiny.build("bert")
    with pytest.raises(ValueError, match="cannot be made"):
        base.pack(Faulty(), starts(2))
    assert not any(isinstance(module, AdaptedLinear) for module in base.model.modules())


def test_runs_that_adapt_different_layers_never_share_a_pack() -> None:
    base = tiny.build("bert")
    one, other = LoRA.Config(rank=2), LoRA.Config(rank=2, target_modules=("query",))
    with pytest.raises(ValueError, match="differ in more than a pack can hold"):
        base.pack(METHOD, [Start(one, 0), Start(other, 0)])
    assert METHOD.structure(one) != METHOD.structure(other)


@pytest.mark.parametrize(("change", "same"), [
    ({"seed": 3}, True), ({"learning_rate": 0.5}, True), ({"rank": 6}, True), ({"alpha": 3.0}, True),
    ({"batch_size": 5}, False), ({"epochs": 3}, False), ({"clip": None}, False), ({"max_length": 64}, False)])
def test_what_may_differ_inside_a_pack(change: dict[str, Any], same: bool) -> None:
    base = tiny.build("bert")

    def spec(rank: int = 2, alpha: float = 16.0, **facts: Any) -> RunSpec:
        return base.spec(METHOD, LoRA.Config(rank=rank, alpha=alpha), **facts)

    assert (spec(**change).packing_key == spec().packing_key) == same
    assert spec(**change).id != spec().id


@pytest.mark.parametrize("arch", CAUSAL)
def test_language_loss_is_the_models_own(arch: str) -> None:
    base = tiny.build(arch)
    batch = base.batch()
    ours = base.loss(base.model, None, 1)(batch)
    theirs = base.model(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss
    torch.testing.assert_close(ours[0], theirs.double(), rtol=1e-6, atol=0)  # theirs is taken in float32


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_each_runs_loss_is_over_its_own_items(arch: str) -> None:
    base = tiny.build(arch)
    loss = base.loss(base.model, base.head(2), 2)(tiny.collate(base.data, [[0, 1], [2, 3]], tiny.CPU))
    for run, items in enumerate([(0, 1), (2, 3)]):
        alone = base.loss(base.model, base.head(), 1)(base.batch(items=items))
        torch.testing.assert_close(loss[run], alone[0])


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_on_a_bfloat16_base_all_that_is_trained_and_the_loss_are_float32(arch: str) -> None:
    base = tiny.build(arch, torch.bfloat16)
    packed = base.pack(METHOD, starts(2, 3))
    assert {parameter.dtype for parameter, _ in packed.parameters()} == {torch.float32}
    assert base.loss_of(packed)(base.batch(2)).dtype == torch.float32
    specs = [base.spec(METHOD, start.config, start.seed, 1e-2) for start in starts(2, 3)]
    trained = base.train(packed, specs)
    assert trained.losses.dtype == torch.float32
    assert trained.alive == [True, True]
    packed.detach()
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}


class WideLowRank(LowRank):
    narrow = False


@pytest.mark.parametrize(("kind", "tolerance"), [(WideLowRank, 1e-5), (LowRank, 2e-2)])
def test_an_adapted_layer_of_a_bfloat16_base_keeps_no_float32_input_and_its_gradients_are_those_of_float64(
    kind: type[LowRank], tolerance: float,
) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 6, generator=draw).bfloat16().requires_grad_()
    base = nn.Linear(6, 4, dtype=torch.bfloat16).requires_grad_(False)
    factors = [Factors(torch.randn(3, 6, generator=draw), torch.randn(4, 3, generator=draw), 0.5) for _ in range(2)]
    adapter = kind(factors)
    given: list[tuple[torch.dtype, StorageWeakRef]] = []
    adapter.register_forward_pre_hook(
        lambda module, inputs: given.append((inputs[0].dtype, StorageWeakRef(inputs[0].untyped_storage()))))
    y = AdaptedLinear(base, adapter, 2)(x)
    upstream = torch.randn(y.shape, generator=draw).bfloat16()
    [(dtype, storage)] = given
    assert dtype == (torch.bfloat16 if kind.narrow else torch.float32)
    assert storage.expired() != kind.narrow
    found = torch.autograd.grad(y, [adapter.A, adapter.B], upstream)

    exact = LowRank(factors).double()
    wide = exact(x.detach().double(), torch.zeros(2, 5, 4, dtype=torch.float64))
    truth = torch.autograd.grad(wide, [exact.A, exact.B], upstream.double())
    for mine, other in zip(found, truth, strict=True):
        assert mine.dtype == torch.float32
        assert (mine.double() - other).norm() < tolerance * other.norm()


def test_below_the_lowest_adapted_layer_nothing_is_kept_for_gradients() -> None:
    base = tiny.build("llama")
    packed = base.pack(METHOD, starts(2, target_modules=("1.self_attn.v_proj", "1.mlp.down_proj")))
    asked: dict[str, bool] = {}
    for name, module in base.model.named_modules():
        if name.count(".") > 3:
            module.register_forward_hook(lambda module, given, out, name=name: asked.__setitem__(name, out.requires_grad))
    base.loss_of(packed)(base.batch()).sum().backward()
    assert {name for name, needed in asked.items() if needed and ".0." in name} == set()
    assert not asked["model.layers.1.self_attn.q_proj"]
    assert asked["model.layers.1.self_attn.v_proj"]
