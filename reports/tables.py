"""A study's tables as data: lines by columns of measured values, with differences to the reference line.

Nothing here is formatted. Whatever was planned has a value, and a value says what became of its runs.
"""

from __future__ import annotations

import re
import statistics as plain
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import pandas as pd

from suite import registry, statistics
from suite.records import Record
from suite.statistics import Difference, Outcomes, Summary

if TYPE_CHECKING:
    from suite.study import Cell, Study

#: What became of a planned run; `missing` has no record yet.
Fate = Literal["finished", "diverged", "failed", "skipped", "missing"]
FATES: tuple[Fate, ...] = ("finished", "diverged", "failed", "skipped", "missing")
T = TypeVar("T")
AVERAGE = "average"
#: Letters of a title that heads a column.
LONGEST_TITLE = 22


@dataclass(frozen=True)
class Line:
    """One line of a table: a row of the study at one budget. `label` names the rank if there are several."""

    row: str
    rank: int | None
    label: str
    method: str

    @property
    def key(self) -> str:
        return self.row if self.rank is None else f"{self.row}@{self.rank}"


@dataclass(frozen=True)
class Column:
    """One task of a table, with what its runs say about the data. None where no run has told yet.

    `title` is short enough to head a column; `about` is what the task calls itself.
    """

    task: str
    title: str
    about: str
    metric: str | None = None
    train: int | None = None
    test: int | None = None
    truncated: int | None = None
    majority: float | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Value:
    """What the planned runs of one line and column gave. Diverged runs count with the score that they got.

    `top`: the highest of its column, or not told apart from it.
    """

    fates: Mapping[Fate, int]
    scores: Mapping[int, float] = field(default_factory=dict)
    summary: Summary | None = None
    top: bool = False

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
    """A measured table. `values` and `differences` are keyed by line and column.

    The column `AVERAGE` exists when there are several tasks with one metric.
    """

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

    @property
    def ranks(self) -> tuple[int, ...]:
        """The budgets, smallest first."""
        return tuple(sorted({line.rank for line in self.lines if line.rank is not None}))

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


def measure(study: Study, scale: str, cells: Sequence[Cell],
            records: Mapping[str, Record]) -> list[StudyTable]:
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
    """What heads a task's column: the name in brackets that ends its title, or a short title, or its id."""
    about = task_about(task_id)
    named = re.search(r"\(([^()]+)\)$", about)
    if named or len(about) <= LONGEST_TITLE:
        return named[1] if named else about
    return task_id.replace("-", " ").capitalize()


def task_about(task_id: str) -> str:
    """A task's own title, or its id in words when the task is not registered here."""
    known = registry.tasks()
    return known[task_id].title if task_id in known else task_id.replace("-", " ").capitalize()


