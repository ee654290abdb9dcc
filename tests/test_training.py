"""The training loop of a pack: repeatable to the bit, an order per seed, unharmed by a run that breaks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from methods.lora import LoRA, LowRank
from suite import registry
from suite.batches import Batch, collate, training_order
from suite.method import Adapter, Layer, Start
from suite.optimiser import schedule
from suite.packing import Packed
from suite.recompute import recomputed
from suite.specs import RunSpec
from suite.training import Trained, train
from tests import tiny

METHOD = registry.method("lora")
STARTS = [Start(LoRA.Config(rank=rank), seed) for seed, rank in enumerate((2, 3))]
BREAKS = 1e150  # a learning rate after whose first step no loss is finite


def trained(arch: str, rates: list[float], seeds: list[int] | None = None,
            **recipe: object) -> tuple[tiny.Tiny, Packed, Trained]:
    base = tiny.build(arch)
    seeds = seeds or list(range(len(rates)))
    config = LoRA.Config(rank=3)
    packed = base.pack(METHOD, [Start(config, seed) for seed in seeds])
    specs = [base.spec(METHOD, config, seed, rate, **recipe) for seed, rate in zip(seeds, rates, strict=True)]
    return base, packed, base.train(packed, specs)


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, NaN for NaN."""
    return torch.equal(one.nan_to_num(nan=12345.0), other.nan_to_num(nan=12345.0))


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_two_identical_trainings_are_equal_to_the_bit(arch: str) -> None:
    found = []
    for noise in range(2):
        torch.manual_seed(noise)  # the global generator has no say
        _, packed, result = trained(arch, [1e-3, 1e-2])
        found.append((result.losses, result.norms, [packed.state(run) for run in range(2)]))
    (losses, norms, states), (others, other_norms, other_states) = found
    assert torch.equal(losses, others)
    assert torch.equal(norms, other_norms)
    for state, other in zip(states, other_states, strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_run_that_breaks_leaves_its_neighbours_as_they_are_without_it(arch: str) -> None:
    _, ill, broken = trained(arch, [1e-3, BREAKS, 2e-3])
    _, well, healthy = trained(arch, [1e-3, 1e-3, 2e-3])
    assert broken.alive == [True, False, True]
    assert healthy.alive == [True] * 3
    for run in (0, 2):
        assert same(broken.losses[:, run], healthy.losses[:, run])
        assert same(broken.norms[:, run], healthy.norms[:, run])
        assert all(torch.equal(tensor, well.state(run)[name]) for name, tensor in ill.state(run).items())
        assert broken.tokens[run] == healthy.tokens[run]


@pytest.mark.parametrize("arch", ["bert", "llama"])
def test_a_run_that_breaks_says_the_same_of_itself_in_any_pack(arch: str) -> None:
    _, _, pack = trained(arch, [1e-3, BREAKS], epochs=6)
    _, _, solo = trained(arch, [BREAKS], seeds=[1], epochs=6)
    assert pack.alive[1] is solo.alive[0] is False
    assert pack.losses.shape[0] == solo.losses.shape[0] == pack.rates.shape[0] == 24
    finite = pack.losses[:, 1].isfinite().tolist()
    steps = finite.index(False)
    assert not any(finite[steps:])
    torch.testing.assert_close(solo.losses[:steps, 0], pack.losses[:steps, 1])
    assert not solo.losses[steps:, 0].isfinite().any()
    assert torch.equal(solo.rates[:, 0], pack.rates[:, 1])
    assert pack.tokens[1] == solo.tokens[0] < pack.tokens[0]
    assert torch.isfinite(pack.losses[:, 0]).all()


def test_a_pack_in_which_no_run_is_left_stops_early() -> None:
    base = tiny.build("llama")
    config = LoRA.Config(rank=2)
    packed = base.pack(METHOD, [Start(config, 0)])
    seen: list[tuple[int, int]] = []
    train(packed, [base.spec(METHOD, config, 0, BREAKS, epochs=10)], base.data, base.loss_of(packed),
          lambda done, total: seen.append((done, total)))
    assert seen == [(10, 40)]


def test_progress_is_told_every_ten_steps_and_at_the_end() -> None:
    base = tiny.build("llama")
    config = LoRA.Config(rank=2)
    packed = base.pack(METHOD, [Start(config, 0)])
    seen: list[tuple[int, int]] = []
    train(packed, [base.spec(METHOD, config, epochs=6)], base.data, base.loss_of(packed),
          lambda done, total: seen.append((done, total)))
    assert seen == [(10, 24), (20, 24), (24, 24)]


def test_each_run_sees_its_own_seeds_order_of_the_data() -> None:
    base = tiny.build("bert")
    config = LoRA.Config(rank=2)
    packed = base.pack(METHOD, [Start(config, seed) for seed in (5, 6)])
    specs: list[RunSpec] = [base.spec(METHOD, config, seed) for seed in (5, 6)]
    seen: list[Batch] = []
    loss_of = base.loss_of(packed)

    def watched(batch: Batch) -> Tensor:
        seen.append(batch)
        return loss_of(batch)

    result = train(packed, specs, base.data, watched, lambda done, total: None)
    orders = [training_order(base.data, 4, 2, seed) for seed in (5, 6)]
    assert len(seen) == 8
    for step, batch in enumerate(seen):
        expected = collate(base.data, [order[step] for order in orders], tiny.CPU)
        assert torch.equal(batch.tokens, expected.tokens)
    tokens = 2 * sum(len(item.tokens) for item in base.data.items)
    assert result.tokens == [tokens, tokens]
    assert result.padding == pytest.approx(1 - 2 * tokens / sum(batch.positions for batch in seen))


def test_recorded_rates_are_each_runs_own_peak_times_the_schedule() -> None:
    _, _, result = trained("bert", [1e-4, 3e-2], warmup_ratio=0.25)
    assert result.rates[:3].tolist() == [[pytest.approx(rate / 2 * k, rel=1e-14) for rate in (1e-4, 3e-2)]
                                         for k in (1, 2, 2)]
    assert result.rates.shape == (8, 2)


class Watched(LowRank):
    """LoRA's adapter that writes down what it is told, and whose loss is drawn towards large B in run 1."""

    def __init__(self, adapter: LowRank, told: list[str]) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(adapter.__dict__)
        self.told = told

    def begin(self, stage: int, stages: int) -> None:
        self.told.append(f"begin {stage + 1}/{stages}")

    def stepped(self, step: int, steps: int) -> None:
        assert self.B.grad is not None
        self.told.append(f"step {step + 1}/{steps}")

    def penalty(self) -> Tensor:
        return self.B.sum((1, 2)) * torch.tensor([0.0, -1.0], dtype=self.B.dtype)


class Staged(LoRA):
    """LoRA in two stages whose adapter of the first query is watched."""

    id = "staged"

    def __init__(self) -> None:
        self.told: list[str] = []

    def stages(self, config: LoRA.Config, epochs: int) -> int:
        return 2

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter:
        made = super().adapter(layer, weight, starts)
        assert isinstance(made, LowRank)
        return Watched(made, self.told) if layer.name.endswith("0.attention.self.query") else made


def test_stages_restart_the_schedule_and_adapters_are_told_of_stages_and_steps() -> None:
    base, method, config = tiny.build("bert"), Staged(), LoRA.Config(rank=2)
    packed = base.pack(method, [Start(config, seed) for seed in range(2)])
    specs = [base.spec(method, config, seed, 1e-3) for seed in range(2)]
    result = base.train(packed, specs)
    steps = [f"step {i}/8" for i in range(1, 9)]
    assert method.told == ["begin 1/2", *steps[:4], "begin 2/2", *steps[4:]]
    part = schedule(specs[0].recipe, 4)
    torch.testing.assert_close(result.rates[:, 0], 1e-3 * torch.cat([part, part]))
    assert all(parameter.grad is None for parameter, _ in packed.parameters())


def test_a_penalty_pulls_its_own_run_alone_and_is_not_part_of_the_recorded_loss() -> None:
    found = []
    for method in (Staged(), METHOD):
        base, config = tiny.build("bert"), LoRA.Config(rank=2)
        packed = base.pack(method, [Start(config, seed) for seed in range(2)])
        result = base.train(packed, [base.spec(method, config, seed, batch_size=tiny.ITEMS, epochs=1, clip=None)
                                     for seed in range(2)])
        found.append((result, next(iter(packed.adapters.values())).delta(1)))
    (pulled, delta), (plain, free) = found
    assert torch.equal(pulled.losses, plain.losses)  # of one step: both runs start alike
    assert pulled.norms[0, 0] == plain.norms[0, 0]
    assert pulled.norms[0, 1] > 2 * plain.norms[0, 1]
    assert not torch.equal(delta, free)


def test_training_lowers_the_loss() -> None:
    _, _, result = trained("llama", [1e-2], epochs=20)
    first, last = result.losses[:4, 0].mean(), result.losses[-4:, 0].mean()
    assert math.isfinite(float(last))
    assert last < 0.5 * first


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_the_parts_of_a_batch_add_up_to_the_whole(arch: str, at_once: int) -> None:
    ends = []
    for size in (None, at_once):
        base = tiny.build(arch)
        packed = base.pack(METHOD, STARTS)
        specs = [base.spec(METHOD, start.config, start.seed, 1e-2) for start in STARTS]
        trained = train(packed, specs, base.data, base.loss_of(packed), lambda done, total: None, at_once=size)
        ends.append((trained, packed.state(1)))
    (whole, state), (parts, other) = ends
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(parts.norms, whole.norms, rtol=1e-9, atol=1e-12)
    assert parts.tokens == whole.tokens
    for name, tensor in state.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("arch", ["bert", "llama", "t5"])
def test_activations_that_are_computed_again_change_nothing_but_the_memory(arch: str) -> None:
    found = []
    for wanted in (False, True):
        base = tiny.build(arch)
        packed = base.pack(METHOD, STARTS)
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        with recomputed(packed.model, wanted):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = base.loss_of(packed)(base.batch(2))
            loss.sum().backward()
        found.append((sum(kept), loss.detach(), [parameter.grad for parameter, _ in packed.parameters()]))
    (whole, loss, gradients), (less, again, others) = found
    assert less < whole / 2
    assert torch.equal(loss, again)
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient is not None
        torch.testing.assert_close(other, gradient)


def test_a_model_without_blocks_cannot_compute_them_again() -> None:
    with pytest.raises(ValueError, match="no blocks"), recomputed(torch.nn.Linear(2, 2)):
        pass
