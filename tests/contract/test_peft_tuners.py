"""Every tuner of peft, on a tiny BERT and a tiny Llama in float32: built, counted, trained, saved and read back."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft.utils import PeftType
from pydantic import ValidationError
from torch import Tensor

from methods import peft_tuners
from suite import registry
from suite.budget import fit
from suite.errors import UserError
from suite.method import Method
from suite.packing import Packed
from suite.specs import Budget, RunSpec
from suite.training import Trained
from tests import tiny

FOLDER = TemporaryDirectory()

#: Tuners that start away from the base: random weights that are not zero, or virtual tokens.
MOVED = {"c3a", "cartridge", "cpt", "fourierft", "p_tuning", "prefix_tuning", "prompt_tuning", "unilora", "vblora"}

CASES = [(f"peft:{tuner.kind}", arch) for tuner in peft_tuners.TUNERS for arch in ("bert", "llama")
         if registry.method(f"peft:{tuner.kind}").skip(*{"bert": ("encoder", "classification"),
                                                         "llama": ("causal", "generation")}[arch]) is None]


@dataclass
class Case:
    """One run, attached and not trained yet."""

    base: tiny.Tiny
    method: Method[Any]
    config: Any
    packed: Packed
    spec: RunSpec

    def train(self) -> Trained:
        return self.base.train(self.packed, [self.spec])

    def outputs(self) -> Tensor:
        """As it answers, at the positions of the batch; virtual tokens stand in front of them."""
        batch, modules = self.base.batch(), list(self.packed.model.modules())
        modes = [module.training for module in modules]
        self.packed.model.eval()
        with torch.no_grad():
            found = self.base.outputs(self.packed.model, batch)[:, -batch.tokens.shape[1]:]
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        return found


def make(name: str, arch: str, **config: Any) -> Case:
    base, method = tiny.build(arch, torch.float32), registry.method(name)
    made = method.Config.model_validate(config)
    packed = base.pack(method, base.starts(method, [made], Path(FOLDER.name)))
    return Case(base, method, made, packed, base.spec(method, made, epochs=1, learning_rate=1e-2))


@cache
def once(name: str, arch: str) -> tuple[Case, Tensor, dict[str, Tensor], Trained]:
    """A trained run with what it gave before training, and where its tensors stood then. Shared, not to be changed."""
    case = make(name, arch)
    before = case.outputs()
    state = {key: tensor.clone() for key, tensor in case.packed.state(0).items()}
    ours = {parameter.data_ptr() for parameter, _ in case.packed.parameters()}
    frozen = {key: tensor.clone() for key, tensor in case.packed.model.state_dict().items()
              if tensor.data_ptr() not in ours}
    trained = case.train()
    after = case.packed.model.state_dict()
    changed = sorted(key for key in frozen if not torch.equal(frozen[key], after[key]))
    assert all("ranknum" in key for key in changed), f"frozen tensors were trained: {changed[:3]}"
    return case, before, state, trained


def test_every_type_of_peft_is_an_entry() -> None:
    ours = {name.removeprefix("peft:") for name in registry.methods() if name.startswith("peft:")}
    assert ours == {kind.value.lower() for kind in PeftType}


def test_what_cannot_be_run_says_why() -> None:
    for kind in ("xlora", "poly", "multitask_prompt_tuning"):
        assert "it " in str(registry.method(f"peft:{kind}").skip("causal", "generation")) or kind == "poly"
    assert registry.method("peft:cpt").skip("encoder", "classification") == "peft's cpt works on causal bases only"


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_it_starts_as_the_base_or_is_known_not_to(name: str, arch: str) -> None:
    _, before, _, _ = once(name, arch)
    bare = tiny.build(arch, torch.float32)
    difference = (before - bare.outputs(bare.model, bare.batch())).abs().max().item()
    if name.removeprefix("peft:") in MOVED:
        assert difference > 1e-4
    else:
        assert difference < 2e-5


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_the_count_from_shapes_is_the_count_of_trained_scalars(name: str, arch: str) -> None:
    case, _, state, _ = once(name, arch)
    expected = case.method.trainable(case.config, case.base.shapes) + case.base.shapes.head
    assert sum(parameter.numel() for parameter, _ in case.packed.parameters()) == expected
    assert sum(tensor.numel() for tensor in state.values()) == expected
    assert expected > case.base.shapes.head


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_training_moves_it(name: str, arch: str) -> None:
    case, _, state, trained = once(name, arch)
    own = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    moved = [key for key, tensor in own.items() if not torch.equal(tensor, case.packed.state(0)[key])]
    assert moved
    assert trained.alive == [True]
    assert all(math.isfinite(loss) for loss in trained.losses.flatten().tolist())
    assert not any(module.training for module in case.packed.model.modules())


@pytest.mark.parametrize(("name", "arch"), CASES)
def test_a_fresh_run_reads_back_what_was_saved(name: str, arch: str) -> None:
    case, before, _, _ = once(name, arch)
    fresh = make(name, arch)
    torch.testing.assert_close(fresh.outputs(), before, rtol=0, atol=0)  # the run's seed alone decides its start
    fresh.packed.load(0, case.packed.state(0))
    torch.testing.assert_close(fresh.outputs(), case.outputs(), rtol=0, atol=0)


def test_gradient_reaches_every_trained_tensor_of_lora() -> None:
    case = make("peft:lora", "llama", options={"init_lora_weights": False})
    case.base.loss_of(case.packed)(case.base.batch()).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter, _ in case.packed.parameters())


def test_a_language_models_loss_visits_the_vocabulary_only_where_there_is_loss() -> None:
    case = make("peft:prompt_tuning", "llama")
    batch = case.base.batch()
    head = case.packed.model.get_output_embeddings()
    seen: list[int] = []
    head.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    loss = case.base.loss_of(case.packed)(batch)
    whole = case.packed.model(input_ids=batch.tokens, attention_mask=batch.mask).logits[:, -batch.tokens.shape[1]:]
    losses = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten())
    torch.testing.assert_close(loss, losses[None])
    assert (batch.labels[:, 1:] != -100).sum().item() in seen


@pytest.mark.parametrize(("kind", "options", "problem"), [
    ("lora", {"rank": 4}, "peft:lora has no option 'rank'; use "),
    ("oft", {"r": 4, "oft_block_size": 4}, "peft:oft does not take these options: "),
    ("lora", {"init_lora_weights": "eva", "eva_config": {"rhoo": 1}}, "peft:lora does not take these options: "),
])
def test_a_wrong_option_is_refused_in_a_sentence(kind: str, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError) as caught:
        registry.method(f"peft:{kind}").Config(options=options)
    message = caught.value.errors()[0]["msg"]
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize("options", [
    {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"use_dora": True},
    {"use_rslora": True},
])
def test_starts_and_variants_of_lora_train_and_begin_as_the_base(options: dict[str, Any]) -> None:
    case = make("peft:lora", "bert", options=options, size=4, data_batches=2, data_batch_size=4)
    bare = tiny.build("bert", torch.float32)
    torch.testing.assert_close(case.outputs(), bare.outputs(bare.model, bare.batch()), rtol=1e-3, atol=2e-5)
    before = case.outputs()
    promised = case.method.trained(case.config, case.base.shapes, case.packed.model)
    if "rho" in str(options) or "eva" not in str(options):
        assert promised == case.method.trainable(case.config, case.base.shapes)
    assert case.train().alive == [True]
    assert not torch.equal(case.outputs(), before)


def test_lora_ga_and_corda_look_at_the_data() -> None:
    plain = make("peft:lora", "bert", size=4).packed.state(0)
    for start in ("lora_ga", "corda", "eva"):
        found = make("peft:lora", "bert", size=4, data_batches=2, data_batch_size=4,
                     options={"init_lora_weights": start} | ({"eva_config": {"rho": 1.0}} if start == "eva" else {}))
        assert any(not torch.equal(tensor, plain[key]) for key, tensor in found.packed.state(0).items())


def test_adalora_moves_ranks_and_pulls_its_factors_to_orthogonality() -> None:
    case = make("peft:adalora", "llama", options={"tinit": 0, "tfinal": 1, "deltaT": 1}, size=4)
    penalty = case.packed.penalty()
    assert penalty is not None
    factors = {name: p for name, p in case.packed.model.named_parameters() if "lora_A" in name or "lora_B" in name}
    each = [(p @ p.T if "lora_A" in name else p.T @ p) for name, p in factors.items()]
    expected = 0.5 * sum((product - torch.eye(4)).norm() for product in each) / len(each)
    torch.testing.assert_close(penalty, expected[None])
    case.train()
    singular = [p for name, p in case.packed.model.named_parameters() if "lora_E" in name]
    zeros = sum(int((p == 0).sum()) for p in singular)
    assert zeros == len(singular) * (4 - 3)  # of rank 4 the budget leaves 3 on average


def test_a_budget_means_the_same_as_for_every_method() -> None:
    base = tiny.build("bert", torch.float32)
    wanted = sum(2 * (layer.in_features + layer.out_features) for layer in base.shapes.layers)
    for kind in ("lora", "hra", "shira", "unilora", "fourierft", "supertuning", "frod"):
        method = registry.method(f"peft:{kind}")
        found = fit(method, method.Config(), Budget(like="lora@2"), base.shapes)
        assert abs(method.trainable(found, base.shapes) - wanted) <= 0.1 * wanted
    assert fit(registry.method("peft:lora"), registry.method("peft:lora").Config(), Budget(rank=2), base.shapes).size == 2
    with pytest.raises(UserError, match=r"LoKr .* cannot train about"):
        fit(registry.method("peft:lokr"), registry.method("peft:lokr").Config(), Budget(like="lora@4"), base.shapes)


def test_what_was_trained_is_still_known_when_the_model_has_been_detached() -> None:
    case = make("peft:lora", "bert", size=2)
    expected = case.method.trainable(case.config, case.base.shapes)
    case.packed.detach()
    assert case.method.trained(case.config, case.base.shapes, case.packed.model) == expected > 0


def test_tokens_that_are_trained_are_the_most_frequent_of_the_data() -> None:
    case = make("peft:trainable_tokens", "bert", size=3, data_batches=2, data_batch_size=4)
    request = peft_tuners._request(case.config)
    counts = torch.zeros(tiny.VOCABULARY, dtype=torch.long)
    for batch in case.base.batches(request):
        counts += torch.bincount(batch.tokens[batch.mask.bool()], minlength=tiny.VOCABULARY)
    chosen = case.packed.model.active_peft_config.token_indices
    assert sorted(counts[chosen].tolist()) == sorted(counts.topk(3).values.tolist())
