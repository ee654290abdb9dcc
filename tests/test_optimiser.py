"""PackedAdamW against torch.optim.AdamW, run by run; and the schedule."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from suite.optimiser import PackedAdamW, schedule
from suite.specs import Recipe

RUNS = 3
RATES = [1e-2, 3e-3, 5e-2]
SHAPES = [(4, 5), (7,)]
Kind = Literal["cosine", "linear", "constant"]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(RUNS, *shape, generator=draw, dtype=dtype)) for shape in SHAPES]


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Runs 0, 1, 2 have norms of about 0.05, 5 and 500: one is below any clip, two above."""
    draw = torch.Generator().manual_seed(1000 + step)
    size = torch.tensor([0.01, 1.0, 100.0], dtype=dtype)
    return [torch.randn(RUNS, *shape, generator=draw, dtype=dtype) * size.view(-1, *[1] * len(shape))
            for shape in SHAPES]


def step(adamw: PackedAdamW, grads: list[Tensor], factor: float = 1.0,
         losses: Tensor | None = None) -> Tensor:
    """One update with these gradients; the norms."""
    for parameter, grad in zip(adamw.parameters, grads, strict=True):
        parameter.grad = grad.clone()
    return adamw.step(torch.ones(RUNS) if losses is None else losses, factor)


@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_each_run_is_torch_adamw_with_clip_schedule_decay_and_ratio(clip: float | None, decay: float) -> None:
    recipe = Recipe(learning_rate=1.0, clip=clip, weight_decay=decay, beta1=0.8, beta2=0.95, warmup_ratio=0.2)
    ratios = torch.tensor([16.0, 1.0, 0.5], dtype=torch.float64)
    ours = parameters()
    packed = PackedAdamW(zip(ours, [None, ratios], strict=True), RUNS, RATES, recipe)
    factors = schedule(recipe, 20)
    norms = torch.stack([step(packed, gradients(i), float(factors[i])) for i in range(20)])

    for run, rate in enumerate(RATES):
        plain, fast = (nn.Parameter(p.detach()[run].clone()) for p in parameters())
        groups = [{"params": [plain], "lr": rate}, {"params": [fast], "lr": rate * float(ratios[run])}]
        theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=recipe.epsilon, weight_decay=decay)
        scheduler = torch.optim.lr_scheduler.LambdaLR(theirs, lambda i: float(factors[min(i, 19)]))
        for i in range(20):
            plain.grad, fast.grad = (grad[run] for grad in gradients(i))
            norm = nn.utils.clip_grad_norm_([plain, fast], math.inf if clip is None else clip)
            theirs.step()
            scheduler.step()
            torch.testing.assert_close(norms[i, run], norm, rtol=1e-12, atol=0)
        for mine, other in zip(ours, (plain, fast), strict=True):
            torch.testing.assert_close(mine.detach()[run], other.detach(), rtol=1e-12, atol=1e-13)


def test_float32_stays_within_rounding_of_float64() -> None:
    recipe = Recipe(learning_rate=1.0)
    found = []
    for dtype in (torch.float32, torch.float64):
        ours = parameters(torch.float64)
        ours = [nn.Parameter(p.detach().to(dtype)) for p in ours]
        packed = PackedAdamW([(p, None) for p in ours], RUNS, RATES, recipe)
        for i in range(20):
            step(packed, [grad.to(dtype) for grad in gradients(i)])
        found.append([p.detach().double() for p in ours])
    for single, double in zip(*found, strict=True):
        torch.testing.assert_close(single, double, rtol=0, atol=2e-5)


def test_gradients_stay_until_dropped_and_a_parameter_without_one_is_left_alone_as_in_torch() -> None:
    ours = parameters()
    before = ours[1].detach().clone()
    packed = PackedAdamW([(p, None) for p in ours], RUNS, RATES, Recipe(learning_rate=1.0, weight_decay=0.1))
    ours[0].grad = gradients(0)[0]
    packed.step(torch.ones(RUNS), 1.0)
    assert ours[0].grad is not None
    packed.drop_gradients()
    assert all(p.grad is None for p in ours)
    assert torch.equal(ours[1], before)


def test_a_restart_is_a_fresh_optimiser_on_the_same_parameters() -> None:
    ours = parameters()
    packed = PackedAdamW([(p, None) for p in ours], RUNS, RATES, Recipe(learning_rate=1.0))
    step(packed, gradients(0))
    packed.drop_gradients()
    packed.restart()
    fresh = [nn.Parameter(p.detach().clone()) for p in ours]
    step(packed, gradients(1))
    step(PackedAdamW([(p, None) for p in fresh], RUNS, RATES, Recipe(learning_rate=1.0)), gradients(1))
    assert all(torch.equal(a, b) for a, b in zip(packed.parameters, fresh, strict=True))


def test_a_solo_run_needs_no_run_axis() -> None:
    weight = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))
    other = nn.Parameter(torch.ones(4, 5, dtype=torch.float64))
    packed = PackedAdamW([(weight, None)], 1, [0.1], Recipe(learning_rate=1.0, clip=None))
    theirs = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for i in range(3):
        weight.grad = gradients(i)[0][0]
        other.grad = gradients(i)[0][0]
        packed.step(torch.ones(1), 1.0)
        theirs.step()
    torch.testing.assert_close(weight, other, rtol=1e-13, atol=1e-14)


Failure = Literal["nan loss", "inf loss", "nan gradient", "inf gradient", "-inf gradient", "overflowing norm"]


def fail(kind: Failure, run: int, grads: list[Tensor], losses: Tensor) -> None:
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "overflowing": 1e200}
    value = values[kind.split()[0]]
    if kind.endswith("loss"):
        losses[run] = value
    else:
        grads[0][run, 2, 3] = value


