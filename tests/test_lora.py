"""LoRA, rsLoRA and LoRA+ against stock peft and torch's own AdamW, in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from methods.lora import LoRA, LowRank
from suite import registry
from suite.batches import collate, training_order
from suite.method import Layer, Shapes, Start
from tests import stock, tiny

METHODS = ("lora", "rslora", "lora-plus")
SHAPES = Shapes((Layer("block.q", 12, 8), Layer("block.mlp.q", 8, 20), Layer("block.k", 8, 4)), 500)


def run(name: str, arch: str, folder: Path, **facts: Any) -> tuple[tiny.Tiny, Any, Start]:
    base, method = tiny.build(arch), registry.method(name)
    config = method.Config(rank=3, alpha=7.0, **facts)
    return base, method, base.starts(method, [config], folder)[0]


def stir(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every trained tensor moved at random, in place, so that no factor is zero."""
    draw = torch.Generator().manual_seed(3)
    for tensor in state.values():
        tensor.add_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype), alpha=0.1)
    return state


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("name", METHODS)
def test_outputs_and_gradients_are_pefts(name: str, arch: str, tmp_path: Path) -> None:
    base, method, start = run(name, arch, tmp_path)
    packed = base.pack(method, [start])
    state = stir(packed.state(0))
    theirs = stock.attach(arch, method.peft_config(start.config, base.shapes, None), state)
    batch = base.batch()
    with torch.no_grad():
        torch.testing.assert_close(base.outputs(base.model, batch), theirs.outputs(theirs.model, batch),
                                   rtol=1e-12, atol=1e-12)
    base.loss_of(packed)(batch).sum().backward()
    theirs.loss(theirs.model, packed.head, 1)(batch).sum().backward()
    expected = stock.parameters(theirs)
    for layer, adapter in packed.adapters.items():
        for key in ("A", "B"):
            grad = getattr(adapter, key).grad[0]
            assert grad.any()
            torch.testing.assert_close(grad, expected[f"{layer}.{key}"].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize(("name", "ratio"), [("lora", 1.0), ("rslora", 1.0), ("lora-plus", 8.0)])
def test_five_steps_are_those_of_peft_and_torch(name: str, ratio: float, arch: str, tmp_path: Path) -> None:
    facts = {"lr_ratio_b": ratio} if name == "lora-plus" else {}
    base, method, start = run(name, arch, tmp_path, **facts)
    packed = base.pack(method, [start])
    theirs = stock.attach(arch, method.peft_config(start.config, base.shapes, None), packed.state(0))
    head = theirs.head()
    spec = base.spec(method, start.config, learning_rate=5e-3, batch_size=3, epochs=1, schedule="constant",
                     warmup_ratio=0, clip=None, weight_decay=0.02)

    factors = stock.parameters(theirs)
    fast = [tensor for key, tensor in factors.items() if key.endswith(".B")]
    slow = [tensor for key, tensor in factors.items() if key.endswith(".A")]
    slow += [] if head is None else list(head.parameters())
    adamw = torch.optim.AdamW([{"params": slow}, {"params": fast, "lr": 5e-3 * ratio}], lr=5e-3,
                              eps=spec.recipe.epsilon, weight_decay=0.02)
    losses = []
    for indices in training_order(base.data, 3, 1, spec.seed):
        adamw.zero_grad()
        loss = theirs.loss(theirs.model, head, 1)(collate(base.data, [indices], tiny.CPU)).sum()
        loss.backward()
        adamw.step()
        losses.append(loss.detach())

    trained = base.train(packed, [spec])
    assert len(losses) == 5
    torch.testing.assert_close(trained.losses[:, 0], torch.stack(losses), rtol=1e-10, atol=1e-12)
    for key, tensor in packed.state(0).items():
        expected = getattr(head, key.removeprefix("head."))[0] if key.startswith("head.") else factors[key]
        torch.testing.assert_close(tensor, expected.detach().reshape(tensor.shape), rtol=1e-9, atol=1e-11)


def test_a_starts_uniform_within_one_over_root_in_and_b_at_zero() -> None:
    layer, config = Layer("x", 400, 30), LoRA.Config(rank=8, alpha=16)
    start = registry.method("lora").start(layer, Start(config, seed=5))
    assert start.A.shape == (8, 400)
    assert start.B.shape == (30, 8)
    assert not start.B.any()
    assert float(start.A.abs().max()) == pytest.approx(1 / 20, rel=0.01)
    assert float(start.A.std()) == pytest.approx(1 / 20 / math.sqrt(3), rel=0.05)


def test_a_depends_on_seed_and_layer_and_larger_ranks_extend_smaller_ones() -> None:
    def draw(seed: int, name: str, rank: int) -> Tensor:
        layer, config = Layer(name, 10, 6), LoRA.Config(rank=rank)
        return registry.method("lora").start(layer, Start(config, seed)).A

    assert torch.equal(draw(0, "a", 3), draw(0, "a", 3))
    assert torch.equal(draw(0, "a", 5)[:3], draw(0, "a", 3))
    for one, other in itertools.combinations([draw(0, "a", 3), draw(1, "a", 3), draw(0, "b", 3)], 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize(("name", "scale"), [("lora", 4.0), ("rslora", 8.0), ("lora-plus", 4.0)])
def test_scale_is_alpha_over_rank_or_over_its_root(name: str, scale: float) -> None:
    method = registry.method(name)
    adapter = method.adapter(SHAPES.layers[0], torch.zeros(1), [Start(method.Config(rank=4, alpha=16), 0)])
    assert isinstance(adapter, LowRank)
    assert float(adapter.scale) == scale


def test_target_modules_choose_whole_words_at_the_end_of_a_name() -> None:
    method = registry.method("lora")

    def names(*targets: str) -> list[str]:
        return [x.name for x in method.targets(LoRA.Config(target_modules=targets), SHAPES)]

    assert names("q") == ["block.q", "block.mlp.q"]
    assert names("mlp.q", "k") == ["block.mlp.q", "block.k"]
    assert names("block.q") == ["block.q"]
    with pytest.raises(ValueError, match=r"no linear layer is named 'lock\.q'; there are k, q"):
        names("lock.q")
    assert method.trainable(LoRA.Config(rank=2, target_modules=("k",)), SHAPES) == 2 * (8 + 4)


def test_a_rank_that_does_not_fit_is_refused() -> None:
    method = registry.method("lora")
    method.check(LoRA.Config(rank=4), SHAPES)
    with pytest.raises(ValueError, match=r"rank 5 .* layer block\.k \(4 x 8\) allows; use at most 4"):
        method.check(LoRA.Config(rank=5), SHAPES)
