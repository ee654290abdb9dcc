"""Builds a study's report from its plan and its records: one HTML page, Markdown, CSV and LaTeX tables, and figures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import findings, numbers, provenance, publication, views
from reports.publication import Publication
from reports.sheets import Entry, Sheet
from reports.tables import StudyTable, measure
from suite.records import Record

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from reports.figures import Figure
    from suite.study import Cell, Study

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class BuildResult:
    """What was written: the page first."""

    paths: tuple[Path, ...]

    @property
    def page(self) -> Path:
        return self.paths[0]


@dataclass(frozen=True)
class Section:
    """One study table with all that is said and shown about it."""

    table: StudyTable
    sentences: tuple[str, ...]
    banner: str
    slices: str
    measured: Sheet
    differences: Sheet
    costs: Sheet
    publication: Publication | None
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Figure] | None = None
    rank_maps: tuple[Figure, ...] = ()

    @property
    def sheets(self) -> list[Sheet]:
        found = [self.measured, self.differences, self.costs]
        if self.publication is not None:
            found += [x for x in (self.publication.matched, self.publication.others, self.publication.gains) if x]
        return found


def build(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record], out_dir: Path) -> BuildResult:
    """Write the report of a study at a scale into `out_dir`: `index.html`, `report.md`, `tables/` and `figures/`.

    `cells` are all planned cells; what has no record is drawn as missing. Tables and figures of an earlier build are
    replaced. Raises `UserError` when a published table that the study names cannot be read.
    """
    out_dir = Path(out_dir)
    tables = measure(study, scale, cells, records)
    for folder in (out_dir / "tables", out_dir / "figures"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    planned = {cell.spec.id for cell in cells}
    records = {run: record for run, record in records.items() if run in planned}
    sections = [_drawn(_section(study, scale, table), study, out_dir / "figures") for table in tables]
    totals = provenance.totals(cells, records)
    context: dict[str, Any] = {
        "study": study, "scale": scale, "about": study.edition(scale).about, "sections": sections, "totals": totals,
        "state": findings.state(totals), "command": provenance.command(study, scale),
        "runs": provenance.runs(study, scale, cells, records), "data": provenance.data_used(tables),
        "failures": provenance.failures(study, cells, records),
        "not_run": provenance.not_run(study, cells, records), "machines": provenance.machines(records),
        "example": next((provenance.run_command(study, scale, cell) for cell in cells), ""),
        "papers": _papers(study, cells),
    }
    sheets = [sheet for section in sections for sheet in section.sheets]
    sheets += [sheet for sheet in (context["data"], context["runs"], context["failures"]) if sheet is not None]
    written = [_write(out_dir / "index.html", _environment(html=True).get_template("report.html.j2").render(context)),
               _write(out_dir / "report.md", _environment(html=False).get_template("report.md.j2").render(context))]
    for sheet in sheets:
        written.append(_write(out_dir / "tables" / f"{sheet.name}.csv", sheet.csv()))
        written.append(_write(out_dir / "tables" / f"{sheet.name}.tex", sheet.latex()))
    written += sorted((out_dir / "figures").iterdir())
    return BuildResult(tuple(written))


def terminal_tables(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[RichTable]:
    """The study's tables for a terminal: mean ± sd per column, and the headline difference to the reference."""
    return [_compact(table).terminal() for table in measure(study, scale, cells, records)]


def as_json(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> dict[str, Any]:
    """The same tables as plain JSON data, with what became of the runs."""
    totals = provenance.totals(cells, records)
    tables = measure(study, scale, cells, records)
    return {
        "study": study.id, "scale": scale, "command": provenance.command(study, scale), "state": findings.state(totals),
        "runs": {"planned": totals.planned, **totals.fates}, "seconds": totals.seconds,
        "tables": [{
            "id": section.table.id, "title": section.table.title, "base": section.table.base,
            "findings": list(section.sentences), "sheets": {x.name: x.json() for x in section.sheets},
        } for section in (_section(study, scale, table) for table in tables)],
    }


def _section(study: Study, scale: str, table: StudyTable) -> Section:
    beside = publication.publication(study, scale, table)
    banner = ""
    if beside is not None:
        columns = study.edition(scale).tables[table.id].published
        shown = [c for c in beside.table.columns if c != "avg" and (not columns or not columns.columns or c in columns.columns)]
        banner = findings.banner(study, scale, table, beside.table.base,
                                 numbers.listing([publication.column_name(c) for c in shown]))
    return Section(table, tuple(findings.table_sentences(table)), banner, findings.slices(table), views.measured(table),
                   views.differences(table), views.costs(table), beside, study.edition(scale).tables[table.id].notes)


def _drawn(section: Section, study: Study, folder: Path) -> Section:
    """The section with its figures."""
    plots, figures = import_module("reports.plots"), import_module("reports.figures")
    table, looks = section.table, figures.looks(list(study.rows))
    drawn = {"differences": plots.differences(table, looks, folder), "parameters": plots.parameters(table, looks, folder),
             "losses": plots.losses(table, looks, folder)}
    maps: list[Figure] = []
    for line in table.lines:  # the first row whose method chooses ranks: the others choose the same or show a part
        if not maps and any(r.prepare.get("ranks") for r in table.records[line.key]):
            maps = plots.rank_maps(table, line.row, study.rows[line.row].label, folder)
    return Section(**{**vars(section), "figures": {k: v for k, v in drawn.items() if v is not None},
                      "rank_maps": tuple(maps)})


def _compact(table: StudyTable) -> Sheet:
    """The measured table without shares, with the headline difference as its last column."""
    full = views.measured(table)
    rows = []
    by_label = {line.label: line for line in table.lines}
    for row in full.rows:
        line = by_label.get(row[0].text)
        delta = table.differences.get((line.key, table.headline)) if line else None
        last = Entry("") if line is None or table.is_reference(line) else views.difference_entry(delta)
        rows.append((row[0], row[1], *row[3:], last))
    header = (full.header[0], full.header[1], *full.header[3:], f"Δ {table.reference_label}")
    return Sheet(full.name, full.title, header, tuple(rows), full.data, full.notes[:1])


def _papers(study: Study, cells: Sequence[Cell]) -> list[tuple[str, str | None]]:
    """Title and arXiv id of the study's paper and of every method's, for the list of references."""
    from suite import registry

    found: dict[str, str | None] = {study.paper.title: study.paper.arxiv}
    for method_id in dict.fromkeys(cell.spec.method.id for cell in cells):
        paper = registry.methods()[method_id].paper if method_id in registry.methods() else None
        if paper is not None and paper.arxiv not in found.values():
            found.setdefault(paper.title, paper.arxiv)
    return list(found.items())


def _environment(html: bool) -> Environment:
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=html, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"seconds": numbers.seconds, "listing": numbers.listing, "several": numbers.several,
                            "safe_svg": Markup, "day": _day}
    environment.globals["letters"] = publication.LETTERS
    environment.globals["evidence"] = {**publication.EVIDENCE_LABELS}
    environment.globals["stylesheet"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment


def _day(moment: str) -> str:
    """`2026-01-31T10:20:30+00:00` -> `2026-01-31 10:20`."""
    return moment[:16].replace("T", " ")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
