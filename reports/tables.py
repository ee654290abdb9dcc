"""A study's tables as data: lines by columns of measured values, with differences to the reference line.

Nothing here is formatted. Whatever was planned has a value, and a value says what became of its runs.
"""

from __future__ import annotations

import re
import statistics as plain
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reports import numbers
from suite import registry, statistics
from suite.records import Record
from suite.statistics import Difference, Outcomes, Ranking, Summary

if TYPE_CHECKING:
    from suite.study import Cell, Study

#: What became of a planned run; `missing` has no record yet.
Fate = Literal["finished", "diverged", "failed", "skipped", "missing"]
FATES: tuple[Fate, ...] = ("finished", "diverged", "failed", "skipped", "missing")
T = TypeVar("T")
AVERAGE = "average"
#: The average over the parts of a task that it does not train on.
ELSEWHERE = "out-of-domain"
#: Letters of a title that heads a column.
LONGEST_TITLE = 22


@dataclass(frozen=True)
class Line:
    """One line of a table: a row of the study at one budget (empty: it has no size).

    `label` is the row's name, with the budget where there are several, and the learning rate where the row has several
    (otherwise `rate` is None).
    """

    row: str
    name: str
    label: str
    budget: str = ""
    rank: int | None = None
    rate: float | None = None
    method: str = ""

    @property
    def key(self) -> str:
        key = f"{self.row}@{self.rank or self.budget}" if self.budget else self.row
        return key if self.rate is None else f"{key}@{self.rate:g}"


@dataclass(frozen=True)
class Column:
    """One task of a table, or one part of it, with what its runs say about the data; None where none has yet.

    `title` is short enough to head a column; `about` is what the task calls itself.
    """

    id: str
    task: str
    part: str | None
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

    `top`: the highest of its column, or not told apart from it: in 95 of 100 tables the truly best line is among these.
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
class Standing:
    """Mean ranks over the columns of those lines that have answers in all of them."""

    lines: tuple[Line, ...]
    ranking: Ranking


@dataclass(frozen=True)
class StudyTable:
    """A measured table. `values` and `differences` are keyed by line and column.

    The p-values of the differences are adjusted together (Benjamini and Hochberg): `q`, and `q_items` for these seeds alone.
    `standing` is None with fewer than two columns, or fewer than three lines that are complete.
    `averages` are the columns that average others (`AVERAGE`, `ELSEWHERE`), each with those that it averages.
    """

    id: str
    title: str
    base: str
    reference: Mapping[str, Line]
    lines: tuple[Line, ...]
    columns: tuple[Column, ...]
    averages: Mapping[str, tuple[str, ...]]
    values: Mapping[tuple[str, str], Value]
    differences: Mapping[tuple[str, str], Difference]
    sizes: Mapping[str, Size]
    seeds: tuple[int, ...]
    records: Mapping[str, tuple[Record, ...]]
    broken: tuple[str, ...] = ()
    standing: Standing | None = None

    @property
    def has_average(self) -> bool:
        return AVERAGE in self.averages

    @property
    def column_ids(self) -> tuple[str, ...]:
        """Ids of the columns in order, the average of all last."""
        return (*(c.id for c in self.columns), *self.averages)

    @property
    def tasks(self) -> dict[str, str]:
        """Titles of the tasks by id: fewer than columns where tasks have parts."""
        return {column.task: task_title(column.task) for column in self.columns}

    @property
    def headline(self) -> str:
        """The column that sums the table up: the average, or the only task."""
        return self.column_ids[-1]

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, in the order of the study."""
        return tuple(dict.fromkeys(line.budget for line in self.lines if line.budget))

    def title_of(self, column: str) -> str:
        if column in self.averages:
            return "Average" if column == AVERAGE else "Out of domain"
        return next(c.title for c in self.columns if c.id == column)

    def is_reference(self, line: Line) -> bool:
        return self.reference[line.key].key == line.key

    @property
    def reference_label(self) -> str:
        """Name of the reference row, without a budget."""
        return next(iter(self.reference.values())).name


def measure(study: Study, scale: str, cells: Sequence[Cell],
            records: Mapping[str, Record]) -> list[StudyTable]:
    """Every table of the study at a scale that has planned cells, filled from the records that exist."""
    tables = study.edition(scale).tables
    planned: dict[str, list[Cell]] = {}
    for cell in cells:
        planned.setdefault(cell.table, []).append(cell)
    return [_Builder(study, scale, table_id, planned[table_id], records).build()
            for table_id in tables if table_id in planned]


def budget_name(cell: Cell) -> str:
    """A cell's budget as a label has it: `r = 8`, `300 k`, `0.5 %`, `lora@8`. Empty when it has none."""
    budget = cell.spec.budget
    if budget is None:
        return ""
    if budget.rank is not None:
        return f"r = {budget.rank}"
    if budget.params is not None:
        return numbers.short(budget.params)
    return numbers.share(budget.share) if budget.share is not None else str(budget.like)


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


