"""Where the numbers come from: data, runs and their commands, machines, versions, and what went wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reports import links, numbers
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import StudyTable, budget_name, fate, task_title
from suite import statistics
from suite.records import Record

if TYPE_CHECKING:
    from suite.study import Cell, Study


@dataclass(frozen=True)
class Machine:
    """One set of hardware, versions and code that runs were made with."""

    runs: int
    facts: tuple[tuple[str, str], ...]
    packages: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Totals:
    """What became of the planned runs, when, and what the recorded ones took."""

    planned: int
    fates: Mapping[str, int]
    seconds: float
    first: str
    last: str

    @property
    def recorded(self) -> int:
        return self.planned - self.fates.get("missing", 0)


def command(study: Study, scale: str) -> str:
    """The command that makes every number of the report."""
    return f"suite run {study.id} --scale {scale}"


def run_command(study: Study, scale: str, cell: Cell) -> str:
    """The command that makes one run (and the runs of other rows that use the same method)."""
    spec = cell.spec
    only = [f"table={cell.table}", f"task={spec.task.id}", f"method={cell.row}", f"seed={spec.seed}"]
    if cell.rank is not None:
        only.append(f"rank={cell.rank}")
    if len(study.edition(scale).tables[cell.table].rates(cell.row)) > 1:
        only.append(f"rate={spec.recipe.learning_rate:g}")
    return " ".join([command(study, scale), *(f"--only {key}" for key in only)])


def totals(cells: Sequence[Cell], records: Mapping[str, Record]) -> Totals:
    """Counts over distinct runs: several cells may share one."""
    runs = {cell.spec.id: records.get(cell.spec.id) for cell in cells}
    fates: dict[str, int] = {}
    for record in runs.values():
        fates[fate(record)] = fates.get(fate(record), 0) + 1
    known = [record for record in runs.values() if record is not None]
    return Totals(len(runs), fates, sum(r.timings.total for r in known),
                  min((r.started for r in known if r.started), default=""),
                  max((r.finished for r in known if r.finished), default=""))


def runs(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> Sheet:
    """Every planned run: id, place, learning rate, what became of it, its score and its command."""
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    marks: dict[str, Mark] = {"missing": "missing", "failed": "failed", "diverged": "failed",
                              "skipped": "skipped"}
    for cell in cells:
        spec, record = cell.spec, records.get(cell.spec.id)
        score = record.score if record else None
        state = fate(record)
        mark = [marks[state]] if state in marks else []
        rows.append((
            entry(spec.id, code=True, link=links.run(spec.id)),
            Entry(study.rows[cell.row].label, link=links.method(spec.method.id)),
            Entry(task_title(spec.task.id), link=links.task(spec.task.id)),
            Entry(budget_name(cell) or numbers.DASH), Entry(str(spec.seed)),
            Entry(f"{spec.recipe.learning_rate:g}"), entry("not run" if state == "missing" else state, *mark),
            Entry(numbers.percent(score.value) if score else numbers.DASH),
        ))
        data.append({
            "run": spec.id, "table": cell.table, "row": cell.row, "task": spec.task.id,
            "budget": budget_name(cell), "rank": cell.rank, "seed": spec.seed,
            "learning_rate": spec.recipe.learning_rate, "status": state,
            "metric": score.metric if score else None, "score": score.value if score else None,
            "stderr": score.stderr if score else None, "items": score.items if score else None,
            "final_loss": record.final_loss if record else None,
            "trained": record.trainable.total if record and record.trainable else None,
            "seconds": record.timings.total if record else None,
            "command": run_command(study, scale, cell),
        })
    header = ("Run", "Row", "Task", "Budget", "Seed", "Learning rate", "Status", "Score")
    return Sheet("runs", "Every planned run", header, tuple(rows), tuple(data), words=frozenset({0, 1, 2, 6}))


def failures(study: Study, cells: Sequence[Cell], records: Mapping[str, Record]) -> Sheet | None:
    """Runs that failed, diverged or were skipped, and why. None when there are none."""
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for cell in cells:
        record = records.get(cell.spec.id)
        if record is None or record.status == "finished":
            continue
        why = record.reason or "no reason was recorded"
        line = told(record.trace)
        rows.append((
            entry(record.id, code=True, link=links.run(record.id)), Entry(study.rows[cell.row].label),
            Entry(task_title(cell.spec.task.id)), Entry(budget_name(cell) or numbers.DASH),
            Entry(str(cell.spec.seed)),
            entry(record.status, "skipped" if record.status == "skipped" else "failed"),
            Entry(why, note=line if line and line not in why else ""),
        ))
        data.append({"run": record.id, "row": cell.row, "task": cell.spec.task.id,
                     "budget": budget_name(cell), "rank": cell.rank, "seed": cell.spec.seed,
                     "status": record.status, "reason": why, "trace": line})
    if not rows:
        return None
    header = ("Run", "Row", "Task", "Budget", "Seed", "Status", "Why")
    return Sheet("failures", "Failed, diverged or skipped", header, tuple(rows), tuple(data),
                 words=frozenset({0, 1, 2, 5, 6}))


def not_run(study: Study, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[str]:
    """Planned runs without a record, gathered: `LoRA on SST-2 (seeds 0, 1)`. None if that is all of them."""
    found: dict[tuple[str, str], list[str]] = {}
    several = len({budget_name(cell) for cell in cells} - {""}) > 1
    for cell in cells if records else ():
        if cell.spec.id not in records:
            budget = budget_name(cell) if several else ""
            label = study.rows[cell.row].label + (f", {budget}" if budget else "")
            found.setdefault((label, cell.spec.task.id), []).append(str(cell.spec.seed))
    return [f"{label} on {task_title(task)} (seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)})"
            for (label, task), seeds in found.items()]


def told(trace: str) -> str:
    """The line of a trace that says something: the first, or the last after `Traceback ...`."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    if not lines:
        return ""
    return lines[-1] if lines[0].startswith("Traceback") else lines[0]


