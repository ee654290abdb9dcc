"""The published tables: an index, and a page per table with everything that is known of it and what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from reports import links, numbers, publication
from reports.frame import Page
from reports.publication import LETTERS, column_name, printed
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.study_page import Chapter
from suite.measures import MEASURES
from suite.published import EVIDENCE_LABELS, Evidence, PublishedRow, PublishedTable

#: Its index, and its entry of the navigation.
AREA = "published/index.html"
#: Evidence levels, the best first.
LEVELS: tuple[Evidence, ...] = get_args(Evidence)
LEGEND = "; ".join(f"{LETTERS[level]}: {EVIDENCE_LABELS[level]}" for level in LEVELS if level != "recalled")


def pages(chapters: Sequence[Chapter], tables: Sequence[PublishedTable]) -> list[Page]:
    """The index of published tables, and a page for each."""
    held = _held(chapters)
    index = _index(tables, held)
    intro = ("Tables of papers as data. Every number says how it is known; only what was read in the paper that made it, or "
             "in a document that repeats it, may decide a verdict. What is missing stays visible as missing.")
    return [Page(AREA, "Published tables", "index_page.html.j2", {"lead": intro, "sheet": index},
                 AREA, (index,)),
            *(_page(table, held.get(table.id, [])) for table in tables)]


def method_sheet(name: str, method_id: str, tables: Sequence[PublishedTable]) -> Sheet | None:
    """What published tables print of a method, a row per published row; None when they have none."""
    rows, data = [], []
    for table in tables:
        for row in table.rows:
            if publication.method_of(row.method) != method_id or not row.cells:
                continue
            rows.append((Entry(table.id, link=links.published(table.id), title=table.paper.title), Entry(table.base_of(row)),
                         Entry(row.label, title=row.source), Entry(str(row.rank) if row.rank else numbers.DASH),
                         *_numbers(table, row)))
            data += [{"table": table.id, "base": table.base_of(row), "method": row.method, "label": row.label,
                      "rank": row.rank, "column": column, "unit": table.measure(column).unit, "mean": cell.mean,
                      "sd": cell.sd, "evidence": cell.evidence, "source": row.source}
                     for column, cell in row.cells.items()]
    if not rows:
        return None
    notes = [f"Mean ± spread as printed. {LEGEND}."]
    if any(one["evidence"] == "recalled" for one in data):
        notes.append("Unverified: remembered, read in no document; such a number proves nothing.")
    return Sheet(name, "Published", ("Table", "Base", "Row", "Rank", "Numbers"), tuple(rows), tuple(data), tuple(notes),
                 frozenset({0, 1, 2, 4}))


def _numbers(table: PublishedTable, row: PublishedRow) -> list[Entry]:
    known = {column: row.cells[column] for column in table.columns
             if column in row.cells and row.cells[column].mean is not None}
    if not known:
        return [entry("not transcribed", "missing")]
    marks: list[Mark] = ["unverified"] if all(cell.evidence == "recalled" for cell in known.values()) else []
    said = [f"{column_name(column)} {printed(cell, table.decimals(column))} {LETTERS[cell.evidence]}"
            for column, cell in known.items()]
    return [entry("; ".join(said), *marks)]


def _held(chapters: Sequence[Chapter]) -> dict[str, list[tuple[str, str]]]:
    """By published table: what is held against it, and the page of it. Studies without records have no page."""
    from suite import study as studies

    found: dict[str, list[tuple[str, str]]] = {}
    known = {of.study.id: of.study for of in chapters}
    for study in [*known.values(), *(studies.load(name) for name in studies.names() if name not in known)]:
        for scale, edition in study.scales.items():
            for table in edition.tables.values():
                if table.published is not None:
                    named = (f"{study.id}, {scale}: {table.title}", links.study(study.id, scale))
                    found.setdefault(table.published.table, []).append(named)
    return found


def _page(table: PublishedTable, held: Sequence[tuple[str, str]]) -> Page:
    name = table.id
    sheet = publication.sheet(name, f"{table.paper.title}: {table.paper.table}", table, table.rows, table.columns)
    shown = (sheet,) if table.rows else ()
    units = [(MEASURES[measure].unit, numbers.listing([column_name(column) for column in columns]))
             for measure, columns in table.measures.items() if columns]
    context: dict[str, Any] = {"table": table, "sheet": sheet if shown else None, "held": held, "units": units}
    return Page(links.published(table.id), table.id, "published.html.j2", context, AREA, shown, label="published")


def _index(tables: Sequence[PublishedTable], held: dict[str, list[tuple[str, str]]]) -> Sheet:
    rows, data = [], []
    for table in tables:
        counts: dict[str, int] = {level: table.evidence.get(level, 0) for level in LEVELS}
        studies = list(dict.fromkeys(name.split(":")[0] for name, _ in held.get(table.id, ())))
        known = entry(f"{table.numbers} of {table.places}") if table.numbers else entry("none yet", "missing")
        bases = "; ".join(table.bases)
        rows.append((
            Entry(table.id, link=links.published(table.id), title=table.paper.table), known,
            *(Entry(str(counts[level])) if counts[level] else entry(numbers.DASH, "faded") for level in LEVELS),
            Entry("; ".join(studies) or numbers.DASH), Entry(bases), Entry(table.paper.title)))
        said: dict[str, Number] = {"table": table.id, "paper": table.paper.title, "arxiv": table.paper.arxiv,
                                   "base": bases, "rows": len(table.rows), "columns": len(table.columns),
                                   "places": table.places, "numbers": table.numbers,
                                   "missing": "; ".join(table.missing), "studies": "; ".join(studies)}
        said |= {str(level): count for level, count in counts.items()}
        data.append(said)
    header = ("Table", "Numbers", *(level.capitalize() for level in LEVELS), "Held against it", "Base", "Paper")
    notes = ("Numbers: how many of the table's places have one. "
             + "; ".join(f"{level.capitalize()}: {EVIDENCE_LABELS[level]}" for level in LEVELS) + ".",)
    return Sheet("published", "Published tables", header, tuple(rows), tuple(data), notes,
                 frozenset({0, *range(len(LEVELS) + 2, len(header))}))