class _Builder:
    """Gathers one table."""

    def __init__(self, study: Study, scale: str, table_id: str, cells: Sequence[Cell],
                 records: Mapping[str, Record]) -> None:
        self.study, self.id, self.cells, self.records = study, table_id, cells, records
        self.table = study.edition(scale).tables[table_id]
        self.broken: list[str] = []
        self.several = len({budget_name(cell) for cell in cells} - {""}) > 1
        self.lines = self._lines()
        self.tasks = list(dict.fromkeys(cell.spec.task.id for cell in cells))
        self.by_place: dict[tuple[str, str], list[Cell]] = {}
        for cell in cells:
            self.by_place.setdefault((self._line(cell).key, cell.spec.task.id), []).append(cell)
        self.columns: dict[str, Column] = {}
        self.averages: dict[str, tuple[str, ...]] = {}
        self.values: dict[tuple[str, str], Value] = {}
        self.outcomes: dict[tuple[str, str], dict[int, Outcomes]] = {}
        # Items as the last run of a column had them, where each stands when they are sorted, and they sorted.
        self.orders: dict[str, tuple[pa.ChunkedArray, NDArray[np.integer[Any]], pd.Index]] = {}

    def build(self) -> StudyTable:
        columns = tuple(column for task in self.tasks for column in self._columns(task))
        self.columns = {column.id: column for column in columns}
        reference = {line.key: self._reference(line) for line in self.lines}
        self.values = {(line.key, column.id): self._value(line, column)
                       for line in self.lines for column in columns}
        for line in self.lines:
            for task in self.tasks:
                self._read_outcomes(line, task)
        self.averages = _averages(columns)
        self.values |= {(line.key, average): self._average(line, over)
                        for line in self.lines for average, over in self.averages.items()}
        column_ids = [*self.columns, *self.averages]
        differences = _adjusted({
            (line.key, column): delta for line in self.lines for column in column_ids
            if (other := reference[line.key]).key != line.key
            and (delta := self._difference(line, other, column)) is not None
        })
        for column in column_ids:
            self._mark_top(column)
        return StudyTable(
            id=self.id, title=self.table.title, base=self.table.base, reference=reference, lines=self.lines,
            columns=columns, averages=self.averages, values=self.values, differences=differences,
            sizes={line.key: size for line in self.lines if (size := self._size(line)) is not None},
            seeds=tuple(sorted({cell.spec.seed for cell in self.cells})),
            records={line.key: tuple(self._records(line.key)) for line in self.lines},
            broken=tuple(self.broken), standing=self._standing(),
        )

    def _line(self, cell: Cell) -> Line:
        name, budget = self.study.rows[cell.row].label, budget_name(cell)
        label = f"{name}, {budget}" if budget and self.several else name
        rate = cell.spec.recipe.learning_rate if len(self.table.rates(cell.row)) > 1 else None
        return Line(cell.row, name, label if rate is None else f"{label}, {rate:g}", budget, cell.rank, rate,
                    cell.spec.method.id)

    def _lines(self) -> tuple[Line, ...]:
        """Those without a budget first, then budget by budget, each in the order of the study's rows and rates."""
        found = {line.key: line for line in map(self._line, self.cells)}
        rows = list(self.table.rows)
        budgets = list(dict.fromkeys(["", *map(budget_name, self.cells)]))
        return tuple(sorted(found.values(), key=lambda x: (budgets.index(x.budget), rows.index(x.row))))

    def _reference(self, line: Line) -> Line:
        """The reference row at the line's own budget (for lines without one, at the last), and of several learning rates at
        the line's own, or else at the first: none is chosen by its score."""
        same = [x for x in self.lines if x.row == self.table.reference]
        if not same:  # a plan cut by --only may lack it
            name = self.study.rows[self.table.reference].label
            return Line(self.table.reference, name, name, line.budget, line.rank)
        budget = line.budget if any(x.budget == line.budget for x in same) else same[-1].budget
        same = [x for x in same if x.budget == budget]
        return next((x for x in same if x.rate == line.rate), same[0])

    def _records(self, key: str, task: str | None = None) -> list[Record]:
        cells = [cell for of in (self.tasks if task is None else [task]) for cell in self.by_place.get((key, of), ())]
        return [self.records[c.spec.id] for c in cells if c.spec.id in self.records]

    def _columns(self, task: str) -> list[Column]:
        """The task's column, or one for each of its parts."""
        told = [record for line in self.lines for record in self._records(line.key, task)
                if record.data is not None and record.scores]
        if not told:
            return [Column(task, task, None, task_title(task), task_about(task))]
        data = told[0].data
        assert data is not None
        truncated = max(record.data.truncated for record in told if record.data is not None)
        parts = [score for score in told[0].scores if score.part is not None]
        return [Column(task if score.part is None else f"{task}/{score.part}", task, score.part,
                       score.part or task_title(task), task_about(task), score.metric, data.train, score.items,
                       truncated, None if score.part else data.majority, data.fingerprint)
                for score in parts or told[0].scores[:1]]

    def _value(self, line: Line, column: Column) -> Value:
        cells = self.by_place.get((line.key, column.task), [])
        fates = Counter(fate(self.records.get(cell.spec.id)) for cell in cells)
        scores: dict[int, float] = {}
        items = 0
        for cell in cells:
            record = self.records.get(cell.spec.id)
            if record is None or record.status not in ("finished", "diverged"):
                continue
            score = next((score for score in record.scores if score.part == column.part), None)
            if score is not None:
                scores[cell.spec.seed] = score.value
                items = score.items
        return Value(fates, scores, statistics.summarise(list(scores.values()), items))

    def _average(self, line: Line, over: Sequence[str]) -> Value:
        parts = [self.values[line.key, column] for column in over]
        fates: Counter[Fate] = Counter()
        for part in parts:
            fates.update(part.fates)
        common = [seed for seed in parts[0].scores if all(seed in part.scores for part in parts)]
        same = all(len(part.scores) == len(common) for part in parts)
        summary = statistics.average([[part.scores[s] for s in common] if same else list(part.scores.values())
                                      for part in parts])
        scores = {s: sum(part.scores[s] for part in parts) / len(parts) for s in common}
        return Value(fates, scores if summary else {}, summary)

    def _read_outcomes(self, line: Line, task: str) -> None:
        """Right or wrong by item, by seed, of the runs that have predictions."""
        for cell in self.by_place.get((line.key, task), []):
            record = self.records.get(cell.spec.id)
            if record is None or record.score is None:
                continue
            try:
                answers = record.answers()
            except (OSError, ValueError):  # damaged
                answers = None
            if not answers or not {"item", "correct"} <= set(answers.column_names):
                self.broken.append(record.id)
                continue
            for column in self.columns.values():
                own = column.task == task and (column.part is None or "part" in answers.column_names)
                if own:
                    rows = answers if column.part is None else answers.filter(pc.equal(answers["part"], column.part))
                    self.outcomes.setdefault((line.key, column.id), {})[cell.spec.seed] = self._by_item(column.id, rows)

    def _by_item(self, column: str, rows: pa.Table) -> pd.Series:
        """Share of right answers by item. Runs that answered the same items share one index: it is most of the memory."""
        known = self.orders.get(column)
        if known is not None and rows["item"].equals(known[0]):
            return pd.Series(rows["correct"].to_numpy().astype(float)[known[1]], index=known[2], name="correct")
        frame = rows.select(["item", "correct"]).to_pandas()
        right = frame.groupby("item")["correct"].mean()
        if len(right) == len(frame):
            self.orders[column] = (rows["item"], frame["item"].argsort(kind="stable").to_numpy(), right.index)
        return right

    def _difference(self, line: Line, other: Line, column: str) -> Difference | None:
        """Line minus other over what both have: paired by item, or by seed where predictions are lacking."""
        columns = self.averages.get(column, (column,))
        pairs = [self._pair(line, other, name, self.outcomes) for name in columns]
        delta = statistics.average_difference(pairs)
        if delta is not None:
            return delta
        scores = {place: value.scores for place, value in self.values.items()}
        parts = [self._pair(line, other, name, scores) for name in columns]
        seeds = [seed for seed in parts[0][0] if all(seed in own and seed in theirs for own, theirs in parts)]
        per_seed = tuple(plain.fmean(own[seed] - theirs[seed] for own, theirs in parts) for seed in seeds)
        return Difference(plain.fmean(per_seed), None, per_seed, 0) if per_seed else None

    def _pair(self, line: Line, other: Line, column: str,
              known: Mapping[tuple[str, str], Mapping[int, T]]) -> tuple[Mapping[int, T], Mapping[int, T]]:
        """What two lines have in a column, by seed."""
        own, theirs = known.get((line.key, column), {}), known.get((other.key, column), {})
        task = self.columns[column].task
        return self._every_seed(line, task, own, theirs), self._every_seed(other, task, theirs, own)

    def _every_seed(self, line: Line, task: str, own: Mapping[int, T],
                    theirs: Iterable[int]) -> Mapping[int, T]:
        """A method that trains nothing runs once: its one answer is paired with every seed of the other."""
        planned = {cell.spec.seed for cell in self.by_place.get((line.key, task), [])}
        if len(planned) == 1 and len(self.table.seeds) > 1 and len(own) == 1:
            return dict.fromkeys(theirs, next(iter(own.values())))
        return own

    def _mark_top(self, column: str) -> None:
        """Mark the highest value of a column and what is not clearly below it: Holm over the comparisons with the highest.

        One-sided, as it is known to be the highest: the truly best line is left out in at most 5 % of tables.
        """
        scored = [(summary.mean, line) for line in self.lines
                  if (summary := self.values[line.key, column].summary) is not None]
        if len(scored) < 2:
            return
        highest, best = max(scored, key=lambda pair: pair[0])
        behind = {line.key: p for mean, line in scored if mean < highest
                  if (delta := self._difference(best, line, column)) is not None and (p := delta.p_above) is not None}
        level = {key for key, p in zip(behind, statistics.adjust(list(behind.values()), "holm"), strict=True)
                 if p > 1 - statistics.CONFIDENCE}
        for mean, line in scored:
            if mean == highest or line.key in level:
                place = (line.key, column)
                self.values[place] = replace(self.values[place], top=True)

    def _standing(self) -> Standing | None:
        """Mean ranks of the lines that have answers in every column."""
        columns = list(self.columns.values())
        lines = tuple(line for line in self.lines if all(self.outcomes.get((line.key, c.id)) for c in columns))
        if len(columns) < 2 or len(lines) < 3:
            return None
        ranking = statistics.rank([[self._every_seed(line, c.task, self.outcomes[line.key, c.id], self.table.seeds)
                                    for line in lines] for c in columns], [c.task for c in columns])
        return Standing(lines, ranking) if ranking is not None else None

    def _size(self, line: Line) -> Size | None:
        found = [r.trainable for r in self._records(line.key) if r.trainable is not None]
        if not found:
            return None
        return Size(min(t.total for t in found), max(t.total for t in found),
                    min(t.share for t in found), max(t.share for t in found))


