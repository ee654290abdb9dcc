"""The published table beside the measured one: printed numbers with how they are known, and both compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import links, numbers
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import Line, StudyTable
from suite import published, registry
from suite.published import AVERAGE, EVIDENCE_LABELS, PublishedCell, PublishedRow, PublishedTable

if TYPE_CHECKING:
    from suite.study import PublishedRef, Study

#: The raised letter beside a printed number.
LETTERS = {"verbatim": "V", "secondary": "S", "recalled": "unverified", "derived": "D"}
_NAMES = {
    AVERAGE: "Average", "glue-mnli": "MNLI", "glue-sst2": "SST-2", "glue-cola": "CoLA", "glue-qnli": "QNLI",
    "glue-mrpc": "MRPC", "gsm8k": "GSM8K", "humaneval": "HumanEval", "mt-bench": "MT-Bench",
}
#: Methods that published tables call by other names than ours.
_MEANT = {"full-finetuning": "full", "base-model": "untouched", "untrained": "untouched"}


@dataclass(frozen=True)
class Publication:
    """A published table as the report shows it.

    `matched` are the rows that the study also has (None: no number of the table is transcribed), `others` the
    rest. `gains` sets the gains over the reference side by side; `cells` does so with every score, where the study
    runs the paper's own tasks.
    """

    table: PublishedTable
    columns: tuple[str, ...]
    matched: Sheet | None
    others: Sheet | None
    gains: Sheet | None
    cells: Sheet | None


def publication(study: Study, scale: str, table: StudyTable) -> Publication | None:
    """What the study's table is held against, or None when it names nothing."""
    reference = study.edition(scale).tables[table.id].published
    if reference is None:
        return None
    source = published.load(reference.table)
    results = [c for c in source.columns if source.measure(c).kind in ("score", "gain", "loss")]
    columns = tuple(c for c in source.columns if c in (reference.columns or results))
    pairs = _pairs(reference, table, source)
    ours = {id(row) for _, row in pairs}
    matched = [row for row in source.rows if id(row) in ours]
    others = [row for row in source.rows if id(row) not in ours and any(c in row.cells for c in columns)]
    title = f"Published: {source.paper.table or source.paper.title}"
    rest = sheet(f"{table.id}-published-others", "Other published rows", source, others, columns)
    return Publication(
        source, columns,
        matched=sheet(f"{table.id}-published", title, source, matched, columns) if source.rows else None,
        others=rest if others else None,
        gains=_gains(pairs, table, columns, same_set_up=scale == "paper"),
        cells=_cells(pairs, table, columns) if scale == "paper" else None,
    )


def method_of(name: str) -> str | None:
    """The registered method that a published table means by a name, or None."""
    known = registry.methods()
    return next((one for one in (_MEANT.get(name, name), f"peft:{name.replace('-', '_')}") if one in known), None)


def method_link(name: str) -> str:
    """The page of the method that a published table means by a name, or nothing."""
    known = method_of(name)
    return links.method(known) if known is not None else ""


def column_name(column: str) -> str:
    """`glue-sst2` -> `SST-2`."""
    return _NAMES.get(column, column.replace("-", " ").upper())


def sheet(name: str, title: str, table: PublishedTable, rows: Sequence[PublishedRow], columns: tuple[str, ...]) -> Sheet:
    """Rows of a published table as printed, with how each number is known; their bases where there are several."""
    used = {cell.evidence for row in rows for c, cell in row.cells.items() if c in columns}
    legend = "; ".join(f"{letter}: {EVIDENCE_LABELS[level]}" for level, letter in LETTERS.items()
                       if level in used and level != "recalled")
    notes = [f"Mean ± spread as printed. {legend}." if legend else "Mean ± spread as printed."]
    if "recalled" in used:
        notes.append("Unverified: remembered, read in no document; such a number proves nothing.")
    data: list[dict[str, Number]] = [
        {"method": row.method, "label": row.label, "base": table.base_of(row), "rank": row.rank, "column": c,
         "unit": table.measure(c).unit, "mean": cell.mean, "sd": cell.sd, "evidence": cell.evidence, "source": row.source}
        for row in rows for c, cell in row.cells.items() if c in columns
    ]
    several = len({table.base_of(row) for row in rows}) > 1
    digits = {column: table.decimals(column) for column in columns}
    shown = tuple(
        (Entry(row.label, title=row.source, link=method_link(row.method)), *([Entry(table.base_of(row))] if several else []),
         Entry(str(row.rank) if row.rank else numbers.DASH),
         *(_cell(row.cells.get(c), digits[c]) for c in columns)) for row in rows)
    header = ("Row", *(["Base"] if several else []), "Rank", *map(column_name, columns))
    return Sheet(name, title, header, shown, tuple(data), tuple(notes), frozenset({0, 1} if several else {0}))


