"""Builds a study's report from its plan and its records: a page, Markdown, tables and figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import findings, numbers, provenance, publication, views
from reports.publication import Publication
from reports.sheets import Sheet, markdown, markdown_code
from reports.tables import StudyTable, measure
from suite.published import EVIDENCE_LABELS
from suite.records import Record

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from reports.figures import Figure
    from suite.study import Cell, Study

#: Rows of a table on the page: its file has all of them.
MOST_ROWS = 200
TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class BuildResult:
    """What was written, the page first, and the tables that it was made from."""

    paths: tuple[Path, ...]
    tables: tuple[StudyTable, ...]

    @property
    def page(self) -> Path:
        return self.paths[0]


@dataclass(frozen=True)
class Section:
    """One study table with all that is said and shown about it."""

    table: StudyTable
    setup: str
    sentences: list[str]
    notes: tuple[str, ...]
    measured: Sheet
    differences: Sheet
    costs: Sheet
    publication: Publication | None
    figures: Mapping[str, Figure]

    @property
    def sheets(self) -> list[Sheet]:
        beside = self.publication
        found: list[Sheet | None] = [self.measured, self.differences, self.costs]
        found += [beside.matched, beside.others, beside.gains, beside.cells] if beside is not None else []
        return [sheet for sheet in found if sheet is not None]


def build(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record],
          out_dir: Path) -> BuildResult:
    """Write `index.html`, `report.md`, `tables/` and `figures/` of a study at a scale into `out_dir`.

    `cells` are all planned cells; what has no record is drawn as missing. Tables and figures of an earlier
    build are replaced. Raises `UserError` when a published table that the study names cannot be read.
    """
    out_dir = Path(out_dir)
    tables = measure(study, scale, cells, records)
    for folder in (out_dir / "tables", out_dir / "figures"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    planned = {cell.spec.id for cell in cells}
    records = {run: record for run, record in records.items() if run in planned}
    sections = [_section(study, scale, table, out_dir / "figures") for table in tables]
    totals = provenance.totals(cells, records)
    runs = provenance.runs(study, scale, cells, records)
    data = provenance.data_used(tables)
    failures = provenance.failures(study, cells, records)
    context: dict[str, Any] = {
        "study": study, "scale": scale, "sections": [_for_page(section) for section in sections], "totals": totals,
        "state": findings.state(totals),
        "banner": findings.banner(study, scale, [(x.table, x.publication) for x in sections]),
        "clearly": findings.CLEARLY if any("learly" in x for s in sections for x in s.sentences) else "",
        "command": provenance.command(study, scale), "runs": runs.shortened(MOST_ROWS), "data": data,
        "failures": failures and failures.shortened(MOST_ROWS),
        "not_run": _some(provenance.not_run(study, cells, records)), "machines": provenance.machines(records),
        "example": next((provenance.run_command(study, scale, cell) for cell in cells), ""),
        "papers": _papers(study, cells),
    }
    page = _environment(html=True).get_template("report.html.j2").render(context)
    text = _environment(html=False).get_template("report.md.j2").render(context)
    text = re.sub(r"\n{3,}", "\n\n", text)
    written = [_write(out_dir / "index.html", page), _write(out_dir / "report.md", text)]
    results = [sheet for section in sections for sheet in section.sheets]
    for sheet in [*results, data, runs, *([failures] if failures else [])]:
        written.append(_write(out_dir / "tables" / f"{sheet.name}.csv", sheet.csv()))
    for sheet in [*results, data]:
        label = f"{study.id}-{sheet.name}"
        written.append(_write(out_dir / "tables" / f"{sheet.name}.tex", sheet.latex(label)))
    written += sorted((out_dir / "figures").iterdir())
    return BuildResult(tuple(written), tuple(tables))


def terminal_tables(tables: Sequence[StudyTable]) -> list[RichTable]:
    """Measured tables for a terminal: mean ± sd per column, and the headline difference."""
    return [views.measured(table).shortened(MOST_ROWS).terminal() for table in tables]


def as_json(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record],
            tables: Sequence[StudyTable]) -> dict[str, Any]:
    """The tables that `measure` gives of these as plain JSON data, with what became of the runs."""
    totals = provenance.totals(cells, records)
    sections = [_section(study, scale, table, None) for table in tables]
    return {
        "study": study.id, "scale": scale, "command": provenance.command(study, scale),
        "state": findings.state(totals), "runs": {"planned": totals.planned, **totals.fates},
        "seconds": totals.seconds,
        "tables": [{
            "id": section.table.id, "title": section.table.title, "base": section.table.base,
            "findings": section.sentences, "sheets": {sheet.name: sheet.json() for sheet in section.sheets},
        } for section in sections],
    }


def _section(study: Study, scale: str, table: StudyTable, folder: Path | None) -> Section:
    """A table's section; its figures are drawn when there is a folder for them."""
    return Section(
        table, findings.setup(study, scale, table), findings.table_sentences(table),
        study.edition(scale).tables[table.id].notes, views.measured(table), views.differences(table),
        views.costs(table), publication.publication(study, scale, table),
        _figures(study, table, folder) if folder is not None else {})


def _for_page(section: Section) -> Section:
    """The section with tables that a page has room for."""
    short = {name: getattr(section, name).shortened(MOST_ROWS) for name in ("measured", "differences", "costs")}
    return replace(section, **short)


def _some(names: list[str]) -> list[str]:
    """The first of many names, and how many more there are."""
    return names if len(names) <= MOST_ROWS else [*names[:MOST_ROWS], f"and {len(names) - MOST_ROWS:,} more"]


def _figures(study: Study, table: StudyTable, folder: Path) -> dict[str, Figure]:
    from reports import figures, plots  # matplotlib is slow to import, and the terminal does not need it

    looks = figures.looks(list(study.rows))
    # The first row whose method chooses ranks: the others choose the same or show a part.
    chooser = next((line.row for line in table.lines
                    if any(record.prepare.get("ranks") for record in table.records[line.key])), None)
    drawn = {"differences": plots.differences(table, looks, folder),
             "standing": plots.standing(table, looks, folder), "profile": plots.profile(table, looks, folder),
             "fronts": plots.fronts(table, looks, folder),
             "parameters": plots.parameters(table, looks, folder),
             "losses": plots.losses(table, looks, folder)}
    if chooser is not None:
        drawn["ranks"] = plots.rank_maps(table, chooser, study.rows[chooser].label, folder)
    return {name: figure for name, figure in drawn.items() if figure is not None}


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
    environment.filters |= {"seconds": numbers.seconds, "several": numbers.several, "day": _day,
                            "md": markdown, "code": markdown_code, "safe_svg": Markup}
    environment.globals["evidence"] = {**EVIDENCE_LABELS}
    environment.globals["stylesheet"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment


def _day(moment: str) -> str:
    """`2026-01-31T10:20:30+00:00` -> `2026-01-31 10:20`."""
    return moment[:16].replace("T", " ")


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
