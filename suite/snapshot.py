"""A study's records in a form that is fit to be committed: what was measured, on what, by which code."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suite.errors import UserError
from suite.records import Record

if TYPE_CHECKING:
    from suite.study import Cell, Study


def write(study: Study, scale: str, cells: Sequence[Cell], known: Mapping[str, Record], folder: Path) -> None:
    """Write `records.jsonl` (one record a line, in the order of the study) into an empty folder, and the report as Markdown
    with its figures and CSV tables.

    Raises `UserError` when a planned run has no record, or failed: a snapshot is whole.
    """
    from reports import site, study_page

    wanted = list(dict.fromkeys(cell.spec.id for cell in cells))
    missing = [run for run in wanted if run not in known or known[run].status == "failed"]
    if missing:
        raise UserError(f"study {study.id} at {scale}: {len(missing)} of {len(wanted)} runs have no record or failed; "
                        f"`suite run {study.id} --scale {scale}` makes them")
    lines = [known[run].model_dump_json() for run in wanted]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "figures").mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        chapter = study_page.Chapter.of(study, scale, cells, known)
        site.build([chapter], Path(scratch))
        drawn = Path(scratch) / chapter.name
        shutil.copyfile(drawn / "report.md", folder / "report.md")
        for figure in sorted((drawn / "figures").glob("*.png")):
            shutil.copyfile(figure, folder / "figures" / figure.name)
        shutil.copytree(drawn / "tables", folder / "tables", ignore=shutil.ignore_patterns("*.tex"))
