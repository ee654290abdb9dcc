"""Fair tuning in the report: the rates that were chosen and how sharply, and what is left of each gain over the reference.

`suite.fair` says how it is done; here it is measured and put beside the paper's protocol.
"""

from __future__ import annotations

import math
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import special

from reports import numbers, views
from reports.sheets import Entry, Number, Sheet, entry
from reports.tables import Line, StudyTable, Value, budget_name, measure, read, task_title
from suite import fair, records
from suite.fair import Point, Tuning
from suite.statistics import CONFIDENCE, Difference, Interval

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from reports.figures import Figure
    from suite.study import Study, Table


@dataclass(frozen=True)
class Change:
    """What a gain is with fair tuning, less what it is at the paper's rates; in the units of the scores (0..1)."""

    mean: float
    interval: Interval | None

    @property
    def clear(self) -> bool:
        return self.interval is not None and self.interval.excludes_zero


@dataclass(frozen=True)
class FairSection:
    """What the report says of one fair table. `gains` and the others are None, and `figure` too, when nothing was run."""

    sentences: list[str]
    gains: Sheet | None = None
    rates: Sheet | None = None
    curves: Sheet | None = None
    measured: Sheet | None = None
    figure: Figure | None = None

    @property
    def sheets(self) -> list[Sheet]:
        return [sheet for sheet in (self.gains, self.rates, self.curves, self.measured) if sheet is not None]


def sections(study: Study, scale: str, folder: Path | None) -> dict[str, FairSection]:
    """The sections of the study's fair tables, by table; the figures are drawn when there is a folder for them."""
    if not fair.has(study, scale):
        return {}
    tunings: dict[str, list[Tuning]] = {}
    for one in fair.survey(study, scale):
        tunings.setdefault(one.table, []).append(one)
    tested = [cell for found in tunings.values() for one in found for cell in one.test]
    before = fair.paper(study, scale)
    known = records.load_many(cell.spec.id for cell in [*tested, *before])
    after = {table.id: table for table in measure(fair.tested(study, scale), scale, tested, known)}
    paper = {table.id: table for table in measure(fair.counterpart(study, scale), scale, before, known)}
    made = {}
    for name, found in tunings.items():
        if not any(point.records for one in found for point in one.points):
            made[name] = FairSection([f"Fair tuning has not been run yet: `suite run {study.id} --scale {scale} "
                                      "--protocol fair`."])
            continue
        made[name] = _section(study, study.edition(scale).tables[name], found, paper[name], after.get(name), folder)
    return made


def terminal_tables(study: Study, scale: str) -> list[RichTable]:
    """The gains and the chosen rates for a terminal."""
    return [sheet.terminal() for section in sections(study, scale, None).values()
            for sheet in (section.gains, section.rates) if sheet is not None]


def change(after: Difference | None, before: Difference | None) -> Change | None:
    """The difference of two differences: `after` minus `before`, whose seeds have nothing in common.

    The two errors are added as if the test items had nothing in common either. They do have, so the interval is a little
    wider than it must be. Degrees of freedom are Welch's. There is no interval where one of the two lacks its error.
    """
    if after is None or before is None:
        return None
    mean = after.mean - before.mean
    if after.error is None or before.error is None or after.dof is None or before.dof is None:
        return Change(mean, None)
    parts = [(after.error**2, after.dof), (before.error**2, before.dof)]
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Change(mean, None)
    dof = variance**2 / sum(part**2 / own for part, own in parts)
    half = math.sqrt(variance) * float(special.stdtrit(dof, (1 + CONFIDENCE) / 2))
    return Change(mean, Interval(mean - half, mean + half))


@dataclass(frozen=True)
class Curve:
    """Validation scores of a row by rate. `error`: the standard error of each over validation items, None without
    predictions. `flat`: the rates around the best that are not worse than it by more than one standard error of the
    difference on the same items."""

    rates: tuple[float, ...]
    scores: tuple[float | None, ...]
    by_task: tuple[Mapping[str, float], ...]
    errors: tuple[float | None, ...]
    flat: tuple[float, float] | None


