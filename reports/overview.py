"""The overview of the site: which method when, how sure that is, and the state of every study."""

from __future__ import annotations

import statistics as plain
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from reports import findings, links, numbers
from reports.frame import Page, day
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import Line, StudyTable
from suite import bases
from suite.errors import UserError
from suite.records import Record
from suite.statistics import Difference

if TYPE_CHECKING:
    from reports.figures import Figure
    from reports.study_page import Chapter

#: Rows of the figure and of a table on the page.
MOST_GROUPS, MOST_ROWS = 40, 200


@dataclass(frozen=True)
class Comparison:
    """A line of a table against its reference, in the column that sums the table up. `time`, `memory` and `trained` are
    multiples of the reference's; None where one of the two is unknown or zero."""

    chapter: Chapter
    table: StudyTable
    line: Line
    reference: Line
    delta: Difference
    time: float | None
    memory: float | None
    trained: float | None

    @property
    def verdict(self) -> str:
        """`above` or `below` when the difference is more than noise, else `level`."""
        return "level" if not self.delta.clear else "above" if self.delta.mean > 0 else "below"


@dataclass(frozen=True)
class Group:
    """All comparisons of one row, by its name, with one reference."""

    name: str
    against: str
    method: str
    found: tuple[Comparison, ...]

    @property
    def seeds(self) -> int:
        """Seeds of the comparison that has most."""
        return max(len(one.delta.per_seed) for one in self.found)

    @property
    def solid(self) -> bool:
        """Whether any comparison has several seeds: one seed claims nothing."""
        return self.seeds > 1

    def count(self, verdict: str) -> int:
        return sum(one.verdict == verdict for one in self.found)

    @property
    def middle(self) -> float:
        return plain.median(one.delta.mean for one in self.found)

    @property
    def detectable(self) -> float | None:
        """The median of the true differences that the comparisons could have found."""
        known = [value for one in self.found if one.delta.over_seeds and (value := one.delta.detectable) is not None]
        return plain.median(known) if known else None

    def multiple(self, what: str) -> float | None:
        """The median of a cost, in multiples of the reference's."""
        known = [value for one in self.found if (value := getattr(one, what)) is not None]
        return plain.median(known) if known else None


def page(chapters: Sequence[Chapter], out: Path) -> Page:
    """The overview of these chapters; its figure is drawn into `figures/` of the site's folder `out`."""
    groups = gather(chapters)
    methods, settings, state = _methods(groups), _settings(chapters), _state(chapters)
    solid = [group for group in groups if group.solid] or groups
    drawn = _figure(solid, out / "figures") if solid else None
    small = sorted({chapter.scale for chapter in chapters} - {"paper"}, key=["desk", "bench", "paper"].index)
    return Page("index.html", "Which adapter, when", "overview.html.j2", {
        "sentences": _sentences(groups), "methods": methods.shortened(MOST_ROWS), "settings": settings.shortened(MOST_ROWS),
        "state": state, "figure": drawn, "small": small, "chapters": len(chapters),
        "runs": len({run for chapter in chapters for run in chapter.records}),
        "last": max((chapter.totals.last for chapter in chapters), default=""),
    }, sheets=(methods, settings, state), label="overview")


def gather(chapters: Sequence[Chapter]) -> list[Group]:
    """Every comparison of every table, by row and reference: those of several seeds first, the highest median difference
    first."""
    found: dict[tuple[str, str], list[Comparison]] = {}
    for chapter in chapters:
        for table in chapter.tables:
            for line in table.lines:
                delta = table.differences.get((line.key, table.headline))
                if delta is not None and not table.is_reference(line):
                    one = _comparison(chapter, table, line, delta)
                    found.setdefault((line.name, one.reference.name), []).append(one)
    groups = [Group(name, against, each[0].line.method, tuple(each)) for (name, against), each in found.items()]
    return sorted(groups, key=lambda group: (not group.solid, -group.middle))


