"""A study's tables as data: lines by columns of measured values, with differences to the reference line.

Nothing here is formatted. Whatever was planned has a value, and a value says what became of its runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pandas as pd

from suite import statistics
from suite.records import Record
from suite.statistics import Difference, Outcomes, Summary

if TYPE_CHECKING:
    from suite.study import Cell, Study

#: What became of a planned run; `missing` has no record yet.
Fate = Literal["finished", "diverged", "failed", "skipped", "missing"]
FATES: tuple[Fate, ...] = ("finished", "diverged", "failed", "skipped", "missing")
AVERAGE = "average"


@dataclass(frozen=True)
class Line:
    """One line of a table: a row of the study at one budget. `label` names the rank where a table has several."""

    row: str
    rank: int | None
    label: str
    method: str

    @property
    def key(self) -> str:
        return self.row if self.rank is None else f"{self.row}@{self.rank}"


@dataclass(frozen=True)
class Column:
    """One task of a table, with what its runs say about the data. None where no run has told yet."""

    task: str
    title: str
    metric: str | None = None
    train: int | None = None
    test: int | None = None
    truncated: int | None = None
    majority: float | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Value:
    """What the planned runs of one line and column gave. Diverged runs count with the score that they got."""

    fates: Mapping[Fate, int]
    scores: Mapping[int, float] = field(default_factory=dict)
    summary: Summary | None = None
    best: bool = False

    @property
    def planned(self) -> int:
        return sum(self.fates.values())

    @property
    def state(self) -> Fate:
        """`finished` when there is a number to show; otherwise the worst that happened to its runs."""
        if self.summary is not None:
            return "finished"
        return next((fate for fate in ("failed", "diverged", "skipped") if self.fates.get(fate)), "missing")

    @property
    def complete(self) -> bool:
        return self.summary is not None and self.fates.get("finished", 0) == self.planned


@dataclass(frozen=True)
class Size:
    """Trained scalars of a line over its runs: they differ between tasks where data decides the ranks."""

    low: int
    high: int
    share_low: float
    share_high: float

    @property
    def middle(self) -> float:
        return (self.low + self.high) / 2


@dataclass(frozen=True)
class StudyTable:
    """A measured table. `values` and `differences` are keyed by line and column; the column `AVERAGE` exists when
    there are several tasks with one metric."""

    id: str
    title: str
    base: str
    reference: Mapping[str, Line]
    lines: tuple[Line, ...]
    columns: tuple[Column, ...]
    values: Mapping[tuple[str, str], Value]
    differences: Mapping[tuple[str, str], Difference]
    sizes: Mapping[str, Size]
    seeds: tuple[int, ...]
    records: Mapping[str, tuple[Record, ...]]
    broken: tuple[str, ...] = ()

    @property
    def has_average(self) -> bool:
        return len(self.columns) > 1 and len({c.metric for c in self.columns if c.metric}) <= 1

    @property
    def column_ids(self) -> tuple[str, ...]:
        """Ids of the columns in order, the average last."""
        return tuple(c.task for c in self.columns) + ((AVERAGE,) if self.has_average else ())

    @property
    def headline(self) -> str:
        """The column that sums the table up: the average, or the only task."""
        return self.column_ids[-1]

    def title_of(self, column: str) -> str:
        if column == AVERAGE:
            return "Average"
        return next(c.title for c in self.columns if c.task == column)

    def is_reference(self, line: Line) -> bool:
        return self.reference[line.key].key == line.key

    @property
    def reference_label(self) -> str:
        """Name of the reference row, without a rank."""
        labels = {line.label for line in self.reference.values()}
        return min(labels, key=len) if len(labels) == 1 else min(labels, key=len).split(", r = ")[0]


def measure(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[StudyTable]:
    """Every table of the study at a scale that has planned cells, filled from the records that exist."""
    tables = study.edition(scale).tables
    planned: dict[str, list[Cell]] = {}
    for cell in cells:
        planned.setdefault(cell.table, []).append(cell)
    return [_Builder(study, scale, table_id, planned[table_id], records).build()
            for table_id in tables if table_id in planned]


def fate(record: Record | None) -> Fate:
    """What became of a run."""
    return "missing" if record is None else record.status


def task_title(task_id: str) -> str:
    """A task's own title, or its id in words when the task is not registered here."""
    from suite import registry
    from suite.errors import UserError

    try:
        return registry.task(task_id).title
    except UserError:
        return task_id.replace("-", " ").capitalize()


