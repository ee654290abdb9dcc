"""A page for every run: what was asked for, what came of it, what it got wrong, where it ran, and how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from markupsafe import Markup

from reports import curves, links, numbers, provenance, task_pages
from reports.frame import Page
from reports.results import Made
from reports.sheets import Entry, Sheet, entry
from reports.tables import budget_name, read, task_title
from reports.task_pages import Misses, label, short
from suite import rank_map, registry
from suite.records import Record

#: Runs that get a page, those that went wrong first: a reader opens few, and ten thousand pages take a minute.
MOST_PAGES = 1000
#: Mistakes that a page shows.
MOST_MISTAKES = 15
_TIMES = ("load", "prepare", "train", "evaluate", "save")


@dataclass(frozen=True)
class Mistake:
    """An item that a run got wrong, its texts cut to what a page shows."""

    item: str
    expected: str
    predicted: str
    output: str


@dataclass(frozen=True)
class Answers:
    """What a run's predictions say: how many items were asked and missed, and the first that were missed."""

    asked: int
    wrong: int
    mistakes: tuple[Mistake, ...]


def chosen(made: Sequence[Made]) -> list[Made]:
    """The runs that get a page: all, or the first `MOST_PAGES`, those that did not finish before the others."""
    if len(made) <= MOST_PAGES:
        return list(made)
    return sorted(made, key=lambda run: run.record.status == "finished")[:MOST_PAGES]


def answers(made: Sequence[Made]) -> tuple[dict[str, Answers], dict[str, Misses]]:
    """What runs got wrong, by run, and how hard items were, by task. Reads every run's predictions once; runs whose file is
    absent or damaged are left out."""
    by_run: dict[str, Answers] = {}
    by_task: dict[str, Misses] = {}
    for run in made:
        frame = read(partial(run.record.predictions, ("item", "correct", "expected", "predicted", "output")))
        if frame is None or not {"item", "correct", "expected", "predicted"} <= set(frame.columns):
            continue
        by_task.setdefault(run.record.spec.task.id, Misses()).add(frame)
        by_run[run.record.id] = _answers(frame, run.record.spec.task.id)
    return by_run, by_task


def pages(made: Sequence[Made], answers: Mapping[str, Answers], mlflow: Mapping[str, str] | None = None) -> list[Page]:
    """A page for every run; its tables and curves are read when it is written. `mlflow`: by run, where MLflow shows it,
    as what follows the address of its pages."""
    def page(run: Made) -> Page:
        return Page(links.run(run.record.id), title(run), "run.html.j2",
                    lambda: _context(run, answers.get(run.record.id), (mlflow or {}).get(run.record.id, "")))

    return [page(run) for run in made]


def title(run: Made) -> str:
    """`LoRA on SST-2, r = 8, seed 0`."""
    budget = budget_name(run.cell)
    parts = [f"{run.label} on {task_title(run.record.spec.task.id)}", *([budget] if budget else []),
             f"seed {run.record.spec.seed}"]
    return ", ".join(parts)


def _answers(frame: pd.DataFrame, task_id: str) -> Answers:
    right = frame["correct"].to_numpy(dtype=bool)
    first = frame[~right].head(MOST_MISTAKES)
    outputs = first["output"].tolist() if "output" in first else [""] * len(first)
    found = tuple(
        Mistake(item, short(label(task_id, expected), 120), short(label(task_id, predicted), 120), short(str(output), 240))
        for item, expected, predicted, output in zip(
            first["item"].tolist(), first["expected"].tolist(), first["predicted"].tolist(), outputs, strict=True))
    return Answers(len(frame), int((~right).sum()), found)


def _context(run: Made, found: Answers | None, mlflow: str) -> dict[str, Any]:
    record, spec = run.record, run.record.spec
    curve = read(record.curves)
    machine = provenance.machine(record.environment, 1)
    return {
        "record": record, "spec": spec, "heading": title(run), "label": run.label, "answers": found, "mlflow": mlflow,
        "method": links.method(spec.method.id), "task": links.task(spec.task.id), "task_title": task_title(spec.task.id),
        "studies": [(of.path, f"{of.study.id}, {of.scale}: {of.study.edition(of.scale).tables[cell.table].title}")
                    for of, cell in run.cells],
        "scores": _scores(record), "mistakes": _mistakes(spec.task.id, found) if found and found.mistakes else None,
        "curves": [(name, Markup(svg)) for name, svg in curves.drawings(curve)] if curve is not None else [],
        "facts_": _facts(record), "costs": _costs(record), "prepared": _prepared(record),
        "maps": _maps(record), "machine": machine,
        "asked": json.dumps(spec.model_dump(mode="json"), indent=1, ensure_ascii=False),
        "command": provenance.run_command(run.of.study, run.of.scale, run.cell),
        "packs": spec.method.id in registry.methods() and registry.methods()[spec.method.id].packs,
    }


def _scores(record: Record) -> Sheet | None:
    """The parts' scores of a task that has parts."""
    if len(record.scores) < 2:
        return None
    rows = tuple((Entry(score.part or "All"), Entry(score.metric.replace("_", " ")), Entry(numbers.percent(score.value)),
                  Entry(f"± {numbers.percent(score.stderr)}"), Entry(numbers.count(score.items))) for score in record.scores)
    header = ("Part", "Metric", "Score", "Standard error", "Items")
    return Sheet("scores", "Scores", header, rows, (), words=frozenset({0, 1}))