def _comparison(chapter: Chapter, table: StudyTable, line: Line, delta: Difference) -> Comparison:
    reference = table.reference[line.key]
    ours, theirs = ([record for record in table.records.get(key, ()) if record.scores] for key in (line.key, reference.key))
    sizes = [table.sizes[key].middle if key in table.sizes else None for key in (line.key, reference.key)]
    return Comparison(chapter, table, line, reference, delta, _ratio(_seconds(ours), _seconds(theirs)),
                      _ratio(_memory(ours), _memory(theirs)), _ratio(*sizes))


def _seconds(done: Sequence[Record]) -> float | None:
    return plain.median(record.timings.total for record in done) if done else None


def _memory(done: Sequence[Record]) -> float | None:
    """Highest bytes while training: the device's where there is one, else the process's."""
    known = [record.memory.device or record.memory.training or record.memory.resident
             for record in done if record.memory is not None]
    return max(known, default=None)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def _sentences(groups: Sequence[Group]) -> list[str]:
    """What the comparisons of several seeds say, method by method, and what is cheap among those that lose nothing."""
    solid = [group for group in groups if group.solid]
    kinds: dict[str, list[str]] = {}
    for group in solid:
        above, below = group.count("above"), group.count("below")
        kind = "both" if above and below else "above" if above else "below" if below else "level"
        kinds.setdefault(kind, []).append(f"{_name(group, groups)} ({_span(group)})")
    titles = {"above": "Clearly above its reference at least once, clearly below never",
              "both": "Clearly above in one place and clearly below in another",
              "level": "Never told apart from its reference",
              "below": "Clearly below its reference at least once, above never"}
    found = [f"{title}: {findings.some(kinds[kind])}." for kind, title in titles.items() if kind in kinds]
    safe = [group for group in solid if not group.count("below") and group.multiple("trained") is not None]
    cheap = []
    for what, said in (("trained", "trained parameters"), ("time", "run time"), ("memory", "memory")):
        known = [(value, group) for group in safe if (value := group.multiple(what)) is not None]
        if known and min(known, key=lambda pair: pair[0])[0] < 0.95:
            value, group = min(known, key=lambda pair: pair[0])
            cheap.append(f"{said} {_name(group, groups)} ({times(value)})")
    if cheap:
        found.append(f"Cheapest of those that are clearly below nowhere, in multiples of the reference: {'; '.join(cheap)}.")
    if len(solid) < len(groups):
        found.append(f"{numbers.several(len(groups) - len(solid), 'row')} ran with one seed only: nothing is claimed of "
                     f"{'it' if len(groups) - len(solid) == 1 else 'them'}.")
    return found


def _name(group: Group, groups: Sequence[Group]) -> str:
    """The row's name, with its reference where that is not the usual one."""
    usual = Counter(one.against for one in groups).most_common(1)[0][0]
    return group.name if group.against == usual else f"{group.name} against {group.against}"


def _span(group: Group) -> str:
    """`+1.2`, or from the lowest difference to the highest."""
    means = [one.delta.mean for one in group.found]
    low, high = numbers.signed(min(means)), numbers.signed(max(means))
    return low if low == high else f"{low} to {high}"


def times(value: float) -> str:
    """2.345 -> × 2.3; 0.0451 -> × 0.045."""
    return f"× {value:.2g}" if value < 100 else f"× {value:.0f}"


def _methods(groups: Sequence[Group]) -> Sheet:
    rows = tuple((
        entry(group.name, *_faded(group), link=links.method(group.method)), Entry(group.against),
        Entry(str(len(group.found))), Entry(str(group.seeds)),
        _counted(group.count("above"), "clear"), _counted(group.count("level")),
        _counted(group.count("below"), "clear"),
        entry(numbers.signed(group.middle), note=_span(group) if len(group.found) > 1 else ""),
        entry(numbers.percent(group.detectable)) if group.detectable is not None else entry(numbers.DASH, "faded"),
        *(_multiple(group.multiple(what)) for what in ("trained", "time", "memory")),
    ) for group in groups)
    data = _data(groups)
    header = ("Method", "Against", "Comparisons", "Seeds", "Clearly above", "Not told apart", "Clearly below",
              "Median difference", "Could find", "Trained", "Run time", "Memory")
    notes = ("A comparison is one row at one budget in one table of a study, against that table's reference, in its average "
             "or only task. Differences are percentage points. Could find: the true difference that such an experiment "
             "finds in 80 of 100 cases (median). Trained parameters, run time and memory: the median multiple "
             "of the reference's. Grey: one seed only, so nothing is claimed.", findings.CLEARLY)
    return Sheet("methods", "Methods against their reference", header, rows, tuple(data), notes, frozenset({0, 1}))