def curve(tuning: Tuning) -> Curve:
    """The whole curve of a row, with its flatness."""
    answers = [_answers(point) for point in tuning.points]
    rates = tuple(point.rate for point in tuning.points)
    best = rates.index(tuning.chosen) if tuning.chosen is not None else None
    flat = None
    if best is not None and answers[best]:
        near = [_within(answers[best], answers[place]) for place in range(len(rates))]
        low, high = best, best
        while low > 0 and near[low - 1]:
            low -= 1
        while high < len(rates) - 1 and near[high + 1]:
            high += 1
        flat = rates[low], rates[high]
    return Curve(rates, tuple(point.score for point in tuning.points), tuple(point.scores for point in tuning.points),
                 tuple(_error(list(found.values())) if found else None for found in answers), flat)


def _answers(point: Point) -> dict[str, pd.Series]:
    """Share of right answers over seeds by validation item, by task; a diverged run has none right. Empty while runs or
    predictions are missing."""
    found: dict[str, list[pd.Series]] = {}
    for cell in point.cells if point.done else ():
        record = point.records[cell.spec.id]
        if record.status == "skipped":
            continue
        frame = read(partial(record.predictions, ("item", "correct")))
        if frame is None:
            return {}
        right = frame.groupby("item")["correct"].mean().astype(float)
        found.setdefault(cell.spec.task.id, []).append(right * (record.status != "diverged"))
    return {task: pd.concat(seeds, axis=1).mean(axis=1) for task, seeds in found.items()}


def _error(parts: Sequence[pd.Series]) -> float:
    """Standard error over items of the mean over tasks of these, an item each."""
    return math.sqrt(sum(float(np.var(part, ddof=1)) / len(part) for part in parts if len(part) > 1)) / len(parts)


def _within(best: Mapping[str, pd.Series], other: Mapping[str, pd.Series]) -> bool:
    """Whether the other is below the best by no more than one standard error, paired by item."""
    if set(other) != set(best):
        return False
    parts = [(best[task] - other[task]).dropna() for task in best]
    return plain.fmean(float(part.mean()) for part in parts) <= _error(parts)


def _section(study: Study, table: Table, tunings: Sequence[Tuning], paper: StudyTable, after: StudyTable | None,
             folder: Path | None) -> FairSection:
    curves = [curve(one) for one in tunings]
    after = replace(after, id=f"{paper.id}-fair", title=f"{paper.title}, tuned fairly") if after is not None else None
    figure = None
    if folder is not None:
        from reports import fair_plot, figures  # matplotlib is slow to import, and the terminal does not need it

        figure = fair_plot.draw(study, table, paper.id, tunings, curves, figures.looks(list(study.rows)), folder)
    return FairSection(
        _sentences(study, table, tunings, paper, after), _gains(study, table, tunings, paper, after),
        _rates(study, table, paper.id, tunings, curves), _curves(study, paper.id, tunings, curves),
        views.measured(after) if after is not None else None, figure)


def label(study: Study, one: Tuning, several: bool) -> str:
    """A row's name, with its budget where there are several."""
    name = study.rows[one.row].label
    return f"{name}, {one.budget.label}" if several and one.budget is not None else name


def several_budgets(tunings: Sequence[Tuning]) -> bool:
    """Whether rows differ in budget."""
    return len({one.budget.text for one in tunings if one.budget is not None}) > 1


@dataclass(frozen=True)
class _Side:
    """One row and budget under one protocol."""

    table: StudyTable | None
    line: Line | None

    @classmethod
    def of(cls, table: StudyTable | None, one: Tuning) -> _Side:
        budget = budget_name((*one.runs, *one.test)[0])
        lines = [line for line in (table.lines if table is not None else ()) if (line.row, line.budget) == (one.row, budget)]
        return cls(table, lines[0] if lines else None)

    def value(self, column: str) -> Value | None:
        if self.table is None or self.line is None:
            return None
        return self.table.values.get((self.line.key, column))

    def gain(self, column: str) -> Difference | None:
        if self.table is None or self.line is None:
            return None
        return self.table.differences.get((self.line.key, column))


