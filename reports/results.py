"""What was measured, looked at across studies: every result of a method or of a task, and the runs behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import links, numbers, views
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import Column, Line, StudyTable, budget_name, fate, task_title
from suite import registry
from suite.records import Record

if TYPE_CHECKING:
    from reports.study_page import Chapter
    from suite.study import Cell


@dataclass(frozen=True)
class Result:
    """One value of one table: a line in a column (None: the column is an average over several)."""

    of: Chapter
    table: StudyTable
    line: Line
    column_id: str
    column: Column | None

    @property
    def method(self) -> str:
        return self.line.method


@dataclass(frozen=True)
class Made:
    """A run with all the links that it has in studies; the first one names it."""

    cells: tuple[tuple[Chapter, Cell], ...]
    record: Record

    @property
    def of(self) -> Chapter:
        return self.cells[0][0]

    @property
    def cell(self) -> Cell:
        return self.cells[0][1]

    @property
    def label(self) -> str:
        """The row's name in its study."""
        return self.of.study.rows[self.cell.row].label


def results(chapters: Sequence[Chapter]) -> Iterator[Result]:
    """Every value of every table, in the order of the studies; averages are among them."""
    for of in chapters:
        for table in of.tables:
            columns = {column.id: column for column in table.columns}
            for line in table.lines:
                for column in table.column_ids:
                    yield Result(of, table, line, column, columns.get(column))


def runs(chapters: Sequence[Chapter]) -> list[Made]:
    """Every recorded run once, in the order of the studies."""
    found: dict[str, list[tuple[Chapter, Cell]]] = {}
    known: dict[str, Record] = {}
    for of in chapters:
        for cell in of.cells:
            record = of.records.get(cell.spec.id)
            if record is not None:
                found.setdefault(record.id, []).append((of, cell))
                known[record.id] = record
    return [Made(tuple(cells), known[run]) for run, cells in found.items()]


def method_sheet(name: str, found: Sequence[Result]) -> Sheet:
    """Results of one method: where, on what, the score with its interval, and the difference to the reference."""
    return _sheet(name, "Every result", "Task", _task_entry, found)


def task_sheet(name: str, found: Sequence[Result]) -> Sheet:
    """Results on one task, by method, with the majority rate beside them."""
    return _sheet(name, "Every result", "Method", _method_entry, found)


def run_sheet(name: str, made: Sequence[Made]) -> Sheet:
    """Runs with what became of them."""
    rows: list[tuple[Entry, ...]] = []
    data: list[Mapping[str, Number]] = []
    for run in made:
        spec, record = run.cell.spec, run.record
        score = record.score
        marks: list[Mark] = [] if record.status == "finished" else ["skipped" if record.status == "skipped" else "failed"]
        rows.append((
            entry(record.id, code=True, link=links.run(record.id)), _study_entry(run.of),
            entry(run.label, link=links.method(spec.method.id)),
            entry(task_title(spec.task.id), link=links.task(spec.task.id)), Entry(budget_name(run.cell) or numbers.DASH),
            Entry(str(spec.seed)), Entry(f"{spec.recipe.learning_rate:g}"), entry(record.status, *marks),
            Entry(numbers.percent(score.value) if score else numbers.DASH)))
        data.append({"run": record.id, "study": run.of.study.id, "scale": run.of.scale, "table": run.cell.table,
                     "row": run.cell.row, "method": spec.method.id, "task": spec.task.id, "budget": budget_name(run.cell),
                     "seed": spec.seed, "learning_rate": spec.recipe.learning_rate, "status": fate(record),
                     "score": score.value if score else None, "seconds": record.timings.total})
    header = ("Run", "Study", "Row", "Task", "Budget", "Seed", "Learning rate", "Status", "Score")
    return Sheet(name, "Runs", header, tuple(rows), tuple(data), words=frozenset({0, 1, 2, 3, 7}))


