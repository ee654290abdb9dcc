"""A study at a scale: its page, its Markdown, and the files of its tables and figures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import fair, findings, links, provenance, publication, verdict_table, views
from reports.fair import FairSection
from reports.frame import Page, environment, write
from reports.provenance import Totals
from reports.publication import Publication
from reports.sheets import Sheet
from reports.tables import StudyTable, measure
from suite.records import Record, load_many
from suite.study import cells as plan_of

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from reports.figures import Figure
    from suite.study import Cell, Study

#: Rows of a table on the page: its file has all of them.
MOST_ROWS = 200


@dataclass(frozen=True)
class Chapter:
    """A study at a scale: what was planned, what there is of it, and its tables measured.

    `only` are the filters that cut the plan (`suite report --only`), `records` those of planned runs.
    """

    study: Study
    scale: str
    cells: Sequence[Cell]
    records: Mapping[str, Record]
    tables: tuple[StudyTable, ...]
    only: tuple[str, ...] = ()

    @classmethod
    def of(cls, study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record],
           only: Sequence[str] = ()) -> Chapter:
        """Measure a study at a scale. `cells` are all planned cells; what has no record is drawn as missing."""
        planned = {cell.spec.id for cell in cells}
        own = {run: record for run, record in records.items() if run in planned}
        return cls(study, scale, cells, own, tuple(measure(study, scale, cells, own)), tuple(only))

    @property
    def name(self) -> str:
        """Name of its folder: `gora-desk`."""
        return f"{self.study.id}-{self.scale}"

    @property
    def path(self) -> str:
        """Where its page stands in the site."""
        return links.study(self.study.id, self.scale)

    @cached_property
    def totals(self) -> Totals:
        """What became of its runs."""
        return provenance.totals(self.cells, self.records)


def chapter(study: Study, scale: str, only: Sequence[str] = ()) -> Chapter:
    """A study at a scale from the records of this machine. Raises `UserError` when it cannot be planned here."""
    cells = plan_of(study, scale, only)
    return Chapter.of(study, scale, cells, load_many(cell.spec.id for cell in cells), only)


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
    fair: FairSection | None = None

    @property
    def sheets(self) -> list[Sheet]:
        beside = self.publication
        found: list[Sheet | None] = [self.measured, self.differences, self.costs]
        found += [beside.matched, beside.others, beside.gains, beside.cells] if beside is not None else []
        found += self.fair.sheets if self.fair is not None else []
        return [sheet for sheet in found if sheet is not None]


def draw(of: Chapter, folder: Path) -> tuple[Page, list[Path]]:
    """Write `report.md` and `figures/` of a chapter into its folder; returns the page that belongs there, still to be
    written, and what was written. Tables and figures of an earlier build are removed.

    Raises `UserError` when a published table that the study names cannot be read.
    """
    for name in ("tables", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "figures").mkdir(parents=True)
    study, scale, cells, records = of.study, of.scale, of.cells, of.records
    tuned = fair.sections(study, scale, folder / "figures")
    sections = [_section(study, scale, table, folder / "figures", tuned.get(table.id)) for table in of.tables]
    runs = provenance.runs(study, scale, cells, records)
    data = provenance.data_used(of.tables)
    failures = provenance.failures(study, cells, records)
    verdicts, unread = verdict_table.last(study.id, scale)
    context: dict[str, Any] = {
        "verdicts": [(one, one.sheet.shortened(MOST_ROWS)) for one in verdicts], "unread": unread,
        "study": study, "scale": scale, "sections": [_for_page(section) for section in sections],
        "totals": of.totals, "state": findings.state(of.totals),
        "banner": findings.banner(study, scale, [(x.table, x.publication) for x in sections]),
        "clearly": findings.CLEARLY if any("learly" in x for s in sections for x in s.sentences) else "",
        "command": provenance.command(study, scale), "runs": runs.shortened(MOST_ROWS), "data": data,
        "failures": failures and failures.shortened(MOST_ROWS),
        "not_run": _some(provenance.not_run(study, cells, records)), "machines": provenance.machines(records),
        "example": next((provenance.run_command(study, scale, cell) for cell in cells), ""),
        "papers": _papers(study, cells),
    }
    text = environment(html=False).get_template("study.md.j2").render(context)
    written = [write(folder / "report.md", re.sub(r"\n{3,}", "\n\n", text))]
    written += sorted((folder / "figures").iterdir())
    sheets = [sheet for section in sections for sheet in section.sheets]
    sheets += [data, runs, *(one.sheet for one in verdicts)]
    return Page(of.path, f"{study.title} · {scale}", "study.html.j2", context, label=study.id,
                sheets=tuple(sheets + ([failures] if failures else []))), written


def terminal_tables(tables: Sequence[StudyTable]) -> list[RichTable]:
    """Measured tables for a terminal: mean ± sd per column, and the headline difference."""
    return [views.measured(table).shortened(MOST_ROWS).terminal() for table in tables]


def as_json(of: Chapter) -> dict[str, Any]:
    """The tables of a chapter as plain JSON data, with what became of the runs."""
    study, scale, totals = of.study, of.scale, of.totals
    tuned = fair.sections(study, scale, None)
    sections = [_section(study, scale, table, None, tuned.get(table.id)) for table in of.tables]
    return {
        "study": study.id, "scale": scale, "command": provenance.command(study, scale),
        "state": findings.state(totals), "runs": {"planned": totals.planned, **totals.fates},
        "seconds": totals.seconds,
        "tables": [{
            "id": section.table.id, "title": section.table.title, "base": section.table.base,
            "findings": section.sentences, "sheets": {sheet.name: sheet.json() for sheet in section.sheets},
        } for section in sections],
    }


def _section(study: Study, scale: str, table: StudyTable, folder: Path | None, tuned: FairSection | None) -> Section:
    """A table's section; its figures are drawn when there is a folder for them."""
    return Section(
        table, findings.setup(study, scale, table), findings.table_sentences(table),
        study.edition(scale).tables[table.id].notes, views.measured(table), views.differences(table),
        views.costs(table), publication.publication(study, scale, table),
        _figures(study, table, folder) if folder is not None else {}, tuned)


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