def _sides(one: Tuning, paper: StudyTable, after: StudyTable | None) -> tuple[_Side, _Side]:
    return _Side.of(paper, one), _Side.of(after, one)


def _gains(study: Study, table: Table, tunings: Sequence[Tuning], paper: StudyTable, after: StudyTable | None) -> Sheet:
    """Scores and gains over the reference under both protocols, and what tuning changes of the gain."""
    several, column, reference = several_budgets(tunings), paper.headline, paper.reference_label
    header = ("Row", "Rate (paper)", "Rate (fair)", "Score (paper)", "Score (fair)", f"Over {reference} (paper)",
              f"Over {reference} (fair)", "Change")
    rows, data = [], []
    for one in tunings:
        sides, is_reference = _sides(one, paper, after), one.row == table.reference
        own = table.rates(one.row)[0]
        scores = [entry(numbers.DASH, "missing", title="not run yet") if value is None else
                  views.value_entry(value, column in paper.averages) for value in (side.value(column) for side in sides)]
        before, now = (side.gain(column) for side in sides)
        gains = [views.difference_entry(before), views.difference_entry(now), _change_entry(change(now, before))]
        if is_reference:
            gains = [entry("reference", "faded"), entry("reference", "faded"), entry(numbers.DASH, "faded")]
        rows.append((entry(label(study, one, several), *(("reference",) if is_reference else ())),
                     Entry(f"{own:g}" if one.points else numbers.DASH), _chosen_entry(one), *scores, *gains))
        data += [_gain_data(one, own, name, *sides) for name in paper.column_ids]
    fresh = table.fair.test_seeds if table.fair else ()
    notes = [
        f"Scores in percent, gains over {reference} and their change in percentage points, {_over(paper)}. (paper): the "
        f"study's own settings, seeds {numbers.listing(list(map(str, table.seeds)))}. (fair): the tuned rate, fresh seeds "
        f"{numbers.listing(list(map(str, fresh)))}. The test items are the same.",
        "Change: the gain with every row tuned alike, less the gain at the study's own rates, with its 95 % interval over "
        "seeds and items (the errors of both gains added). Bold: the interval excludes zero.",
        views.FINDS,
    ]
    return Sheet(f"{paper.id}-fair-gains", f"What is left of the gains over {reference}", header, tuple(rows), tuple(data),
                 tuple(notes))


def _over(table: StudyTable) -> str:
    return f"averaged over {numbers.several(len(table.columns), 'column')}" if table.has_average else \
        f"on {table.title_of(table.headline)}"


def _change_entry(moved: Change | None) -> Entry:
    if moved is None:
        return entry(numbers.DASH, "missing", title="one of the two has not been run yet")
    if moved.interval is None:
        return entry(numbers.signed(moved.mean), "faded", note="no interval")
    return entry(numbers.signed(moved.mean), *(("clear",) if moved.clear else ()), note=numbers.interval(moved.interval))


def _chosen_entry(one: Tuning) -> Entry:
    if not one.points:
        return entry(numbers.DASH, "faded", title="nothing is trained, so there is no rate")
    if one.chosen is None:
        return entry("skipped", "skipped") if one.settled else entry(numbers.DASH, "missing", title="not settled yet")
    if one.edge is not None:
        return entry(f"{one.chosen:g}", "warn", note=f"{one.edge} rate tried",
                     title="the best rate stands at an end of what was tried, and no further one was allowed")
    return Entry(f"{one.chosen:g}")


def _gain_data(one: Tuning, own: float, column: str, before: _Side, now: _Side) -> dict[str, Number]:
    found: dict[str, Number] = {"row": one.row, "budget": one.budget.text if one.budget else "", "column": column,
                                "rate_paper": own, "rate_fair": one.chosen, "edge": one.edge}
    for name, side in (("paper", before), ("fair", now)):
        value, gain = side.value(column), side.gain(column)
        found[f"score_{name}_percent"] = 100 * value.summary.mean if value and value.summary else None
        found |= _points(f"gain_{name}", gain.mean if gain else None, gain.interval if gain else None)
    moved = change(now.gain(column), before.gain(column))
    return found | _points("change", moved.mean if moved else None, moved.interval if moved else None)


