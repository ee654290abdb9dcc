"""How fast this machine trains packs of each size, measured with real steps on real data, and kept.

A workload is what the speed hangs on most: the base, its precision and the tokens of one step. For each, some steps of
LoRA are timed at pack sizes 1, 2, 4 ... until doubling no longer pays: that size is the knee. Studies whose precision is
`auto` take the quicker of float32 and bfloat16, measured in the same way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from suite import environment, paths, registry
from suite.specs import RunSpec, digest

Precision = Literal["float32", "bfloat16"]
#: Doubling a pack must raise tokens per second by this share to be worth it.
GAIN = 0.05
#: No pack is larger than this.
LARGEST = 64
#: Timed steps per pack size, and how often they are timed: the fastest counts, as others only disturb.
STEPS, REPEATS = 3, 3


@dataclass(frozen=True)
class Workload:
    """What a measured speed holds for. `tokens`: real tokens of one run's training step, to the next power of two."""

    base: str
    precision: str
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.base}, {self.precision}, about {self.tokens:,} tokens a step"


@dataclass(frozen=True)
class Calibration:
    """Tokens per second of all runs of a pack together, by pack size; `flops` is the rate of a run that rides alone, in
    operations of the frozen and trained layers per second. `date` is the day."""

    workload: Workload
    speeds: dict[int, float]
    flops: float
    date: str
    machine: dict[str, Any]

    @property
    def knee(self) -> int:
        """The pack size from which on doubling gains too little."""
        sizes = sorted(self.speeds)
        for size, double in pairwise(sizes):
            if self.speeds[double] < (1 + GAIN) * self.speeds[size]:
                return size
        return sizes[-1]

    def gain(self, size: int) -> float:
        """Speed of a pack of a size over that of a run alone, from the largest measured size that is not above it."""
        return self.speeds[max(known for known in self.speeds if known <= size)] / self.speeds[1]


def workload(spec: RunSpec) -> Workload:
    """The workload that a run belongs to."""
    mean = min(registry.task(spec.task.id).mean_tokens, spec.recipe.max_length)
    tokens = max(1, round(mean * spec.recipe.batch_size))
    return Workload(spec.base.id, spec.recipe.precision, 1 << (tokens - 1).bit_length())


@cache
def machine(device: str) -> dict[str, Any]:
    """What a measurement holds for: the processor or GPU, its cores, and the version of torch."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else environment.cpu_name()
    return {"device": device, "name": name, "cores": environment.cores(), "torch": str(torch.__version__)}


def load(of: Workload, device: str) -> Calibration | None:
    """What was measured of a workload on this machine with this torch, or None."""
    try:
        content = json.loads(_file(of, device).read_text(encoding="utf-8"))
        speeds = {int(size): float(speed) for size, speed in content["speeds"].items()}
        found = Calibration(of, speeds, float(content["flops"]), str(content["date"]), content["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if 1 in speeds and min(speeds.values()) > 0 else None


def save(found: Calibration) -> None:
    """Keep a calibration, whole or not at all."""
    paths.write_json(_file(found.workload, found.machine["device"]), asdict(found))


def representatives(specs: Sequence[RunSpec]) -> list[RunSpec]:
    """One run of each workload among these whose method can ride in a pack."""
    found: dict[Workload, RunSpec] = {}
    for spec in specs:
        method = registry.method(spec.method.id)
        if method.packs and method.trains == "adapter" and not spec.unmet:
            found.setdefault(workload(spec), spec)
    return list(found.values())


def measure(spec: RunSpec, device: str, seconds: float = 40.0) -> Calibration:
    """Time LoRA of rank 8 at this run's base, task and recipe, at growing pack sizes.

    Stops when doubling gains less than `GAIN`, when memory runs out, or before a size that would take it past
    `seconds`, counted from when base and data are loaded. Raises `UserError` when they cannot be had.
    """
    import torch

    speeds: dict[int, float] = {}
    with _threads(device):
        once = _timed(spec, device)
        began, size = time.monotonic(), 1
        try:
            once(1)  # the first steps of all are slower
            while size <= LARGEST:
                started = time.monotonic()
                speeds[size] = max(once(size) for _ in range(REPEATS))
                taken = time.monotonic() - started
                settled = size > 1 and speeds[size] < (1 + GAIN) * speeds[size // 2]
                if settled or time.monotonic() - began + 2 * taken > seconds:
                    break
                size *= 2
        except (torch.OutOfMemoryError, MemoryError):
            if not speeds:
                raise
    from suite import bases

    lora, shapes = registry.method("lora"), bases.shapes(bases.get(spec.base.id), registry.task(spec.task.id))
    linear = sum(layer.in_features * layer.out_features for layer in shapes.layers)
    operations = 4 * linear + 6 * (lora.trainable(lora.Config(rank=8), shapes) + shapes.head)
    return Calibration(workload(spec), speeds, speeds[1] * operations, time.strftime("%Y-%m-%d"), machine(device))


def precision(base: str) -> Precision:
    """The quicker precision of a base on this machine, as measured by `compare`. What is assumed where nothing was: float32
    on a CPU, bfloat16 on a GPU that has it."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    try:
        speeds = json.loads(_precision_file(base).read_text(encoding="utf-8"))["speeds"]
        return "bfloat16" if speeds["bfloat16"] > (1 + GAIN) * speeds["float32"] else "float32"
    except (OSError, ValueError, KeyError, TypeError):
        return "float32"