def _sheet(name: str, title: str, heading: str, middle: Callable[[Result], Entry], found: Sequence[Result]) -> Sheet:
    majority = any(result.column is not None and result.column.majority is not None for result in found)
    header = [heading, "Study", "Budget", "Score", "95 % interval", *(["Majority"] if majority else []),
              "Above the reference", "Seeds", "Trained"]
    rows, data = [], []
    for result in found:
        value = result.table.values[result.line.key, result.column_id]
        interval = value.summary.interval if value.summary else None
        rate = result.column.majority if result.column else None
        size = result.table.sizes.get(result.line.key)
        rows.append((
            middle(result), _study_entry(result.of, result.table.title), Entry(result.line.budget or numbers.DASH),
            views.value_entry(value, result.column is None),
            entry(numbers.interval(interval, sign=False) if interval else numbers.DASH,
                  title=value.summary.basis if value.summary else ""),
            *([entry(numbers.percent(rate) if rate is not None else numbers.DASH, "faded")] if majority else []),
            _above(result), Entry(str(value.summary.seeds) if value.summary else numbers.DASH),
            Entry(numbers.short(size.middle) if size else numbers.DASH)))
        data.append(_data(result, rate))
    notes = ["Score in percent, mean ± standard deviation over seeds. Interval: over other seeds (t) where there are "
             "several, over other test items (Wilson) where there is one.",
             "Bold scores: the highest of their column in the study's table, and all that may be as good.",
             "Above the reference: percentage points above the study's own reference, paired by item and seed. In brackets: "
             "the 95 % interval over seeds and test items, or over items alone where there is one seed. Bold: not zero at "
             f"the 5 % level, adjusted for the study's table. {views.FINDS}",
             "Scores of different studies or scales do not compare: bases, data and recipes differ."]
    if majority:
        notes.append("Majority: percent of the most frequent label of the test items, what a constant answer scores.")
    return Sheet(name, title, tuple(header), tuple(rows), tuple(data), tuple(notes), frozenset({0, 1, 2}))


def _study_entry(of: Chapter, table: str = "") -> Entry:
    return Entry(f"{of.study.id}, {of.scale}", link=of.path, title=table)


def _row(line: Line) -> str:
    """A line's name in its study, with its learning rate where the row has several; its budget has a column of its own."""
    return line.name if line.rate is None else f"{line.name}, {line.rate:g}"


def _variant(result: Result) -> str:
    """A line's name where it says more than the method's."""
    known, name = registry.methods().get(result.method), _row(result.line)
    return "" if known is not None and name == known.label else name


def _task_entry(result: Result) -> Entry:
    if result.column is None:
        return entry(result.table.title_of(result.column_id), "faded", note=_variant(result))
    part = f", {result.column.part}" if result.column.part else ""
    return entry(task_title(result.column.task) + part, note=_variant(result), link=links.task(result.column.task))


def _method_entry(result: Result) -> Entry:
    part = result.column.part if result.column else None
    return entry(_row(result.line), note=part or "", link=links.method(result.method))


def _above(result: Result) -> Entry:
    reference = result.table.reference[result.line.key]
    if reference.key == result.line.key:
        return entry("reference", "faded")
    found = views.difference_entry(result.table.differences.get((result.line.key, result.column_id)))
    return entry(found.text, *found.marks, note=found.note, sign=found.sign,
                 title=f"above {reference.label}" + (f"; {found.title}" if found.title else ""))


def _data(result: Result, majority: float | None) -> dict[str, Number]:
    table, line = result.table, result.line
    value, delta = table.values[line.key, result.column_id], table.differences.get((line.key, result.column_id))
    summary, size = value.summary, table.sizes.get(line.key)
    inside, beyond = summary.interval if summary else None, delta.interval if delta else None
    return {
        "study": result.of.study.id, "scale": result.of.scale, "table": table.id, "base": table.base, "row": line.row,
        "label": line.label, "method": result.method, "budget": line.budget, "learning_rate": line.rate,
        "task": result.column.task if result.column else None,
        "part": result.column.part if result.column else result.column_id,
        "mean_percent": 100 * summary.mean if summary else None,
        "sd_percent": 100 * summary.sd if summary and summary.sd is not None else None,
        "low_percent": 100 * inside.low if inside else None, "high_percent": 100 * inside.high if inside else None,
        "interval": summary.basis if summary else None, "seeds": summary.seeds if summary else 0, "state": value.state,
        "majority_percent": 100 * majority if majority is not None else None, "reference": table.reference[line.key].key,
        "difference_points": 100 * delta.mean if delta else None,
        "difference_low_points": 100 * beyond.low if beyond else None,
        "difference_high_points": 100 * beyond.high if beyond else None, "trained": size.middle if size else None,
    }
