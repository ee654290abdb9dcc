"""A study file, read strictly and resolved into runs.

A study holds rows (a method with options) and, per scale, tables: a base, tasks, which rows, budgets, learning rates,
seeds, a recipe, an evaluation protocol and the published table it is held against.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from suite import bases, calibration, paths, published, registry, yamlfile
from suite.budget import fit
from suite.conventions import Excusable
from suite.errors import UserError, one_of
from suite.specs import (
    BaseRef,
    Budget,
    Evaluation,
    Frozen,
    MethodRef,
    PositiveFloat,
    PositiveInt,
    Recipe,
    RunSpec,
    TaskRef,
)
from suite.verdicts import Margins

Scale = Literal["desk", "bench", "paper"]
SCALES: tuple[Scale, ...] = ("desk", "bench", "paper")


#: Several learning rates of one row: an axis of the sweep, like its budgets and seeds.
Rates = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]


class PaperRef(Frozen):
    title: str
    arxiv: str | None = None
    year: int | None = None


class Row(Frozen):
    """One line of a table: a method, its options, and the name a reader sees."""

    method: str
    label: str
    options: dict[str, Any] = Field(default_factory=dict)


class PublishedRef(Frozen):
    """The published table this one is held against; `rows` maps our row names to the method names in it.

    `tasks` maps our tasks (or TASK/PART) to columns of it where the names differ. `despite`: what may differ, or be
    unknown, without that a verdict is withheld; such a verdict is shown and never fails."""

    table: str
    columns: tuple[str, ...] = ()
    rows: dict[str, str]
    tasks: dict[str, str] = Field(default_factory=dict)
    despite: tuple[Excusable, ...] = ()

    def column(self, task: str, part: str | None = None) -> str:
        """The column that a task, or a part of one, would stand in."""
        return self.tasks.get(task if part is None else f"{task}/{part}", part or task)


class Grid(Frozen):
    """Learning rates of even ratio: 10^(k / `per_decade`) for whole k, to two digits, from `lowest` to `highest`. A row
    whose best rate is at an end gets further ones beyond it, `extensions` in all at most."""

    lowest: PositiveFloat
    highest: PositiveFloat
    per_decade: Annotated[int, Field(ge=1, le=10)] = 4
    extensions: Annotated[int, Field(ge=0)] = 4

    def rates(self, below: int = 0, above: int = 0) -> tuple[float, ...]:
        """The rates, with so many more below and above."""
        first, last = self._place(self.lowest), self._place(self.highest)
        return tuple(self._rate(place) for place in range(first - below, last + above + 1))

    def _place(self, rate: float) -> int:
        return round(self.per_decade * math.log10(rate))

    def _rate(self, place: int) -> float:
        return float(f"{10 ** (place / self.per_decade):.1e}")

    @model_validator(mode="after")
    def _has_its_ends(self) -> Grid:
        for key in ("lowest", "highest"):
            given = getattr(self, key)
            near = [self._rate(self._place(given) + step) for step in (-1, 0, 1)]
            if given not in near:
                raise ValueError(f"{key}: {given:g} is none of {self.per_decade} rates a decade; near it are {one_of(near)}")
        if len(self.rates()) < 3:
            raise ValueError("a grid has at least three rates from lowest to highest")
        return self


class Fair(Frozen):
    """How the rows of a table are tuned alike (`suite.fair`). None stands for all of the table's rows, tasks and budgets.
    `validation`: how many items of the validation split (of each part of a task) a rate is scored on."""

    grid: Grid
    rows: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    tasks: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] | None = None
    tuning_seeds: Seeds
    test_seeds: Seeds
    validation: PositiveInt | None = None


class Table(Frozen):
    """One table of a study at one scale. `learning_rates` overrides the recipe's rate per row, with
    one rate or several (a run for each); `train` is a number of
    items, or one per task. `sizes` gives rows the size that their paper has, in place of what a budget solves for.
    `unmet`: what becomes of a method that cannot have a budget: the study is refused, or its runs are recorded as
    skipped, with the reason. `fair`: the same table with every row tuned alike."""

    title: str
    base: str
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    rows: Annotated[tuple[str, ...], Field(min_length=1)]
    reference: str
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)]
    seeds: Seeds
    train: PositiveInt | dict[str, PositiveInt] | None = None
    test: PositiveInt | None = None
    recipe: Recipe
    learning_rates: dict[str, PositiveFloat | Rates] = Field(default_factory=dict)
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    sizes: dict[str, PositiveInt] = Field(default_factory=dict)
    unmet: Literal["refuse", "skip"] = "refuse"
    evaluation: Evaluation = Evaluation()
    published: PublishedRef | None = None
    margins: Margins = Margins()
    fair: Fair | None = None
    notes: tuple[str, ...] = ()

    def items(self, task: str) -> int | None:
        """Training items of a task (None: all)."""
        return self.train.get(task) if isinstance(self.train, dict) else self.train

    def rates(self, row: str) -> tuple[float, ...]:
        """The learning rates of a row, in the order of the file."""
        given = self.learning_rates.get(row, self.recipe.learning_rate)
        return given if isinstance(given, tuple) else (given,)

    @model_validator(mode="after")
    def _reference_is_a_row(self) -> Table:
        if self.reference not in self.rows:
            raise ValueError(f"reference {self.reference!r} is not one of the rows {one_of(self.rows)}")
        for task in self.train if isinstance(self.train, dict) else ():
            if task not in self.tasks:
                raise ValueError(f"train: {task!r} is none of the table's tasks {one_of(self.tasks)}")
        return self

    @model_validator(mode="after")
    def _nothing_stands_twice(self) -> Table:
        for key in ("tasks", "rows", "budgets", "seeds"):
            values = getattr(self, key)
            if len(set(values)) != len(values):
                raise ValueError(f"{key} must not name anything twice")
        for row in self.learning_rates:
            if len(set(self.rates(row))) != len(self.rates(row)):
                raise ValueError(f"learning_rates.{row} must not name anything twice")
        return self

    @model_validator(mode="after")
    def _fair_is_a_part_of_it(self) -> Table:
        fair = self.fair
        if fair is None:
            return self
        for key in ("rows", "tasks", "budgets"):
            known, named = getattr(self, key), getattr(fair, key) or ()
            unknown = [one for one in named if one not in known]
            if unknown:
                wrong, allowed = ((unknown[0].text, [one.text for one in known]) if key == "budgets"
                                  else (repr(unknown[0]), known))
                raise ValueError(f"fair.{key}: {wrong} is none of the table's {key} {one_of(allowed)}")
            if len(set(named)) != len(named):
                raise ValueError(f"fair.{key} must not name anything twice")
        if fair.rows is not None and self.reference not in fair.rows:
            raise ValueError(f"fair.rows: the reference {self.reference!r} must be among them")
        several = next((row for row in fair.rows or self.rows if len(self.rates(row)) > 1), None)
        if several is not None:
            raise ValueError(f"fair: row {several!r} has several learning rates in learning_rates; leave it one, or out of "
                             "fair.rows")
        if self.evaluation.split != "test":
            raise ValueError("fair: the table must score its test split, as rates are chosen on the validation split")
        _check_seeds(self.seeds, fair)
        return self


def _check_seeds(seeds: tuple[int, ...], fair: Fair) -> None:
    """Fresh means fresh: the seeds of a table, of its tuning and of its fair test have nothing in common."""
    for key, own, others in (
        ("tuning_seeds", fair.tuning_seeds, {"seeds": seeds}),
        ("test_seeds", fair.test_seeds, {"seeds": seeds, "fair.tuning_seeds": fair.tuning_seeds}),
    ):
        if len(set(own)) != len(own):
            raise ValueError(f"fair.{key} must not name anything twice")
        for name, taken in others.items():
            common = sorted(set(own) & set(taken))
            if common:
                raise ValueError(f"fair.{key}: {common[0]} stands in {name} too; use seeds that do not stand in "
                                 f"{' or '.join(others)}")


class Edition(Frozen):
    about: str
    tables: Annotated[dict[str, Table], Field(min_length=1)]


class Study(Frozen):
    """A study file. `scales` may hold any of desk, bench and paper.

    A row whose method is a pattern (`*`, `peft:*`) stands for one row per registered method that it matches, under the
    method's id and label; a table that names it has them all.
    """

    id: str
    title: str
    paper: PaperRef
    about: str
    rows: dict[str, Row]
    scales: dict[Scale, Edition]

    @model_validator(mode="before")
    @classmethod
    def _patterns_become_rows(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
            return content
        rows: dict[str, Any] = {}
        made: dict[str, list[str]] = {}
        for name, row in content["rows"].items():
            pattern = row.get("method") if isinstance(row, dict) else None
            known = registry.methods() if isinstance(pattern, str) and "*" in pattern else {}
            found = {id: method for id, method in sorted(known.items()) if fnmatchcase(id, str(pattern))}
            rows |= {id: {"label": method.label} | row | {"method": id} for id, method in found.items()} or {name: row}
            if found:
                made[name] = list(found)
        return {**content, "rows": rows, "scales": _spread(content.get("scales"), made)} if made else content

    def edition(self, scale: str) -> Edition:
        """The edition at a scale. Raises `UserError` naming the scales that the study has."""
        if scale not in self.scales:
            raise UserError(f"study {self.id}: no scale {scale!r}; use {one_of(list(self.scales))}")
        return self.scales[scale]


@dataclass(frozen=True)
class Cell:
    """A run and its place in the study: table, row, budget. Several cells may share one run."""

    table: str
    row: str
    spec: RunSpec

    @property
    def rank(self) -> int | None:
        return self.spec.budget.rank if self.spec.budget else None


def names() -> list[str]:
    """Ids of the built-in studies."""
    return sorted(path.stem for path in paths.studies().glob("*.yaml"))


def load(name: str) -> Study:
    """Read a built-in study by id, or any study file by path.

    Raises `UserError` naming the file, the key and what is allowed when anything in it is wrong.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else paths.studies() / f"{name}.yaml"
    try:
        study = yamlfile.load(path, Study)
    except FileNotFoundError:
        if path.parent != paths.studies():
            raise UserError(f"{path}: no such file") from None
        raise UserError(f"unknown study {name!r}: use {one_of(names())}, or the path of a .yaml file") from None
    _check_names(study, path)
    return study


