"""What a large study costs: planning it, saying where it stands, and reporting it. Prints JSON.

`python -m benchmarks.scale [--cells 10000]` makes a study of methods x budgets x learning rates x seeds, plans it, writes a
record with curves and predictions for every run into a temporary folder (nothing is trained: the numbers in them are drawn),
and times each step in a process of its own: wall-clock and processor seconds, imports and start-up left out, and the peak of
resident memory. `--mlflow` also fills MLflow with all of them, twice, which takes about 0.1 s a run the first time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil

from suite import plan, records, study, sweep
from suite.records import Data, Memory, Pack, Record, Score, Throughput, Timings, Trainable

METHODS = ("lora", "rslora", "lora-plus", "dora", "pissa")
RANKS = (1, 2, 4, 8, 16)
RATES = 20
ITEMS, STEPS, VARIANTS = 500, 32, 50


def made(cells: int) -> study.Study:
    """A study of about so many cells: seeds are what is added."""
    seeds = max(1, round(cells / (len(METHODS) * len(RANKS) * RATES)))
    rates = [float(f"{10 ** (-4.5 + 3 * i / (RATES - 1)):.3g}") for i in range(RATES)]
    return study.Study.model_validate({
        "id": "scale", "title": "A large study", "about": "Nothing is trained.", "paper": {"title": "none"},
        "rows": {method: {"method": method, "label": method} for method in METHODS},
        "scales": {"desk": {"about": "Large.", "tables": {"large": {
            "title": "Large", "base": "minilm", "tasks": ["movie-sentiment"], "rows": METHODS, "reference": "lora",
            "budgets": [{"rank": rank} for rank in RANKS], "seeds": list(range(seeds)), "train": 1024, "test": ITEMS,
            "recipe": {"learning_rate": 1e-3}, "learning_rates": dict.fromkeys(METHODS, rates)}}}}})


def write(found: study.Study) -> int:
    """A record for every run of the study; returns how many."""
    from suite import environment

    rng = np.random.default_rng(0)
    here = environment.snapshot(threads=1)
    items = [f"movie/{i}" for i in range(ITEMS)]
    variants = []
    for _ in range(VARIANTS):
        right = rng.random(ITEMS) < 0.75
        predictions = pd.DataFrame({"item": items, "expected": 1, "predicted": right.astype(int), "correct": right})
        curve = pd.DataFrame({"step": range(1, STEPS + 1), "loss": np.linspace(0.7, 0.5, STEPS) + rng.random(STEPS) / 50,
                              "gradient_norm": 1.0, "learning_rate": 1e-3})
        variants.append((float(right.mean()), _parquet(predictions), _parquet(curve)))
    specs = study.unique(study.cells(found, "desk"))
    for place, spec in enumerate(specs):
        score, predictions_file, curves_file = variants[place % VARIANTS]
        record = Record(
            id=spec.id, spec=spec, status="finished",
            scores=[Score(metric="accuracy", value=score, items=ITEMS, stderr=0.02)], final_loss=0.5,
            trainable=Trainable(adapter=300_000, head=770, total=300_770, share=0.013),
            data=Data(fingerprint="0" * 16, train=1024, test=ITEMS, truncated=0, majority=0.5),
            timings=Timings(load=0.1, prepare=0.1, train=8.0, evaluate=2.0, save=0.1),
            throughput=Throughput(steps=STEPS, tokens=22_000, padding=0.05, tokens_per_second=2800.0),
            memory=Memory(resident=10**9), pack=Pack(size=1, position=0), environment=here,
            started="2026-01-01T00:00:00+00:00", finished="2026-01-01T00:00:10+00:00")
        folder = records.folder(spec.id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "predictions.parquet").write_bytes(predictions_file)
        (folder / "curves.parquet").write_bytes(curves_file)
        (folder / "record.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")
    return len(specs)


def _parquet(frame: pd.DataFrame) -> bytes:
    out = io.BytesIO()
    frame.to_parquet(out, index=False)
    return out.getvalue()


def _plan(cells: int) -> dict[str, Any]:
    found = made(cells)
    planned = plan.make(found, "desk", study.cells(found, "desk"), None, machine=plan.local("desk"))
    return {"runs": len(planned.runs), "packs": len(planned.packs)}


def _write(cells: int) -> dict[str, Any]:
    return {"records": write(made(cells))}


def _status(cells: int) -> dict[str, Any]:
    found = made(cells)
    return {"finished": sum(one.status == "finished" for one in sweep.status(found, study.cells(found, "desk")))}


def _report(cells: int) -> dict[str, Any]:
    from reports import site, study_page

    chapter = study_page.chapter(made(cells), "desk")
    written = site.build([chapter], Path(os.environ["SUITE_RESULTS"]) / "report")
    pages = [path.stat().st_size for path in written.paths if path.suffix == ".html"]
    return {"page_bytes": written.page.stat().st_size, "largest_page_bytes": max(pages), "pages": len(pages),
            "lines": sum(len(table.lines) for table in chapter.tables)}


def _sync(cells: int) -> dict[str, Any]:
    from suite import tracking

    found = made(cells)
    of = study.cells(found, "desk")
    return vars(tracking.sync(found, "desk", of, records.OnDisk(cell.spec.id for cell in of)))


STEPS_OF: dict[str, Callable[[int], dict[str, Any]]] = {
    "plan": _plan, "write": _write, "status": _status, "report": _report, "sync": _sync, "sync again": _sync}


def step(name: str, cells: int) -> dict[str, Any]:
    """Run one step here and say what it took."""
    from suite import bases, registry

    bases.shapes(bases.get("minilm"), registry.task("movie-sentiment"))  # start-up: torch and transformers are imported
    if name == "report":
        import reports.plots  # noqa: F401
    wall, processor = time.perf_counter(), time.process_time()
    told = STEPS_OF[name](cells)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {**told, "wall_seconds": round(wall, 2), "processor_seconds": round(processor, 2),
            "peak_mib": round(peak / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cells", type=int, default=10_000)
    parser.add_argument("--step", choices=list(STEPS_OF), help="run this step alone, in this process")
    parser.add_argument("--mlflow", action="store_true", help="fill MLflow too")
    asked = parser.parse_args()
    if asked.step:
        print(json.dumps(step(asked.step, asked.cells)))
        return
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {"cells": asked.cells}
        for name in [name for name in STEPS_OF if asked.mlflow or not name.startswith("sync")]:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scale", "--step", name, "--cells", str(asked.cells)], check=True,
                stdout=subprocess.PIPE, text=True, env={**os.environ, "SUITE_RESULTS": folder})
            found[name] = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
