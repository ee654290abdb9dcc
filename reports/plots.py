"""The figures of a report: differences, standing over tasks, scores against costs, loss curves and rank maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reports import numbers, views
from reports.figures import GRID, INK, MUTED, PAPER, Figure, Look, drawing, finish, panels, ramp, style
from reports.sheets import Number
from reports.tables import Line, StudyTable, read
from suite import rank_map, statistics
from suite.records import Record
from suite.statistics import Summary

#: Points per curve in a figure: as many as a screen can show.
CURVE_POINTS = 160
#: Lines in a figure of differences: as many as a page can show.
MOST_LINES = 60
#: Curves in a performance profile.
MOST_CURVES = 12
#: A point, for what a profile's description says of the runs near the top.
NEAR = 0.01
#: Panels side by side.
ACROSS = 3


def differences(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Every line's difference to the reference per column: interval, mean, and a tick per seed."""
    lines = [line for line in table.lines if not table.is_reference(line)]
    if not lines or not table.differences:
        return None
    columns = table.column_ids
    every = len(lines)
    if every > MOST_LINES:
        far = sorted(lines, key=lambda line: -_distance(table, line))[:MOST_LINES]
        lines = [line for line in lines if line in far]
    left = 0.35 + 0.068 * max(len(line.label) for line in lines)
    with style():
        wide = max(1.7, 3.4 / len(columns))
        figure = drawing(left + 0.12 + wide * len(columns), 0.85 + 0.27 * len(lines))
        axes = panels(figure, len(columns), 1, share=True, left=left, right=0.12, top=0.3, bottom=0.5,
                      wide=0.16)
        for axis, column in zip(axes, columns, strict=True):
            axis.axvline(0, color=MUTED, linewidth=1)
            for y, line in enumerate(lines):
                _difference(axis, y, table, line, column, looks[line.row])
                if y and lines[y - 1].budget != line.budget:
                    axis.axhline(y - 0.5, color=GRID, linewidth=0.7)
            axis.set_title(table.title_of(column))
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0, labelleft=axis is axes[0])
            axis.xaxis.set_major_locator(MaxNLocator(round(3 * wide), steps=[1, 2, 5, 10], integer=True))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.signed(value / 100, 0)))
            axis.spines["left"].set_visible(False)
            axis.margins(x=0.06)
        axes[0].set_yticks(range(len(lines)), [line.label for line in lines])
        axes[0].set_ylim(len(lines) - 0.5, -0.5)
        middle = (left / figure.get_figwidth() + 1) / 2
        figure.text(middle, 0.07 / figure.get_figheight(), f"points above {table.reference_label}",
                    ha="center", va="bottom")
        several = len(table.seeds) > 1
        noise = "seeds and test items; thin ticks are single seeds" if several else "test items, for this one seed"
        caption = (f"Difference to {table.reference_label} in percentage points: mean and paired 95 % "
                   f"interval over {noise}.")
        if several:
            caption += " Filled: not zero at the 5 % level, adjusted for all differences of the table."
        if any((line.key, column) not in table.differences for line in lines for column in columns):
            caption += " Hatched: no result."
        if every > len(lines):
            caption += f" The {len(lines)} of {every} rows that are furthest from the reference; the table has the others."
        data = [_difference_data(table, line, column) for line in lines for column in columns]
        return finish(figure, f"{table.id}-difference", caption, _difference_alt(table, lines), folder, data,
                      paper=True)


