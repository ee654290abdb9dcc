"""The figures of a report: differences, accuracy against parameters, loss curves and rank maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reports import numbers
from reports.figures import GRID, MUTED, PAPER, Figure, Look, drawing, finish, panels, ramp, style
from reports.tables import Line, StudyTable, read
from suite import rank_map
from suite.records import Record
from suite.statistics import Summary

#: Points per curve in a figure: as many as a screen can show.
CURVE_POINTS = 160
#: Lines in a figure of differences: as many as a page can show.
MOST_LINES = 60
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
        ticks = "; thin ticks are single seeds" if len(table.seeds) > 1 else ""
        caption = (f"Difference to {table.reference_label} in percentage points: mean and paired 95 % "
                   f"interval over test items{ticks}. Filled: the interval excludes zero, and at least two "
                   "seeds all point the same way.")
        if any((line.key, column) not in table.differences for line in lines for column in columns):
            caption += " Hatched: no result."
        if every > len(lines):
            caption += f" The {len(lines)} of {every} rows that are furthest from the reference; the table has the others."
        return finish(figure, f"{table.id}-difference", caption, _difference_alt(table, lines), folder,
                      paper=True)


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
        return finish(figure, f"{table.id}-parameters", _parameters_caption(table, known, rows),
                      _parameters_alt(table, trained), folder, paper=True)


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
                      _losses_alt(table, curves), folder)


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
        alt = f"Rank maps of {label}. " + " ".join(f"{title}: {_rank_alt(grid)}." for _, title, grid in maps)
        return finish(figure, f"{table.id}-ranks", caption, alt, folder)


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
    raw, thin = (x.iloc[:: max(1, len(x) // CURVE_POINTS)] for x in (curve, smooth))
    axis.plot(raw.index, raw.to_numpy(), color=look.colour, alpha=0.2, linewidth=0.8)
    axis.plot(thin.index, thin.to_numpy(), color=look.colour, linestyle=look.dash, linewidth=1.5)


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