class _Builder:
    """Gathers one table."""

    def __init__(self, study: Study, scale: str, table_id: str, cells: Sequence[Cell],
                 records: Mapping[str, Record]) -> None:
        self.study, self.id, self.cells, self.records = study, table_id, cells, records
        self.table = study.edition(scale).tables[table_id]
        self.broken: list[str] = []
        self.lines = self._lines()
        self.tasks = list(dict.fromkeys(cell.spec.task.id for cell in cells))
        self.by_place: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            self.by_place.setdefault((self._line_key(cell), cell.spec.task.id), []).append(cell)
        self.outcomes: dict[tuple[str, str], dict[int, Outcomes]] = {}

    def build(self) -> StudyTable:
        columns = tuple(self._column(task) for task in self.tasks)
        reference = {line.key: self._reference(line) for line in self.lines}
        values = {(line.key, task): self._value(line, task) for line in self.lines for task in self.tasks}
        self.outcomes = {place: self._outcomes(place) for place in values}
        averaged = len(columns) > 1 and len({c.metric for c in columns if c.metric}) <= 1
        if averaged:
            values |= {(line.key, AVERAGE): self._average(line, values) for line in self.lines}
        differences: dict[tuple[str, str], Difference] = {}
        for line in self.lines:
            if reference[line.key].key != line.key:
                differences |= self._differences(line, reference[line.key], values, averaged)
        return StudyTable(
            id=self.id, title=self.table.title, base=self.table.base, reference=reference, lines=self.lines,
            columns=columns, values=_mark_best(values), differences=differences,
            sizes={line.key: size for line in self.lines if (size := self._size(line)) is not None},
            seeds=tuple(sorted({cell.spec.seed for cell in self.cells})),
            records={line.key: tuple(self._records(line.key)) for line in self.lines}, broken=tuple(self.broken),
        )

    def _line_key(self, cell: Cell) -> str:
        return cell.row if cell.rank is None else f"{cell.row}@{cell.rank}"

    def _lines(self) -> tuple[Line, ...]:
        found: dict[str, Line] = {}
        several = len({cell.rank for cell in self.cells if cell.rank is not None}) > 1
        for cell in self.cells:
            label = self.study.rows[cell.row].label
            if several and cell.rank is not None:
                label = f"{label}, r = {cell.rank}"
            line = Line(cell.row, cell.rank, label, cell.spec.method.id)
            found.setdefault(line.key, line)
        order = list(self.table.rows)
        return tuple(sorted(found.values(), key=lambda line: (order.index(line.row), line.rank or 0)))

    def _reference(self, line: Line) -> Line:
        """The reference row at the line's own budget; for lines without one, at the largest."""
        same = [x for x in self.lines if x.row == self.table.reference]
        if not same:  # a plan cut by --only may lack it
            return Line(self.table.reference, line.rank, self.study.rows[self.table.reference].label, "")
        return next((x for x in same if x.rank == line.rank), same[-1])

    def _records(self, key: str, task: str | None = None) -> list[Record]:
        cells = [c for (k, t), found in self.by_place.items() if k == key and task in (None, t) for c in found]
        return [self.records[c.spec.id] for c in cells if c.spec.id in self.records]

    def _column(self, task: str) -> Column:
        told = [r for line in self.lines for r in self._records(line.key, task) if r.data is not None and r.scores]
        if not told:
            return Column(task, task_title(task))
        data, score = told[0].data, told[0].scores[0]
        assert data is not None
        return Column(task, task_title(task), score.metric, data.train, score.items,
                      max(r.data.truncated for r in told if r.data is not None), data.majority, data.fingerprint)

    def _value(self, line: Line, task: str) -> Value:
        cells = self.by_place.get((line.key, task), [])
        fates = Counter(fate(self.records.get(cell.spec.id)) for cell in cells)
        scores: dict[int, float] = {}
        items = 0
        for cell in cells:
            record = self.records.get(cell.spec.id)
            if record is not None and record.score is not None and record.status in ("finished", "diverged"):
                scores[cell.spec.seed] = record.score.value
                items = record.score.items
        return Value(fates, scores, statistics.summarise(list(scores.values()), items))

    def _average(self, line: Line, values: Mapping[tuple[str, str], Value]) -> Value:
        parts = [values[line.key, task] for task in self.tasks]
        fates: Counter[Fate] = Counter()
        for part in parts:
            fates.update(part.fates)
        common = [seed for seed in parts[0].scores if all(seed in part.scores for part in parts)]
        same = all(len(part.scores) == len(common) for part in parts)
        summary = statistics.average([list(part.scores[s] for s in common) if same else list(part.scores.values())
                                      for part in parts])
        scores = {s: sum(part.scores[s] for part in parts) / len(parts) for s in common}
        return Value(fates, scores if summary else {}, summary)

    def _outcomes(self, place: tuple[str, str]) -> dict[int, Outcomes]:
        """Right or wrong by item, by seed, of the runs that have predictions."""
        found: dict[int, Outcomes] = {}
        for cell in self.by_place.get(place, []):
            record = self.records.get(cell.spec.id)
            if record is None or record.score is None:
                continue
            frame = read(record.predictions)
            if frame is None or not {"item", "correct"} <= set(frame.columns):
                self.broken.append(record.id)
                continue
            found[cell.spec.seed] = frame.groupby("item")["correct"].mean()
        return found

    def _differences(self, line: Line, reference: Line, values: Mapping[tuple[str, str], Value],
                     averaged: bool) -> dict[tuple[str, str], Difference]:
        found: dict[tuple[str, str], Difference] = {}
        pairs: list[tuple[dict[int, Outcomes], dict[int, Outcomes]]] = []
        for task in self.tasks:
            pair = (self.outcomes.get((line.key, task), {}), self.outcomes.get((reference.key, task), {}))
            pair = (self._every_seed(line, task, *pair), self._every_seed(reference, task, pair[1], pair[0]))
            pairs.append(pair)
            delta = statistics.difference(*pair)
            if delta is None and (reference.key, task) in values:
                delta = _of_means(values[line.key, task], values[reference.key, task])
            if delta is not None:
                found[line.key, task] = delta
        if averaged:
            delta = statistics.average_difference(pairs)
            if delta is None and (reference.key, AVERAGE) in values:
                delta = _of_means(values[line.key, AVERAGE], values[reference.key, AVERAGE])
            if delta is not None:
                found[line.key, AVERAGE] = delta
        return found

    def _every_seed(self, line: Line, task: str, own: dict[int, Outcomes],
                    other: dict[int, Outcomes]) -> dict[int, Outcomes]:
        """A method that trains nothing runs once: its one answer is paired with every seed of the other."""
        planned = {cell.spec.seed for cell in self.by_place.get((line.key, task), [])}
        if len(planned) == 1 and len(self.table.seeds) > 1 and len(own) == 1:
            only = next(iter(own.values()))
            return {seed: only for seed in other}
        return own

    def _size(self, line: Line) -> Size | None:
        found = [r.trainable for r in self._records(line.key) if r.trainable is not None]
        if not found:
            return None
        return Size(min(t.total for t in found), max(t.total for t in found),
                    min(t.share for t in found), max(t.share for t in found))


def read(table: object) -> pd.DataFrame | None:
    """A record's table, or None when its file is absent or damaged: a report never fails for that."""
    try:
        found = table()  # type: ignore[operator]
    except (OSError, ValueError):
        return None
    return found if isinstance(found, pd.DataFrame) and not found.empty else None


def _of_means(value: Value, reference: Value) -> Difference | None:
    """Difference of two means without predictions: no interval."""
    if value.summary is None or reference.summary is None:
        return None
    seeds = [seed for seed in value.scores if seed in reference.scores]
    per_seed = tuple(value.scores[seed] - reference.scores[seed] for seed in seeds)
    return Difference(value.summary.mean - reference.summary.mean, None, per_seed, 0)


def _mark_best(values: Mapping[tuple[str, str], Value]) -> dict[tuple[str, str], Value]:
    best: dict[str, float] = {}
    for (_, column), value in values.items():
        if value.summary is not None:
            best[column] = max(best.get(column, 0.0), value.summary.mean)
    several = Counter(column for (_, column), value in values.items() if value.summary is not None)
    return {
        place: Value(value.fates, value.scores, value.summary,
                     value.summary is not None and several[place[1]] > 1 and value.summary.mean == best[place[1]])
        for place, value in values.items()
    }