def apart(delta: Difference) -> bool:
    """Whether the interval excludes zero and no seed points the other way; one seed is enough."""
    return (delta.interval is not None and delta.interval.excludes_zero
            and all(value * delta.mean > 0 for value in delta.per_seed))


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
        self.values: dict[tuple[str, str], Value] = {}
        self.outcomes: dict[tuple[str, str], dict[int, Outcomes]] = {}

    def build(self) -> StudyTable:
        columns = tuple(self._column(task) for task in self.tasks)
        reference = {line.key: self._reference(line) for line in self.lines}
        self.values = {(line.key, task): self._value(line, task)
                       for line in self.lines for task in self.tasks}
        self.outcomes = {place: self._outcomes(place) for place in self.values}
        column_ids = list(self.tasks)
        if len(columns) > 1 and len({c.metric for c in columns if c.metric}) <= 1:
            self.values |= {(line.key, AVERAGE): self._average(line) for line in self.lines}
            column_ids.append(AVERAGE)
        differences = {
            (line.key, column): delta for line in self.lines for column in column_ids
            if (other := reference[line.key]).key != line.key
            and (delta := self._difference(line, other, column)) is not None
        }
        for column in column_ids:
            self._mark_top(column)
        return StudyTable(
            id=self.id, title=self.table.title, base=self.table.base, reference=reference, lines=self.lines,
            columns=columns, values=self.values, differences=differences,
            sizes={line.key: size for line in self.lines if (size := self._size(line)) is not None},
            seeds=tuple(sorted({cell.spec.seed for cell in self.cells})),
            records={line.key: tuple(self._records(line.key)) for line in self.lines},
            broken=tuple(self.broken),
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
        return tuple(sorted(found.values(), key=lambda line: (line.rank or 0, order.index(line.row))))

    def _reference(self, line: Line) -> Line:
        """The reference row at the line's own budget; for lines without one, at the largest."""
        same = [x for x in self.lines if x.row == self.table.reference]
        if not same:  # a plan cut by --only may lack it
            return Line(self.table.reference, line.rank, self.study.rows[self.table.reference].label, "")
        return next((x for x in same if x.rank == line.rank), same[-1])

    def _records(self, key: str, task: str | None = None) -> list[Record]:
        cells = [cell for (line, of), found in self.by_place.items() if line == key and task in (None, of)
                 for cell in found]
        return [self.records[c.spec.id] for c in cells if c.spec.id in self.records]

    def _column(self, task: str) -> Column:
        told = [record for line in self.lines for record in self._records(line.key, task)
                if record.data is not None and record.scores]
        if not told:
            return Column(task, task_title(task), task_about(task))
        data, score = told[0].data, told[0].scores[0]
        assert data is not None
        truncated = max(record.data.truncated for record in told if record.data is not None)
        return Column(task, task_title(task), task_about(task), score.metric, data.train, score.items,
                      truncated, data.majority, data.fingerprint)

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

    def _average(self, line: Line) -> Value:
        parts = [self.values[line.key, task] for task in self.tasks]
        fates: Counter[Fate] = Counter()
        for part in parts:
            fates.update(part.fates)
        common = [seed for seed in parts[0].scores if all(seed in part.scores for part in parts)]
        same = all(len(part.scores) == len(common) for part in parts)
        summary = statistics.average([[part.scores[s] for s in common] if same else list(part.scores.values())
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

    def _difference(self, line: Line, other: Line, column: str) -> Difference | None:
        """Line minus other over what both have: paired by item, or by seed where predictions are lacking."""
        tasks = self.tasks if column == AVERAGE else [column]
        pairs = [self._pair(line, other, task, self.outcomes) for task in tasks]
        delta = statistics.average_difference(pairs)
        if delta is not None:
            return delta
        scores = {place: value.scores for place, value in self.values.items()}
        parts = [self._pair(line, other, task, scores) for task in tasks]
        seeds = [seed for seed in parts[0][0] if all(seed in own and seed in theirs for own, theirs in parts)]
        per_seed = tuple(plain.fmean(own[seed] - theirs[seed] for own, theirs in parts) for seed in seeds)
        return Difference(plain.fmean(per_seed), None, per_seed, 0) if per_seed else None

    def _pair(self, line: Line, other: Line, task: str,
              known: Mapping[tuple[str, str], Mapping[int, T]]) -> tuple[Mapping[int, T], Mapping[int, T]]:
        """What two lines have on a task, by seed."""
        own, theirs = known.get((line.key, task), {}), known.get((other.key, task), {})
        return self._every_seed(line, task, own, theirs), self._every_seed(other, task, theirs, own)

    def _every_seed(self, line: Line, task: str, own: Mapping[int, T],
                    theirs: Mapping[int, T]) -> Mapping[int, T]:
        """A method that trains nothing runs once: its one answer is paired with every seed of the other."""
        planned = {cell.spec.seed for cell in self.by_place.get((line.key, task), [])}
        if len(planned) == 1 and len(self.table.seeds) > 1 and len(own) == 1:
            return dict.fromkeys(theirs, next(iter(own.values())))
        return own

    def _mark_top(self, column: str) -> None:
        """Mark the highest value of a column, and every other that its difference does not set apart."""
        scored = [(summary.mean, line) for line in self.lines
                  if (summary := self.values[line.key, column].summary) is not None]
        if len(scored) < 2:
            return
        highest, best = max(scored, key=lambda pair: pair[0])
        for mean, line in scored:
            delta = self._difference(best, line, column) if mean < highest else None
            if mean == highest or (delta is not None and delta.interval is not None and not apart(delta)):
                place = (line.key, column)
                self.values[place] = replace(self.values[place], top=True)

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