def _points(name: str, mean: float | None, interval: Interval | None) -> dict[str, Number]:
    return {f"{name}_points": None if mean is None else 100 * mean, f"{name}_low": 100 * interval.low if interval else None,
            f"{name}_high": 100 * interval.high if interval else None}


def _rates(study: Study, table: Table, name: str, tunings: Sequence[Tuning], curves: Sequence[Curve]) -> Sheet:
    """Chosen rates, how flat the curve is around them, and what finding them cost."""
    several = several_budgets(tunings)
    header = ("Row", "Chosen", "Study's own", "Validation", "As good", "Best by task", "Tried", "Runs", "Diverged", "Time")
    rows, data = [], []
    for one, found in zip(tunings, curves, strict=True):
        if not one.points:
            continue
        made = [record for point in one.points for record in point.records.values()]
        place = found.rates.index(one.chosen) if one.chosen is not None else None
        score = found.scores[place] if place is not None else None
        error = found.errors[place] if place is not None else None
        by_task = _best_by_task(found) if one.settled else {}
        flat = f"{found.flat[0]:g} to {found.flat[1]:g}" if found.flat and found.flat[0] < found.flat[1] else \
            f"{found.flat[0]:g} only" if found.flat else numbers.DASH
        seconds = sum(record.timings.total for record in made)
        diverged = sum(point.diverged for point in one.points)
        scored = numbers.DASH if score is None else numbers.percent(score) + (
            f" ± {numbers.percent(error)}" if error is not None else "")
        rows.append((
            entry(label(study, one, several), *(("reference",) if one.row == table.reference else ())),
            _chosen_entry(one), Entry(f"{table.rates(one.row)[0]:g}"), Entry(scored), Entry(flat),
            Entry(", ".join(f"{rate:g}" for rate in by_task.values()) or numbers.DASH,
                  title=", ".join(f"{task_title(task)} {rate:g}" for task, rate in by_task.items())),
            Entry(f"{found.rates[0]:g} to {found.rates[-1]:g}"), Entry(f"{len(made)} of {len(one.runs)}"),
            entry(str(diverged), *(("failed",) if diverged else ())), Entry(numbers.seconds(seconds))))
        data.append({
            "row": one.row, "budget": one.budget.text if one.budget else "", "chosen": one.chosen,
            "paper": table.rates(one.row)[0], "edge": one.edge, "validation_percent": None if score is None else 100 * score,
            "error_percent": None if error is None else 100 * error, "flat_low": found.flat[0] if found.flat else None,
            "flat_high": found.flat[1] if found.flat else None, "lowest_tried": found.rates[0],
            "highest_tried": found.rates[-1], "rates": len(found.rates), "runs": len(made), "runs_planned": len(one.runs),
            "diverged": diverged, "seconds": seconds, **{f"best_{task}": rate for task, rate in by_task.items()}})
    tasks = table.fair.tasks or table.tasks if table.fair else table.tasks
    seeds = table.fair.tuning_seeds if table.fair else ()
    notes = [
        f"Chosen: the highest mean validation score over {numbers.listing([task_title(task) for task in tasks])} and tuning "
        f"seed{'s' if len(seeds) > 1 else ''} {numbers.listing(list(map(str, seeds)))}; of equal ones the lower rate; a "
        "diverged run counts as 0. One rate for all tasks.",
        "Validation: percent, ± its standard error over validation items. It is the highest of many and so too high; the "
        "test scores above are not.",
        "As good: the rates around the chosen one whose score is not lower by more than one standard error of the "
        "difference on the same validation items. Best by task: what each task alone would have chosen. Time: work of all "
        "tuning runs.",
    ]
    return Sheet(f"{name}-fair-rates", "Learning rates that were chosen", header, tuple(rows), tuple(data), tuple(notes))


