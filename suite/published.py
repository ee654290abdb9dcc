"""The papers' tables as data, read strictly.

One YAML file per table under `results/published/`. Every cell carries how it is known (its evidence), every column what
it counts (`suite.measures`), every average is held against its cells, and what a reader must know before trusting a
number stands in `caveats`. `docs/published.md` says how to add a table.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from suite import paths, yamlfile
from suite.conventions import Conventions
from suite.errors import UserError, one_of
from suite.measures import MEASURES, Measure
from suite.specs import Frozen

#: How a number is known: read in the paper that made it; read in a document that repeats it; remembered, checked
#: against nothing; computed from other numbers.
Evidence = Literal["verbatim", "secondary", "recalled", "derived"]
#: What evidence is called in front of readers.
EVIDENCE_LABELS: dict[Evidence, str] = {
    "verbatim": "read in the paper that made it",
    "secondary": "read in a document that repeats it",
    "recalled": "unverified",
    "derived": "computed from other numbers",
}
#: Evidence that is good enough to fail a run by.
GATING: tuple[Evidence, ...] = ("verbatim", "secondary")
#: The column that averages all other scores, unless `averages` says which.
AVERAGE = "avg"
#: The `base` of a table whose rows name their own.
PER_ROW = "per row"
#: How a protocol's text begins where we do not know the answer.
UNKNOWN = ("not stated", "not transcribed")

_Text = Annotated[str, Field(min_length=1)]


class Source(Frozen):
    """Which paper, which version of it, which table in it."""

    title: _Text
    arxiv: str | None = None
    version: str = ""
    table: _Text


class Protocol(Frozen):
    """How the paper trained and scored: without it a number says nothing.

    `statistic`: what is printed of several seeds, where it is known not to be their mean.
    """

    train: _Text
    metric: _Text
    split: _Text
    seeds: int | str | None
    selection: _Text
    statistic: Literal["mean", "median"] = "mean"
    rank: int | str | None = None
    notes: tuple[str, ...] = ()

    @property
    def unknown(self) -> tuple[str, ...]:
        """Which of the keys say nothing; what is not known cannot be compared with."""
        texts = {name: getattr(self, name) for name in ("train", "metric", "split", "selection")}
        return (*(name for name, text in texts.items() if text.startswith(UNKNOWN)),
                *(("seeds",) if self.seeds is None else ()))


class PublishedCell(Frozen):
    """A printed number. `mean` is None where the paper has a cell whose number we do not know."""

    mean: FiniteFloat | None = None
    sd: Annotated[FiniteFloat, Field(ge=0)] | None = None
    evidence: Evidence

    @property
    def may_gate(self) -> bool:
        """Whether the number is known well enough that a run may fail by it: verbatim or secondary."""
        return self.mean is not None and self.evidence in GATING


class PublishedRow(Frozen):
    """One line of a published table. Cells of columns that the row does not have are absent.

    `evidence` is that of the cells that name none of their own. `base`: where it is not the table's.
    """

    method: _Text
    label: _Text
    base: str | None = None
    rank: int | None = None
    evidence: Evidence | None = None
    cells: dict[str, PublishedCell]
    source: _Text

    @model_validator(mode="before")
    @classmethod
    def _inherit_evidence(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("cells"), dict) or "evidence" not in content:
            return content
        return content | {"cells": {
            column: {"evidence": content["evidence"], **cell} if isinstance(cell, dict) else cell
            for column, cell in content["cells"].items()
        }}


class Claim(Frozen):
    """A sentence of the paper that carries a number, or none."""

    text: _Text
    value: FiniteFloat | None = None
    evidence: Evidence


class PublishedTable(Frozen):
    """One published table. Of a table whose numbers we do not have, `missing` says what is still to be transcribed.

    `measures`: what the columns count, by the names of `suite.measures`; every column stands under one. `averages`:
    the columns that an average is the mean of, where `avg` is not the mean of all scores or the average has another
    name; a list inside the list counts once, with its mean; an empty list: those columns are not in the table.
    `conventions`: what of the protocol `suite regress` compares with ours; what is not stated there is not known.
    """

    id: str
    paper: Source
    base: _Text
    protocol: Protocol
    columns: tuple[str, ...]
    measures: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    averages: dict[str, tuple[str | tuple[str, ...], ...]] = Field(default_factory=dict)
    rows: tuple[PublishedRow, ...]
    headline_claims: tuple[Claim, ...] = ()
    caveats: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    conventions: Conventions = Conventions()

    @model_validator(mode="after")
    def _empty_tables_say_what_is_missing(self) -> PublishedTable:
        if not (self.columns and self.rows) and not self.missing:
            raise ValueError("a table without columns or rows must say under `missing` what is to be transcribed")
        return self

    def measure(self, column: str) -> Measure:
        """What a column counts. Raises `KeyError` for a column that the table does not have."""
        for name, columns in self.measures.items():
            if column in columns:
                return MEASURES[name]
        raise KeyError(column)

    @property
    def scores(self) -> tuple[str, ...]:
        """The columns that say how well a model does, averages among them; not losses, costs, sizes or settings."""
        return tuple(column for column in self.columns if self.measure(column).kind == "score")

    def averaged(self, column: str) -> tuple[tuple[str, ...], ...]:
        """What an average is the mean of: groups of columns, each group counting once with its own mean.

        Empty when the columns are not in the table, or when `column` is no average.
        """
        if column in self.averages:
            return tuple((part,) if isinstance(part, str) else part for part in self.averages[column])
        if column != AVERAGE:
            return ()
        return tuple((other,) for other in self.scores if other not in self.measures.get("mean", ()))

    def decimals(self, column: str) -> int:
        """How many decimals the column is printed with: the most that any of its numbers has."""
        numbers = [row.cells[column].mean for row in self.rows if column in row.cells]
        return max([0, *(-int(Decimal(repr(number)).normalize().as_tuple().exponent) for number in numbers if number)])

    def base_of(self, row: PublishedRow) -> str:
        """The base of a row: its own, or the table's."""
        return row.base or self.base

    @property
    def bases(self) -> tuple[str, ...]:
        """Every base that rows have, the table's own first; that alone when there are no rows."""
        found = dict.fromkeys(self.base_of(row) for row in self.rows)
        return tuple(sorted(found, key=lambda base: base != self.base)) or (self.base,)

    def rows_of(self, method: str, rank: int | None = None, base: str | None = None) -> tuple[PublishedRow, ...]:
        """The rows of a method, in order; with `rank` or `base` only those of that rank or base."""
        return tuple(row for row in self.rows if row.method == method and rank in (None, row.rank)
                     and base in (None, self.base_of(row)))

    def row(self, method: str, rank: int | None = None, base: str | None = None) -> PublishedRow | None:
        """The row of a method: the one at `rank` when there is one, else the first.

        With `base` only rows of that base; without it those of the table's own base come first.
        """
        rows = sorted(self.rows_of(method, base=base), key=lambda row: self.base_of(row) != self.base)
        return next(iter([row for row in rows if rank is not None and row.rank == rank] or rows), None)

    def cell(self, method: str, column: str, rank: int | None = None, base: str | None = None) -> PublishedCell | None:
        """The cell of the row that `row` finds, or None where there is no such row or no such cell in it."""
        row = self.row(method, rank, base)
        return row.cells.get(column) if row else None

    def may_gate(self, row: PublishedRow, column: str) -> bool:
        """Whether a run may fail by this cell: a score whose number was read in the paper or a document that repeats it."""
        cell = row.cells.get(column)
        return cell is not None and cell.may_gate and self.measure(column).kind == "score"

    @property
    def places(self) -> int:
        """How many cells rows times columns make, those that the paper leaves empty among them."""
        return len(self.rows) * len(self.columns)

    @property
    def evidence(self) -> dict[Evidence, int]:
        """How many numbers are known in which way, best first; levels without any are left out."""
        counts = Counter(cell.evidence for row in self.rows for cell in row.cells.values() if cell.mean is not None)
        return {level: counts[level] for level in EVIDENCE_LABELS if counts[level]}

    @property
    def numbers(self) -> int:
        """How many cells have a number."""
        return sum(self.evidence.values())