def _adjusted(found: Mapping[tuple[str, str], Difference]) -> dict[tuple[str, str], Difference]:
    """The differences of a table with their p-values adjusted for all of them."""
    both: list[dict[tuple[str, str], float]] = []
    for name in ("p", "p_items"):
        known = {place: p for place, delta in found.items() if (p := getattr(delta, name)) is not None}
        both.append(dict(zip(known, statistics.adjust(list(known.values()), "bh"), strict=True)))
    q, q_items = both
    return {place: replace(delta, q=q.get(place), q_items=q_items.get(place)) for place, delta in found.items()}


def _averages(columns: Sequence[Column]) -> dict[str, tuple[str, ...]]:
    """The averages over several columns of one metric: over parts that are not trained on, then over all."""
    if len(columns) < 2 or len({c.metric for c in columns if c.metric}) > 1:
        return {}
    known = registry.tasks()
    unseen = tuple(c.id for c in columns if c.task in known and c.part in known[c.task].unseen)
    return ({ELSEWHERE: unseen} if unseen else {}) | {AVERAGE: tuple(c.id for c in columns)}


def read(table: object) -> pd.DataFrame | None:
    """A record's table, or None when its file is absent or damaged: a report never fails for that."""
    try:
        found = table()  # type: ignore[operator]
    except (OSError, ValueError):
        return None
    return found if isinstance(found, pd.DataFrame) and not found.empty else None
