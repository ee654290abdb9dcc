"""The fair protocol: every row of a table gets the same search for its learning rate, then fresh seeds on the test split.

1. Every row runs at every rate of one grid, with the tuning seeds, and is scored on validation items (`Table.fair`).
2. A row's score at a rate is the mean over the table's tasks and the tuning seeds; a diverged run counts as 0, the worst
   there is. The highest score wins; of equal ones, the lower rate. One rate is chosen for a row and budget over all tasks,
   as the paper's tables have one: one task's validation items are too few to choose by (300 items: 2.5 points of noise).
3. While the winner stands at an end of what was tried, one rate more is tried beyond it, up to `Grid.extensions` in all.
   A winner that stands at an end then is reported as such.
4. The chosen rate runs with fresh seeds and is scored on the test split, as the paper's rates are.

Which runs come next follows from the study and the records that exist, and from nothing else: a sweep that was killed goes
on, and several processes agree without talking. Every run is an ordinary `RunSpec`; those at the paper's own rates are the
runs of the paper's protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from suite import records, registry
from suite import study as studies
from suite.errors import UserError, one_of
from suite.records import Record
from suite.specs import Budget
from suite.study import Cell, Fair, Study, Table

if TYPE_CHECKING:
    from suite.plan import Plan

Stage = Literal["paper", "tuning", "test"]
End = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Point:
    """One learning rate of a row: its runs on validation data, and the records of those that have one."""

    rate: float
    cells: tuple[Cell, ...]
    records: Mapping[str, Record]

    @property
    def done(self) -> bool:
        return all(cell.spec.id in self.records and self.records[cell.spec.id].status in records.DONE for cell in self.cells)

    @property
    def scores(self) -> dict[str, float]:
        """Mean score over seeds by task, of what has been scored. A diverged run has 0."""
        found: dict[str, list[float]] = {}
        for cell in self.cells:
            record = self.records.get(cell.spec.id)
            if record is not None and record.status in ("finished", "diverged"):
                lost = record.status == "diverged" or record.score is None
                found.setdefault(cell.spec.task.id, []).append(0.0 if lost or record.score is None else record.score.value)
        return {task: sum(values) / len(values) for task, values in found.items()}

    @property
    def score(self) -> float | None:
        """Mean over tasks; None while runs are missing, and where all were skipped."""
        scores = self.scores
        return sum(scores.values()) / len(scores) if scores and self.done else None

    @property
    def diverged(self) -> int:
        return sum(record.status == "diverged" for record in self.records.values())


@dataclass(frozen=True)
class Tuning:
    """How far the tuning of one row at one budget (None: it has no size) is. `points` in order of rate. `chosen` is None
    until it is settled, and for rows that were skipped or train nothing. `edge`: at which end of what was tried the chosen
    rate stands, when no further rate may be tried. `test`: the runs of the chosen rate on the test split."""

    table: str
    row: str
    budget: Budget | None
    points: tuple[Point, ...] = ()
    chosen: float | None = None
    settled: bool = False
    edge: End | None = None
    test: tuple[Cell, ...] = ()

    @property
    def runs(self) -> tuple[Cell, ...]:
        """The tuning runs that were asked for so far."""
        return tuple(chain.from_iterable(point.cells for point in self.points))


def survey(study: Study, scale: str) -> list[Tuning]:
    """How far every row and budget of the study's fair tables is, by the records that exist, in the order of the study.

    Raises `UserError` when no table of the study at this scale has a `fair` block.
    """
    runs = _grouped(study, scale, _tuned)
    known = records.load_many(cell.spec.id for rates in runs.values() for cells in rates.values() for cell in cells)
    tests, paper = _grouped(study, scale, _tested), _grouped(study, scale, _as_it_is)
    found = []
    for key, rates in runs.items():
        (table, row, _), first = key, next(iter(rates.values()))[0]
        budget = first.spec.budget
        if registry.method(first.spec.method.id).trains == "nothing":  # nothing to tune: the paper's run is its test
            test = tuple(chain.from_iterable(paper[key].values()))
            found.append(Tuning(table, row, budget, settled=True, test=test))
            continue
        points = {rate: Point(rate, tuple(cells), {cell.spec.id: known[cell.spec.id] for cell in cells
                                                   if cell.spec.id in known}) for rate, cells in rates.items()}
        fair = _fair(study.edition(scale).tables[table])
        tried, chosen, edge = _search(fair, points)
        settled = all(point.done for point in tried)
        test = tuple(tests[key][chosen]) if chosen is not None else ()
        found.append(Tuning(table, row, budget, tuple(tried), chosen, settled, edge, test))
    return found


def cells(study: Study, scale: str, only: Sequence[str] = ()) -> list[Cell]:
    """The runs of the fair protocol that are known to be needed so far: those of the paper's protocol that its tables are
    held against, all rates that are to be tried, and the test runs of rows whose rate is chosen.

    `only` as in `studies.cells`. What it leaves out is not run, but still counts: no rate is chosen before all runs of a
    row's grid have their records.
    """
    known = survey(study, scale)
    listed = [*paper(study, scale), *chain(*(one.runs for one in known)), *chain(*(one.test for one in known))]
    return studies.filtered(study, scale, _distinct(listed), only)


def paper(study: Study, scale: str) -> list[Cell]:
    """The runs of the paper's protocol in the rows, tasks and budgets of the fair tables."""
    return studies.cells(counterpart(study, scale), scale)