def standing(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Mean rank over the columns with its interval; bars join the lines that are not told apart."""
    if table.standing is None:
        return None
    ranking, every = table.standing.ranking, len(table.standing.lines)
    order = sorted(range(every), key=lambda i: ranking.means[i])
    lines = [table.standing.lines[i] for i in order[:MOST_LINES]]
    groups = [place for group in ranking.groups() if (place := [order.index(i) for i in group])[-1] < len(lines)]
    left = 0.35 + 0.068 * max(len(line.label) for line in lines)
    right = 0.3 + 0.11 * len(groups)
    with style():
        figure = drawing(left + 4.2 + right, 1.25 + 0.25 * len(lines))
        axis = panels(figure, 1, 1, left=left, right=right, top=0.62, bottom=0.5)[0]
        for y, (i, line) in enumerate(zip(order, lines, strict=False)):
            look, interval = looks[line.row], ranking.intervals[i]
            axis.plot([interval.low, interval.high], [y, y], color=look.colour, linewidth=2.2, solid_capstyle="butt")
            axis.plot(ranking.means[i], y, marker=look.marker, markersize=6.5, color=look.colour, markeredgecolor=PAPER,
                      markeredgewidth=0.6)
        axis.set_xlim(0.8, max(every, 1.2) + 0.2)
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_yticks(range(len(lines)), [line.label for line in lines])
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_xlabel("mean rank (1: best in every column)")
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        for number, group in enumerate(groups):
            x = 1 + (0.14 + 0.11 * number) / 4.2
            axis.plot([x, x], [group[0] - 0.25, group[-1] + 0.25], color=INK, linewidth=2, clip_on=False,
                      transform=axis.get_yaxis_transform(), solid_capstyle="butt")
        ruler = 1 + 0.17 / (0.25 * len(lines))  # above the panel
        end = min(1 + ranking.critical, every + 0.2)
        axis.plot([1, end], [ruler, ruler], color=INK, linewidth=1.4, clip_on=False, marker="|", markersize=6,
                  transform=axis.get_xaxis_transform())
        axis.text(1, ruler + 0.12 / (0.25 * len(lines)), f"critical difference {ranking.critical:.2f}",
                  transform=axis.get_xaxis_transform(), fontsize=8.5)
        noise = "seeds and test items" if ranking.over_seeds else "test items, as some rows have one seed"
        caption = (f"Mean rank over {len(table.columns)} columns, with the 95 % interval over other {noise}. Bars at the "
                   "right join rows that are not told apart: their mean ranks differ by less than the critical difference, "
                   "which holds for all pairs at once. Other tasks might rank otherwise.")
        if every > len(lines):
            caption += f" The best {len(lines)} of {every} rows."
        if len(missing := [line.label for line in table.lines if line not in table.standing.lines]):
            caption += f" Not ranked, as some answers are missing: {numbers.listing(missing[:MOST_LINES])}."
        said = "; ".join(f"{line.label} {ranking.means[i]:.2f}" for i, line in zip(order, lines, strict=False))
        data = [{**_place(table.standing.lines[i]), "mean_rank": ranking.means[i], "low": ranking.intervals[i].low,
                 "high": ranking.intervals[i].high, "critical_difference": ranking.critical} for i in order]
        alt = f"Mean ranks, {table.title}, critical difference {ranking.critical:.2f}: {said}."
        return finish(figure, f"{table.id}-standing", caption, alt, folder, data, paper=True)


def profile(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Performance profiles: the share of a line's runs that are at most so many points behind the best of their column."""
    columns = [column.id for column in table.columns]
    lines = [line for line in table.lines if all(table.values[line.key, column].scores for column in columns)]
    if len(columns) < 2 or len(lines) < 3:
        return None
    scores = [[list(table.values[line.key, column].scores.values()) for line in lines] for column in columns]
    gaps = sorted({max(sum(of) / len(of) for of in task) - score for task in scores for of in task for score in of})
    behind = [0.0, *(gap for gap in gaps if gap > 0)]
    shares = statistics.profile(scores, behind)
    order = sorted(range(len(lines)), key=lambda i: -float(np.trapezoid(shares[i], behind)))
    best = {lines[i].row: i for i in reversed(order)}  # a row has one look, so of its sizes only the best is drawn
    shown = [i for i in order if best[lines[i].row] == i][:MOST_CURVES]
    beside = 0.45 + 0.066 * max(len(lines[i].label) for i in shown)  # inches for the legend
    with style():
        figure = drawing(5.2 + beside, max(3.2, 0.75 + 0.235 * len(shown)))
        axis = panels(figure, 1, 1, left=0.65, right=beside + 0.1, top=0.15, bottom=0.5)[0]
        for i in shown:
            look = looks[lines[i].row]
            axis.step([100 * x for x in behind], 100 * shares[i], where="post", color=look.colour, linestyle=look.dash)
        axis.set_ylim(0, 103)
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.set_xlabel("points behind the best of the column")
        axis.set_ylabel("runs, %")
        handles = [Line2D([], [], color=looks[lines[i].row].colour, linestyle=looks[lines[i].row].dash,
                          label=lines[i].label) for i in shown]
        figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1 - beside / figure.get_figwidth(), 0.55),
                      borderaxespad=0, labelspacing=0.55, handlelength=1.6)
        caption = (f"Performance profile over {len(columns)} columns: how many of a row's runs are at most so many points "
                   "behind the highest mean of their column. Higher is better; at the left, how often a row is at the top.")
        if len(best) < len(lines):
            caption += " Of a row's sizes, the best over all."
        if len(shown) < len(best):
            caption += f" The {len(shown)} of {len(best)} rows that are best over all."
        near = shares[:, max(i for i, gap in enumerate(behind) if gap <= NEAR)]
        said = "; ".join(f"{lines[i].label} {100 * near[i]:.0f} %" for i in shown)
        data = [{**_place(lines[i]), "behind_points": 100 * gap, "runs_percent": 100 * float(share)}
                for i in order for gap, share in zip(behind, shares[i], strict=True)]
        alt = f"Share of runs within {100 * NEAR:.0f} point of the best, {table.title}: {said}."
        return finish(figure, f"{table.id}-profile", caption, alt, folder, data, paper=True)