def compare(spec: RunSpec) -> dict[str, float]:
    """Tokens per second of LoRA at this run's base, task and recipe on this CPU, in either precision, taking turns; kept,
    and not measured again where it is known. Raises `UserError` when base or data cannot be had."""
    target = _precision_file(spec.base.id)
    if target.exists():
        return dict(json.loads(target.read_text(encoding="utf-8"))["speeds"])
    with _threads("cpu"):
        ways = {name: _timed(spec.model_copy(update={"recipe": spec.recipe.model_copy(update={"precision": name})}), "cpu")
                for name in ("float32", "bfloat16")}
        for once in ways.values():
            once(1)  # the first steps of all are slower
        speeds = dict.fromkeys(ways, 0.0)
        for _ in range(REPEATS):
            speeds = {name: max(speeds[name], once(1)) for name, once in ways.items()}
    paths.write_json(target, {"base": spec.base.id, "speeds": speeds, "date": time.strftime("%Y-%m-%d"),
                              "machine": machine("cpu")})
    return speeds


@contextmanager
def _threads(device: str) -> Iterator[None]:
    """One thread on a CPU, as a worker has."""
    import torch

    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(spec: RunSpec, device: str) -> Callable[[int], float]:
    """A function that trains a pack of a size for `STEPS` steps and gives its tokens per second."""
    import torch

    from suite import bases, data, objectives
    from suite.batches import encode
    from suite.method import Start
    from suite.packing import Head, Packed
    from suite.training import train

    base, task, lora = bases.get(spec.base.id), registry.task(spec.task.id), registry.method("lora")
    recipe = spec.recipe.model_copy(update={"epochs": 1})
    loaded = bases.load(base, dtype=getattr(torch, recipe.precision), device=device)
    items = data.load(spec.task.model_copy(update={"train": STEPS * recipe.batch_size, "test": 1}))
    encoded = encode(loaded.tokenizer, items.train, recipe.max_length, task.kind != "classification")
    shapes, config = bases.shapes(base, task), lora.Config(rank=8)

    def once(size: int) -> float:
        head = None
        if task.kind == "classification":
            head = Head(loaded.hidden_size, len(task.labels), size, ("calibration",)).to(device)
        packed = Packed(loaded.model, lora, shapes, [Start(config, seed) for seed in range(size)], head)
        runs = [spec.model_copy(update={"recipe": recipe, "seed": seed}) for seed in range(size)]
        try:
            trained = train(
                packed, runs, encoded,
                lambda batch: (objectives.language_loss(packed.model, size, batch) if packed.head is None
                               else objectives.classification_loss(packed.model, packed.head, batch)),
                lambda done, total: None)
        finally:
            packed.detach()
        return sum(trained.tokens) / trained.seconds

    return once


def _precision_file(base: str) -> Path:
    key = digest([base, machine("cpu")])[:16]
    return paths.cache() / "calibration" / f"precision-{key}.json"


def _file(of: Workload, device: str) -> Path:
    key = digest([asdict(of), machine(device)])[:16]
    return paths.cache() / "calibration" / f"{key}.json"
