"""What a checkpoint costs: milliseconds to write and to take up again, beside a training step, and bytes.

    python -m benchmarks.checkpoints         LoRA r = 8 and full fine-tuning of MiniLM, batches of 32

One thread. Steps and writing take turns, so that what else the machine does hits them alike; medians. Restoring is once.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from suite import bases, objectives, registry
from suite.batches import collate, encode, training_order
from suite.checkpoint import Checkpoint, Loop
from suite.data import load
from suite.method import Start
from suite.optimiser import PackedAdamW
from suite.packing import Head, Packed
from suite.specs import BaseRef, Evaluation, MethodRef, Recipe, RunSpec, TaskRef

ROUNDS = 7


def measure(method_id: str, config: dict[str, Any], folder: Path) -> None:
    """Print one line for a method on MiniLM."""
    method, task, base = registry.method(method_id), registry.task("movie-sentiment"), bases.get("minilm")
    made = method.Config(**config)
    spec = RunSpec(base=BaseRef(id=base.id, revision=base.revision), task=TaskRef(id=task.id, version=1, train=512, test=8),
                   method=MethodRef(id=method.id, version=method.version, config=made.model_dump(mode="json")), budget=None,
                   recipe=Recipe(learning_rate=1e-4), evaluation=Evaluation(), seed=0)

    def ready() -> tuple[Packed, PackedAdamW, Loop, Checkpoint]:
        """The run before its first step, or, where there is a checkpoint, after the step that it stands at."""
        loaded = bases.load(base, dtype=torch.float32)
        head = Head(loaded.hidden_size, len(task.labels), 1, ("minilm", task.id, 1))
        packed = Packed(loaded.model, method, bases.shapes(base, task), [Start(made, 0)], head)
        adamw = PackedAdamW(packed.parameters(), 1, [1e-4], spec.recipe)
        loop = Loop.fresh(len(order), adamw)
        keeper = Checkpoint([spec], {}, 1e-9)
        keeper.path = folder / f"{method_id}.safetensors"
        began = time.perf_counter()
        keeper.restore(packed, adamw, loop)
        found["restore"] = [1000 * (time.perf_counter() - began)]
        return packed, adamw, loop, keeper

    found: dict[str, list[float]] = {"step": [], "write": []}
    data = encode(bases.load(base, dtype=torch.float32).tokenizer, load(spec.task).train, 128, "label")
    order = training_order(data, 32, 1, 0)
    packed, adamw, loop, keeper = ready()

    def step() -> None:
        assert packed.head is not None
        batch = collate(data, [order[len(found["step"])]], adamw.device)
        loss = objectives.classification_loss(packed.model, packed.head, batch)
        loss.sum().backward()
        adamw.step(loss.detach(), 1.0)
        adamw.drop_gradients()

    for _ in range(ROUNDS):
        for name, work in (("step", step), ("write", lambda: keeper.keep(packed, adamw, loop))):
            began = time.perf_counter()
            work()
            found[name].append(1000 * (time.perf_counter() - began))
    loop.done = ROUNDS
    keeper.keep(packed, adamw, loop)
    assert ready()[2].done == ROUNDS
    size = keeper.path.stat().st_size
    print(f"{method_id}: " + ", ".join(f"{name} {statistics.median(times):.1f} ms" for name, times in found.items()) +
          f", {size / 1e6:.1f} MB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        measure("lora", {"rank": 8}, Path(scratch))
        measure("full", {}, Path(scratch))