def cells(study: Study, scale: str, only: Sequence[str] = ()) -> list[Cell]:
    """Every cell of a study at a scale, in the order of the file: table, task, budget, row, learning rate, seed.

    `only` holds filters `key=value[,value]` with key table, task, method (row or method id), rank, budget (as written:
    rank=8, lora@8, 0.5%, 300000), rate (learning rate) or seed.
    Methods without a size appear once, not once per budget. Raises `UserError` on a wrong method option or filter.
    """
    return filtered(study, scale, list(_cells(study, scale)), only)


def filtered(study: Study, scale: str, found: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that pass filters as those of `cells`. Raises `UserError` for a filter that no cell could pass."""
    for key, values in map(_filter, only):
        known = {value for cell in found for value in _facts(cell)[key]}
        for value in values:
            if value not in known:
                raise UserError(f"--only {key}={value}: study {study.id} at {scale} has {key} {one_of(sorted(known))}")
    return select(found, only)


def select(found: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that pass every filter, written as for `cells`. Raises `UserError` for one that is not `key=value`."""
    filters = [_filter(text) for text in only]
    return [cell for cell in found if all(set(_facts(cell)[key]) & values for key, values in filters)]


def supposing(study: Study, scale: str, base: str | None, budget: Budget | None) -> Study:
    """The study as it would be on another base, at another budget, or both, for planning: every method at the size that
    it solves for, and those that cannot have the budget skipped. Raises `UserError` for an unknown base."""
    change: dict[str, Any] = {"unmet": "skip", "sizes": {}}
    if base is not None:
        change["base"] = bases.get(base).id
    if budget is not None:
        change["budgets"] = (budget,)
    edition = study.edition(scale)
    tables = {name: table.model_copy(update=change) for name, table in edition.tables.items()}
    return study.model_copy(update={"scales": {**study.scales, scale: edition.model_copy(update={"tables": tables})}})


def unique(found: Sequence[Cell]) -> list[RunSpec]:
    """The distinct runs behind cells, in order."""
    return list({cell.spec.id: cell.spec for cell in found}.values())


def resolve_method(row: Row, extra: dict[str, Any], where: str) -> tuple[Any, Any]:
    """A row's method and its typed config. Raises `UserError` naming the option and what is allowed."""
    try:
        method = registry.method(row.method)
    except UserError as error:
        raise UserError(f"{where}: method: {error}") from None
    options = {**extra, **row.options}
    try:
        return method, method.Config.model_validate(options)
    except ValidationError as error:
        problem = yamlfile.explain(error, options, method.Config)
        raise UserError(f"{where}: options of {row.method}: {problem}") from None


def _cells(study: Study, scale: str) -> Iterator[Cell]:
    for table_id, table in study.edition(scale).tables.items():
        base = bases.get(table.base)
        base_ref = BaseRef(id=base.id, revision=base.revision)
        recipes: dict[float, Recipe] = {}
        precision = table.recipe.precision
        if precision == "auto":
            precision = calibration.precision(base.id)
        for task_id in table.tasks:
            task = registry.task(task_id)
            task_ref = TaskRef(id=task.id, version=task.version, train=table.items(task.id), test=table.test)
            for position, budget in enumerate(table.budgets):
                for row_id in table.rows:
                    row = study.rows[row_id]
                    where = f"study {study.id}, scales.{scale}.tables.{table_id}, row {row_id}"
                    method, config = resolve_method(row, table.options.get(row.method, {}), where)
                    if method.size is None and position > 0:
                        continue
                    unmet = None
                    try:
                        sized = _sized(method, config, budget, table.sizes.get(row_id), bases.shapes(base, task),
                                       f"{where}, base {base.id}")
                    except UserError as error:
                        if table.unmet == "refuse":
                            raise
                        sized, unmet = config, str(error.__cause__ or error)
                    reference = MethodRef(id=method.id, version=method.version, config=sized.model_dump(mode="json"))
                    rates, seeds = table.rates(row_id), table.seeds
                    if method.trains == "nothing":
                        rates, seeds = rates[:1], seeds[:1]
                    for rate in rates:
                        if rate not in recipes:
                            recipes[rate] = table.recipe.model_copy(update={"learning_rate": rate, "precision": precision})
                        for seed in seeds:  # what runs have in common is one object: a large study stays small
                            yield Cell(table_id, row_id, RunSpec(
                                base=base_ref, task=task_ref, method=reference,
                                budget=budget if method.size is not None else None,
                                recipe=recipes[rate], evaluation=table.evaluation, seed=seed, unmet=unmet))


def _sized(method: Any, config: Any, budget: Budget, size: int | None, shapes: Any, where: str) -> Any:
    """The config at a size or budget, checked against the layers: what fits one budget need not fit another."""
    try:
        sized = fit(method, config, budget, shapes) if size is None else method.resized(config, size)
        method.check(sized, shapes)
    except ValidationError as error:
        problem = yamlfile.explain(error, config.model_dump(), method.Config)
        raise UserError(f"{where}: options of {method.id} at {budget.label}: {problem}") from None
    except (UserError, ValueError) as error:
        raise UserError(f"{where}: {error}") from error
    return sized


def _spread(scales: Any, made: dict[str, list[str]]) -> Any:
    """The scales with every pattern's name in a table's rows replaced by the rows that it stands for."""
    if isinstance(scales, dict):
        return {key: [one for name in value for one in (made.get(name, [name]) if isinstance(name, str) else [name])]
                if key == "rows" and isinstance(value, list) else _spread(value, made) for key, value in scales.items()}
    return scales


def _check_names(study: Study, path: Path) -> None:
    """Every name in the file must exist: rows, tasks, bases, options of methods."""
    for scale, edition in study.scales.items():
        for table_id, table in edition.tables.items():
            where = f"{path}: scales.{scale}.tables.{table_id}"
            for key, used in (("rows", table.rows), ("learning_rates", table.learning_rates), ("sizes", table.sizes)):
                for name in used:
                    if name not in study.rows:
                        raise UserError(f"{where}.{key}: unknown row {name!r}; use {one_of(list(study.rows))}")
            try:
                bases.get(table.base)
            except UserError as error:
                raise UserError(f"{where}.base: {error}") from None
            for task in table.tasks:
                if task not in registry.tasks():
                    raise UserError(f"{where}.tasks: unknown task {task!r}; use {one_of(sorted(registry.tasks()))}")
            for method, options in table.options.items():
                if method not in registry.methods():
                    raise UserError(f"{where}.options: unknown method {method!r}; "
                                    f"use {one_of(sorted(registry.methods()))}")
                resolve_method(Row(method=method, label="", options=options), {}, f"{where}.options")
            if table.published is not None:
                _check_published(table.published, study, f"{where}.published")
                for task in table.published.tasks:
                    if task.partition("/")[0] not in table.tasks:
                        raise UserError(f"{where}.published.tasks: {task!r} is none of the table's tasks "
                                        f"{one_of(table.tasks)}")
    for row_id, row in study.rows.items():
        resolve_method(row, {}, f"{path}: rows.{row_id}")


def _check_published(reference: PublishedRef, study: Study, where: str) -> None:
    """The published table, its columns and its rows, and our rows, must exist."""
    try:
        table = published.load(reference.table)
    except UserError as error:
        raise UserError(f"{where}.table: {error}") from None
    named = [("columns", column) for column in reference.columns]
    for key, column in [*named, *((f"tasks.{task}", column) for task, column in reference.tasks.items())]:
        if column not in table.columns:
            raise UserError(f"{where}.{key}: unknown column {column!r}; use {one_of(table.columns)}")
    methods = list(dict.fromkeys(row.method for row in table.rows))
    for row, method in reference.rows.items():
        if row not in study.rows:
            raise UserError(f"{where}.rows: unknown row {row!r}; use {one_of(list(study.rows))}")
        if method not in methods:
            raise UserError(f"{where}.rows.{row}: {table.id} has no method {method!r}; use {one_of(methods)}")


def _filter(text: str) -> tuple[str, set[str]]:
    key, separator, values = text.partition("=")
    if not separator or key not in ("table", "task", "method", "rank", "budget", "rate", "seed"):
        raise UserError(f"--only {text}: write key=value with key table, task, method, rank, budget, rate or seed")
    return key, set(values.split(","))


def _facts(cell: Cell) -> dict[str, tuple[str, ...]]:
    return {
        "table": (cell.table,),
        "task": (cell.spec.task.id,),
        "method": (cell.row, cell.spec.method.id),
        "rank": (str(cell.rank),),
        "budget": (str(cell.spec.budget and cell.spec.budget.text),),
        "rate": (f"{cell.spec.recipe.learning_rate:g}",),
        "seed": (str(cell.spec.seed),),
    }


__all__ = ["SCALES", "Cell", "Fair", "Grid", "Row", "Scale", "Study", "Table", "cells", "filtered", "load", "names",
           "select", "supposing", "unique"]