def fronts(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Score against trained parameters, run time and peak memory, with the Pareto front of each."""
    column = table.headline
    scored = [(line, summary) for line in table.lines if (summary := table.values[line.key, column].summary) is not None]
    costs: dict[str, dict[str, float]] = {"trained parameters": {}, "run time, s": {}, "peak memory, GiB": {}}
    for line, _ in scored:
        seconds, memory = views.price(table, line)
        trained = table.sizes[line.key].middle if line.key in table.sizes else None
        for kind, value in zip(costs, (trained, seconds, memory / 2**30 if memory else None), strict=True):
            if value:  # what trains nothing has no place on a log axis
                costs[kind][line.key] = value
    costs = {kind: values for kind, values in costs.items() if len(values) > 1}
    if not costs:
        return None
    rows = list({line.row: line for line, _ in scored}.values())
    legend = 0.19 * -(-len(rows) // 4) + 0.1
    data: list[dict[str, Number]] = []
    ends: list[str] = []
    with style():
        figure = drawing(0.75 + 2.6 * len(costs), 3.0 + legend)
        axes = panels(figure, len(costs), 1, left=0.62, right=0.12, top=0.15, bottom=0.5 + legend, wide=0.3)
        for axis, (kind, values) in zip(axes, costs.items(), strict=True):
            points = [(line, values[line.key], summary) for line, summary in scored if line.key in values]
            best = statistics.front([summary.mean for *_, summary in points], [cost for _, cost, _ in points])
            edge = sorted((cost, 100 * summary.mean) for (_, cost, summary), on in zip(points, best, strict=True) if on)
            axis.step([x for x, _ in edge], [y for _, y in edge], where="post", color=MUTED, linewidth=1,
                      linestyle=(0, (4, 3)), zorder=1)
            for (line, cost, summary), on in zip(points, best, strict=True):
                look = looks[line.row]
                axis.errorbar(cost, 100 * summary.mean, yerr=100 * (summary.sd or 0), color=look.colour, fmt=look.marker,
                              markersize=6.5, elinewidth=0.9, markeredgecolor=look.colour, markeredgewidth=1.3,
                              markerfacecolor=look.colour if on else PAPER)
                data.append({**_place(line), "column": column, "cost": kind, "value": cost,
                             "mean_percent": 100 * summary.mean,
                             "sd_percent": 100 * summary.sd if summary.sd is not None else None, "on_front": on})
            low, high = min(values.values()), max(values.values())
            if high > 8 * low:
                axis.set_xscale("log")
                axis.set_xlim(low / 1.5, high * 1.5)
                wide = high > 50 * low
                axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=9))
                axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            else:
                axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
                axis.margins(x=0.1)
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
            axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
            axis.tick_params(labelleft=axis is axes[0])
            axis.set_xlabel(kind)
            axis.margins(y=0.08)
            names = [line.label for (line, *_), on in zip(points, best, strict=True) if on]
            ends.append(f"{kind}: {numbers.listing(names)}")
        axes[0].set_ylabel(f"{table.title_of(column)}, %")
        handles = [Line2D([], [], color=looks[line.row].colour, marker=looks[line.row].marker, markersize=6,
                          linestyle="none", label=line.name) for line in rows]
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(rows)), handletextpad=0.3, columnspacing=1.2,
                      borderaxespad=0.2)
        caption = (f"{table.title_of(column)} against what it costs. Filled: on the Pareto front, no row scores as high for "
                   "less. The front is that of the means as measured; bars are one standard deviation over seeds.")
        alt = f"Pareto fronts, {table.title}. {'. '.join(ends)}."
        return finish(figure, f"{table.id}-fronts", caption, alt, folder, data, paper=True)


def parameters(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Score against trained parameters. A row's budgets are joined by a line."""
    column = table.headline
    known = [(line, table.sizes[line.key].middle, summary) for line in table.lines
             if line.key in table.sizes and (summary := table.values[line.key, column].summary) is not None]
    trained = [point for point in known if point[1] > 0]
    if not trained:
        return None
    rows: dict[str, list[tuple[Line, float, Summary]]] = {}
    for point in trained:
        rows.setdefault(point[0].row, []).append(point)
    sizes = [x for _, x, _ in trained]
    beside = 0.4 + 0.066 * max(len(_legend(*point)) for point in known)  # inches for the legend
    shift = dict(zip((line.key for line, _, _ in trained), _dodge([(x, summary) for _, x, summary in trained]),
                     strict=True))
    with style():
        figure = drawing(5.7 + beside, max(3.6, 0.75 + 0.235 * len(rows)))
        axis = panels(figure, 1, 1, left=0.62, right=beside + 0.1, top=0.12, bottom=0.55)[0]
        for row, points in rows.items():
            look = looks[row]
            links = [x * shift[line.key] for line, x, _ in points]
            heights = [100 * summary.mean for _, _, summary in points]
            axis.plot(links, heights, color=look.colour, linewidth=1.2, alpha=0.7)
            axis.errorbar(links, heights, yerr=[100 * (summary.sd or 0) for _, _, summary in points],
                          color=look.colour, fmt=look.marker, markersize=7, capsize=2.5, elinewidth=1.1,
                          markeredgecolor=PAPER, markeredgewidth=0.6)
        untrained = [(line, summary) for line, x, summary in known if x == 0]
        for _, summary in untrained:
            axis.axhline(100 * summary.mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_xscale("log")
        axis.set_xlim(min(sizes) / 1.8, max(sizes) * 1.8)
        wide = max(sizes) > 50 * min(sizes)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.short(value)))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.margins(y=0.08)
        axis.set_xlabel("trained parameters, task head included")
        axis.set_ylabel(f"{table.title_of(column)}, %")
        best = {row: max(points, key=lambda point: point[2].mean) for row, points in rows.items()}
        order = sorted(rows, key=lambda row: -best[row][2].mean)
        handles = [Line2D([], [], color=looks[row].colour, marker=looks[row].marker, markersize=6,
                          markeredgewidth=0, linestyle="-" if len(rows[row]) > 1 else "none", linewidth=1.2,
                          label=_legend(*best[row])) for row in order]
        handles += [Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), linewidth=1,
                           label=_legend(line, 0, summary)) for line, summary in untrained]
        figure.legend(handles=handles, loc="center left",
                      bbox_to_anchor=(1 - beside / figure.get_figwidth(), 0.55), handletextpad=0.5,
                      borderaxespad=0, labelspacing=0.55, handlelength=1.4)
        data = [{**_place(line), "column": column, "trained": size, "mean_percent": 100 * summary.mean,
                 "sd_percent": 100 * summary.sd if summary.sd is not None else None} for line, size, summary in known]
        return finish(figure, f"{table.id}-parameters", _parameters_caption(table, known, rows),
                      _parameters_alt(table, trained), folder, data, paper=True)


