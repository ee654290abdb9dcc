"""Believable records of a study, made of random numbers: nothing is trained, no model or data set is needed.

Every item of a task has a difficulty that all methods share, so that paired differences behave as in earnest.
What becomes of each run is the caller's choice: `world(study(), fate=...)`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import numpy as np
import pandas as pd

from suite import records
from suite.records import Record
from suite.specs import BaseRef, Budget, Evaluation, MethodRef, RunSpec, TaskRef
from suite.study import Cell, Study

#: What may become of a run. `no-predictions` and `broken` finished, but lack or lost their predictions.
Fate = Literal["finished", "diverged", "failed", "skipped", "missing", "no-predictions", "broken"]

ROWS: dict[str, dict[str, Any]] = {
    "full": {"method": "full", "label": "Full fine-tuning"},
    "head": {"method": "head", "label": "Head only"},
    "base": {"method": "untouched", "label": "Untouched base"},
    "lora": {"method": "lora", "label": "LoRA"},
    "rslora": {"method": "rslora", "label": "rsLoRA"},
    "lora-plus": {"method": "lora-plus", "label": "LoRA+"},
    "gora": {"method": "gora", "label": "GoRA"},
    "gora-ranks": {"method": "gora", "label": "GoRA, ranks only (γ = 0)", "options": {"gamma": 0.0}},
    "gora-init": {"method": "gora", "label": "GoRA, initialisation only",
                  "options": {"allocation": "uniform"}},
    "gora-lora-plus": {"method": "gora", "label": "GoRA with LoRA+", "options": {"lr_ratio_b": 16.0}},
}
#: How much better than the base, in units of an item's difficulty.
SKILL = {"head": 0.55, "full": 1.75, "lora": 1.25, "rslora": 1.3, "lora-plus": 1.5, "gora": 1.55,
         "gora-ranks": 1.32, "gora-init": 1.45, "gora-lora-plus": 1.7}
RECIPE = {"learning_rate": 1e-3, "batch_size": 32, "max_length": 64}
HIDDEN, WIDE, BLOCKS, HEAD, BASE = 384, 1536, 6, 770, 22_713_216
KINDS = {"attention.self.query": (HIDDEN, HIDDEN), "attention.self.key": (HIDDEN, HIDDEN),
         "attention.self.value": (HIDDEN, HIDDEN), "attention.output.dense": (HIDDEN, HIDDEN),
         "intermediate.dense": (HIDDEN, WIDE), "output.dense": (WIDE, HIDDEN)}
ENVIRONMENT = {
    "python": "3.11.8", "platform": "Linux x86_64", "commit": "c0ffee" * 6 + "c0de", "dirty": False,
    "threads": 1,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
    "hardware": {"cpu": "Some processor", "cores": 2, "memory_bytes": 8 * 2**30, "gpu": None},
}
BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@dataclass(frozen=True)
class World:
    """A study at a scale with its planned cells and the records that exist."""

    study: Study
    scale: str
    cells: list[Cell]
    records: dict[str, Record]

    def record(self, row: str, task: str, seed: int = 0) -> Record:
        """The record of one run."""
        return next(self.records[c.spec.id] for c in self.cells
                    if (c.row, c.spec.task.id, c.spec.seed) == (row, task, seed))


def study(scale: str = "desk", both: bool = False, **table: Any) -> Study:
    """A study of the shape of `gora`: a classification table, with `both` a table of word problems beside it.

    Further keywords replace keys of the classification table.
    """
    tables = {"classification": {
        "title": "Classification", "base": "minilm",
        "tasks": ["movie-sentiment", "amazon-sentiment", "bigram-shift"],
        "rows": [row for row in ROWS if row != "base"], "reference": "lora", "budgets": [{"rank": 8}],
        "seeds": [0, 1], "train": 1024, "test": 500, "recipe": RECIPE,
        "published": {"table": "gora_glue_t5base",
                      "rows": {row: row for row in ("full", "lora", "rslora", "lora-plus", "gora")}},
        **table}}
    if both:
        tables["word-problems"] = {
            "title": "Word problems", "base": "smollm2-135m", "tasks": ["asdiv"],
            "rows": ["base", "full", "lora", "gora"], "reference": "lora", "budgets": [{"rank": 8}],
            "seeds": [0], "train": 128, "test": 100, "recipe": RECIPE,
            "published": {"table": "gora_llama31_8b", "columns": ["gsm8k"],
                          "rows": {"full": "full", "lora": "lora", "gora": "gora"}}}
    return Study.model_validate({
        "id": "synthetic", "title": "A synthetic study", "about": "One pass of gradients decides the ranks.",
        "paper": {"title": "GoRA: Gradient-driven Adaptive Low Rank Adaptation", "arxiv": "2502.12171"},
        "rows": ROWS, "scales": {scale: {"about": "Two cores, minutes.", "tables": tables}}})


def cells(of: Study, scale: str = "desk") -> list[Cell]:
    """The planned cells of any study, without asking for models or data."""
    found = []
    for table_id, table in of.edition(scale).tables.items():
        for task in table.tasks:
            for position, budget in enumerate(table.budgets):
                for row in table.rows:
                    method = of.rows[row].method
                    sized = method not in ("full", "head", "untouched")
                    if position and not sized:
                        continue
                    config = {"rank": rank(budget), **of.rows[row].options} if sized else {}
                    places = [(rate, seed) for rate in table.rates(row) for seed in table.seeds]
                    for rate, seed in places if method != "untouched" else places[:1]:
                        found.append(Cell(table_id, row, RunSpec(
                            base=BaseRef(id=table.base, revision="1"),
                            task=TaskRef(id=task, version=1, train=table.items(task), test=table.test),
                            method=MethodRef(id=method, version=1, config=config),
                            budget=budget if sized else None,
                            recipe=table.recipe.model_copy(update={"learning_rate": rate}),
                            evaluation=Evaluation(), seed=seed)))
    return found


def rank(budget: Budget | None) -> int:
    """The rank that a budget of any kind comes to."""
    if budget is None or budget.rank is not None:
        return budget.rank or 0 if budget else 0
    if budget.like is not None:
        return int(budget.like.partition("@")[2])
    wanted = budget.params or (budget.share or 0) * BASE
    return max(1, round(wanted / sum(a + b for _, (a, b) in _layers())))


def world(of: Study | None = None, scale: str = "desk",
          fate: Callable[[Cell], Fate] = lambda cell: "finished", **changes: Any) -> World:
    """Records of a study, saved where `$SUITE_RESULTS` says. `changes` replace fields of every record."""
    of = of or study(scale)
    planned = cells(of, scale)
    made: dict[str, Record] = {}
    for cell in planned:
        became = fate(cell)
        if became != "missing" and cell.spec.id not in made:
            made[cell.spec.id] = record(cell, became, **changes)
    return World(of, scale, planned, made)


def half(cell: Cell) -> Fate:
    """Half of the runs have not been made, some of the others went wrong."""
    place = chance("half", cell.spec.id)
    if place < 0.5:
        return "missing"
    if place < 0.64:
        return "failed" if place < 0.56 else "diverged" if place < 0.6 else "skipped"
    return "finished"


def record(cell: Cell, fate: Fate = "finished", parts: Sequence[str] = (), **changes: Any) -> Record:
    """One run's record, saved to its folder with curves and predictions. `parts` are those of its task."""
    spec, test = cell.spec, cell.spec.task.test or 200
    scored = fate in ("finished", "diverged", "no-predictions", "broken")
    trained = spec.method.id != "untouched"
    ranks = _ranks(cell) if spec.method.id == "gora" and scored else {}
    steps = max(4, (spec.task.train or 256) // spec.recipe.batch_size)
    rng = generator("run", spec.id)
    predictions = _predictions(cell, test, -0.5 if fate == "diverged" else SKILL.get(cell.row, 0.0))
    if parts:
        predictions["part"] = [parts[min(i % 4, len(parts) - 1)] for i in range(test)]
    scores = _scores(predictions)
    curve = _curve(cell, steps, fate == "diverged")
    speed = {"full": 2100, "head": 9200}.get(spec.method.id, 3600) * (1 + 0.03 * rng.standard_normal())
    tokens = (spec.task.train or 256) * 22
    start = BEGAN + timedelta(seconds=60 * chance("start", spec.id) * 60)
    status = "finished" if fate in ("no-predictions", "broken") else fate
    reason = {"failed": "out of memory: 3.1 GiB asked for, 1.2 GiB free",
              "skipped": "there is no task head to train",
              "diverged": "the loss is not finite from step 7 on"}
    fields: dict[str, Any] = {
        "id": spec.id, "spec": spec, "status": status, "reason": reason.get(fate, ""),
        "scores": scores if scored else [],
        "final_loss": float(curve["loss"].iloc[-1]) if scored and fate != "diverged" else None,
        "trainable": _trainable(cell, ranks) if scored else None,
        "data": records.Data(fingerprint=f"{zlib.crc32(spec.task.id.encode()):08x}" * 8,
                             train=spec.task.train or 256, test=test, truncated=3,
                             majority=None if spec.task.id == "asdiv" else 0.512),
        "timings": records.Timings(load=1.2, prepare=8.0 if ranks and spec.seed == 0 else 0.1,
                                   train=tokens / speed if trained else 0, evaluate=4.2, save=0.1),
        "throughput": records.Throughput(steps=steps, tokens=tokens, padding=0.08, tokens_per_second=speed)
        if trained and scored else None,
        "memory": records.Memory(resident=int((1.9 if spec.method.id == "full" else 1.1) * 2**30)),
        "adapter_bytes": 1_330_000 if scored and spec.method.id not in ("full", "untouched") else None,
        "prepare": {"ranks": ranks} if ranks else {}, "environment": ENVIRONMENT,
        "started": start.isoformat(timespec="seconds"),
        "finished": (start + timedelta(seconds=20)).isoformat(timespec="seconds"),
        "trace": "Traceback (most recent call last):\n  File \"worker.py\", line 1\nMemoryError: 3.1 GiB"
        if fate == "failed" else "",
    }
    kept = records.save(Record(**{**fields, **changes}), curve if trained and scored else None,
                        predictions if scored and fate != "no-predictions" else None)
    if fate == "broken":
        (kept.folder / "predictions.parquet").write_bytes(b"PAR1 cut off")
        (kept.folder / "curves.parquet").write_bytes(b"")
    return kept


def chance(*parts: object) -> float:
    """A fixed number in [0, 1) from names."""
    return zlib.crc32("/".join(map(str, parts)).encode()) / 2**32


def generator(*parts: object) -> np.random.Generator:
    """Random numbers that depend on names alone."""
    return np.random.default_rng(zlib.crc32("/".join(map(str, parts)).encode()))


def _scores(predictions: pd.DataFrame) -> list[records.Score]:
    """The score; of a task with parts the mean of theirs, and then each."""
    groups = predictions.groupby("part", sort=False) if "part" in predictions else [(None, predictions)]
    found = []
    for part, rows in groups:
        value = float(rows["correct"].mean())
        error = math.sqrt(value * (1 - value) / len(rows))
        found.append(records.Score(metric="accuracy", value=value, items=len(rows), stderr=error, part=part))
    mean = sum(score.value for score in found) / len(found)
    whole = records.Score(metric="accuracy", value=mean, items=len(predictions), stderr=found[0].stderr)
    return [whole, *found] if len(found) > 1 else found


def _predictions(cell: Cell, test: int, skill: float) -> pd.DataFrame:
    """An answer is right when skill exceeds the item's difficulty; the run and the answer have some luck."""
    task = cell.spec.task.id
    hard = generator("items", task).normal(0.4 if task != "asdiv" else 2.8, 1.6, test)
    luck = generator("luck", cell.spec.id)
    right = skill + 0.6 + 0.08 * luck.standard_normal() + 0.5 * luck.standard_normal(test) > hard
    expected = generator("labels", task).integers(0, 2, test)
    return pd.DataFrame({"item": [f"{task}/{i}" for i in range(test)], "expected": expected,
                         "predicted": np.where(right, expected, 1 - expected), "correct": right})


def _curve(cell: Cell, steps: int, diverges: bool) -> pd.DataFrame:
    rng, step = generator("curve", cell.spec.id), np.arange(1, steps + 1)
    end = 0.62 - 0.13 * SKILL.get(cell.row, 0.0) + 0.02 * rng.standard_normal()
    loss = end + (0.69 - end) * np.exp(-3 * step / steps) + 0.03 * rng.standard_normal(steps)
    if diverges:
        loss[steps // 3:] = np.nan
    return pd.DataFrame({"step": step, "loss": loss, "gradient_norm": np.ones(steps),
                         "learning_rate": np.linspace(cell.spec.recipe.learning_rate, 0, steps)})


def _ranks(cell: Cell) -> dict[str, int]:
    r = rank(cell.spec.budget)
    if cell.spec.method.config.get("allocation") == "uniform":
        return {name: r for name, _ in _layers()}
    rng = generator("ranks", cell.spec.task.id, r)
    wide = {name: rng.lognormal(0.6 if "value" in name or "output" in name else -0.3, 0.4)
            for name, _ in _layers()}
    return {name: int(np.clip(round(r * x), max(1, r // 2), 4 * r)) for name, x in wide.items()}


def _layers() -> list[tuple[str, tuple[int, int]]]:
    return [(f"encoder.layer.{block}.{kind}", shape)
            for block in range(BLOCKS) for kind, shape in KINDS.items()]


def _trainable(cell: Cell, ranks: Mapping[str, int]) -> records.Trainable:
    method, r = cell.spec.method.id, rank(cell.spec.budget)
    adapter = {"full": BASE, "head": 0, "untouched": 0}.get(
        method, sum(ranks.get(name, r) * (a + b) for name, (a, b) in _layers()))
    head = 0 if cell.spec.task.id == "asdiv" or method == "untouched" else HEAD
    return records.Trainable(adapter=adapter, head=head, total=adapter + head, share=(adapter + head) / BASE)
