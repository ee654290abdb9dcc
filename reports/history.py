"""The history page: what every `suite regress` found, night by night, and where scores, loss, speed or memory step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from reports import numbers
from reports.frame import Page, day
from reports.sheets import Entry, Number, Sheet, entry
from suite import history, regression
from suite.errors import UserError

if TYPE_CHECKING:
    from reports.figures import Figure
    from reports.study_page import Chapter

#: Comparisons of a study on the page; its file has all of them.
MOST_ROWS = 60
_NAMES = {"score": "score", "loss": "training loss", "speed": "tokens per second", "memory": "peak memory"}


@dataclass(frozen=True)
class Track:
    """What is kept of a study at a scale: its comparisons, the steps of its series, and figures of them."""

    chapter: Chapter
    comparisons: Sheet
    steps: Sheet | None
    figures: list[Figure]
    problem: str


def page(chapters: Sequence[Chapter], out: Path) -> Page:
    """The history of these chapters; figures are drawn into `figures/` of the site's folder `out`."""
    tracks = [track for chapter in chapters if (track := _track(chapter, out / "figures")) is not None]
    sheets = [sheet for track in tracks for sheet in (track.comparisons, track.steps) if sheet is not None]
    return Page("history.html", "History", "history.html.j2", {
        "tracks": [(track, track.comparisons.shortened(MOST_ROWS)) for track in tracks],
        "example": chapters[0].study.id if chapters else "gora",
    }, area="history.html", sheets=tuple(sheets), label="history")


def _track(chapter: Chapter, folder: Path) -> Track | None:
    """None when nothing was ever compared. A file that cannot be read costs its study the history, and is named."""
    try:
        kept = [made for against in get_args(regression.Against)
                for made in regression.history(chapter.study.id, chapter.scale, against)]
        nights = history.load(chapter.study.id, chapter.scale)
    except UserError as error:
        kept, nights, problem = [], [], str(error)
    else:
        problem = ""
    if not kept and not nights and not problem:
        return None
    return Track(chapter, _comparisons(chapter, kept), _steps(chapter, nights), _figures(chapter, nights, folder), problem)


def _comparisons(chapter: Chapter, kept: Sequence[regression.Regression]) -> Sheet:
    """One row per `suite regress`, the latest first."""
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for made in sorted(kept, key=lambda one: one.time, reverse=True):
        red = len(made.red)
        counts = ", ".join(f"{count} {verdict}" for verdict, count in made.counts.items())
        commit = (made.commit or "")[:10] + (" with changes" if made.dirty else "")
        rows.append((Entry(day(made.time)), Entry(made.baseline or made.against),
                     entry(f"red ({red})", "failed") if red else Entry("nothing red"), Entry(str(len(made.findings))),
                     Entry(counts), entry(commit or numbers.DASH, code=bool(commit))))
        counted: dict[str, Number] = {str(verdict): count for verdict, count in made.counts.items()}
        data.append({"time": made.time, "against": made.against, "baseline": made.baseline, "red": red,
                     "findings": len(made.findings), "commit": made.commit, "dirty": made.dirty, **counted})
    return Sheet(f"history-{chapter.name}", f"Comparisons of {chapter.study.title}, {chapter.scale}",
                 ("When", "Against", "Result", "Findings", "By verdict", "Commit"), tuple(rows), tuple(data), (),
                 frozenset({0, 1, 2, 4, 5}))


def _steps(chapter: Chapter, nights: Sequence[history.Night]) -> Sheet | None:
    """Where a series of nights changes its level; None with too few nights to say."""
    if len(nights) < 2 * history.SIDE:
        return None
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for measure in history.MEASURES:
        for (table, row, column), values in history.series(nights, measure).items():
            for step in history.steps(values):
                night = nights[step.at]
                rows.append((Entry(_NAMES[measure]), Entry(f"{row}, {column}"), Entry(day(night.time)),
                             Entry(f"{step.before:.4g}"), Entry(f"{step.after:.4g}"), Entry(f"{step.p:.2g}"),
                             entry((night.commit or numbers.DASH)[:10], code=True)))
                data.append({"measure": measure, "table": table, "row": row, "column": column, "time": night.time,
                             "before": step.before, "after": step.after, "p": step.p, "commit": night.commit})
    return Sheet(f"steps-{chapter.name}", f"Steps in {len(nights)} nights of {chapter.study.title}, {chapter.scale}",
                 ("What", "Row and task", "First night after", "Before", "After", "p", "Commit"), tuple(rows), tuple(data),
                 (f"A step has at least {history.SIDE} nights on each side and p at most {history.ALPHA:g} in a permutation "
                  "test; scores as shares, loss in nats, memory in bytes.",), frozenset({0, 1, 2, 6}))


def _figures(chapter: Chapter, nights: Sequence[history.Night], folder: Path) -> list[Figure]:
    """Score, loss, speed and memory of every table over the nights."""
    if len(nights) < 2:
        return []
    from reports import nights as drawn  # matplotlib is slow to import
    from reports.figures import looks

    folder.mkdir(parents=True, exist_ok=True)
    rows = chapter.study.rows
    labels = {row: rows[row].label for row in rows}
    found = [drawn.figure(nights, table, measure, looks(list(rows)), labels, folder, f"{chapter.name}-")
             for table in dict.fromkeys(point.table for night in nights for point in night.points)
             for measure in history.MEASURES]
    return [figure for figure in found if figure is not None]