def _data(groups: Sequence[Group]) -> list[dict[str, Number]]:
    """A row per comparison."""
    return [{
        "study": one.chapter.study.id, "scale": one.chapter.scale, "table": one.table.id, "row": one.line.row,
        "label": one.line.label, "method": one.line.method, "reference": one.reference.key,
        "column": one.table.headline, "difference_points": 100 * one.delta.mean,
        "low_points": 100 * one.delta.interval.low if one.delta.interval else None,
        "high_points": 100 * one.delta.interval.high if one.delta.interval else None,
        "seeds": len(one.delta.per_seed), "items": one.delta.items, "verdict": one.verdict,
        "times_trained": one.trained, "times_seconds": one.time, "times_memory": one.memory,
    } for group in groups for one in group.found]


def _faded(group: Group) -> list[Mark]:
    return [] if group.solid else ["faded"]


def _counted(value: int, *marks: Mark) -> Entry:
    return entry(str(value), *marks) if value else entry("0", "faded")


def _multiple(value: float | None) -> Entry:
    return entry(times(value)) if value is not None else entry(numbers.DASH, "faded")


def _settings(chapters: Sequence[Chapter]) -> Sheet:
    """One row per table: the highest row, what is level with it, and what the reference gets."""
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for chapter in chapters:
        for table in chapter.tables:
            scored = {line.key: summary for line in table.lines
                      if (summary := table.values[line.key, table.headline].summary) is not None}
            name = Entry(table.title, link=f"{chapter.path}#table-{table.id}", aside=f"{chapter.study.id}, {chapter.scale}")
            place = (name, Entry(_base(table.base)), Entry(findings.some(list(table.tasks.values()))))
            if not scored:
                rows.append((*place, *(entry(numbers.DASH, "missing", title="not run yet"),) * 4))
                continue
            best = max((line for line in table.lines if line.key in scored), key=lambda line: scored[line.key].mean)
            top = scored[best.key]
            level = [line.label for line in table.lines
                     if line.key != best.key and table.values[line.key, table.headline].top]
            anchor = scored.get(table.reference[best.key].key)
            spread = f" ± {numbers.percent(top.sd)}" if top.sd is not None else ""
            rows.append((
                *place, Entry(best.label, link=links.method(best.method)),
                entry(f"{numbers.percent(top.mean)}{spread}",
                      title=f"95 % interval {numbers.interval(top.interval, sign=False)}" if top.interval else ""),
                Entry(f"{table.reference_label} {numbers.percent(anchor.mean)}" if anchor else numbers.DASH),
                Entry(findings.some(level) if level else "none")))
            data.append({"study": chapter.study.id, "scale": chapter.scale, "table": table.id, "base": table.base,
                         "column": table.headline, "highest": best.key, "mean_percent": 100 * top.mean,
                         "sd_percent": None if top.sd is None else 100 * top.sd, "seeds": top.seeds,
                         "reference": table.reference[best.key].key,
                         "reference_percent": 100 * anchor.mean if anchor else None, "level": " ".join(level)})
    header = ("Table", "Base", "Tasks", "Highest", "Score", "Reference", "Not told apart from the highest")
    notes = ("Score: percent, average over the table's tasks, ± standard deviation over seeds. A highest row that many are "
             "level with is no winner.",)
    return Sheet("settings", "Highest row of every table", header, tuple(rows), tuple(data), notes,
                 frozenset({0, 1, 2, 3, 5, 6}))


def _base(base: str) -> str:
    """A base's title without what stands in brackets."""
    try:
        return bases.get(base).title.split(" (")[0]
    except UserError:
        return base


