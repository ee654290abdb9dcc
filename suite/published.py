"""The papers' tables as data, read strictly.

One YAML file per table under `results/published/`. Every cell carries how it is known (its evidence), every average is
held against its cells, and what a reader must know before trusting a number stands in `caveats`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, FiniteFloat, model_validator

from suite import paths, yamlfile
from suite.conventions import Conventions
from suite.errors import UserError, one_of
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
#: The column that averages all the others.
AVERAGE = "avg"
#: Printed averages are rounded, and so are their cells.
AVERAGE_TOLERANCE = 0.011


class Source(Frozen):
    """Which paper, which version of it, which table in it."""

    title: str
    arxiv: str | None = None
    version: str = ""
    table: str = ""


class Protocol(Frozen):
    """How the paper trained and scored: without it a number says nothing."""

    train: str
    metric: str
    split: str
    seeds: int | str | None
    selection: str
    rank: int | str | None = None
    notes: tuple[str, ...] = ()


class PublishedCell(Frozen):
    """A printed number. `mean` is None where the paper has a cell whose number we do not know."""

    mean: FiniteFloat | None = None
    sd: Annotated[FiniteFloat, Field(ge=0)] | None = None
    evidence: Evidence


class PublishedRow(Frozen):
    """One line of a published table. Cells of columns that the row does not have are absent."""

    method: str
    label: str
    rank: int | None = None
    cells: dict[str, PublishedCell]
    source: str

    @model_validator(mode="before")
    @classmethod
    def _inherit_evidence(cls, content: Any) -> Any:
        """A cell without evidence of its own has its row's."""
        if not isinstance(content, dict) or not isinstance(content.get("cells"), dict):
            return content
        content = dict(content)
        evidence = content.pop("evidence", None)
        if evidence is not None:
            content["cells"] = {
                column: {"evidence": evidence, **cell} if isinstance(cell, dict) else cell
                for column, cell in content["cells"].items()
            }
        return content


class Claim(Frozen):
    """A sentence of the paper that carries a number, or none."""

    text: str
    value: FiniteFloat | None = None
    evidence: Evidence


class PublishedTable(Frozen):
    """One published table. Of a table whose numbers we do not have, `missing` says what is still to be transcribed.

    `conventions` is what of the protocol `suite regress` can compare with ours; what is not stated there is not known."""

    id: str
    paper: Source
    base: str
    protocol: Protocol
    columns: tuple[str, ...]
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

    def row(self, method: str, rank: int | None = None) -> PublishedRow | None:
        """The row of a method: the one at `rank` when there are several, else the first."""
        rows = [row for row in self.rows if row.method == method]
        at_rank = [row for row in rows if rank is not None and row.rank == rank]
        return next(iter(at_rank or rows), None)


def names() -> list[str]:
    """Ids of the published tables in the repository."""
    return sorted(path.stem for path in paths.published().glob("*.yaml"))


def load(name: str) -> PublishedTable:
    """Read a published table by id, or from the path of a YAML file.

    Raises `UserError` naming the file and the key when the file breaks the schema, a cell stands in an unknown
    column, or an average is neither the mean of its cells nor listed among the caveats as an exception.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else paths.published() / f"{name}.yaml"
    try:
        table = yamlfile.load(path, PublishedTable)
    except FileNotFoundError:
        raise UserError(f"unknown published table {name!r}: use {one_of(names())}") from None
    for key, problem in _problems(table, path.stem):
        raise UserError(f"{path}: {key}: {problem}")
    return table


def _problems(table: PublishedTable, stem: str) -> list[tuple[str, str]]:
    """What a schema cannot say: (key, sentence) for each fault."""
    found: list[tuple[str, str]] = []
    if table.id != stem:
        found.append(("id", f"{table.id!r} must be the file's name, {stem!r}"))
    if len(set(table.columns)) != len(table.columns):
        found.append(("columns", "a column stands twice"))
    for column in table.conventions.columns:
        if column not in table.columns:
            found.append((f"conventions.columns.{column}", f"unknown column; use {one_of(table.columns)}"))
    for index, row in enumerate(table.rows):
        key = f"rows.{index}.cells"
        for column in row.cells:
            if column not in table.columns:
                found.append((f"{key}.{column}", f"unknown column; use {one_of(table.columns)}"))
        problem = _average_problem(table, row)
        if problem:
            found.append((f"{key}.{AVERAGE}", problem))
    return found


def _average_problem(table: PublishedTable, row: PublishedRow) -> str | None:
    """An average that is not the mean of its cells, unless a caveat `avg exception: ...` names label and number."""
    printed = row.cells[AVERAGE].mean if AVERAGE in row.cells else None
    parts = [row.cells[c].mean for c in table.columns if c != AVERAGE and c in row.cells]
    numbers = [part for part in parts if part is not None]
    if printed is None or len(numbers) < len(table.columns) - 1:
        return None
    mean = sum(numbers) / len(numbers)
    if abs(mean - printed) <= AVERAGE_TOLERANCE:
        return None
    excused = any(
        caveat.startswith("avg exception:") and row.label in caveat and f"{printed:g}" in caveat
        for caveat in table.caveats
    )
    return None if excused else (
        f"the average of {row.label} is printed {printed:g} but its cells give {mean:.3f}; "
        "correct it or add a caveat that begins 'avg exception:' and names the row's label and the printed number"
    )


__all__ = ["AVERAGE", "EVIDENCE_LABELS", "Claim", "Evidence", "PublishedCell", "PublishedRow", "PublishedTable",
           "load", "names"]