def losses(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Training loss per task and budget: mean over seeds, lightly smoothed, the raw mean faint behind it."""
    lines = _first_rates(table)
    curves = {(line.key, task): curve for line in lines for task in table.tasks
              if (curve := _curve(table.records[line.key], task)) is not None}
    if not curves:
        return None
    budgets = table.budgets if len(table.budgets) > 1 else ("",)
    links = [(budget, task) for budget in budgets for task in table.tasks]
    shown = list({line.row: line for line in lines
                  if any((line.key, task) in curves for task in table.tasks)}.values())
    across = min(ACROSS, len(table.tasks))
    down = -(-len(links) // across)
    legend = 0.19 * -(-len(shown) // 4) + 0.1
    with style():
        figure = drawing(7.8 if across > 1 else 5.6, 2.3 * down + legend + 0.25)
        axes = panels(figure, across, down, left=0.65, right=0.12, top=0.3, bottom=0.5 + legend, wide=0.42,
                      high=0.7)
        for axis, (budget, task) in zip(axes, links, strict=False):
            for line in lines:
                curve = curves.get((line.key, task))
                if curve is not None and (not budget or line.budget in ("", budget)):
                    _loss(axis, curve, looks[line.row])
            axis.set_title(table.tasks[task] + (f", {budget}" if budget else ""))
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
            if axis.lines:
                _limit(axis)
            else:
                axis.text(0.5, 0.5, "no curves yet", transform=axis.transAxes, ha="center", color=MUTED)
        for axis in axes[len(links):]:
            axis.remove()
        for axis in axes[:len(links):across]:
            axis.set_ylabel("training loss")
        for axis in axes[max(0, len(links) - across):len(links)]:
            axis.set_xlabel("step")
        handles = [Line2D([], [], color=looks[line.row].colour, linestyle=looks[line.row].dash,
                          label=line.name) for line in shown]
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(shown)), handlelength=1.6,
                      columnspacing=1.4, borderaxespad=0.2)
        first = "" if len(lines) == len(table.lines) else " Of several learning rates, the first."
        return finish(figure, f"{table.id}-loss",
                      f"Training loss, mean over seeds: lightly smoothed, with the raw mean faint behind it.{first}",
                      _losses_alt(table, curves), folder, _losses_data(lines, curves))


def rank_maps(table: StudyTable, row: str, label: str, folder: Path) -> Figure | None:
    """The ranks that a row's method chose, block by module kind: a map per budget and task."""
    maps: list[tuple[str, str, pd.DataFrame]] = []
    for line in _first_rates(table):
        for task, title in table.tasks.items() if line.row == row else ():
            ranks = _ranks(table.records[line.key], task)
            if ranks:
                budget = f", {line.budget}" if len(table.budgets) > 1 else ""
                maps.append((line.budget, title + budget, rank_map.grid(ranks)))
    if not maps:
        return None
    limits = {budget: _limits([grid for of, _, grid in maps if of == budget]) for budget, _, _ in maps}
    blocks, kinds = max(len(grid) for *_, grid in maps), max(len(grid.columns) for *_, grid in maps)
    across = min(ACROSS, len(maps), max(1, 26 // kinds))
    down = -(-len(maps) // across)
    with style():
        figure = drawing(0.75 + across * (0.33 * kinds + 0.45), 0.72 + down * (0.43 + 0.23 * blocks))
        axes = panels(figure, across, down, left=0.55, right=0.35, top=0.32, bottom=0.8, wide=0.5, high=0.4)
        for place, (axis, (budget, title, grid)) in enumerate(zip(axes, maps, strict=False)):
            _rank_map(axis, grid, limits[budget])
            axis.set_title(title)
            axis.tick_params(labelbottom=place + across >= len(maps))
            axis.set_ylabel("block" if place % across == 0 else "")
        for axis in axes[len(maps):]:
            axis.remove()
        totals = [f"{title} {int(np.nansum(grid.to_numpy(dtype=float)))}" for _, title, grid in maps]
        caption = f"Rank of every adapted layer, as chosen by {label}; sum of ranks: {numbers.listing(totals)}."
        if len(limits) > 1:
            caption += " Each budget has its own scale of colours."
        if any(grid.isna().any(axis=None) for *_, grid in maps):
            caption += " Grey: no adapter."
        data: list[dict[str, Number]] = [
            {"title": title, "block": str(block), "kind": str(kind), "rank": float(rank)}
            for _, title, grid in maps for kind in grid.columns for block, rank in grid[kind].dropna().items()]
        alt = f"Rank maps of {label}. " + " ".join(f"{title}: {_rank_alt(grid)}." for _, title, grid in maps)
        return finish(figure, f"{table.id}-ranks", caption, alt, folder, data)


def _place(line: Line) -> dict[str, Number]:
    return {"row": line.row, "label": line.label, "budget": line.budget}


def _difference_data(table: StudyTable, line: Line, column: str) -> dict[str, Number]:
    delta = table.differences.get((line.key, column))
    found = delta.interval if delta else None
    return {**_place(line), "column": column, "difference_points": 100 * delta.mean if delta else None,
            "low_points": 100 * found.low if found else None, "high_points": 100 * found.high if found else None,
            "by_seed_points": " ".join(f"{100 * x:.4f}" for x in delta.per_seed) if delta else None,
            "clear": delta.clear if delta else None}


def _losses_data(lines: Sequence[Line], curves: Mapping[tuple[str, str], pd.Series]) -> list[dict[str, Number]]:
    """The points that are drawn."""
    found: list[dict[str, Number]] = []
    for line in lines:
        for task in dict.fromkeys(task for key, task in curves if key == line.key):
            raw, smooth = _thin(curves[line.key, task]), _thin(_smooth(curves[line.key, task]))
            found += [{**_place(line), "task": task, "step": int(step), "loss": float(loss), "smoothed": float(mean)}
                      for step, loss, mean in zip(raw.index, raw, smooth, strict=True)]
    return found


def _tick(value: float) -> str:
    """A tick of a log axis: 0.5, 20, 300 k."""
    return numbers.short(value) if value >= 1000 else f"{value:g}"


def _distance(table: StudyTable, line: Line) -> float:
    """How far a line is from its reference in the column that sums up; -1 without a result."""
    delta = table.differences.get((line.key, table.headline))
    return -1.0 if delta is None else abs(delta.mean)


def _first_rates(table: StudyTable) -> list[Line]:
    """One line per row and budget: the first of its learning rates."""
    return list({(line.row, line.budget): line for line in reversed(table.lines)}.values())[::-1]


def _limits(grids: Sequence[pd.DataFrame]) -> tuple[float, float]:
    values = np.concatenate([grid.to_numpy(dtype=float).ravel() for grid in grids])
    return float(np.nanmin(values)), float(np.nanmax(values))


def _rank_map(axis: Axes, grid: pd.DataFrame, limits: tuple[float, float]) -> None:
    values = grid.to_numpy(dtype=float)
    rows, columns = values.shape
    span = limits[1] - limits[0] or 1.0
    axis.pcolormesh(np.ma.masked_invalid(values), cmap=ramp(), vmin=limits[0], vmax=limits[0] + span,
                    edgecolors="none")
    axis.set_facecolor(GRID)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = (value - limits[0]) / span > 0.45
            axis.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=7.5,
                      color="#ffffff" if dark else "#12263a")
    axis.set_ylim(rows, 0)
    names = [str(kind).replace("attention.", "attn.") for kind in grid.columns]
    axis.set_xticks(np.arange(columns) + 0.5, names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_yticks(np.arange(rows) + 0.5, [str(block) for block in grid.index])
    axis.tick_params(length=0)
    axis.grid(visible=False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _difference(axis: Axes, y: int, table: StudyTable, line: Line, column: str, look: Look) -> None:
    delta = table.differences.get((line.key, column))
    if delta is None:
        axis.axhspan(y - 0.3, y + 0.3, facecolor="none", edgecolor=GRID, hatch="////", linewidth=0)
        return
    mean = 100 * delta.mean
    if delta.interval is not None:
        axis.plot([100 * delta.interval.low, 100 * delta.interval.high], [y, y], color=look.colour,
                  linewidth=2.2, solid_capstyle="butt")
    for value in delta.per_seed if len(delta.per_seed) > 1 else ():
        axis.plot([100 * value] * 2, [y - 0.2, y + 0.2], color=look.colour, linewidth=1, alpha=0.75)
    axis.plot(mean, y, marker=look.marker, markersize=6.5, color=look.colour, markeredgecolor=look.colour,
              markeredgewidth=1.3, markerfacecolor=look.colour if delta.clear else PAPER)


def _difference_alt(table: StudyTable, lines: Sequence[Line]) -> str:
    said = []
    for line in lines:
        delta = table.differences.get((line.key, table.headline))
        if delta is None:
            said.append(f"{line.label}: no result")
        else:
            tail = f" {numbers.interval(delta.interval)}" if delta.interval else ""
            said.append(f"{line.label} {numbers.signed(delta.mean)}{tail}")
    return (f"Differences to {table.reference_label}, {table.title_of(table.headline)}, in points: "
            f"{'; '.join(said)}.")


def _legend(line: Line, size: float, summary: Summary) -> str:
    where = f" at {line.budget}" if line.label != line.name else ""
    return f"{line.name}  {numbers.percent(summary.mean)}{where}"


def _parameters_caption(table: StudyTable, known: Sequence[tuple[Line, float, Summary]],
                        rows: Mapping[str, Sequence[object]]) -> str:
    spread = any(summary.sd is not None for _, _, summary in known)
    bars = "; bars are one standard deviation over seeds" if spread else "; no spread over seeds is known"
    caption = f"{table.title_of(table.headline)} against trained parameters{bars}."
    if any(len(points) > 1 for points in rows.values()):
        caption += " Lines join a row's budgets; the legend gives its highest score."
    caption += " Equal sizes are drawn a little apart where they would overlap."
    missing = [line.label for line in table.lines if line.key not in {found.key for found, _, _ in known}]
    return caption + (f" No complete result yet: {numbers.listing(missing)}." if missing else "")


def _parameters_alt(table: StudyTable, trained: Sequence[tuple[Line, float, Summary]]) -> str:
    order = sorted(trained, key=lambda point: -point[2].mean)
    said = "; ".join(f"{line.label} {numbers.percent(summary.mean)} % with {numbers.short(size)}"
                     for line, size, summary in order)
    return f"Score against trained parameters, {table.title}. {said}."


def _losses_alt(table: StudyTable, curves: Mapping[tuple[str, str], pd.Series]) -> str:
    said = []
    for line in table.lines:
        ends = [float(_smooth(curves[line.key, task]).iloc[-1]) for task in table.tasks
                if (line.key, task) in curves]
        if ends:
            said.append(f"{line.label} {' / '.join(f'{end:.3g}' for end in ends)}")
    tasks = " / ".join(table.tasks.values())
    return f"Training loss over steps, {table.title}. Last values ({tasks}): {'; '.join(said)}."


def _loss(axis: Axes, curve: pd.Series, look: Look) -> None:
    smooth = _smooth(curve)
    raw, thin = _thin(curve), _thin(smooth)
    axis.plot(raw.index, raw.to_numpy(), color=look.colour, alpha=0.2, linewidth=0.8)
    axis.plot(thin.index, thin.to_numpy(), color=look.colour, linestyle=look.dash, linewidth=1.5)


def _thin(curve: pd.Series) -> pd.Series:
    return curve.iloc[:: max(1, len(curve) // CURVE_POINTS)]


def _limit(axis: Axes) -> None:
    """Let no single spike or diverging curve flatten the others."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axis.lines]
    high = float(np.percentile([curve.max() for curve in curves[1::2]], 90))
    low = min(float(np.percentile(curve, 1)) for curve in curves[::2])
    room = max(high - low, 1e-9)
    axis.set_ylim(low - 0.05 * room, high + 0.12 * room)


def _rank_alt(grid: pd.DataFrame) -> str:
    parts = []
    for kind in grid.columns:
        column = grid[kind].dropna()
        low, high = int(column.min()), int(column.max())
        parts.append(f"{kind} {low}" if low == high else f"{kind} {low} to {high}")
    return ", ".join(parts)


def _ranks(records: Sequence[Record], task: str) -> dict[str, int]:
    """Ranks of the first run on a task that reports them: they do not depend on the run's seed."""
    for record in records:
        ranks = record.prepare.get("ranks")
        if record.spec.task.id == task and isinstance(ranks, Mapping) and ranks:
            return {str(name): int(rank) for name, rank in ranks.items()}
    return {}


def _curve(records: Sequence[Record], task: str) -> pd.Series | None:
    """Mean loss over a line's runs on a task, by step."""
    found = []
    for record in records:
        frame = read(partial(record.curves, ("step", "loss"))) if record.spec.task.id == task else None
        if frame is not None and {"step", "loss"} <= set(frame.columns):
            found.append(frame.set_index("step")["loss"].replace([np.inf, -np.inf], np.nan))
    if not found:
        return None
    mean = pd.concat(found, axis=1).mean(axis=1).dropna()
    return mean if len(mean) else None


def _smooth(curve: pd.Series) -> pd.Series:
    """A centred moving average over about a twelfth of the curve."""
    return curve.rolling(max(1, len(curve) // 12), center=True, min_periods=1).mean()


def _dodge(points: Sequence[tuple[float, Summary]]) -> list[float]:
    """Factors that set points of nearly equal size apart on a log axis where they or their bars would overlap."""
    spans = [(summary.mean - (summary.sd or 0), summary.mean + (summary.sd or 0)) for _, summary in points]
    margin = 0.04 * (max(high for _, high in spans) - min(low for low, _ in spans))
    clumps: list[list[int]] = []
    for i in sorted(range(len(points)), key=lambda i: spans[i]):
        for clump in clumps:
            near = max(points[i][0], points[clump[0]][0]) <= 1.15 * min(points[i][0], points[clump[0]][0])
            if near and spans[i][0] <= max(spans[j][1] for j in clump) + margin:
                clump.append(i)
                break
        else:
            clumps.append([i])
    factors = [1.0] * len(points)
    for clump in clumps:
        for place, i in enumerate(sorted(clump)):
            factors[i] = 1.18 ** (place - (len(clump) - 1) / 2)
    return factors
