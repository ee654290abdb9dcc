"""What a study would do, before anything is done: runs, packs, trained parameters, expected time and memory.

Everything here comes from shapes and task sizes; no weights and no data are loaded.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from suite import bases, calibration, environment, limits, records, registry
from suite.bases import Base
from suite.calibration import Calibration
from suite.limits import Limits
from suite.method import Layer, Shapes
from suite.objectives import CHUNK
from suite.specs import RunSpec
from suite.study import Cell, Scale, Study, unique
from suite.task import Task


@dataclass(frozen=True)
class Machine:
    """What a scale is planned for.

    `flops`: assumed effective rate of one worker, in floating-point operations per second, by precision.
    `overhead`: resident bytes of an idle worker. `start_seconds`: tokenising, attaching and saving, per run.
    `layer_seconds`: the least that a training step spends on one linear layer, however small. `capacity`:
    bytes that one worker may use (None: not known). `device`: what was measured on it here is used (None: this is
    another machine, and all is assumed).
    """

    name: str
    workers: int
    flops: dict[str, float]
    overhead: float
    start_seconds: float
    layer_seconds: float = 0.0
    capacity: float | None = None
    device: Literal["cpu", "cuda"] | None = None


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


def local(scale: Scale, workers: int | None = None, run: bool = False) -> Machine:
    """The machine at hand, for planning what runs here. A scale that is meant for another kind of machine is planned for
    that one, unless it is to `run` here all the same."""
    import torch

    gpu = torch.cuda.is_available()
    meant = MACHINES[scale]
    if gpu and (run or meant.layer_seconds):
        found = MACHINES["bench"] if not meant.layer_seconds else meant
        return replace(found, name=torch.cuda.get_device_name(), workers=workers or 1, device="cuda",
                       capacity=torch.cuda.get_device_properties(0).total_memory / (workers or 1))
    if not gpu and (run or not meant.layer_seconds):
        count = workers or environment.cores()
        name = "two CPU cores" if count == 2 else f"{count} CPU core{'s' if count > 1 else ''}"
        return replace(MACHINES["desk"], name=name, workers=count, device="cpu",
                       capacity=environment.memory_bytes() / count)
    return meant


#: Share of a worker's memory that a pack may be expected to fill.
FILLED = 0.8
#: Items are batched by length: the longest batch is taken to have this many times the mean length.
LONGEST = 2


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one run that rides alone: seconds on one worker, and peak bytes of that worker.

    `start`: seconds that every run takes for itself. `phases`: of training and scoring, the seconds of computing, which
    add up in a pack, and of launching, which a pack pays once. `common` is the part of `memory` that runs of one pack share
    (worker and base). `gradients` names the gradient estimate that the run asks for, and `gradient_seconds` is what making
    it takes; runs that ask for the same share it, so it is not part of `seconds`.
    """

    start: float
    memory: float
    common: float = 0.0
    phases: tuple[tuple[float, float], ...] = ()
    gradients: tuple[object, ...] | None = None
    gradient_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.start + sum(max(phase) for phase in self.phases)


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
    budget: str | None  # in words; None for a method without a size
    size: str | None  # what the method solved for it: `bond 7`
    seed: int
    learning_rate: float
    trainable: int
    share: float
    status: str  # planned, or the status of its record
    skip: str | None
    seconds: float
    memory: float
    fits: bool = True
    at_once: int | None = None  # items of a batch that are computed together; None: all
    recompute: bool = False  # whether activations are computed again


@dataclass(frozen=True)
class PackKind:
    """Runs that may ride together, how they were packed, and why in packs of that size.

    `limit`: `measured` (the knee that was measured here), `assumed` (the knee that is taken without a measurement),
    `memory`, `workers` (every worker gets a share), `runs` (all of them fit into one pack), `structure` (the method runs
    alone) or `asked` (`--pack`). `seconds` and `memory` are those of the largest pack.
    """

    base: str
    task: str
    method: str
    batch_tokens: int
    runs: int
    packs: int
    size: int
    limit: str
    knee: int
    seconds: float
    memory: float