def _best_by_task(found: Curve) -> dict[str, float]:
    tasks = dict.fromkeys(task for scores in found.by_task for task in scores)
    return {task: max(zip(found.rates, found.by_task, strict=True), key=lambda pair: (pair[1].get(task, -1.0), -pair[0]))[0]
            for task in tasks}


def _curves(study: Study, name: str, tunings: Sequence[Tuning], curves: Sequence[Curve]) -> Sheet:
    """Every validation score: rows by rates."""
    several = several_budgets(tunings)
    rates = sorted({rate for found in curves for rate in found.rates})
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for one, found in zip(tunings, curves, strict=True):
        if not one.points:
            continue
        scores = dict(zip(found.rates, found.scores, strict=True))
        line = [Entry(label(study, one, several))]
        for rate in rates:
            score = scores.get(rate)
            if rate not in scores:
                line.append(Entry(""))
            elif score is None:
                line.append(entry(numbers.DASH, "missing", title="not run yet"))
            else:
                line.append(entry(numbers.percent(score), *(("best",) if rate == one.chosen else ())))
        rows.append(tuple(line))
        for point, score, error in zip(one.points, found.scores, found.errors, strict=True):
            data.append({"row": one.row, "budget": one.budget.text if one.budget else "", "rate": point.rate, "task": "mean",
                         "score_percent": None if score is None else 100 * score,
                         "error_percent": None if error is None else 100 * error, "diverged": point.diverged})
            data += [{"row": one.row, "budget": one.budget.text if one.budget else "", "rate": point.rate, "task": task,
                      "score_percent": 100 * value} for task, value in point.scores.items()]
    return Sheet(f"{name}-fair-curves", "Validation score at every learning rate", ("Row", *(f"{rate:g}" for rate in rates)),
                 tuple(rows), tuple(data), ("Percent, mean over tasks and tuning seeds. Bold: the rate that was chosen.",))


#: What may become of a gain: how it is told from the two differences, and the words.
_FATES = (
    (lambda before, now: now.clear and now.mean > 0 and before is not None and before.clear and before.mean > 0,
     "Clearly above {} under both protocols"),
    (lambda before, now: now.clear and now.mean > 0, "Clearly above {} with fair tuning alone"),
    (lambda before, now: now.clear, "Clearly below {} with fair tuning"),
    (lambda before, now: before is not None and before.clear and before.mean > 0,
     "Clearly above {} at the study's own rates, not told apart from it with fair tuning"),
    (lambda before, now: True, "Not told apart from {} with fair tuning"),
)


def _sentences(study: Study, table: Table, tunings: Sequence[Tuning], paper: StudyTable,
               after: StudyTable | None) -> list[str]:
    """How far it is, what is left of the gains, and which rates stand at an end."""
    several, reference = several_budgets(tunings), paper.reference_label
    tuned = [one for one in tunings if one.points]
    settled = sum(one.settled for one in tuned)
    said = [f"With every row tuned on validation data at the same learning rates ({settled} of "
            f"{numbers.several(len(tuned), 'row')} settled), and fresh seeds on the test data:"]
    told: dict[str, list[str]] = {}
    for one in tunings:
        before, now = (side.gain(paper.headline) for side in _sides(one, paper, after))
        if one.row != table.reference and now is not None:
            text = next(text for holds, text in _FATES if holds(before, now))
            was = f"; at its own rate {numbers.signed(before.mean)}" if before is not None else ""
            told.setdefault(text, []).append(f"{label(study, one, several)} ({numbers.signed(now.mean)}{was})")
    said += [f"{text.format(reference)}: {numbers.listing(told[text])}." for _, text in _FATES if text in told]
    edges = [f"{label(study, one, several)} ({one.chosen:g}, the {one.edge})" for one in tuned if one.edge is not None]
    if edges:
        said.append("The best rate stands at an end of what was tried, so a better one may lie beyond: "
                    f"{numbers.listing(edges)}.")
    return said