def _mistakes(task_id: str, found: Answers) -> Sheet:
    texts = task_pages.prompts(task_id)
    written = any(one.output for one in found.mistakes)
    rows = tuple(
        (entry(one.item, code=True), *([Entry(short(texts.get(one.item, "")) or numbers.DASH)] if texts else []),
         Entry(one.expected), Entry(one.predicted or "(nothing)"), *([Entry(one.output)] if written else []))
        for one in found.mistakes)
    header = ("Item", *(["Prompt"] if texts else []), "Right", "Said", *(["Written in full"] if written else []))
    return Sheet("mistakes", "Mistakes", header, rows, (), words=frozenset(range(len(header))))


def _facts(record: Record) -> list[tuple[str, str]]:
    """What was asked for, in a few lines."""
    spec, recipe = record.spec, record.spec.recipe
    found = [
        ("Base", f"{spec.base.id} at {spec.base.revision}"), ("Method", f"{spec.method.id}, version {spec.method.version}"),
        ("Options", ", ".join(f"{key} {value}" for key, value in spec.method.config.items()) or "none"),
        ("Budget", spec.budget.label if spec.budget else "none"),
        ("Task", f"{spec.task.id}, version {spec.task.version}"),
        ("Optimiser", f"learning rate {recipe.learning_rate:g}, {recipe.schedule}, warm-up {recipe.warmup_ratio:g}, "
                      f"weight decay {recipe.weight_decay:g}, clip {recipe.clip}"),
        ("Batches", f"{numbers.several(recipe.epochs, 'epoch')}, batches of {recipe.batch_size}, at most "
                    f"{recipe.max_length} tokens, {recipe.precision}"),
        ("Scored on", f"{spec.evaluation.split}, {spec.evaluation.selection.replace('-', ' ')}"), ("Seed", str(spec.seed)),
        ("Engine", str(spec.engine)),
    ]
    if record.decode:
        found.append(("Decoding", ", ".join(f"{key} {value}" for key, value in record.decode.items())))
    if record.data is not None:
        data = record.data
        found.append(("Data", f"{numbers.count(data.train)} training items ({data.truncated} truncated), "
                              f"{numbers.count(data.test)} scored, fingerprint {data.fingerprint[:16]}"))
        if data.majority is not None:
            found.append(("Majority class", f"{numbers.percent(data.majority)} % of the scored items"))
    return found


def _costs(record: Record) -> list[tuple[str, str]]:
    """Time, speed, memory and size, as far as they were recorded."""
    found = [("Time", ", ".join(f"{name} {numbers.seconds(getattr(record.timings, name))}" for name in _TIMES)
              + f"; {numbers.seconds(record.timings.total)} in all")]
    if record.trainable is not None:
        size = record.trainable
        found.append(("Trained", f"{numbers.count(size.total)} scalars ({numbers.share(size.share)} of the base): "
                                 f"{numbers.count(size.adapter)} in the adapter, {numbers.count(size.head)} in the head"))
    if record.throughput is not None:
        speed = record.throughput
        found.append(("Speed", f"{numbers.count(speed.tokens_per_second)} tokens/s over "
                               f"{numbers.several(speed.steps, 'step')} and {numbers.count(speed.tokens)} tokens, "
                               f"{numbers.share(speed.padding)} padding"))
    if record.memory is not None:
        memory = record.memory
        said = [f"{numbers.size(memory.resident)} at most"]
        said += [f"{numbers.size(memory.training)} while training"] if memory.training is not None else []
        said += [f"{numbers.size(memory.idle)} before it"] if memory.idle is not None else []
        said += [f"{numbers.size(memory.device)} on the device"] if memory.device is not None else []
        found.append(("Memory", ", ".join(said)))
    if record.pack is not None:
        found.append(("Pack", f"place {record.pack.position + 1} of {record.pack.size}"))
    if record.adapter_bytes is not None:
        found.append(("Adapter file", numbers.size(record.adapter_bytes)))
    if record.resumed:
        found.append(("Went on", f"from a checkpoint after step {numbers.listing([str(step) for step in record.resumed])}"))
    return found


def _prepared(record: Record) -> list[tuple[str, str]]:
    """What preparation said that is not a number per layer."""
    return [(key.replace("_", " ").capitalize(), f"{value:.4g}" if isinstance(value, float) else str(value))
            for key, value in record.prepare.items() if not isinstance(value, Mapping)]


def _maps(record: Record) -> list[Sheet]:
    """What preparation chose or measured for every layer, blocks by module kinds: GoRA's ranks, SpaRTA's entries."""
    found = []
    for key, value in record.prepare.items():
        if not isinstance(value, Mapping) or not all(isinstance(one, int | float) for one in value.values()) or not value:
            continue
        grid = rank_map.grid(value)
        rows = tuple((Entry(str(block)), *(_number(one) for one in grid.loc[block])) for block in grid.index)
        notes = (f"Sum over all layers: {sum(value.values()):,}.",) if key == "ranks" else ()
        kinds = [str(kind).replace(".", " ") for kind in grid.columns]
        found.append(Sheet(key, f"{key.replace('_', ' ').capitalize()} by layer", ("Block", *kinds), rows, (), notes))
    return found


def _number(value: Any) -> Entry:
    if pd.isna(value):
        return entry(numbers.DASH, "missing", title="no adapter")
    whole = float(value).is_integer()
    return Entry(numbers.count(value) if whole else f"{value:.3g}")
