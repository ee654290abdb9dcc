"""What `suite list` shows: a header and rows of plain values, the same for people and for `--json`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from suite import bases, capabilities, published, registry, study
from suite.measures import MEASURES

Listing = tuple[list[str], list[list[Any]]]


def methods() -> Listing:
    """Every registered method with what it can do (found by trying, `suite.capabilities`), its options and defaults."""
    rows = []
    for method in registry.methods().values():
        options = [f"{name}={_default(field)}" for name, field in method.Config.model_fields.items()]
        can = capabilities.summary(method.id).values()
        rows.append([method.id, method.label, method.paper.arxiv or "", method.packs, *can, ", ".join(options)])
    return ["id", "label", "arxiv", "packs", *capabilities.QUESTIONS.values(), "options"], sorted(rows)


def tasks() -> Listing:
    """Every registered task with its sizes."""
    rows = []
    for task in registry.tasks().values():
        place = task.source.asset or task.source.hub or ""
        rows.append([task.id, task.version, task.kind, task.metric, task.sizes["train"], task.sizes["validation"],
                     task.sizes["test"], place, task.title])
    return ["id", "version", "kind", "metric", "train", "validation", "test", "source", "title"], sorted(rows)


def all_bases() -> Listing:
    """Every known base with its parameters, counted from its config."""
    rows = []
    for base in bases.known().values():
        count = bases.parameters(base)
        rows.append([base.id, base.kind, count, base.asset or base.hub or "", base.revision, base.gated, base.title])
    return ["id", "kind", "parameters", "source", "revision", "gated", "title"], rows


def studies() -> Listing:
    """Every built-in study with its scales."""
    rows = []
    for name in study.names():
        found = study.load(name)
        rows.append([found.id, list(found.scales), found.paper.arxiv or "", found.title])
    return ["id", "scales", "arxiv", "title"], rows


def all_published() -> Listing:
    """Every published table that is carried as data: how many of its cells have numbers, how those are known, what is
    still to be transcribed, and the studies that are held against it."""
    held = held_against()
    rows = []
    for name in published.names():
        table = published.load(name)
        rows.append([table.id, table.paper.arxiv or "", list(table.bases), len(table.rows), len(table.columns),
                     table.numbers, table.evidence, list(table.missing), held.get(table.id, []), table.paper.title])
    return ["id", "arxiv", "bases", "rows", "columns", "numbers", "evidence", "missing", "studies", "paper"], rows


def brief(kind: str, header: list[str], rows: list[list[Any]]) -> Listing:
    """A listing as a terminal shows it: of published tables one line each, with the names of papers and bases cut."""
    if kind != "published":
        return header, rows
    lines = []
    for id_, _, bases_, count, columns, numbers, evidence, _, held, title in rows:
        names = [base.rpartition("/")[2] for base in bases_]
        base = textwrap.shorten(names[0], 24, placeholder="…") + (f" +{len(names) - 1}" if len(names) > 1 else "")
        lines.append([id_, textwrap.shorten(title.partition(":")[0], 26, placeholder="…"), base, f"{count} × {columns}",
                      f"{numbers} of {count * columns}" if numbers else "none yet", evidence, held])
    return ["id", "paper", "base", "size", "numbers", "evidence", "studies"], lines


def held_against() -> dict[str, list[str]]:
    """The studies that are held against each published table, at any scale."""
    held: dict[str, list[str]] = {}
    for name in study.names():
        found = study.load(name)
        tables = [table for edition in found.scales.values() for table in edition.tables.values()]
        for id_ in dict.fromkeys(table.published.table for table in tables if table.published is not None):
            held.setdefault(id_, []).append(found.id)
    return held


def about(kind: str, rows: list[list[Any]], text: str) -> list[list[Any]]:
    """The rows that contain a text, in any case; a published table also by its methods, row labels and columns."""
    wanted = text.casefold()

    def words(row: list[Any]) -> str:
        shown = list(row)
        if kind == "published":
            table = published.load(row[0])
            shown += [table.columns, *((one.method, one.label) for one in table.rows)]
        return str(shown).casefold()

    return [row for row in rows if wanted in words(row)]


#: How a number is known, behind it, in a terminal.
_SIGNS: dict[published.Evidence, str] = {"verbatim": "V", "secondary": "S", "recalled": "R", "derived": "D"}


def published_cells(table: published.PublishedTable) -> Listing:
    """A published table as its paper prints it, each number with the sign of its evidence; `?` where the paper has a
    number that we do not know. Wide tables are turned: one line per column."""
    several = len(table.bases) > 1
    header = ["row", "rank", *(["base"] if several else []), *table.columns]
    rows: list[list[Any]] = [
        [row.label, "—" if row.rank is None else str(row.rank),
         *([table.base_of(row).rpartition("/")[2]] if several else []),
         *(_cell(table, row, column) for column in table.columns)] for row in table.rows]
    if len(table.columns) > 14:
        header, *rows = [list(line) for line in zip(header, *rows, strict=True)]
    return header, rows


def published_facts(table: published.PublishedTable) -> list[str]:
    """What a reader must know beside the numbers: the source, the protocol, what columns count, caveats."""
    paper, protocol = table.paper, table.protocol
    counts = ", ".join(f"{count} {level}: {published.EVIDENCE_LABELS[level]} ({_SIGNS[level]})"
                       for level, count in table.evidence.items())
    arxiv = paper.arxiv and f"arXiv {paper.arxiv}"
    return [
        f"Paper: {', '.join(filter(None, (paper.title, arxiv, paper.version)))}; {paper.table}.",
        f"Bases: {', '.join(table.bases)}.",
        f"Numbers: {table.numbers} of {table.places} places. {counts}",
        *(f"{name.capitalize()}: {getattr(protocol, name)}" for name in ("train", "metric", "split", "selection")),
        f"Seeds: {'not stated' if protocol.seeds is None else protocol.seeds}"
        f"{'; their median is printed' if protocol.statistic == 'median' else ''}",
        *(f"Note: {text}" for text in protocol.notes),
        *(f"{MEASURES[name].unit}: {', '.join(columns)}" for name, columns in table.measures.items()),
        *(f"Claim ({claim.evidence}): {claim.text}{'' if claim.value is None else f': {claim.value:g}'}"
          for claim in table.headline_claims),
        *(f"Caveat: {text}" for text in table.caveats),
        *(f"Missing: {text}" for text in table.missing),
    ]


def _cell(table: published.PublishedTable, row: published.PublishedRow, column: str) -> str:
    cell = row.cells.get(column)
    if cell is None:
        return "—"
    if cell.mean is None:
        return f"? {_SIGNS[cell.evidence]}"
    digits = table.decimals(column)
    spread = "" if cell.sd is None else f" ± {cell.sd:.{digits}f}"
    return f"{cell.mean:.{digits}f}{spread} {_SIGNS[cell.evidence]}"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if value is None else str(value)


LISTINGS: dict[str, Callable[[], Listing]] = {
    "methods": methods, "tasks": tasks, "bases": all_bases, "studies": studies, "published": all_published,
}