@dataclass(frozen=True)
class Plan:
    """All cells in order, the packs of runs still to do, and totals. `rates` says where rates and knees come from."""

    study: str
    scale: str
    machine: str
    workers: int
    rates: str
    runs: list[PlannedRun]
    packs: list[list[str]]
    kinds: list[PackKind]
    seconds: float  # wall clock for what is left, all workers busy
    memory: float  # peak bytes of all workers together

    def as_json(self) -> dict[str, object]:
        """The plan as JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class _Facts:
    """What runs have in common that differ in seed and learning rate alone."""

    skip: str | None
    trainable: int
    share: float
    size: str | None
    structure: Hashable
    estimate: Estimate
    fits: Limits
    measured: Calibration | None
    knee: int


@dataclass
class _Group:
    """Runs that may ride together."""

    specs: list[RunSpec] = field(default_factory=list)
    size: int = 1
    limit: str = "structure"


def make(study: Study, scale: Scale, cells: Sequence[Cell], pack_size: int | None = 1, workers: int | None = None,
         machine: Machine | None = None) -> Plan:
    """Plan the given cells of a study, for the scale's machine unless another is named. `pack_size` None lets the planner
    choose."""
    machine = machine or MACHINES[scale]
    workers = workers or machine.workers
    specs = unique(cells)
    known = {run_id: record.status for run_id, record in records.each(spec.id for spec in specs)}
    facts = _facts(specs, machine)
    estimates = _with_gradients(specs, {spec.id: facts[spec.id].estimate for spec in specs})
    runs = []
    for cell in cells:
        spec = cell.spec
        found, expected = facts[spec.id], estimates[spec.id]
        runs.append(PlannedRun(
            id=spec.id, table=cell.table, row=cell.row, label=study.rows[cell.row].label,
            method=spec.method.id, base=spec.base.id, task=spec.task.id, rank=cell.rank, seed=spec.seed,
            budget=spec.budget.label if spec.budget else None, size=found.size,
            learning_rate=spec.recipe.learning_rate, trainable=found.trainable, share=found.share,
            status=known.get(spec.id, "planned"), skip=found.skip,
            seconds=expected.seconds, memory=expected.memory,
            fits=machine.capacity is None or expected.memory <= machine.capacity,
            at_once=found.fits.items, recompute=found.fits.recompute,
        ))
    left = [spec for spec in specs if known.get(spec.id) not in records.DONE]
    groups = _groups(left, facts)
    share = sum(estimates[spec.id].seconds for spec in left) / workers
    made: list[tuple[list[RunSpec], float, float]] = []  # with seconds and bytes
    kinds = []
    for group in groups:
        _size(group, pack_size, share, facts, estimates, machine)
        parts = -(-len(group.specs) // group.size)
        even = -(-len(group.specs) // parts) if pack_size is None else group.size
        own = [group.specs[i:i + even] for i in range(0, len(group.specs), even)]
        cost = [(pack, _pack_seconds([estimates[spec.id] for spec in pack], facts[pack[0].id].measured),
                 _pack_memory([estimates[spec.id] for spec in pack])) for pack in own]
        made += cost
        first = group.specs[0]
        kinds.append(PackKind(
            base=first.base.id, task=first.task.id, method=first.method.id,
            batch_tokens=calibration.workload(first).tokens, runs=len(group.specs), packs=len(own), size=even,
            limit=group.limit, knee=facts[first.id].knee, seconds=max(seconds for _, seconds, _ in cost),
            memory=max(memory for *_, memory in cost)))
    packed = _ordered(made)
    seconds = [seconds for _, seconds, _ in packed]
    peaks = sorted(memory for *_, memory in packed)
    return Plan(study=study.id, scale=scale, machine=machine.name, workers=workers, rates=_rates(facts, left), runs=runs,
                packs=[[spec.id for spec in pack] for pack, *_ in packed], kinds=kinds,
                seconds=max([sum(seconds) / workers, *seconds]), memory=sum(peaks[-workers:]))


def _facts(specs: Sequence[RunSpec], machine: Machine) -> dict[str, _Facts]:
    """Facts by run; what seed and learning rate do not change is found out once."""
    known: dict[Hashable, _Facts] = {}
    measured: dict[calibration.Workload, Calibration | None] = {}
    found: dict[str, _Facts] = {}
    for spec in specs:
        key = (*spec.packing_key, json.dumps(spec.method.config, sort_keys=True))
        if key not in known:
            workload = calibration.workload(spec)
            if machine.device is not None and workload not in measured:
                measured[workload] = calibration.load(workload, machine.device)
            known[key] = _facts_of(spec, machine, measured.get(workload))
        found[spec.id] = known[key]
    return found


def _facts_of(spec: RunSpec, machine: Machine, measured: Calibration | None) -> _Facts:
    method, task = registry.method(spec.method.id), registry.task(spec.task.id)
    base = bases.get(spec.base.id)
    shapes = bases.shapes(base, task)
    config = method.Config.model_validate(spec.method.config)
    head = shapes.head if method.trains != "nothing" else 0
    total = 0 if spec.unmet else method.trainable(config, shapes) + head
    expected, fits = fitting(spec, machine, measured)
    return _Facts(
        skip=method.skip(base.kind, task.kind) or spec.unmet, trainable=total, share=total / shapes.parameters,
        size=None if method.size is None or spec.unmet else f"{method.size} {getattr(config, method.size)}",
        structure=method.structure(config) if method.packs else None, estimate=expected, fits=fits, measured=measured,
        knee=measured.knee if measured else _assumed_knee(expected))


def _assumed_knee(expected: Estimate) -> int:
    """Without a measurement: as many runs as it takes until a training step computes as long as it launches. A CPU launches
    nothing, so there it is 1."""
    computing, launching = expected.phases[0] if expected.phases else (0.0, 0.0)
    wanted = math.ceil(launching / computing) if computing else 1
    return min(calibration.LARGEST, max(1, wanted))


def _with_gradients(specs: Sequence[RunSpec], alone: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """Estimates by run; the first run that asks for a gradient estimate pays for it."""
    found: dict[str, Estimate] = {}
    made: set[tuple[object, ...]] = set()
    for spec in specs:
        own = alone[spec.id]
        if own.gradients is not None and own.gradients not in made:
            made.add(own.gradients)
            own = replace(own, start=own.start + own.gradient_seconds)
        found[spec.id] = own
    return found


def _pack_memory(pack: Sequence[Estimate]) -> float:
    """Peak bytes of a worker that runs a pack: one base, and everything else once per run."""
    common = max(one.common for one in pack)
    return common + sum(one.memory - one.common for one in pack)


def _pack_seconds(pack: Sequence[Estimate], measured: Calibration | None) -> float:
    """Expected seconds of a pack. Computing adds up, at the speed that was measured for packs of this size; launching is
    paid once."""
    gain = measured.gain(len(pack)) if measured else 1.0
    phases = [max(sum(computing for computing, _ in phase) / gain, max(launching for _, launching in phase))
              for phase in zip(*(one.phases for one in pack), strict=True)]
    return sum(one.start for one in pack) + sum(phases)


def _groups(specs: Sequence[RunSpec], facts: Mapping[str, _Facts]) -> list[_Group]:
    """Runs that may ride together, in order."""
    groups: dict[Hashable, _Group] = {}
    for spec in specs:
        key = (*spec.packing_key, facts[spec.id].structure)
        groups.setdefault(key, _Group()).specs.append(spec)
    return list(groups.values())


def _size(group: _Group, asked: int | None, share: float, facts: Mapping[str, _Facts], estimates: Mapping[str, Estimate],
          machine: Machine) -> None:
    """Set a group's pack size to the least of what speaks against more, and name that. `share`: seconds per worker."""
    first = facts[group.specs[0].id]
    if not registry.method(group.specs[0].method.id).packs:
        return
    learned = limits.most(group.specs[0])  # from a pack that ran out of memory
    if asked is not None:
        group.size, group.limit = (asked, "asked") if learned is None or asked <= learned else (learned, "memory")
        return
    if first.skip:
        group.size, group.limit = len(group.specs), "runs"  # nothing but a record is made
        return
    own = [estimates[spec.id] for spec in group.specs]
    against = [(len(group.specs), "runs"), (first.knee, "measured" if first.measured else "assumed")]
    if machine.capacity is not None:
        each = max(one.memory - one.common for one in own)
        room = FILLED * machine.capacity - max(one.common for one in own)
        against.append((int(room // each) if each > 0 else len(own), "memory"))
    if learned is not None:
        against.append((learned, "memory"))
    against.append((math.ceil(share * len(own) / max(1e-9, sum(one.seconds for one in own))), "workers"))
    size, group.limit = min(against, key=lambda limit: limit[0])
    group.size = max(1, size)


def _ordered(made: Sequence[tuple[list[RunSpec], float, float]]) -> list[tuple[list[RunSpec], float, float]]:
    """Packs with the dearest base first, so that a worker keeps its base, and of one base the longest first."""
    by_base: dict[str, float] = {}
    for pack, seconds, _ in made:
        by_base[pack[0].base.id] = max(seconds, by_base.get(pack[0].base.id, 0.0))
    return sorted(made, key=lambda one: (-by_base[one[0][0].base.id], -one[1]))


def _rates(facts: Mapping[str, _Facts], left: Sequence[RunSpec]) -> str:
    """Where the rates and knees of a plan come from."""
    found = [facts[spec.id].measured for spec in left]
    dates = sorted({one.date for one in found if one is not None})
    if not dates:
        return "assumed"
    here = f"measured here on {dates[0]}" + (f" to {dates[-1]}" if len(dates) > 1 else "")
    return f"{here}, and assumed for what was not measured" if any(one is None for one in found) else here


def fitting(spec: RunSpec, machine: Machine, measured: Calibration | None = None) -> tuple[Estimate, Limits]:
    """How a run alone is made to fit into `FILLED` of a worker's memory, and what it then costs: as it is, or in parts of
    its batches (half of what is too much), or, where one item is still too much, with activations computed again, in the
    largest parts that fit then. What fits in no way is left as it is."""
    whole = Limits()
    found = estimate(spec, machine, measured)
    room = math.inf if machine.capacity is None else FILLED * machine.capacity
    if found.memory <= room:
        return found, whole
    sizes = [spec.recipe.batch_size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    for recompute in (False, True):
        for items in sizes if recompute else sizes[1:]:
            parts = Limits(items=items, recompute=recompute)
            smaller = estimate(spec, machine, measured, parts)
            if smaller.memory <= room:
                return smaller, parts
    return found, whole


def estimate(spec: RunSpec, machine: Machine, measured: Calibration | None = None,
             fits: Limits | None = None) -> Estimate:
    """Expected seconds and peak bytes of one run, from counts of operations and scalars. What was `measured` of the run's
    workload on this machine takes the place of the assumed rate, launching included. `fits`: the parts in which its batches
    are computed, and whether activations are computed again.

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
      without the attention scores, which SDPA does not keep. Of a batch in parts, those of one part. Computed again, those
      of one block and the input of every block. Where no gradient passes through the base, one layer's activations are
      there at a time;
    - for causal bases, 12 per token of that batch and entry of the vocabulary, as if every position carried loss, but for no
      more than `objectives.CHUNK` of them: logits, log-probabilities and their gradient in float32.
    """
    base, task = bases.get(spec.base.id), registry.task(spec.task.id)
    method = registry.method(spec.method.id)
    if method.skip(base.kind, task.kind) or spec.unmet:
        return Estimate(0.1, machine.overhead, machine.overhead)
    shapes, config = bases.shapes(base, task), method.Config.model_validate(spec.method.config)
    recipe, evaluation, trains = spec.recipe, spec.evaluation, method.trains
    fits = fits or Limits()
    layers = _busy(base, task, shapes)
    trained = 0 if trains == "nothing" else method.trainable(config, shapes) + shapes.head
    N = sum(x.in_features * x.out_features for x in layers)
    tokens = min(task.mean_tokens, recipe.max_length)

    flops = measured.flops if measured else machine.flops[recipe.precision]

    def phase(items: int, batch: int, tokens: int, operations: int, passes: float) -> tuple[float, float]:
        """Seconds of computing and of launching that items of so many tokens take."""
        launching = 0.0 if measured else math.ceil(items / batch) * passes * machine.layer_seconds * len(shapes.layers)
        return items * tokens * operations / flops, launching

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
    at_once = min(fits.items or recipe.batch_size, recipe.batch_size)
    if fits.recompute:
        step, passes = step + 2 * N + 2 * trained, passes + 1 / 3
    phases = (phase(train, at_once, tokens, step, passes),
              phase(scored, evaluation.batch_size, tokens + answer, 2 * N + 2 * trained, (1 + answer) / 3))

    width = 4 if recipe.precision == "float32" else 2
    common = machine.overhead + (0 if trains == "base" else width * shapes.parameters)
    if trains in ("adapter", "base", "foreign"):
        kept = activations(layers, width)
        if fits.recompute:
            blocks = len({place[0] if (place := re.match(r".*?\.\d+\.", x.name)) else "" for x in layers})
            kept = -(-kept // blocks) + blocks * width * layers[0].in_features
    else:
        kept = max((activations([x], width) for x in layers), default=0)
    largest = at_once * min(recipe.max_length, LONGEST * task.mean_tokens)
    logits = 12 * min(largest * base.config["vocab_size"], CHUNK) if base.kind == "causal" and trains != "nothing" else 0
    memory = common + method.bytes_per_scalar * trained + largest * kept + logits
    found = Estimate(machine.start_seconds, memory, common, phases)

    batches, size = getattr(config, "batches", None), getattr(config, "batch_size", None)
    if batches and size:  # the sample behind a gradient estimate
        sample = (batches, size, getattr(config, "gradient_seed", 0))
        key = (spec.base.id, spec.task.model_dump_json(), recipe.max_length, recipe.precision, *sample)
        cost = max(phase(batches * size, size, tokens, 6 * N, 1.0))
        found = replace(found, gradients=key, gradient_seconds=cost)
    return found


def activations(layers: Sequence[Layer], width: int) -> int:
    """Bytes that training keeps per token (without logits), for a base of so many bytes per scalar."""
    return sum(width * (x.in_features + x.out_features) for x in layers)


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


def summary(runs: Sequence[PlannedRun]) -> tuple[list[str], list[list[object]]]:
    """One line per row and budget: the size that it comes to, runs, rate, trained parameters, time and memory of one run."""
    groups: dict[tuple[str, str | None], list[PlannedRun]] = {}
    for run in runs:
        groups.setdefault((run.row, run.budget), []).append(run)
    header = ["row", "budget", "size", "runs", "to do", "learning rate", "trained", "share", "minutes a run", "GiB",
              "note"]
    rows: list[list[object]] = []
    for (_, budget), found in groups.items():
        trained = sorted({run.trainable for run in found})
        todo = sum(run.status not in records.DONE for run in found)
        notes = [run.skip or "more memory than the machine has" for run in found if run.skip or not run.fits]
        notes += [f"{run.at_once} items at a time" + (", activations computed again" if run.recompute else "")
                  for run in found if run.at_once and not run.skip]
        rows.append([
            found[0].label, budget or "—", found[0].size or "—", len(found), todo,
            ", ".join(f"{rate:g}" for rate in dict.fromkeys(run.learning_rate for run in found)),
            f"{trained[0]:,}" if len(trained) == 1 else f"{trained[0]:,} to {trained[-1]:,}",
            f"{_short(100 * max(run.share for run in found))} %",
            _short(sum(run.seconds for run in found) / len(found) / 60),
            _short(max(run.memory for run in found) / 2**30), notes[0] if notes else "",
        ])
    return header, rows


#: What keeps packs from being larger, in words.
LIMITS = {
    "measured": "knee measured here", "assumed": "knee assumed", "memory": "memory", "workers": "one share per worker",
    "runs": "all its runs", "structure": "method runs alone", "asked": "as asked",
}


def pack_table(plan: Plan) -> tuple[list[str], list[list[object]]]:
    """One line per kind of runs that may ride together and limit: runs, packs, their size and why, seconds and memory."""
    groups: dict[tuple[object, ...], list[PackKind]] = {}
    for kind in plan.kinds:
        key = (kind.base, kind.task, kind.method, kind.batch_tokens, kind.limit, kind.knee)
        groups.setdefault(key, []).append(kind)
    header = ["method", "task", "base", "runs", "packs", "pack size", "limited by", "knee", "minutes a pack", "GiB"]
    rows: list[list[object]] = []
    for (base, task, method, _, limit, knee), found in groups.items():
        rows.append([method, task, base, sum(kind.runs for kind in found), sum(kind.packs for kind in found),
                     max(kind.size for kind in found), LIMITS[str(limit)], knee,
                     _short(max(kind.seconds for kind in found) / 60), _short(max(kind.memory for kind in found) / 2**30)])
    return header, rows


def sentence(plan: Plan) -> str:
    """Totals, and what they rest on."""
    todo = sum(len(pack) for pack in plan.packs)
    hours = plan.seconds / 3600
    time = f"{plan.seconds / 60:.0f} minutes" if hours < 2 else f"{hours:,.1f} hours"
    return (
        f"{len({run.id for run in plan.runs})} runs, {todo} to do in {len(plan.packs)} packs. Expected on "
        f"{plan.machine}: {time}, {plan.memory / 2**30:.1f} GiB at the peak. Times and memory are estimates "
        f"from counts of operations and scalars; rates and knees: {plan.rates}."
    )


def _short(number: float) -> str:
    return f"{number:.2g}" if number < 10 else f"{number:,.0f}"
