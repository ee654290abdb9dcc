"""What `suite list` shows: a header and rows of plain values, the same for people and for `--json`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from suite import bases, capabilities, published, registry, study

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
    """Every published table that is carried as data, with the evidence levels of its cells."""
    rows = []
    for name in published.names():
        table = published.load(name)
        levels = sorted({cell.evidence for row in table.rows for cell in row.cells.values()})
        rows.append([table.id, table.base, len(table.rows), len(table.columns), levels, table.paper.title])
    return ["id", "base", "rows", "columns", "evidence", "paper"], rows


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if value is None else str(value)


LISTINGS: dict[str, Callable[[], Listing]] = {
    "methods": methods, "tasks": tasks, "bases": all_bases, "studies": studies, "published": all_published,
}
