"""What every registered method keeps, on every tiny architecture that it applies to.

A new method is covered by being registered; it is named here only where the plain example configs do not fit.
The tuners of peft, which are built by another library, have tests of their own (`test_peft_tuners.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import registry
from suite.batches import collate
from suite.method import Method, Start
from suite.packing import Packed
from suite.specs import RunSpec
from suite.training import Trained
from tests import tiny

RUNS = 3
RATES = (2e-3, 1e-3, 5e-3)
FOLDER = TemporaryDirectory()  # of gradient estimates; goes when the process ends

#: So few tokens reach few experts.
_MIXTURE = {"experts": 3}

#: Hyper-parameters that a tiny model needs, by method; the three runs differ in rank and alpha of themselves.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "adalora": [{}, {"gamma": 0.1}, {"target": 1.0}],
    "gora": [{"batches": 2, "batch_size": 4}, {"batches": 2, "batch_size": 4, "gamma": 0.0},
             {"batches": 3, "batch_size": 4, "variant": "official_code", "lr_ratio_b": 4.0}],
    "lora-fa": [{}, {"projected": True}, {}],
    "lora-ga": [{"batches": 2}, {"batches": 2, "directions": "ArBr", "scale": "unit"}, {"batches": 3, "scale": "weightS"}],
    "lora-plus": [{"lr_ratio_b": 16.0}, {"lr_ratio_b": 1.5}, {"lr_ratio_b": 2.0}],
    "lorasc": [{"slow_alpha": 0.6}, {"slow_alpha": 1.0, "noise_scale": 0.0}, {"slow_alpha": 0.3, "noise_scale": 0.4}],
    "malora": [_MIXTURE | {"beta": 1.25}, _MIXTURE | {"lambda_": 0.6}, _MIXTURE | {"expand": False}],
    "moasylora": [_MIXTURE] * RUNS,
    "qdota": [{"bond": 3}] * RUNS,  # they share what is quantised
    "molora": [_MIXTURE, _MIXTURE | {"aux_coefficient": 0.3}, _MIXTURE | {"router": "kaiming"}],
    "sparta": [{"entries": 150}, {"entries": 260, "allocation": "uniform", "selection_seed": 7},
               {"entries": 900, "selection": "bernoulli"}],
}

#: Methods that cut parts off, which then only the penalty reaches.
PRUNED = {"adalora"}

#: Methods that may start away from the base.
MOVED = {"gora", "qdota", "qlora"}


def configs(method: Method[Any]) -> list[Any]:
    """Three configs that differ where runs of a pack may: rank, alpha, and what the examples say."""
    found = []
    for run, (rank, alpha) in enumerate([(2, 4.0), (4, 8.0), (3, 16.0)]):
        config = method.resized(method.Config(), rank) if method.size else method.Config()
        facts = {"alpha": alpha} if "alpha" in config.model_dump() else {}
        facts |= EXAMPLES.get(method.id, [{}] * RUNS)[run]
        found.append(method.Config.model_validate(config.model_dump() | facts))
    return found


def applies(method: Method[Any], arch: str) -> bool:
    """Whether the method can be built on the architecture: not skipped, and there are layers to adapt."""
    base = tiny.build(arch)
    if method.skip(base.kind, base.task_kind) is not None:
        return False
    return method.trains != "adapter" or bool(base.shapes.layers)


def cases(wanted: Callable[[Method[Any]], bool]) -> list[tuple[str, str]]:
    """Method and architecture, of the methods that are wanted."""
    methods = sorted((n, m) for n, m in registry.methods().items() if m.trains != "foreign")
    return [(name, arch) for name, method in methods if wanted(method) for arch in tiny.ARCHITECTURES
            if applies(method, arch)]


ALL = cases(lambda method: True)
TRAINED = cases(lambda method: method.trains != "nothing")
ADAPTED = cases(lambda method: method.trains == "adapter")
FROZEN = cases(lambda method: method.trains != "base" and not method.frees_weights)
PACKED = cases(lambda method: method.trains != "nothing" and method.packs)


@dataclass
class Case:
    """A pack of three runs (or one, where the method runs alone) that has been trained, still attached."""

    base: tiny.Tiny
    method: Method[Any]
    starts: list[Start]
    specs: list[RunSpec]
    packed: Packed
    trained: Trained | None

    @property
    def runs(self) -> range:
        return range(len(self.starts))


@cache
def prepared(name: str, arch: str) -> list[Start]:
    """What the three runs (one, where the method runs alone) bring."""
    method = registry.method(name)
    starts = tiny.build(arch).starts(method, configs(method), Path(FOLDER.name))
    return starts if method.packs else starts[:1]


def make(name: str, arch: str, runs: range) -> Case:
    """A fresh base with the chosen runs attached, not trained yet."""
    base, method = tiny.build(arch), registry.method(name)
    starts = [prepared(name, arch)[run] for run in runs]
    specs = [base.spec(method, start.config, start.seed, RATES[start.seed]) for start in starts]
    return Case(base, method, starts, specs, base.pack(method, starts), None)


def trained(name: str, arch: str, runs: range) -> Case:
    case = make(name, arch, runs)
    case.trained = case.base.train(case.packed, case.specs)
    return case


@cache
def whole(name: str, arch: str) -> Case:
    """All runs of the case trained in one pack. Shared: a test leaves it as it was."""
    return trained(name, arch, range(len(prepared(name, arch))))


@contextmanager
def gradients_in_place(packed: Packed) -> Iterator[None]:
    """Every trained tensor shows its gradient, so that `state` cuts gradients as it cuts parameters."""
    held = [(parameter, parameter.data) for parameter, _ in packed.parameters()]
    try:
        for parameter, _ in held:
            assert parameter.grad is not None
            parameter.data = parameter.grad
        yield
    finally:
        for parameter, values in held:
            parameter.data = values
            parameter.grad = None


def saved(packed: Packed, run: int) -> dict[str, Tensor]:
    """All that a run leaves."""
    return packed.state(run) | packed.constants(run)


def gradients(case: Case, run: int) -> dict[str, Tensor]:
    """One run's gradients on a fixed batch."""
    case.base.loss_of(case.packed)(case.base.batch(case.packed.runs)).sum().backward()
    with gradients_in_place(case.packed):
        return {name: tensor.clone() for name, tensor in case.packed.state(run).items()}