@pytest.mark.parametrize("kind", Failure.__args__)
def test_a_run_that_is_not_finite_stops_for_good_and_its_neighbours_never_notice(kind: Failure) -> None:
    recipe = Recipe(learning_rate=1.0, weight_decay=0.1)
    ill, well = parameters(), parameters()
    failing = PackedAdamW([(p, None) for p in ill], RUNS, RATES, recipe)
    healthy = PackedAdamW([(p, None) for p in well], RUNS, RATES, recipe)
    for i in range(8):
        if i == 3:
            last = [p.detach()[1].clone() for p in ill]
        grads, losses = gradients(i), torch.ones(RUNS, dtype=torch.float64)
        if i == 3:
            fail(kind, 1, grads, losses)
        norms = step(failing, grads, losses=losses)
        expected = step(healthy, gradients(i))
        assert torch.equal(norms[[0, 2]], expected[[0, 2]])
        assert failing.alive.tolist() == [True, i < 3, True]
    for mine, other, kept in zip(ill, well, last, strict=True):
        assert torch.equal(mine[[0, 2]], other[[0, 2]])
        assert torch.equal(mine[1], kept)
        assert not torch.equal(mine[1], other[1])


@given(steps=st.integers(1, 400), warmup=st.floats(0, 0.99), final=st.floats(0, 1),
       kind=st.sampled_from(["cosine", "linear", "constant"]))
def test_schedule_rises_to_one_and_falls_to_above_the_final_ratio(steps: int, warmup: float, final: float,
                                                                  kind: Kind) -> None:
    recipe = Recipe(learning_rate=1.0, schedule=kind, warmup_ratio=warmup, final_lr_ratio=final)
    factors = schedule(recipe, steps).tolist()
    rise = math.ceil(warmup * steps)
    assert len(factors) == steps
    assert factors[:rise] == [(i + 1) / rise for i in range(rise)]
    assert all(a >= b - 1e-12 for a, b in zip(factors[rise:], factors[rise + 1:], strict=False))
    assert all(final - 1e-12 <= factor <= 1 for factor in factors[rise:])
    assert factors[min(rise, steps - 1)] == 1.0
    if kind == "constant":
        assert factors[rise:] == [1.0] * (steps - rise)


@pytest.mark.parametrize(("kind", "expected"), [
    ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0])])
def test_schedule_shapes(kind: Kind, expected: list[float]) -> None:
    recipe = Recipe(learning_rate=1.0, schedule=kind, warmup_ratio=1 / 3)
    assert schedule(recipe, 6).tolist() == pytest.approx(expected)
    above = Recipe(learning_rate=1.0, schedule=kind, warmup_ratio=1 / 3, final_lr_ratio=0.1)
    lifted = expected[:2] + [0.1 + 0.9 * x if kind != "constant" else x for x in expected[2:]]
    assert schedule(above, 6).tolist() == pytest.approx(lifted)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_after_the_warmup_the_schedule_is_that_of_transformers(name: Kind) -> None:
    from transformers import get_scheduler

    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimiser, num_warmup_steps=3, num_training_steps=40)
    rates = []
    for _ in range(40):
        rates.append(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()
    ours = schedule(Recipe(learning_rate=1.0, schedule=name, warmup_ratio=3 / 40), 40).tolist()
    assert ours[3:] == pytest.approx(rates[3:])
    assert ours[:2] == pytest.approx(rates[1:3])  # theirs spends its first step at a rate of zero


def test_one_step_and_no_warmup_start_at_the_peak() -> None:
    assert schedule(Recipe(learning_rate=1.0), 1).tolist() == [1.0]
    assert schedule(Recipe(learning_rate=1.0, warmup_ratio=0), 1).tolist() == [1.0]
    assert schedule(Recipe(learning_rate=1.0, warmup_ratio=0), 2).tolist() == pytest.approx([1.0, 0.5])
    assert schedule(Recipe(learning_rate=1.0, warmup_ratio=0.9), 1).tolist() == [1.0]


def test_a_bfloat16_parameter_moves_by_steps_that_it_cannot_show_one_by_one() -> None:
    recipe = Recipe(learning_rate=1e-5, weight_decay=0.1)
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(64, generator=draw).bfloat16()
    narrow, wide = nn.Parameter(start.clone()), nn.Parameter(start.float())
    ours = PackedAdamW([(narrow, None)], 1, [1e-5], recipe)
    theirs = PackedAdamW([(wide, None)], 1, [1e-5], recipe)
    grad = torch.randn(64, generator=draw).bfloat16()
    for _ in range(600):
        step(ours, [grad], losses=torch.zeros(1))
        step(theirs, [grad.float()], losses=torch.zeros(1))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.detach(), wide.detach().bfloat16())
    assert (narrow != start).float().mean() > 0.5

    other = PackedAdamW([(nn.Parameter(start.clone()), None)], 1, [1e-5], recipe)
    other.restore(ours.snapshot())
    assert other.masters[0] is not None
    assert torch.equal(other.masters[0], wide.detach())


def test_a_parameter_whose_data_was_exchanged_is_still_the_one_that_moves() -> None:
    parameter = nn.Parameter(torch.zeros(1, 3))
    adamw = PackedAdamW([(parameter, None)], 1, [1e-2], Recipe(learning_rate=1e-2))
    parameter.data = torch.ones(1, 3)  # as peft's CPT does between steps
    step(adamw, [torch.ones(1, 3)], losses=torch.zeros(1))
    assert (parameter < 1).all()
