"""The training loop of a pack, to be read from top to bottom."""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from suite import optimiser
from suite.batches import Batch, EncodedSet, collate, training_order
from suite.checkpoint import Checkpoint, Loop
from suite.packing import Packed
from suite.specs import Recipe, RunSpec

#: Steps between two looks at the device: the only moments at which the host waits for it.
REPORT_EVERY = 10


@dataclass(frozen=True)
class Trained:
    """Curves `[steps, runs]`, which runs stayed finite `[runs]`, and what it cost.

    A run that stopped being finite has NaN after the step that stopped it, and its tokens end there too: what
    is said of a run is the same in every pack.
    """

    losses: Tensor
    norms: Tensor
    rates: Tensor
    alive: list[bool]
    seconds: float
    tokens: list[int]  # real training tokens of each run
    padding: float
    resumed: list[int]  # the steps after which it was taken up again from a checkpoint


def train(packed: Packed, specs: Sequence[RunSpec], data: EncodedSet, loss_of: Callable[[Batch], Tensor],
          progress: Callable[[int, int], None], checkpoint: Checkpoint | None = None, at_once: int | None = None) -> Trained:
    """Train every run of a pack on its own order of the data. `loss_of(batch)` gives one loss per run, `[runs]`, the mean
    over its items, or over its target tokens. Where there is a checkpoint of the pack, training goes on from it.

    `at_once`: items of a run that are computed together (None: the whole batch). Gradients of the parts of a batch are
    added up with the share of losses that each has, which is the gradient of the whole batch. (A penalty of a method is
    taken over each part by itself.)
    """
    recipe = specs[0].recipe
    orders = [training_order(data, recipe.batch_size, recipe.epochs, spec.seed) for spec in specs]
    steps = len(orders[0])
    starts, factors = _stages(packed, specs[0], recipe, steps)
    adamw = optimiser.PackedAdamW(packed.parameters(), len(specs), [s.recipe.learning_rate for s in specs], recipe)
    loop = Loop.fresh(steps, adamw)
    if checkpoint is not None:
        checkpoint.restore(packed, adamw, loop)
    if loop.done:
        progress(loop.done, steps)
    started = time.perf_counter() - loop.seconds

    for step in range(loop.done, steps):
        if step in starts:
            packed.begin(starts.index(step), len(starts))
            adamw.restart()
        for indices, share in _parts(data, [order[step] for order in orders], at_once, loop.losses):
            batch = collate(data, indices, adamw.device)
            packed.see(batch.mask)
            loss = loss_of(batch)
            penalty = packed.penalty()
            total = loss if penalty is None else loss + penalty
            (total * share).sum().backward()
            loop.losses[step] += loss.detach() * share
            loop.real += batch.real
            loop.positions += batch.positions
        loop.lived[step] = adamw.alive
        loop.norms[step] = adamw.step(loop.losses[step], float(factors[step]))
        packed.stepped(step, steps)
        adamw.drop_gradients()
        loop.done = step + 1
        loop.seconds = time.perf_counter() - started
        if (step + 1) % REPORT_EVERY == 0 or step + 1 == steps:
            progress(step + 1, steps)
            if not bool(adamw.alive.any()):
                for stage in range(bisect.bisect(starts, step), len(starts)):
                    packed.begin(stage, len(starts))  # as for a run that stopped in a pack that went on
                break
        if checkpoint is not None:
            checkpoint.keep(packed, adamw, loop)

    packed.see(None)
    packed.end()
    alive = adamw.alive.tolist()
    losses, norms = (curve.masked_fill(~loop.lived, math.nan).cpu() for curve in (loop.losses, loop.norms))
    rates = factors[:, None] * torch.tensor([s.recipe.learning_rate for s in specs], dtype=factors.dtype)
    tokens = [sum(data.items[i].size for batch in order[:taken] for i in batch)
              for order, taken in zip(orders, loop.lived.sum(0).tolist(), strict=True)]
    return Trained(losses, norms, rates, alive, time.perf_counter() - started, tokens, 1 - loop.real / loop.positions,
                   loop.resumed)


def _parts(data: EncodedSet, indices: Sequence[Sequence[int]], at_once: int | None,
           like: Tensor) -> Iterator[tuple[Sequence[Sequence[int]], Tensor | float]]:
    """The items of a step `[runs][batch]` in parts of so many items of each run, each with the share of the run's losses
    that stand in it, `[runs]`."""
    size = len(indices[0])
    if at_once is None or at_once >= size:
        yield indices, 1.0
        return
    whole = [sum(data.items[i].losses for i in run) for run in indices]
    for start in range(0, size, at_once):
        part = [run[start:start + at_once] for run in indices]
        own = [sum(data.items[i].losses for i in run) for run in part]
        yield part, like.new_tensor([some / max(1, every) for some, every in zip(own, whole, strict=True)])


def _stages(packed: Packed, spec: RunSpec, recipe: Recipe, steps: int) -> tuple[list[int], Tensor]:
    """The first step of each stage, and the factor on the learning rate at every step: a schedule per stage."""
    method = packed.method
    count = min(steps, method.stages(method.Config.model_validate(spec.method.config), recipe.epochs))
    starts = [steps * stage // count for stage in range(count)]
    lengths = [end - start for start, end in zip(starts, [*starts[1:], steps], strict=True)]
    return starts, torch.cat([optimiser.schedule(recipe, length) for length in lengths])
