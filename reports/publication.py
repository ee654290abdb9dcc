"""The published table beside the measured one: printed numbers with how they are known, and the gains of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import numbers
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import Line, StudyTable
from suite import published
from suite.published import AVERAGE, EVIDENCE_LABELS, PublishedCell, PublishedRow, PublishedTable

if TYPE_CHECKING:
    from suite.study import PublishedRef, Study

#: The letter that stands beside a printed number.
LETTERS = {"verbatim": "V", "secondary": "S", "recalled": "unverified", "derived": "D"}
_NAMES = {AVERAGE: "Average"}


@dataclass(frozen=True)
class Publication:
    """A published table as the report shows it: rows that the study also has, the others, and gains side by side."""

    table: PublishedTable
    matched: Sheet
    others: Sheet | None
    gains: Sheet | None


def publication(study: Study, scale: str, table: StudyTable) -> Publication | None:
    """What the study's table is held against, or None when it names nothing."""
    reference = study.edition(scale).tables[table.id].published
    if reference is None:
        return None
    source = published.load(reference.table)
    columns = tuple(c for c in source.columns if not reference.columns or c in reference.columns)
    ours = {id(row) for _, row in _pairs(reference, table, source)}
    matched = [row for row in source.rows if id(row) in ours]
    others = [row for row in source.rows if id(row) not in ours and any(c in row.cells for c in columns)]
    title = f"Published: {source.paper.title}"
    return Publication(
        table=source,
        matched=_sheet(f"{table.id}-published", title, matched, columns),
        others=_sheet(f"{table.id}-published-others", "Other rows of the published table", others, columns)
        if others else None,
        gains=_gains(reference, table, source, columns, same_set_up=scale == "paper"),
    )


def column_name(column: str) -> str:
    """`glue-sst2` -> `GLUE SST2`."""
    return _NAMES.get(column, column.replace("-", " ").upper())


def _sheet(name: str, title: str, rows: list[PublishedRow], columns: tuple[str, ...]) -> Sheet:
    used = {cell.evidence for row in rows for c, cell in row.cells.items() if c in columns}
    legend = "; ".join(f"{letter}: {EVIDENCE_LABELS[level]}" for level, letter in LETTERS.items()
                       if level in used and letter != EVIDENCE_LABELS[level])
    notes = [f"Mean ± spread as printed. {legend}." if legend else "Mean ± spread as printed."]
    if "recalled" in used:
        notes.append("Unverified: remembered, read in no document; such a number is shown grey and proves nothing.")
    data: list[dict[str, Number]] = [
        {"method": row.method, "label": row.label, "rank": row.rank, "column": c, "mean": cell.mean, "sd": cell.sd,
         "evidence": cell.evidence, "source": row.source}
        for row in rows for c, cell in row.cells.items() if c in columns
    ]
    return Sheet(name, title, ("Row", "Rank", *map(column_name, columns), "Source"), tuple(
        (Entry(row.label), Entry(str(row.rank) if row.rank else numbers.DASH),
         *(_cell(row.cells.get(c)) for c in columns), Entry(row.source)) for row in rows
    ), tuple(data), tuple(notes), frozenset({0, len(columns) + 2}))


def _cell(cell: PublishedCell | None) -> Entry:
    if cell is None or cell.mean is None:
        return entry(numbers.DASH, "missing", title="the paper's number is not known to us" if cell else "not in the table")
    text = f"{cell.mean:.2f}" + (f" ± {cell.sd:.2f}" if cell.sd is not None else "")
    marks: list[Mark] = ["unverified"] if cell.evidence == "recalled" else []
    return entry(text, *marks, note=LETTERS[cell.evidence], title=f"{cell.evidence}: {EVIDENCE_LABELS[cell.evidence]}")


def _pairs(reference: PublishedRef, table: StudyTable, source: PublishedTable) -> list[tuple[Line, PublishedRow]]:
    """Our lines with the published rows that they are held against: equal ranks where the paper has several."""
    found = []
    for line in table.lines:
        row = source.row(reference.rows[line.row], line.rank) if line.row in reference.rows else None
        if row is not None and (line.rank is None or row.rank in (None, line.rank)):
            found.append((line, row))
    return found


def _gains(reference: PublishedRef, table: StudyTable, source: PublishedTable, columns: tuple[str, ...],
           same_set_up: bool) -> Sheet | None:
    """The gain over the reference, here and in the paper, in the column that sums each table up."""
    column = AVERAGE if AVERAGE in columns else columns[0] if len(columns) == 1 else None
    pairs = _pairs(reference, table, source)
    printed = {line.key: row.cells.get(column) for line, row in pairs} if column else {}
    rows, data = [], []
    for line, _ in pairs:
        anchor = table.reference[line.key]
        paper, base = printed.get(line.key), printed.get(anchor.key)
        if anchor.key == line.key or paper is None or base is None or paper.mean is None or base.mean is None:
            continue
        gain = paper.mean - base.mean
        delta = table.differences.get((line.key, table.headline))
        weak = "recalled" in (paper.evidence, base.evidence)
        here = entry(numbers.DASH, "missing", title="not run yet") if delta is None else entry(
            numbers.signed(delta.mean), *(["clear"] if delta.clear else []),
            note=numbers.interval(delta.interval) if delta.interval else "no interval")
        rows.append((Entry(line.label), here,
                     entry(numbers.signed(gain / 100, 2), *(["unverified"] if weak else []),
                           note="unverified" if weak else "", title="difference of the printed means")))
        data.append({"row": line.row, "label": line.label, "rank": line.rank, "reference": anchor.key,
                     "here_points": 100 * delta.mean if delta else None, "paper_points": round(gain, 4),
                     "paper_evidence": "recalled" if weak else "derived"})
    if not rows or column is None:
        return None
    here_name, paper_name = table.title_of(table.headline), column_name(column)
    return Sheet(f"{table.id}-gains", f"Gain over {table.reference_label}: here and in the paper",
                 ("Row", f"Here ({here_name})", f"Paper ({paper_name})"), tuple(rows), tuple(data),
                 ("Percentage points." if same_set_up else
                  "Percentage points. Different bases and data: only the direction can be compared, not the size.",))