def data_used(tables: Sequence[StudyTable]) -> Sheet:
    """What every task's runs were trained and scored on, and how coarse that makes a score."""
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for table in tables:
        for column in table.columns:
            name = Entry(column.title, aside=column.about if column.about != column.title else "",
                         link=links.task(column.task))
            if column.test is None:
                rows.append((name, *(entry(numbers.DASH, "missing", title="not run yet"),) * 6))
                data.append({"table": table.id, "task": column.id})
                continue
            coarse = statistics.summarise([0.5], column.test)
            width = (coarse.interval.high - coarse.interval.low) / 2 if coarse and coarse.interval else None
            rows.append((
                name, Entry(numbers.count(column.train or 0)), Entry(numbers.count(column.test)),
                Entry(f"± {numbers.percent(width)}" if width is not None else numbers.DASH),
                Entry(str(column.truncated)),
                Entry(numbers.percent(column.majority) if column.majority is not None else numbers.DASH),
                entry((column.fingerprint or "")[:12], code=True),
            ))
            data.append({"table": table.id, "task": column.id, "metric": column.metric,
                         "train": column.train, "test": column.test, "truncated": column.truncated,
                         "majority": column.majority, "half_width": width, "fingerprint": column.fingerprint})
    header = ("Task", "Trained on", "Scored on", "Item noise", "Truncated", "Majority", "Fingerprint")
    notes = ("Item noise: half the width, in points, of the 95 % Wilson interval of one run's score when "
             "half the items are right. Truncated: training items cut at the length limit. Majority: percent "
             "of the most frequent label.",)
    return Sheet("data", "Data used", header, tuple(rows), tuple(data), notes, frozenset({0, 6}))


def machines(records: Mapping[str, Record]) -> list[Machine]:
    """The distinct environments of the records, most used first. Keys that a record lacks are left out."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records.values():
        groups.setdefault(repr(sorted(_flat(record.environment).items())), []).append(record.environment)
    found = [machine(group[0], len(group)) for group in groups.values()]
    return sorted(found, key=lambda one: -one.runs)


def machine(environment: Mapping[str, Any], runs: int) -> Machine:
    """A record's environment as names and values. Keys that it lacks are left out."""
    facts: list[tuple[str, str]] = []
    hardware = environment.get("hardware")
    for key, value in (hardware.items() if isinstance(hardware, Mapping) else ()):
        if value is not None:
            name = str(key).removesuffix("_bytes").replace("_", " ").capitalize()
            in_bytes = str(key).endswith("_bytes") and isinstance(value, int)
            facts.append((name.replace("Cpu", "Processor").replace("Gpu", "GPU"),
                          numbers.size(value) if in_bytes else str(value)))
    if environment.get("threads") is not None:
        facts.append(("Threads", str(environment["threads"])))
    if environment.get("platform"):
        facts.append(("Platform", str(environment["platform"])))
    if environment.get("python"):
        facts.append(("Python", str(environment["python"])))
    commit = environment.get("commit")
    changed = " with uncommitted changes" if environment.get("dirty") else ""
    facts.append(("Commit", f"{str(commit)[:12]}{changed}" if commit else "not recorded"))
    packages = environment.get("packages")
    listed = packages.items() if isinstance(packages, Mapping) else ()
    return Machine(runs, tuple(facts), tuple((str(name), str(version)) for name, version in listed))


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if not isinstance(value, Mapping):
        return {prefix: str(value)}
    found: dict[str, str] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}")
    return found