def promised(case: Case, run: int) -> int:
    """What the method says that a run trains, from shapes alone, task head included."""
    start = case.starts[run]
    return case.method.trained(start.config, case.base.shapes, start.prepared) + case.base.shapes.head


def outputs(case: Case) -> Tensor:
    """`[runs, items, length, ...]`: what every run makes of the same items, head included."""
    batch = case.base.batch(case.packed.runs)
    with torch.no_grad():
        found = case.base.outputs(case.packed.model, batch).unflatten(0, (case.packed.runs, -1))
        return found if case.packed.head is None else case.packed.head(found[:, :, 0].flatten(0, 1))


@pytest.mark.parametrize(("name", "arch"), TRAINED)
def test_trainable_is_the_count_of_trained_scalars(name: str, arch: str) -> None:
    for run in range(len(prepared(name, arch))):
        alone = make(name, arch, range(run, run + 1))
        parameters = [parameter for parameter, _ in alone.packed.parameters()]
        assert all(parameter.requires_grad for parameter in parameters)
        assert sum(parameter.numel() for parameter in parameters) == promised(alone, 0)
        assert sum(tensor.numel() for tensor in alone.packed.state(0).values()) == promised(alone, 0)


@pytest.mark.parametrize(("name", "arch"), PACKED)
def test_a_run_in_a_pack_saves_only_its_own_scalars(name: str, arch: str) -> None:
    case = whole(name, arch)
    for run in case.runs:
        assert sum(tensor.numel() for tensor in case.packed.state(run).values()) == promised(case, run)


@pytest.mark.parametrize(("name", "arch"), ADAPTED)
def test_a_zero_delta_gives_exactly_the_bases_outputs(name: str, arch: str) -> None:
    runs = range(len(prepared(name, arch)))
    case = make(name, arch, runs)
    batch = case.base.batch(len(runs))
    bare = tiny.build(arch)
    with torch.no_grad():
        expected = bare.outputs(bare.model, batch).chunk(len(runs))
        found = case.base.outputs(case.packed.model, batch).chunk(len(runs))
    for run in runs:
        if (any(adapter.delta(run).any() for adapter in case.packed.adapters.values()) if case.packed.mergeable
                else name in MOVED):
            assert name in MOVED
            assert not torch.equal(found[run], expected[run])
        else:
            torch.testing.assert_close(found[run], expected[run], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("name", "arch"), PACKED)
def test_a_pack_of_three_is_three_solo_runs(name: str, arch: str) -> None:
    pack = whole(name, arch)
    assert pack.trained is not None
    for run in pack.runs:
        solo = trained(name, arch, range(run, run + 1))
        assert solo.trained is not None
        close(pack.trained.losses[:, run], solo.trained.losses[:, 0])
        close(pack.trained.norms[:, run], solo.trained.norms[:, 0])
        assert torch.equal(pack.trained.rates[:, run], solo.trained.rates[:, 0])
        assert pack.trained.tokens[run] == solo.trained.tokens[0]
        close(saved(pack.packed, run), saved(solo.packed, 0))
        close(gradients(pack, run), gradients(solo, 0))


