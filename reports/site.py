"""Builds the site: every study that has a page, and the pages over all of them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from reports import history, overview, shared_pages, study_page
from reports.frame import Frame, Page
from reports.study_page import Chapter
from suite import paths
from suite import study as studies
from suite.errors import UserError

#: What a chapter's folder keeps, so that a later build can measure the chapter again.
KEPT = "study.json"
#: Folders whose pages are made anew by every build.
SHARED = ("methods", "tasks", "published", "runs")


@dataclass(frozen=True)
class BuildResult:
    """What was written, and the page to open first."""

    page: Path
    paths: tuple[Path, ...]


def build(drawn: Sequence[Chapter], out: Path, others: Sequence[Chapter] = (),
          mlflow: str | None = None) -> BuildResult:
    """Write the site into `out`: the pages of the chapters `drawn`, and the pages over these and `others`, whose own pages
    an earlier build wrote. `mlflow` is the address of the MLflow pages.

    `page` of what it returns is the first chapter's where only one was drawn, otherwise the overview. Raises `UserError`
    when a published table that a study names cannot be read.
    """
    frame = Frame(Path(out), mlflow)
    written = frame.assets()
    shutil.rmtree(frame.out / "figures", ignore_errors=True)
    for name in SHARED:
        shutil.rmtree(frame.out / name, ignore_errors=True)
    frame.known = {path.relative_to(frame.out).as_posix() for path in frame.out.rglob("*.html")}
    pages: list[Page] = []
    for chapter in drawn:
        page, files = study_page.draw(chapter, frame.out / chapter.name)
        pages.append(page)
        written += [*files, _keep(chapter, frame.out / chapter.name)]
    pages += shared(sorted([*drawn, *others], key=_place), frame.out)
    frame.expect(pages)
    for page in pages:
        written += frame.write(page)
    return BuildResult(frame.out / (drawn[0].path if len(drawn) == 1 else "index.html"), tuple(written))


def shared(chapters: Sequence[Chapter], out: Path) -> list[Page]:
    """The pages over all chapters; figures are drawn into the folder `out` of the site."""
    return [overview.page(chapters, out), history.page(chapters, out), *shared_pages.pages(chapters)]


def _place(chapter: Chapter) -> tuple[int, str]:
    """Small scales first, studies by name."""
    return studies.SCALES.index(chapter.scale), chapter.study.id


def others(out: Path, drawn: Sequence[Chapter] = ()) -> list[Chapter]:
    """The chapters besides `drawn` that have a page in the site, measured again from the records. A study that this version
    cannot read any more is left out."""
    names = {chapter.name for chapter in drawn}
    found = []
    for study, scale, only, folder in _kept(Path(out)):
        if folder not in names:
            with contextlib.suppress(UserError):  # made with a method or a base that is not there any more
                found.append(study_page.chapter(study, scale, only))
    return found


def recorded() -> list[tuple[studies.Study, studies.Scale]]:
    """The built-in studies and scales of which this machine has records."""
    if not paths.runs().is_dir():
        return []
    runs = {folder.name for folder in paths.runs().iterdir()}
    found = []
    for name in studies.names():
        study = studies.load(name)
        for scale in study.scales:
            if any(cell.spec.id in runs for cell in studies.cells(study, scale)):
                found.append((study, scale))
    return found


def _keep(chapter: Chapter, folder: Path) -> Path:
    content = {"study": chapter.study.model_dump(mode="json"), "scale": chapter.scale, "only": list(chapter.only)}
    paths.write_json(folder / KEPT, content)
    return folder / KEPT


def _kept(out: Path) -> Iterator[tuple[studies.Study, str, list[str], str]]:
    for path in sorted(out.glob(f"*/{KEPT}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            yield studies.Study.model_validate(content["study"]), content["scale"], content["only"], path.parent.name
        except (OSError, ValueError, KeyError, ValidationError):
            continue