def _cell(cell: PublishedCell | None, digits: int) -> Entry:
    if cell is None:
        return entry(numbers.DASH, "faded", title="not in the table")
    if cell.mean is None:
        return entry("?", "missing", title="the number is not known to us")
    marks: list[Mark] = ["unverified"] if cell.evidence == "recalled" else []
    return entry(printed(cell, digits), *marks, sign=LETTERS[cell.evidence], title=EVIDENCE_LABELS[cell.evidence])


def printed(cell: PublishedCell, digits: int = 2) -> str:
    """A known number with its spread."""
    spread = "" if cell.sd is None else f" ± {cell.sd:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread}".replace("-", "−")


def _pairs(reference: PublishedRef, table: StudyTable,
           source: PublishedTable) -> list[tuple[Line, PublishedRow]]:
    """Our lines with the published rows that they are held against; ranks must not differ."""
    found = []
    for line in table.lines:
        row = source.row(reference.rows[line.row], line.rank) if line.row in reference.rows else None
        rankless = line.rank is None and len(table.budgets) <= 1
        if row is not None and (rankless or not line.budget or row.rank in (None, line.rank)):
            found.append((line, row))
    return found


def _gains(pairs: list[tuple[Line, PublishedRow]], table: StudyTable, columns: tuple[str, ...],
           same_set_up: bool) -> Sheet | None:
    """The gain over the reference, here and in the paper, in the column that sums each table up."""
    column = AVERAGE if AVERAGE in columns else columns[0] if len(columns) == 1 else None
    if column is None:
        return None
    theirs = {line.key: row.cells.get(column) for line, row in pairs}
    rows, data = [], []
    for line, _ in pairs:
        anchor = table.reference[line.key]
        paper, base = theirs.get(line.key), theirs.get(anchor.key)
        if anchor.key == line.key or paper is None or base is None or paper.mean is None or base.mean is None:
            continue
        gain = paper.mean - base.mean
        delta = table.differences.get((line.key, table.headline))
        weak = "recalled" in (paper.evidence, base.evidence)
        marks: list[Mark] = ["clear"] if delta is not None and delta.clear else []
        here = entry(numbers.DASH, "missing", title="not run yet") if delta is None else entry(
            numbers.signed(delta.mean), *marks,
            note=numbers.interval(delta.interval) if delta.interval else "no interval")
        unverified: list[Mark] = ["unverified"] if weak else []
        rows.append((Entry(line.label), here,
                     entry(numbers.signed(gain / 100, 2), *unverified, sign="unverified" if weak else "",
                           title="difference of the printed means")))
        data.append({"row": line.row, "label": line.label, "rank": line.rank, "reference": anchor.key,
                     "here_points": 100 * delta.mean if delta else None, "paper_points": round(gain, 4),
                     "paper_evidence": "recalled" if weak else "derived"})
    if not rows:
        return None
    what = table.title_of(table.headline)
    return Sheet(f"{table.id}-gains", f"Gain over {table.reference_label}, here and in the paper",
                 ("Row", f"Here: {what}", f"Paper: {column_name(column)}"), tuple(rows), tuple(data),
                 ("Percentage points." if same_set_up else
                  "Percentage points. Bases and data differ: compare directions, not sizes.",))


def _cells(pairs: list[tuple[Line, PublishedRow]], table: StudyTable,
           columns: tuple[str, ...]) -> Sheet | None:
    """Our score minus the printed one, task by task, where the tasks are the paper's."""
    shown = {c.id: name for c in table.columns if (name := c.part or c.task) in columns}
    if table.has_average and {*shown.values(), AVERAGE} == set(columns):
        shown[table.headline] = AVERAGE
    elif len(table.columns) == len(columns) == 1:
        shown = {table.headline: columns[0]}
    rows, data = [], []
    for line, row in pairs:
        items = []
        for task, column in shown.items():
            summary, cell = table.values[line.key, task].summary, row.cells.get(column)
            if summary is None or cell is None or cell.mean is None:
                why = "not run yet" if summary is None else "not in the published table"
                items.append(entry(numbers.DASH, "missing", title=why))
                continue
            gap = 100 * summary.mean - cell.mean
            marks: list[Mark] = ["unverified"] if cell.evidence == "recalled" else []
            items.append(entry(numbers.signed(gap / 100, 2), *marks, sign=LETTERS[cell.evidence],
                               note=f"{numbers.percent(summary.mean, 2)} − {cell.mean:.2f}",
                               title=f"printed: {printed(cell)}, {EVIDENCE_LABELS[cell.evidence]}"))
            data.append({"row": line.row, "label": line.label, "rank": line.rank, "column": column,
                         "here_percent": 100 * summary.mean, "paper_percent": cell.mean,
                         "gap_points": round(gap, 4), "seeds": summary.seeds, "evidence": cell.evidence})
        rows.append((Entry(line.label), *items))
    if not shown or not rows:
        return None
    return Sheet(f"{table.id}-here-minus-paper", "Here minus the paper", ("Row", *map(table.title_of, shown)),
                 tuple(rows), tuple(data),
                 ("Percentage points: our mean minus the printed one. The gap has no interval: hold it "
                  "against both spreads.",))
