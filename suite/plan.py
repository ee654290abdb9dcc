"""What a study would do, before anything is done: runs, packs, trained parameters, expected time and memory.

Everything here comes from shapes and task sizes; no weights and no data are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass, replace

from suite import bases, limits, records, registry
from suite.bases import Base
from suite.method import Layer, Shapes
from suite.specs import RunSpec
from suite.study import Cell, Scale, Study, unique
from suite.task import Task


@dataclass(frozen=True)
class Machine:
    """What a scale is planned for.

    `flops`: assumed effective rate of one worker, in floating-point operations per second, by precision.
    `overhead`: resident bytes of an idle worker. `start_seconds`: tokenising, attaching and saving, per run.
    `layer_seconds`: the least that a training step spends on one linear layer, however small. `capacity`:
    bytes that one worker may use (None: not known).
    """

    name: str
    workers: int
    flops: dict[str, float]
    overhead: float
    start_seconds: float
    layer_seconds: float = 0.0
    capacity: float | None = None


_CPU = {"float32": 8e10, "bfloat16": 3e10}
_GPU = {"float32": 2.7e13, "bfloat16": 4e14}

#: Effective rates: desk as measured on the reference machine (docs/performance.md); GPU rates are 40 % of the
#: vendor's dense peak (989 TFLOP/s bfloat16, 67 TFLOP/s float32), and `layer_seconds` stands for some 40
#: kernels of 8 microseconds: assumptions until measured.
MACHINES: dict[Scale, Machine] = {
    "desk": Machine("two CPU cores", 2, _CPU, 0.7e9, 1.0),
    "bench": Machine("one H100-class GPU", 1, _GPU, 1.5e9, 3.0, 3e-4, 80e9),
    "paper": Machine("one H100-class GPU", 1, _GPU, 1.5e9, 20.0, 3e-4, 80e9),
}

#: Items are batched by length: the longest batch is taken to have this many times the mean length.
LONGEST = 2


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one run that rides alone: seconds on one worker, and peak bytes of that worker.

    `common` is the part of `memory` that runs of one pack share (worker and base). `gradients` names the
    gradient estimate that the run asks for, and `gradient_seconds` is what making it takes; runs that ask for
    the same share it, so it is not part of `seconds`.
    """

    seconds: float
    memory: float
    common: float = 0.0
    gradients: tuple[object, ...] | None = None
    gradient_seconds: float = 0.0


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the study with what is known of it in advance.

    The first run that asks for a gradient estimate has the making of it among its `seconds`. `fits` says
    whether the machine has the memory.
    """

    id: str
    table: str
    row: str
    label: str
    method: str
    base: str
    task: str
    rank: int | None
    seed: int
    learning_rate: float
    trainable: int
    share: float
    status: str  # planned, or the status of its record
    skip: str | None
    seconds: float
    memory: float
    fits: bool = True


@dataclass(frozen=True)
class Plan:
    """All cells in order, the packs of runs still to do, and totals."""

    study: str
    scale: str
    machine: str
    runs: list[PlannedRun]
    packs: list[list[str]]
    seconds: float  # wall clock for what is left, all workers busy
    memory: float  # peak bytes of all workers together

    def as_json(self) -> dict[str, object]:
        """The plan as JSON data."""
        return asdict(self)


def make(
    study: Study, scale: Scale, cells: Sequence[Cell], pack_size: int = 1, workers: int | None = None
) -> Plan:
    """Plan the given cells of a study."""
    machine = MACHINES[scale]
    workers = workers or machine.workers
    specs = unique(cells)
    known = records.load_many(spec.id for spec in specs)
    estimates = _with_gradients(specs, machine)
    runs = []
    for cell in cells:
        spec = cell.spec
        method, task = registry.method(spec.method.id), registry.task(spec.task.id)
        base = bases.get(spec.base.id)
        shapes = bases.shapes(base, task)
        config = method.Config.model_validate(spec.method.config)
        skip = method.skip(base.kind, task.kind) or spec.unmet
        head = shapes.head if method.trains != "nothing" else 0
        total = 0 if spec.unmet else method.trainable(config, shapes) + head
        record = known.get(spec.id)
        expected = estimates[spec.id]
        runs.append(PlannedRun(
            id=spec.id, table=cell.table, row=cell.row, label=study.rows[cell.row].label,
            method=spec.method.id, base=spec.base.id, task=spec.task.id, rank=cell.rank, seed=spec.seed,
            learning_rate=spec.recipe.learning_rate, trainable=total, share=total / shapes.parameters,
            status=record.status if record else "planned", skip=skip,
            seconds=expected.seconds, memory=expected.memory,
            fits=machine.capacity is None or expected.memory <= machine.capacity,
        ))
    left = [spec for spec in specs if spec.id not in known or known[spec.id].status not in records.DONE]
    packed = packs(left, pack_size, estimates)
    seconds = [sum(estimates[spec.id].seconds for spec in pack) for pack in packed]
    peaks = [_pack_memory([estimates[spec.id] for spec in pack]) for pack in packed]
    return Plan(study=study.id, scale=scale, machine=machine.name, runs=runs,
                packs=[[spec.id for spec in pack] for pack in packed],
                seconds=max([sum(seconds) / workers, *seconds]), memory=sum(sorted(peaks)[-workers:]))


def _with_gradients(specs: Sequence[RunSpec], machine: Machine) -> dict[str, Estimate]:
    """Estimates by run; the first run that asks for a gradient estimate pays for it."""
    found: dict[str, Estimate] = {}
    made: set[tuple[object, ...]] = set()
    for spec in specs:
        alone = estimate(spec, machine)
        if alone.gradients is not None and alone.gradients not in made:
            made.add(alone.gradients)
            alone = replace(alone, seconds=alone.seconds + alone.gradient_seconds)
        found[spec.id] = alone
    return found


def _pack_memory(pack: Sequence[Estimate]) -> float:
    """Peak bytes of a worker that runs a pack: one base, and everything else once per run."""
    common = max(one.common for one in pack)
    return common + sum(one.memory - one.common for one in pack)


def packs(specs: Sequence[RunSpec], size: int, estimates: dict[str, Estimate]) -> list[list[RunSpec]]:
    """Group runs that may train together into packs of at most `size`, dearest base and pack first."""
    groups: dict[tuple[Hashable, ...], list[RunSpec]] = {}
    for spec in specs:
        alone = size == 1 or not registry.method(spec.method.id).packs
        groups.setdefault((spec.id,) if alone else (*spec.packing_key, _structure(spec)), []).append(spec)
    made = [part for group in groups.values() for i in range(0, len(group), size) for part in limits.cut(group[i:i + size])]
    by_base: dict[str, float] = {}
    for pack in made:
        seconds = max(estimates[spec.id].seconds for spec in pack)
        by_base[pack[0].base.id] = max(seconds, by_base.get(pack[0].base.id, 0.0))
    cost = {pack[0].id: sum(estimates[spec.id].seconds for spec in pack) for pack in made}
    return sorted(made, key=lambda pack: (-by_base[pack[0].base.id], -cost[pack[0].id]))


def estimate(spec: RunSpec, machine: Machine) -> Estimate:
    """Expected seconds and peak bytes of one run, from counts of operations and scalars.

    Operations per token, with N = scalars of the linear layers that see it and P = trained scalars: a forward
    pass 2N + 2P, an adapter's step 4N + 6P, full fine-tuning 6N, a gradient estimate 6N. A training step
    takes at least `machine.layer_seconds` per layer and a forward pass a third of that; generating is one
    forward pass per token, up to the decode policy's limit. The vocabulary and attention itself, some percent
    of the whole at these sizes, are not counted.

    Bytes are the sum of

    - the idle worker, and the base's scalars at the recipe's width (4, or 2 in bfloat16);
    - `Method.bytes_per_scalar` per trained scalar: 16 for value, gradient and two moments in float32, 4 more where its
      place or its first value is held too. For a bfloat16 base that is trained
      itself: value and gradient in bfloat16, value and moments in float32. These 16 then cover the base;
    - activations, for every token of the largest batch (`LONGEST` times the mean length, at most
      `max_length`): input and output of every linear layer at that width. In a BERT block these are 18
      scalars per hidden unit, 36 bytes in half precision, where Korthikanti et al. (2022, eq. 2) count 34
      without the attention scores, which SDPA does not keep. An adapter on a bfloat16 base keeps its input in
      float32 besides. Nothing is recomputed, and no batch is accumulated from parts. Where no gradient passes
      through the base, one layer's activations are there at a time;
    - for causal bases, 12 per token of that batch and entry of the vocabulary: logits, log-probabilities and
      their gradient in float32, as if every position carried loss.
    """
    base, task = bases.get(spec.base.id), registry.task(spec.task.id)
    method = registry.method(spec.method.id)
    if method.skip(base.kind, task.kind) or spec.unmet:
        return Estimate(0.1, machine.overhead, machine.overhead)
    shapes, config = bases.shapes(base, task), method.Config.model_validate(spec.method.config)
    recipe, evaluation, trains = spec.recipe, spec.evaluation, method.trains
    layers = _busy(base, task, shapes)
    trained = 0 if trains == "nothing" else method.trainable(config, shapes) + shapes.head
    N = sum(x.in_features * x.out_features for x in layers)
    tokens = min(task.mean_tokens, recipe.max_length)

    def seconds(items: int, batch: int, tokens: int, operations: int, passes: float) -> float:
        """What items of so many tokens take, computing or launching layers, whichever is longer."""
        launching = math.ceil(items / batch) * passes * machine.layer_seconds * len(shapes.layers)
        return max(items * tokens * operations / machine.flops[recipe.precision], launching)

    train = _items(task, "train", spec.task.train) * recipe.epochs
    scored = _items(task, evaluation.split, spec.task.test)
    answer = evaluation.decode.max_new_tokens if evaluation.decode else 0
    step, passes = {
        "adapter": (4 * N + 6 * trained, 1.0),
        "foreign": (4 * N + 6 * trained, 1.0),
        "base": (6 * N, 1.0),
        "head": (2 * N, 1 / 3),
        "nothing": (0, 0.0),
    }[trains]
    run = machine.start_seconds + seconds(train, recipe.batch_size, tokens, step, passes)
    run += seconds(scored, evaluation.batch_size, tokens + answer, 2 * N + 2 * trained, (1 + answer) / 3)

    width = 4 if recipe.precision == "float32" else 2
    common = machine.overhead + (0 if trains == "base" else width * shapes.parameters)
    adapted = method.targets(config, shapes)
    if trains in ("adapter", "base", "foreign"):
        kept = activations(layers, adapted, width)
    else:
        kept = max((activations([x], [], width) for x in layers), default=0)
    if base.kind == "causal" and trains != "nothing":
        kept += 12 * base.config["vocab_size"]
    largest = recipe.batch_size * min(recipe.max_length, LONGEST * task.mean_tokens)
    found = Estimate(run, common + method.bytes_per_scalar * trained + largest * kept, common)

    batches, size = getattr(config, "batches", None), getattr(config, "batch_size", None)
    if batches and size:  # the sample behind a gradient estimate
        sample = (batches, size, getattr(config, "gradient_seed", 0))
        key = (spec.base.id, spec.task.model_dump_json(), recipe.max_length, recipe.precision, *sample)
        cost = seconds(batches * size, size, tokens, 6 * N, 1.0)
        found = replace(found, gradients=key, gradient_seconds=cost)
    return found


def activations(layers: Sequence[Layer], adapted: Sequence[Layer], width: int) -> int:
    """Bytes that training keeps per token (without logits), for a base of so many bytes per scalar."""
    kept = sum(width * (x.in_features + x.out_features) for x in layers)
    return kept + (sum(4 * x.in_features for x in adapted) if width < 4 else 0)


def _busy(base: Base, task: Task, shapes: Shapes) -> Sequence[Layer]:
    """The layers that see every token.

    Where an encoder-decoder answers with the word of a label, its decoder sees two or three tokens, which are
    not counted.
    """
    if base.kind == "seq2seq" and task.kind == "classification":
        return [x for x in shapes.layers if not x.name.startswith("decoder.")]
    return shapes.layers


def _items(task: Task, split: str, most: int | None) -> int:
    return min(task.sizes[split], most or task.sizes[split])


def _structure(spec: RunSpec) -> Hashable:
    method = registry.method(spec.method.id)
    return method.structure(method.Config.model_validate(spec.method.config))


def summary(runs: Sequence[PlannedRun]) -> tuple[list[str], list[list[object]]]:
    """One line per row and rank: runs, rate, trained parameters, time and memory of one run."""
    groups: dict[tuple[str, int | None], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.row, run.rank), []).append(run)
    header = ["row", "rank", "runs", "to do", "learning rate", "trained", "share", "minutes a run", "GiB",
              "note"]
    rows: list[list[object]] = []
    for (_, rank), found in groups.items():
        trained = sorted({run.trainable for run in found})
        todo = sum(run.status not in records.DONE for run in found)
        notes = [run.skip or "more memory than the machine has" for run in found if run.skip or not run.fits]
        rows.append([
            found[0].label, rank if rank is not None else "—", len(found), todo,
            f"{found[0].learning_rate:g}",
            f"{trained[0]:,}" if len(trained) == 1 else f"{trained[0]:,} to {trained[-1]:,}",
            f"{_short(100 * max(run.share for run in found))} %",
            _short(sum(run.seconds for run in found) / len(found) / 60),
            _short(max(run.memory for run in found) / 2**30), notes[0] if notes else "",
        ])
    return header, rows


def sentence(plan: Plan) -> str:
    """Totals, and what they rest on."""
    todo = sum(len(pack) for pack in plan.packs)
    hours = plan.seconds / 3600
    time = f"{plan.seconds / 60:.0f} minutes" if hours < 2 else f"{hours:,.1f} hours"
    return (
        f"{len({run.id for run in plan.runs})} runs, {todo} to do in {len(plan.packs)} packs. Expected on "
        f"{plan.machine}: {time}, {plan.memory / 2**30:.1f} GiB at the peak. Times and memory are estimates "
        "from counts of operations and scalars."
    )


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"