def stage(study: Study, scale: str, cell: Cell) -> Stage:
    """What a run of the fair protocol is for."""
    if cell.spec.evaluation.split == "validation":
        return "tuning"
    return "paper" if cell.spec.seed in study.edition(scale).tables[cell.table].seeds else "test"


def expected(study: Study, scale: str, only: Sequence[str] = ()) -> tuple[list[Cell], list[Cell]]:
    """All runs of the fair protocol from beginning to end, as far as can be said: if no further row needs rates beyond its
    grid, and if every row takes all that it may. Where a rate is not chosen yet, the middle one stands for it."""
    known = survey(study, scale)
    runs, tests = _grouped(study, scale, _tuned), _grouped(study, scale, _tested)
    least, most = paper(study, scale), []
    for one in known:
        fair, key = _fair(study.edition(scale).tables[one.table]), (one.table, one.row, _name(one.budget))
        least += one.runs
        least += one.test
        if not one.settled:
            rates = [point.rate for point in one.points]
            left = fair.grid.extensions - (len(rates) - len(fair.grid.rates()))
            least += tests[key][rates[len(rates) // 2]]
            most += [cell for rate in [rate for rate in runs[key] if rate > rates[-1]][:left] for cell in runs[key][rate]]
    both = [studies.filtered(study, scale, _distinct(listed), only) for listed in (least, [*least, *most])]
    return both[0], both[1]


def tested(study: Study, scale: str) -> Study:
    """The study with its fair tables alone, as they are scored on the test split; the rates are still the paper's."""
    return _derived(study, scale, lambda table: {"seeds": _fair(table).test_seeds})


def counterpart(study: Study, scale: str) -> Study:
    """The study with what the fair tables are held against: the paper's protocol in their rows, tasks and budgets."""
    return _derived(study, scale, _as_it_is)


def has(study: Study, scale: str) -> bool:
    """Whether a table of the study at this scale has a fair block."""
    return any(table.fair is not None for table in study.edition(scale).tables.values())


@dataclass(frozen=True)
class Progress:
    """Where one row at one budget stands. `stage`: `grid`, `extension`, `test`, `done` or `skipped`; `runs` of `asked` are
    there in this stage; `rates` were or are tried."""

    table: str
    row: str
    budget: str
    stage: str
    runs: int
    asked: int
    rates: tuple[float, ...]
    chosen: float | None
    edge: End | None


def progress(study: Study, scale: str) -> list[Progress]:
    """Where every row of the fair tables stands."""
    found = []
    for one in survey(study, scale):
        grid = len(_fair(study.edition(scale).tables[one.table]).grid.rates())
        rates = tuple(point.rate for point in one.points)
        cells = one.test if one.settled else one.runs
        runs = sum(records.is_done(cell.spec.id) for cell in cells)
        stage = ("extension" if len(rates) > grid else "grid") if not one.settled else \
            "skipped" if not cells else "test" if runs < len(cells) else "done"
        found.append(Progress(one.table, one.row, one.budget.label if one.budget else "", stage, runs, len(cells), rates,
                              one.chosen, one.edge))
    return found


def progress_table(study: Study, found: Sequence[Progress]) -> tuple[list[str], list[list[object]]]:
    """`progress` for people."""
    header = ["table", "row", "budget", "stage", "runs", "rates tried", "chosen", "note"]
    rows: list[list[object]] = []
    for one in found:
        rows.append([one.table, study.rows[one.row].label, one.budget or "—", one.stage, f"{one.runs} of {one.asked}",
                     f"{one.rates[0]:g} to {one.rates[-1]:g}" if one.rates else "none: nothing is trained",
                     f"{one.chosen:g}" if one.chosen is not None else "—",
                     f"best at the {one.edge} rate tried" if one.edge else ""])
    return header, rows


def sentences(study: Study, scale: str, now: Plan, least: Plan, most: Plan) -> list[str]:
    """What a plan of the fair protocol comes to: what is run, and how long it takes with and without further rates."""
    said = []
    for table in tested(study, scale).edition(scale).tables.values():
        fair = _fair(table)
        said.append(
            f"{table.title}: {_several(len(fair.grid.rates()), 'rate')} from {fair.grid.lowest:g} to {fair.grid.highest:g}, "
            f"up to {fair.grid.extensions} more for a row whose best is at an end; tuning on validation items with "
            f"{_seeds(fair.tuning_seeds)}, test with {_seeds(fair.test_seeds)}.")
    return [*said, f"First round: {_cost(now)}. All of it, on {now.machine}: {_cost(least)} if no row needs more rates, "
                   f"{_cost(most)} if all take all they may (what is done is not counted; rates and knees: {now.rates})."]


def _cost(of: Plan) -> str:
    runs = sum(len(pack) for pack in of.packs)
    hours = of.seconds / 3600
    return f"{_several(runs, 'run')}, {f'{of.seconds / 60:.0f} minutes' if hours < 2 else f'{hours:,.1f} hours'}"


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _search(fair: Fair, points: Mapping[float, Point]) -> tuple[list[Point], float | None, End | None]:
    """The points that are to be tried, the chosen rate, and the end at which it stands if it had to be left there."""
    below = above = 0
    while True:
        tried = [points[rate] for rate in fair.grid.rates(below, above)]
        scores = [point.score for point in tried]
        if not all(point.done for point in tried) or all(score is None for score in scores):
            return tried, None, None
        # Rates rise, so the first of equal scores is the lowest rate. Scores are means: rounding must not break a tie.
        best = max(range(len(tried)), key=lambda place: (round(scores[place] or 0.0, 9), -place))
        edge: End | None = "lowest" if best == 0 else "highest" if best == len(tried) - 1 else None
        if edge is None or below + above == fair.grid.extensions:
            return tried, tried[best].rate, edge
        below, above = below + (edge == "lowest"), above + (edge == "highest")


Change = Callable[[Table], dict[str, Any]]


def _as_it_is(table: Table) -> dict[str, Any]:
    return {}


def _tuned(table: Table) -> dict[str, Any]:
    """What tuning changes of a table: every rate that may be tried, on validation items, with the tuning seeds."""
    fair = _fair(table)
    return {"seeds": fair.tuning_seeds, "test": fair.validation, "learning_rates": _rates(table, fair),
            "evaluation": table.evaluation.model_copy(update={"split": "validation"})}


def _tested(table: Table) -> dict[str, Any]:
    """What the fair test changes of a table: every rate that may be chosen, with fresh seeds."""
    fair = _fair(table)
    return {"seeds": fair.test_seeds, "learning_rates": _rates(table, fair)}


def _rates(table: Table, fair: Fair) -> dict[str, tuple[float, ...]]:
    extensions = fair.grid.extensions
    return dict.fromkeys(fair.rows or table.rows, fair.grid.rates(extensions, extensions))


def _derived(study: Study, scale: str, change: Change) -> Study:
    """The study with its fair tables alone, cut to what is tuned, and changed."""
    edition = study.edition(scale)
    found = {name: table.model_copy(update={
        "rows": table.fair.rows or table.rows, "tasks": table.fair.tasks or table.tasks,
        "budgets": table.fair.budgets or table.budgets, **change(table)})
        for name, table in edition.tables.items() if table.fair is not None}
    if not found:
        having = [name for name, other in study.scales.items() if any(table.fair for table in other.tables.values())]
        remedy = f"use --scale {one_of(having)}" if having else "docs/fair.md says what to write"
        raise UserError(f"study {study.id} at {scale}: no table has a `fair` block, so it has no fair protocol; {remedy}")
    return study.model_copy(update={"scales": {**study.scales, scale: edition.model_copy(update={"tables": found})}})


def _grouped(study: Study, scale: str, change: Change) -> dict[tuple[str, str, str], dict[float, list[Cell]]]:
    """Cells of the changed study by table, row and budget, and by rate in rising order."""
    found: dict[tuple[str, str, str], dict[float, list[Cell]]] = {}
    for cell in studies.cells(_derived(study, scale, change), scale):
        rates = found.setdefault((cell.table, cell.row, _name(cell.spec.budget)), {})
        rates.setdefault(cell.spec.recipe.learning_rate, []).append(cell)
    return {key: dict(sorted(rates.items())) for key, rates in found.items()}


def _name(budget: Budget | None) -> str:
    return budget.text if budget is not None else ""


def _fair(table: Table) -> Fair:
    assert table.fair is not None, "only fair tables are derived"
    return table.fair


def _distinct(listed: Sequence[Cell]) -> list[Cell]:
    return list({(cell.table, cell.row, cell.spec.id): cell for cell in listed}.values())
