"""What a study would do, before anything is done: runs, packs, trained parameters, expected time and memory.

Everything here comes from shapes and task sizes; no weights and no data are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from suite import bases, records, registry
from suite.method import Shapes
from suite.specs import RunSpec
from suite.study import Cell, Scale, Study, unique


@dataclass(frozen=True)
class Machine:
    """What a scale is planned for. `flops` is the assumed effective rate of one worker, in floating-point operations
    per second, by precision; `overhead` is the resident size of an idle worker in bytes."""

    name: str
    workers: int
    flops: dict[str, float]
    overhead: float
    start_seconds: float  # per run: tokenising, attaching, saving


#: Effective rates: desk as measured on the reference machine (docs/performance.md); GPU rates are 40 % of the vendor's
#: dense peak (989 TFLOP/s bfloat16, 67 TFLOP/s float32), an assumption until measured.
MACHINES: dict[Scale, Machine] = {
    "desk": Machine("two CPU cores", 2, {"float32": 8e10, "bfloat16": 3e10}, 0.7e9, 1.0),
    "bench": Machine("one H100-class GPU", 1, {"float32": 2.7e13, "bfloat16": 4e14}, 1.5e9, 3.0),
    "paper": Machine("one H100-class GPU", 1, {"float32": 2.7e13, "bfloat16": 4e14}, 1.5e9, 20.0),
}


@dataclass(frozen=True)
class Estimate:
    """Expected cost of one run: seconds on one worker and peak bytes of that worker."""

    seconds: float
    memory: float


@dataclass(frozen=True)
class PlannedRun:
    """One cell of the study with what is known of it in advance."""

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


def make(study: Study, scale: Scale, cells: Sequence[Cell], pack_size: int = 1, workers: int | None = None) -> Plan:
    """Plan the given cells of a study."""
    machine = MACHINES[scale]
    workers = workers or machine.workers
    specs = unique(cells)
    known = records.load_many(spec.id for spec in specs)
    estimates = {spec.id: estimate(spec, machine) for spec in specs}
    runs = []
    for cell in cells:
        spec = cell.spec
        method, task, base = registry.method(spec.method.id), registry.task(spec.task.id), bases.get(spec.base.id)
        shapes = bases.shapes(base, task)
        config = method.Config.model_validate(spec.method.config)
        total = method.trainable(config, shapes) + (shapes.head if method.trains != "nothing" else 0)
        record = known.get(spec.id)
        runs.append(PlannedRun(
            id=spec.id, table=cell.table, row=cell.row, label=study.rows[cell.row].label, method=spec.method.id,
            base=spec.base.id, task=spec.task.id, rank=cell.rank, seed=spec.seed,
            learning_rate=spec.recipe.learning_rate, trainable=total, share=total / shapes.parameters,
            status=record.status if record else "planned", skip=method.skip(base.kind, task.kind),
            seconds=estimates[spec.id].seconds, memory=estimates[spec.id].memory,
        ))
    left = [spec for spec in specs if spec.id not in known or known[spec.id].status not in records.DONE]
    packed = packs(left, pack_size, estimates)
    largest = sorted((estimates[spec.id].memory for spec in left), reverse=True)[:workers]
    return Plan(study=study.id, scale=scale, machine=machine.name, runs=runs,
                packs=[[spec.id for spec in pack] for pack in packed],
                seconds=sum(estimates[spec.id].seconds for spec in left) / workers, memory=sum(largest))


def packs(specs: Sequence[RunSpec], size: int, estimates: dict[str, Estimate]) -> list[list[RunSpec]]:
    """Group runs that may train together into packs of at most `size`, dearest base first, dearest pack first."""
    groups: dict[tuple[str, ...], list[RunSpec]] = {}
    for spec in specs:
        alone = size == 1 or not registry.method(spec.method.id).packs
        groups.setdefault(((spec.id,) if alone else spec.packing_key), []).append(spec)
    made = [group[i:i + size] for group in groups.values() for i in range(0, len(group), size)]
    by_base: dict[str, float] = {}
    for pack in made:
        seconds = max(estimates[spec.id].seconds for spec in pack)
        by_base[pack[0].base.id] = max(seconds, by_base.get(pack[0].base.id, 0.0))
    return sorted(made, key=lambda pack: (-by_base[pack[0].base.id], -sum(estimates[s.id].seconds for s in pack)))


def estimate(spec: RunSpec, machine: Machine) -> Estimate:
    """Expected seconds and peak bytes of one run, from counts of operations and scalars.

    Per token, N = scalars of the adapted linear layers (the vocabulary is not visited where it carries no loss) and
    P = trained scalars: a forward pass costs 2N + 2P operations, an adapter step 4N + 6P, full fine-tuning 6N.
    Bytes: the base, 16 per trained scalar (value, gradient, two moments), and 34 half-width activations per hidden
    unit, layer and token of a training batch (Korthikanti et al. 2022, eq. 2, without the attention term).
    """
    base, task, method = bases.get(spec.base.id), registry.task(spec.task.id), registry.method(spec.method.id)
    shapes = bases.shapes(base, task)
    config = method.Config.model_validate(spec.method.config)
    if method.skip(base.kind, task.kind):
        return Estimate(0.1, machine.overhead)
    width = 4 if spec.recipe.precision == "float32" else 2
    recipe, rate = spec.recipe, machine.flops[spec.recipe.precision]
    N = sum(x.in_features * x.out_features for x in shapes.layers)
    P = method.trainable(config, shapes)
    tokens = min(task.mean_tokens, recipe.max_length)
    train_items = min(spec.task.train or task.sizes["train"], task.sizes["train"])
    test_items = min(spec.task.test or task.sizes[spec.evaluation.split], task.sizes[spec.evaluation.split])
    per_token = {"adapter": 4 * N + 6 * P, "head": 2 * N, "base": 6 * N, "nothing": 0}[method.trains]
    operations = float(train_items * recipe.epochs * tokens * per_token)
    answers = spec.evaluation.decode.max_new_tokens if spec.evaluation.decode else 0
    operations += test_items * (tokens + 2 * answers) * (2 * N + 2 * P)
    activations = recipe.batch_size * tokens * _width(shapes) * 34 * (width / 2)
    if method.trains in ("head", "nothing"):
        activations /= max(1, len(shapes.layers))
    memory = machine.overhead + shapes.parameters * width + 16 * (0 if method.trains == "nothing" else P) + activations
    return Estimate(operations / rate + machine.start_seconds, memory)


def _width(shapes: Shapes) -> int:
    """Sum of hidden widths over the blocks of a base; a block is counted by its query projection."""
    queries = [x.in_features for x in shapes.layers if x.kind in ("query", "q_proj", "q")]
    return sum(queries)
