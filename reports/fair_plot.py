"""The figure of fair tuning: validation score against learning rate, a panel per row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from reports import fair, numbers
from reports.figures import INK, MUTED, PAPER, Figure, Look, drawing, finish, panels, style
from reports.sheets import Number
from reports.tables import task_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from reports.fair import Curve
    from suite.fair import Tuning
    from suite.study import Study, Table

ACROSS = 3
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ((0, (1.5, 1.2)), (0, (5, 1.5)), (0, (4, 1, 1, 1)), (0, (2, 3)))
#: Tasks of a table of which each gets a line of its own; of more, only the mean is drawn.
MOST_TASKS = 4


def draw(study: Study, table: Table, name: str, tunings: Sequence[Tuning], curves: Sequence[Curve],
         looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Every row's curve with a band of one standard error, the chosen rate filled, the study's own a dashed line."""
    pairs = [(one, found) for one, found in zip(tunings, curves, strict=True)
             if any(score is not None for score in found.scores)]
    if not pairs:
        return None
    rows = list(dict.fromkeys(one.row for one, _ in pairs))
    budgets = list(dict.fromkeys(one.budget.text for one, _ in pairs if one.budget is not None))
    tasks = list(dict.fromkeys(task for _, found in pairs for scores in found.by_task for task in scores))
    alone = len(budgets) < 2 and 1 < len(tasks) <= MOST_TASKS  # tasks are told apart where budgets need not be
    low, high = _limits(pairs, alone)
    across = min(ACROSS, len(rows))
    down = -(-len(rows) // across)
    with style():
        figure = drawing(7.8 if across > 1 else 4.6, 2.0 * down + 0.75)
        axes = panels(figure, across, down, share=True, left=0.62, right=0.12, top=0.3, bottom=0.85, wide=0.2, high=0.45)
        for place, (axis, row) in enumerate(zip(axes, rows, strict=False)):
            axis.axvline(table.rates(row)[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
            for one, found in pairs:
                if one.row == row:
                    number = budgets.index(one.budget.text) if one.budget is not None and one.budget.text in budgets else 0
                    _curve(axis, one, found, looks[row], MARKERS[number % len(MARKERS)], tasks if alone else [], low)
            axis.set_title(study.rows[row].label)
            axis.tick_params(labelleft=place % across == 0, labelbottom=place + across >= len(rows))
        for axis in axes[len(rows):]:
            axis.remove()
        axes[0].set_xscale("log")
        axes[0].set_ylim(low, high)
        for axis in axes[:len(rows)]:
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0,), numticks=8))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        for axis in axes[:len(rows):across]:
            axis.set_ylabel("validation, %")
        for axis in axes[max(0, len(rows) - across):len(rows)]:
            axis.set_xlabel("learning rate")
        figure.legend(handles=_legend(budgets, tasks if alone else [], pairs), loc="lower center", ncols=4, handlelength=2.2,
                      columnspacing=1.4, borderaxespad=0.3)
        return finish(figure, f"{name}-fair-curves", _caption(pairs, alone, budgets), _alt(study, pairs), folder,
                      _data(pairs), paper=True)


def _limits(pairs: Sequence[tuple[Tuning, Curve]], alone: bool) -> tuple[float, float]:
    """Percent at the foot and top of every panel. Diverged runs, which count as 0, are drawn at the foot."""
    shown = [value for one, found in pairs
             for point, score, scores in zip(one.points, found.scores, found.by_task, strict=True)
             if score is not None and not point.diverged for value in ([*scores.values(), score] if alone else [score])]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    room = max(0.02, 0.1 * (high - low))
    return 100 * (low - room), 100 * min(1.0, high + room)


def _curve(axis: Axes, one: Tuning, found: Curve, look: Look, marker: str, tasks: Sequence[str], foot: float) -> None:
    whole = [(point.rate, score, error or 0.0, scores) for point, score, error, scores
             in zip(one.points, found.scores, found.errors, found.by_task, strict=True)
             if score is not None and not point.diverged]
    rates = [rate for rate, *_ in whole]
    for number, task in enumerate(tasks):
        axis.plot(rates, [100 * scores.get(task, math.nan) for *_, scores in whole], color=look.colour, linewidth=1,
                  alpha=0.75, linestyle=DASHES[number % len(DASHES)])
    axis.fill_between(rates, [100 * (score - error) for _, score, error, _ in whole],
                      [100 * (score + error) for _, score, error, _ in whole], color=look.colour, alpha=0.18, linewidth=0)
    axis.plot(rates, [100 * score for _, score, *_ in whole], color=look.colour, linewidth=1.8, marker=marker, markersize=4,
              markerfacecolor=PAPER)
    lost = [point.rate for point in one.points if point.diverged]
    if lost:
        axis.plot(lost, [foot] * len(lost), linestyle="none", marker="x", color=look.colour, markersize=6, clip_on=False,
                  markeredgewidth=1.6)
    if one.chosen is not None:
        score = found.scores[found.rates.index(one.chosen)]
        if score is not None:
            axis.plot(one.chosen, max(foot, 100 * score), marker=marker, markersize=8, color=look.colour,
                      markeredgecolor=PAPER)


def _legend(budgets: Sequence[str], tasks: Sequence[str], pairs: Sequence[tuple[Tuning, Curve]]) -> list[Line2D]:
    made = [Line2D([], [], color=INK, linewidth=1.8, label="mean over tasks" if tasks else "validation score")]
    made += [Line2D([], [], color=INK, linewidth=1, linestyle=DASHES[number % len(DASHES)], label=task_title(task))
             for number, task in enumerate(tasks)]
    if len(budgets) > 1:
        made += [Line2D([], [], color=INK, marker=MARKERS[number % len(MARKERS)], markerfacecolor=PAPER, linewidth=1.8,
                        label=budget) for number, budget in enumerate(budgets)]
    made += [Line2D([], [], color=INK, marker="o", markersize=7, linestyle="none", label="chosen"),
             Line2D([], [], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="the study's own rate")]
    if any(point.diverged for one, _ in pairs for point in one.points):
        made.append(Line2D([], [], color=INK, marker="x", linestyle="none", markeredgewidth=1.6, label="diverged"))
    return made


def _caption(pairs: Sequence[tuple[Tuning, Curve]], alone: bool, budgets: Sequence[str]) -> str:
    text = "Validation score against learning rate, every row at the same rates; the band is one standard error over items."
    if alone:
        text += " Thin lines are single tasks."
    if len(budgets) > 1:
        text += " A marker for each budget."
    if any(one.edge for one, _ in pairs):
        text += " A chosen rate at the end of its curve had no further one allowed."
    return text


def _alt(study: Study, pairs: Sequence[tuple[Tuning, Curve]]) -> str:
    several = fair.several_budgets([one for one, _ in pairs])
    said = []
    for one, found in pairs:
        score = found.scores[found.rates.index(one.chosen)] if one.chosen is not None else None
        said.append(f"{fair.label(study, one, several)}: " + (
            f"best at {one.chosen:g} with {numbers.percent(score)} %" if score is not None else "not settled yet"))
    return f"Validation score against learning rate. {'; '.join(said)}."


def _data(pairs: Sequence[tuple[Tuning, Curve]]) -> list[dict[str, Number]]:
    return [{"row": one.row, "budget": one.budget.text if one.budget else "", "rate": point.rate,
             "score_percent": None if score is None else 100 * score,
             "error_percent": None if error is None else 100 * error,
             "diverged": point.diverged, "chosen": point.rate == one.chosen}
            for one, found in pairs
            for point, score, error in zip(one.points, found.scores, found.errors, strict=True)]