def names() -> list[str]:
    """Ids of the published tables in the repository."""
    return sorted(path.stem for path in paths.published().glob("*.yaml"))


def load(name: str) -> PublishedTable:
    """Read a published table by id, or from the path of a YAML file.

    Raises `UserError` naming the file, the line and the key when the file breaks the schema, a column stands under no
    measure or two, a number is outside what its measure allows, a row or column stands twice, or an average is neither
    the mean of its cells nor listed among the caveats as an exception.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else paths.published() / f"{name}.yaml"
    try:
        written = path.stat()
        return _load(path, (written.st_mtime_ns, written.st_size))
    except FileNotFoundError:
        known = names()
        stem = Path(name).stem
        alike = [one for one in known if stem in one or stem.partition("_")[0] == one.partition("_")[0]]
        alike = alike or difflib.get_close_matches(stem, known, 5, 0.4)
        raise UserError(f"unknown published table {name!r}: use {one_of(alike or known)}; `suite list published` shows "
                        f"all {len(known)}") from None


@lru_cache(maxsize=512)
def _load(path: Path, written: tuple[int, int]) -> PublishedTable:
    """Read and checked once per state of the file: studies and pages ask for the same tables again and again."""
    table, lines = yamlfile.load_with_lines(path, PublishedTable)
    for key, problem in _problems(table, path.stem):
        raise UserError(f"{path}, line {lines.at(key)}: {'.'.join(map(str, key))}: {problem}")
    return table


_Problems = Iterator[tuple[tuple[str | int, ...], str]]


def _problems(table: PublishedTable, stem: str) -> _Problems:
    """What a schema cannot say: (key, sentence) for each fault. Later checks rely on what earlier ones found in order."""
    if table.id != stem:
        yield ("id",), f"{table.id!r} must be the file's name, {stem!r}"
    yield from _wrong_columns(table)
    yield from _wrong_averages(table)
    for column in table.conventions.columns:
        if column not in table.columns:
            yield ("conventions", "columns", column), f"unknown column; use {one_of(table.columns)}"
    seen: dict[object, int] = {}
    for index, row in enumerate(table.rows):
        if table.base == PER_ROW and row.base is None:
            yield ("rows", index), f"the row must name its `base`, because the table's is {PER_ROW!r}"
        for column, cell in row.cells.items():
            if column not in table.columns:
                yield ("rows", index, "cells", column), f"unknown column; use {one_of(table.columns)}"
            if problem := _range_problem(table.measure(column), cell.mean):
                yield ("rows", index, "cells", column, "mean"), problem
        first = seen.setdefault(_identity(table, row), index)
        if first != index:
            yield ("rows", index), (f"the row {row.label} stands twice, here and in rows.{first}; rows must differ in "
                                    "method, label, rank, base, source or a setting")
    for average in table.measures.get("mean", ()):
        half = 0.5 * 10.0 ** -max(1, table.decimals(average))
        for index, row in enumerate(table.rows):
            if problem := _average_problem(table, row, average, half):
                yield ("rows", index, "cells", average), problem


def _wrong_columns(table: PublishedTable) -> _Problems:
    found: dict[str, str] = {}
    for index, column in enumerate(table.columns):
        if column in table.columns[:index]:
            yield ("columns", index), f"the column {column!r} stands twice"
    for name, columns in table.measures.items():
        if name not in MEASURES:
            yield ("measures", name), f"unknown measure; use {one_of(MEASURES)}"
        for index, column in enumerate(columns):
            if column not in table.columns:
                yield ("measures", name, index), f"unknown column {column!r}; use {one_of(table.columns)}"
            if column in found:
                yield ("measures", name, index), f"{column!r} stands under {found[column]!r} already"
            found[column] = name
    for index, column in enumerate(table.columns):
        if column not in found:
            yield ("columns", index), (f"{column!r} stands under no measure; add it under `measures` to what it counts: "
                                       f"{one_of(MEASURES)}")


def _wrong_averages(table: PublishedTable) -> _Problems:
    means = table.measures.get("mean", ())
    for name, parts in table.averages.items():
        if name not in means:
            yield ("averages", name), f"no column of measure 'mean'; use {one_of(means)}" if means else \
                "no column has the measure 'mean'"
        for index, part in enumerate(parts):
            for column in (part,) if isinstance(part, str) else part:
                if column not in table.columns:
                    yield ("averages", name, index), f"unknown column {column!r}; use {one_of(table.columns)}"
    for name in means:
        if name not in table.averages and name != AVERAGE:
            yield ("columns", table.columns.index(name)), (
                f"say under `averages` which columns {name!r} is the mean of, or [] when they are not in the table")


def _range_problem(measure: Measure, value: float | None) -> str | None:
    low, high = measure.low, measure.high
    if value is None or ((low is None or value >= low) and (high is None or value <= high)):
        return None
    allowed = f"from {low:g} to {high:g}" if low is not None and high is not None else \
        f"at least {low:g}" if low is not None else f"at most {high:g}"
    return f"must be {allowed}, being {measure.unit} (got {value:g})"


def _identity(table: PublishedTable, row: PublishedRow) -> object:
    """What tells a row from the others."""
    settings = {column: cell.mean for column, cell in row.cells.items() if table.measure(column).kind == "setting"}
    return row.method, row.label, row.rank, row.base, row.source, frozenset(settings.items())


def _average_problem(table: PublishedTable, row: PublishedRow, average: str, half: float) -> str | None:
    """An average further than half a unit of its last decimal from the mean of its cells, unless a caveat
    `AVERAGE exception: ...` names label and number."""
    printed = row.cells[average].mean if average in row.cells else None
    groups = [[row.cells[column].mean if column in row.cells else None for column in group]
              for group in table.averaged(average)]
    parts = [_mean(group) for group in groups]
    numbers = [part for part in parts if part is not None]
    if printed is None or not numbers or len(numbers) < len(parts):
        return None
    mean = math.fsum(numbers) / len(numbers)
    if abs(mean - printed) <= half + 1e-9:
        return None
    if any(caveat.startswith(f"{average} exception:") and _names(caveat, row.label) and _names(caveat, f"{printed:g}")
           for caveat in table.caveats):
        return None
    return (f"the average of {row.label} is printed {printed:g} but its cells give {mean:.3f}; correct it or add a caveat "
            f"that begins '{average} exception:' and names the row's label and the printed number")


def _mean(values: list[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _names(caveat: str, text: str) -> bool:
    """Whether a caveat has `text` as a word of its own: 5.1 is not in 75.1, LoRA not in MoLoRA or LoRA-GA."""
    return re.search(rf"(?<![\w.+-]){re.escape(text)}(?![\w+-]|\.\d)", caveat) is not None


__all__ = ["AVERAGE", "EVIDENCE_LABELS", "GATING", "PER_ROW", "Claim", "Evidence", "Protocol", "PublishedCell",
           "PublishedRow", "PublishedTable", "load", "names"]