def _state(chapters: Sequence[Chapter]) -> Sheet:
    """What became of every study's runs."""
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    for chapter in chapters:
        totals = chapter.totals
        wrong = sum(totals.fates.get(kind, 0) for kind in ("failed", "diverged"))
        missing = totals.fates.get("missing", 0)
        rows.append((
            Entry(chapter.study.title, link=chapter.path, aside=" ".join(chapter.only)), Entry(chapter.scale),
            Entry(str(totals.planned)), Entry(str(totals.fates.get("finished", 0))),
            entry(str(wrong), "failed") if wrong else entry("0", "faded"),
            _counted(totals.fates.get("skipped", 0)), _counted(missing), Entry(numbers.seconds(totals.seconds)),
            Entry(day(totals.last) or numbers.DASH)))
        data.append({"study": chapter.study.id, "scale": chapter.scale, "only": " ".join(chapter.only),
                     "planned": totals.planned, **totals.fates, "seconds": totals.seconds,
                     "first": totals.first, "last": totals.last})
    header = ("Study", "Scale", "Planned runs", "Finished", "Failed or diverged", "Skipped", "Not run yet", "Work",
              "Last run")
    return Sheet("studies", "State of every study", header, tuple(rows), tuple(data), (), frozenset({0, 1, 8}))


def _figure(groups: Sequence[Group], folder: Path) -> Figure:
    """Every comparison as a point with its interval, a line per method and reference."""
    import numpy as np
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    from reports.figures import INK, MUTED, PALETTE, PAPER, drawing, finish, panels, style

    folder.mkdir(parents=True, exist_ok=True)
    shown = list(groups[:MOST_GROUPS])
    names = [_name(group, groups) for group in shown]
    every = [one.delta for group in shown for one in group.found]
    ends = [100 * value for delta in every for value in
            ((delta.interval.low, delta.interval.high) if delta.interval else (delta.mean,))]
    # A single row far below must not flatten the others: it is drawn as an arrow at the edge.
    low, high = (float(value) for value in np.percentile(ends, [8, 98]))
    room = max(high - low, 1.0)
    low, high = min(low - 0.15 * room, 0.0), max(high + 0.1 * room, 0.0)
    colour = PALETTE[0]
    left = 0.35 + 0.068 * max(map(len, names))
    with style():
        figure = drawing(min(left + 6.2, 9.6), 0.95 + 0.29 * len(shown))
        axis = panels(figure, 1, 1, left=left, right=0.15, top=0.1, bottom=0.75)[0]
        axis.axvline(0, color=MUTED, linewidth=1)
        for y, group in enumerate(shown):
            for place, one in enumerate(group.found):
                at = y + 0.62 * ((place + 0.5) / len(group.found) - 0.5)
                mean = 100 * one.delta.mean
                if one.delta.interval is not None:
                    axis.plot([100 * one.delta.interval.low, 100 * one.delta.interval.high], [at, at], color=colour,
                              linewidth=1.2, alpha=0.55, solid_capstyle="butt")
                marker = "<" if mean < low else ">" if mean > high else "o"
                axis.plot(min(max(mean, low), high), at, marker=marker, markersize=4.5, color=colour,
                          markerfacecolor=colour if one.delta.clear else PAPER, markeredgewidth=1.1,
                          clip_on=False)
        axis.set_xlim(low, high)
        axis.set_ylim(len(shown) - 0.4, -0.6)
        axis.set_yticks(range(len(shown)), names)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.signed(value / 100, 0)))
        axis.set_xlabel("points above the reference")
        handles = [Line2D([], [], color=colour, marker="o", linestyle="none", markersize=5, label="clear difference"),
                   Line2D([], [], color=colour, marker="o", linestyle="none", markersize=5, markerfacecolor=PAPER,
                          label="not told apart")]
        figure.legend(handles=handles, loc="lower center", ncols=2, labelcolor=INK, borderaxespad=0.2)
        caption = ("Every comparison with a reference: difference in percentage points and its paired 95 % interval. "
                   "Rows of one seed only are left out where others have several. Filled: a clear difference. "
                   "Arrows: outside the figure.")
        if len(groups) > len(shown):
            caption += f" The {len(shown)} highest of {len(groups)}; the table has all."
        alt = "Differences to the reference, in points. " + "; ".join(
            f"{name} {_span(group)}" for name, group in zip(names, shown, strict=True)) + "."
        return finish(figure, "overview", caption, alt, folder, _data(shown))
