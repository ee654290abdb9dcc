"""What a method's training holds in memory, each in a process of its own: `python -m benchmarks.memory [METHOD ...]`.

A few steps on real data, at the count of LoRA of a rank: the highest that the process holds while it trains, less what it
held before the base was loaded. The C library is told to give large blocks back at once, so that what is resident is what
is used. CPU only; on a GPU, records have the device's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

from rich.console import Console
from rich.table import Table

METHODS = ("lora", "dota", "qlora", "qdota", "sparta", "full")


def measure(base_id: str, task_id: str, method_id: str, rank: int, items: int) -> dict[str, float]:
    """Train a few steps and say what was held, in MiB. Runs in a process of its own."""
    from suite import bases, budget, environment, registry, worker
    from suite.specs import BaseRef, Budget, Decode, Evaluation, MethodRef, Recipe, RunSpec, TaskRef

    base, task, method = bases.get(base_id), registry.task(task_id), registry.method(method_id)
    size = Budget(rank=rank)
    shapes = bases.shapes(base, task)
    config = budget.fit(method, method.Config(), size, shapes)
    decode = None if task.kind == "classification" else Decode(max_new_tokens=1)
    spec = RunSpec(
        base=BaseRef(id=base.id, revision=base.revision),
        task=TaskRef(id=task.id, version=task.version, train=items, test=2),
        method=MethodRef(id=method.id, version=method.version, config=config.model_dump(mode="json")),
        budget=size if method.size else None, recipe=Recipe(learning_rate=1e-4, batch_size=4, max_length=64),
        evaluation=Evaluation(decode=decode, batch_size=2), seed=0)
    made = worker.Worker()
    before = environment.resident()
    record = made.run([spec])[0]
    if record.memory is None or record.memory.training is None or record.trainable is None:
        raise SystemExit(f"{method_id}: {record.status}: {record.reason}")
    return {"trained": record.trainable.total, "peak": (record.memory.training - before) / 2**20}


def main() -> None:
    """Measure methods one after the other and print a table, or JSON lines with `--json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--task", default="asdiv")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.base, asked.task, asked.methods[0], asked.rank, asked.items)))
        return
    table = Table("method", "trained", "peak, MiB", title=f"{asked.base}, {asked.task}, LoRA's count at rank {asked.rank}")
    for method in asked.methods:
        with tempfile.TemporaryDirectory() as results:
            told = subprocess.run(
                [sys.executable, "-m", "benchmarks.memory", method, "--here", "--base", asked.base, "--task", asked.task,
                 "--rank", str(asked.rank), "--items", str(asked.items)],
                env={**os.environ, "SUITE_RESULTS": results, "MALLOC_MMAP_THRESHOLD_": str(2**16), "OMP_NUM_THREADS": "1"},
                capture_output=True, text=True, check=True).stdout
        found = json.loads(told.splitlines()[-1])
        if asked.json:
            print(json.dumps({"method": method, **found}), flush=True)
        table.add_row(method, f"{found['trained']:,}", f"{found['peak']:.0f}")
    if not asked.json:
        Console().print(table)


if __name__ == "__main__":
    main()
