"""The frame that every page of the site stands in: layout, navigation, links, and the files beside a page's tables."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports import numbers
from reports.sheets import Sheet, markdown, markdown_code
from suite.published import EVIDENCE_LABELS

TEMPLATES = Path(__file__).resolve().parent / "templates"
#: Files of the site that pages load, all of them ours.
ASSETS = ("style.css", "site.js")
#: Index pages in the order of the navigation; those that a site does not have are left out.
NAVIGATION = (("index.html", "Overview"), ("methods/index.html", "Methods"), ("tasks/index.html", "Tasks"),
              ("published/index.html", "Published"), ("history.html", "History"))


@dataclass(frozen=True)
class Page:
    """A page of the site.

    `path` is where it stands, relative to the site, with slashes: `methods/lora.html`. `template` extends
    `layout.html.j2`; it gets what `context` holds, or what it returns when it is a function (called when the page is
    written, so that thousands of pages need not be in memory at once). `area` is the entry of the navigation that it
    belongs to: the path of an index page. Every one of `sheets` is written beside it as `tables/<name>.csv` and
    `.tex`, and `parts.sheet` links to the files.
    """

    path: str
    title: str
    template: str
    context: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
    area: str = "index.html"
    sheets: tuple[Sheet, ...] = ()
    label: str = ""  # what a LaTeX label begins with

    @property
    def root(self) -> str:
        """What leads from the page's folder to the site: empty, `../` or more of them."""
        return "../" * self.path.count("/")


@dataclass
class Frame:
    """Writes pages into the folder of a site. `known` are the paths that a link may lead to; `mlflow` is the address of
    the MLflow pages, when one is given."""

    out: Path
    mlflow: str | None = None
    known: set[str] = field(default_factory=set)

    def expect(self, pages: Iterable[Page]) -> None:
        """Let links lead to pages that are still to be written."""
        self.known |= {page.path for page in pages}

    def assets(self) -> list[Path]:
        """Copy what every page loads."""
        self.out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copyfile(TEMPLATES / name, self.out / name)) for name in ASSETS]

    def write(self, page: Page) -> list[Path]:
        """Render a page and write it with the files of its tables. The page itself comes first."""
        context = page.context() if callable(page.context) else page.context
        target = self.out / page.path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = environment(html=True).get_template(page.template).render(
            {**context, "page": page, "root": page.root, "site": self, "files": {sheet.name for sheet in page.sheets}})
        written = [write(target, text)]
        for sheet in page.sheets:
            folder = target.parent / "tables"
            folder.mkdir(exist_ok=True)
            written.append(write(folder / f"{sheet.name}.csv", sheet.csv()))
            written.append(write(folder / f"{sheet.name}.tex", sheet.latex(f"{page.label}-{sheet.name}".strip("-"))))
        return written

    @property
    def navigation(self) -> list[tuple[str, str]]:
        """Path and name of every index page that the site has."""
        return [entry for entry in NAVIGATION if entry[0] in self.known]

    def has(self, path: str) -> bool:
        """Whether the site has the page that a link such as `runs/1a2b.html#scores` leads to."""
        return path.split("#")[0] in self.known


@cache
def environment(html: bool) -> Environment:
    """Jinja with the project's filters: for pages (`html`: everything is escaped) or for Markdown."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=html, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    made.filters |= {"seconds": numbers.seconds, "several": numbers.several, "day": day, "percent": numbers.percent,
                     "signed": numbers.signed, "count": numbers.count, "short": numbers.short, "size": numbers.size,
                     "md": markdown, "code": markdown_code, "safe_svg": Markup}
    made.globals["evidence"] = {**EVIDENCE_LABELS}
    return made


def day(moment: str) -> str:
    """`2026-01-31T10:20:30+00:00` -> `2026-01-31 10:20`."""
    return moment[:16].replace("T", " ")


def write(path: Path, text: str) -> Path:
    """Write a text file and return its path."""
    path.write_text(text, encoding="utf-8")
    return path
