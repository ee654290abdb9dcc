"""A training that is killed again and again, and taken up each time by fresh objects from its checkpoint, ends bit for bit
as one that is left alone: every registered method, solo and in a pack of two, and a choice of peft's tuners."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import registry
from suite.batches import Batch
from suite.checkpoint import Checkpoint
from suite.packing import Packed
from suite.training import Trained, train
from tests import tiny
from tests.contract.test_methods import RATES, applies, configs

#: Of eight steps, in two cascades where there are cascades: within the first, where they meet, within the second.
KILLS = (2, 4, 7)
ALWAYS = 1e-9  # minutes: a checkpoint after every step

NATIVE = [(name, next(arch for arch in tiny.ARCHITECTURES if applies(method, arch)), runs)
          for name, method in sorted(registry.methods().items()) if method.trains not in ("foreign", "nothing")
          for runs in ((1, 2) if method.packs else (1,))]

#: Tuners with ranks that move, random draws in training, frozen draws, a changed base, and virtual tokens.
FOREIGN: list[tuple[str, dict[str, Any]]] = [
    ("peft:adalora", {"tinit": 0, "tfinal": 2, "deltaT": 1}), ("peft:lora", {"lora_dropout": 0.3}),
    ("peft:lora", {"init_lora_weights": "pissa"}), ("peft:pvera", {}), ("peft:vera", {"vera_dropout": 0.3}),
    ("peft:osf", {}), ("peft:boft", {}), ("peft:unilora", {}), ("peft:shira", {}), ("peft:p_tuning", {})]


class KilledError(Exception):
    """Instead of a signal: the process and all its objects are done with."""


@dataclass
class Run:
    """A training that came to its end."""

    base: tiny.Tiny
    packed: Packed
    trained: Trained

    def outputs(self) -> Tensor:
        with torch.no_grad():
            return self.base.outputs(self.packed.model, self.base.batch(self.packed.runs))


def attempt(name: str, arch: str, chosen: Sequence[Any], folder: Path, minutes: float = ALWAYS,
            steps: int | None = None) -> Run:
    """Train on from what stands on disk, with nothing in memory; raises `KilledError` after so many steps."""
    base, method = tiny.build(arch, torch.float32), registry.method(name)
    starts = base.starts(method, chosen, folder)
    specs = [base.spec(method, start.config, start.seed, RATES[start.seed]) for start in starts]
    packed = base.pack(method, starts)
    loss_of, made = base.loss_of(packed), 0

    def watched(batch: Batch) -> Tensor:
        nonlocal made
        if made == steps:
            raise KilledError
        made += 1
        return loss_of(batch)

    keeper = Checkpoint(specs, {}, minutes)
    return Run(base, packed, train(packed, specs, base.data, watched, lambda done, total: None, keeper))


def check(name: str, arch: str, chosen: Sequence[Any], folder: Path) -> None:
    """Whole and in four parts, with another global random state in each process."""
    torch.manual_seed(1)
    whole = attempt(name, arch, chosen, folder, minutes=0)
    for seed, steps in enumerate(last - first for first, last in pairwise([0, *KILLS])):
        torch.manual_seed(seed)
        with pytest.raises(KilledError):
            attempt(name, arch, chosen, folder, steps=steps)
    parts = attempt(name, arch, chosen, folder)
    assert parts.trained.resumed == list(KILLS)
    assert whole.trained.resumed == []
    for curve in ("losses", "norms", "rates"):
        assert torch.equal(getattr(parts.trained, curve), getattr(whole.trained, curve)), curve
    for fact in ("alive", "tokens", "padding"):
        assert getattr(parts.trained, fact) == getattr(whole.trained, fact)
    found, expected = parts.packed.snapshot(), whole.packed.snapshot()
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert torch.equal(parts.outputs(), whole.outputs())


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))


@pytest.mark.parametrize(("name", "arch", "runs"), NATIVE)
def test_a_killed_training_ends_as_one_left_alone(name: str, arch: str, runs: int, tmp_path: Path) -> None:
    check(name, arch, configs(registry.method(name))[:runs], tmp_path)


@pytest.mark.parametrize(("name", "options"), FOREIGN, ids=lambda value: str(value))
def test_a_killed_training_of_peft_ends_as_one_left_alone(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    check(name, "bert", [registry.method(name).Config(options=options)], tmp_path)


def test_a_method_that_cannot_go_on_exactly_begins_anew(tmp_path: Path) -> None:
    config = registry.method("peft:adamss").Config()
    with pytest.raises(KilledError):
        attempt("peft:adamss", "bert", [config], tmp_path, steps=3)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert attempt("peft:adamss", "bert", [config], tmp_path).trained.resumed == []