@pytest.mark.parametrize(("name", "arch"), TRAINED)
def test_training_moves_the_run(name: str, arch: str) -> None:
    case, fresh = whole(name, arch), make(name, arch, range(len(prepared(name, arch))))
    for run in case.runs:
        before, after = fresh.packed.state(run), case.packed.state(run)
        assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("name", "arch"), ADAPTED)
def test_merged_model_is_the_unmerged_one(name: str, arch: str) -> None:
    case = whole(name, arch)
    batch = case.base.batch(case.packed.runs)
    with torch.no_grad():
        apart = case.base.outputs(case.packed.model, batch).chunk(case.packed.runs)
        for run in case.runs:
            if not case.packed.mergeable:  # then it refuses, and leaves the adapters where they were
                with pytest.raises(TypeError), case.packed.merged(run):
                    pass
                continue
            with case.packed.merged(run) as model:
                assert not any("adapter" in key for key, _ in model.named_modules())
                close(case.base.outputs(model, case.base.batch()), apart[run])
        again = case.base.outputs(case.packed.model, batch).chunk(case.packed.runs)
    assert all(torch.equal(a, b) for a, b in zip(apart, again, strict=True))


@pytest.mark.parametrize(("name", "arch"), ADAPTED)
def test_the_ordinary_lora_that_is_exported_is_the_delta(name: str, arch: str) -> None:
    case = whole(name, arch)
    for run in case.runs:
        for adapter in case.packed.adapters.values():
            factors = adapter.factors(run)
            if factors is not None:
                close(factors[1].data @ factors[0].data, adapter.delta(run).data)


@pytest.mark.parametrize(("name", "arch"), ADAPTED)
def test_a_run_taken_alone_is_the_run_in_the_pack(name: str, arch: str) -> None:
    case = whole(name, arch)
    batch = case.base.batch(case.packed.runs)
    with torch.no_grad():
        together = case.base.outputs(case.packed.model, batch).chunk(case.packed.runs)
        for run in case.runs:
            with case.packed.alone(run) as model:
                close(case.base.outputs(model, case.base.batch()), together[run])
        again = case.base.outputs(case.packed.model, batch).chunk(case.packed.runs)
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


@pytest.mark.parametrize(("name", "arch"), TRAINED)
def test_state_and_load_bring_back_every_run_alone(name: str, arch: str) -> None:
    case = whole(name, arch)
    expected = outputs(case)
    other = make(name, arch, range(len(case.starts)))
    untouched = outputs(other)
    last = case.runs[-1]
    other.packed.load(last, {key: tensor.clone() for key, tensor in saved(case.packed, last).items()})
    assert torch.equal(outputs(other)[last], expected[last])
    assert torch.equal(outputs(other)[:last], untouched[:last])
    for run in case.runs:
        other.packed.load(run, saved(case.packed, run))
    assert torch.equal(outputs(other), expected)


@pytest.mark.parametrize(("name", "arch"), TRAINED)
def test_gradient_reaches_all_that_is_trained_and_nothing_else(name: str, arch: str) -> None:
    case = whole(name, arch)
    batch = collate(case.base.data, [range(tiny.ITEMS)] * case.packed.runs, tiny.CPU)
    loss, penalty = case.base.loss_of(case.packed)(batch), case.packed.penalty()
    (loss + penalty if name in PRUNED and penalty is not None else loss).sum().backward()
    ours = {id(parameter) for parameter, _ in case.packed.parameters()}
    frozen = [p for p in case.packed.model.parameters() if id(p) not in ours]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    with gradients_in_place(case.packed):
        for run in case.runs:
            for key, tensor in case.packed.state(run).items():
                # A whole base holds embeddings of words and places that no item has; a router may leave an expert out.
                reached = tensor.any() if case.method.trains == "base" or not case.packed.mergeable else tensor.all()
                assert reached, f"run {run}: no gradient reaches {key}"


@pytest.mark.parametrize(("name", "arch"), FROZEN)
def test_training_and_detaching_leave_the_base_bitwise_as_it_was(name: str, arch: str) -> None:
    bare = tiny.build(arch)
    case = make(name, arch, range(len(prepared(name, arch))))
    if case.method.trains != "nothing":
        case.base.train(case.packed, case.specs)
    case.packed.detach()
    found, expected = case.base.model.state_dict(), bare.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not any(p.requires_grad or p.grad is not None for p in case.base.model.parameters())
    assert [type(m) for m in case.base.model.modules()] == [type(m) for m in bare.model.modules()]


def test_every_method_meets_an_architecture() -> None:
    assert {name for name, _ in ALL} == {name for name, method in registry.methods().items() if method.trains != "foreign"}


def close(found: Any, expected: Any) -> None:
    """Equal but for the order in which float64 sums are taken."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
