"""The figures of a report: differences, accuracy against parameters, loss curves and rank maps."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from reports import numbers
from reports.figures import GRID, INK, MUTED, Figure, Look, drawing, finish, panels, ramp, style
from reports.tables import Line, StudyTable, read
from suite import rank_map
from suite.records import Record

#: Points per curve in a figure: as many as a screen can show.
CURVE_POINTS = 160


def differences(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Every line's difference to the reference per column: interval, mean, and a tick per seed."""
    lines = [line for line in table.lines if not table.is_reference(line)]
    if not lines or not table.differences:
        return None
    columns = table.column_ids
    with style():
        figure = drawing(1.9 + 1.65 * len(columns), 0.75 + 0.3 * len(lines))
        axes = panels(figure, len(columns), 1, share_y=True, left=1.9, right=0.12, top=0.3, bottom=0.42, wide=0.16)
        for axis, column in zip(axes, columns, strict=True):
            axis.axvline(0, color=MUTED, linewidth=1)
            for y, line in enumerate(lines):
                _difference(axis, y, table, line, column, looks[line.row])
            axis.set_title(table.title_of(column))
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
            axis.tick_params(labelleft=axis is axes[0])
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0"))
            axis.spines["left"].set_visible(False)
            axis.margins(x=0.08)
        axes[0].set_yticks(range(len(lines)), [line.label for line in lines])
        axes[0].set_ylim(len(lines) - 0.5, -0.5)
        figure.text(0.5 + 0.9 / figure.get_figwidth(), 0.03, f"points above {table.reference_label}", ha="center",
                    va="bottom", color=MUTED)
        return finish(figure, f"{table.id}-difference",
                      f"Difference to {table.reference_label} in percentage points: mean and paired 95 % interval over "
                      "test items; the small ticks are the seeds. Filled: the interval excludes zero and the seeds "
                      "agree. Hatched: no result.", _difference_alt(table, lines), folder)


def parameters(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Score against trained parameters, with the spread over seeds."""
    column = table.headline
    points = [(line, table.sizes[line.key].middle, summary) for line in table.lines
              if line.key in table.sizes and (summary := table.values[line.key, column].summary) is not None]
    trained = [point for point in points if point[1] > 0]
    if not trained:
        return None
    absent = [line.label for line in table.lines if line.key not in {x.key for x, _, _ in points}]
    with style():
        figure = drawing(7.2, 3.7)
        axis = panels(figure, 1, 1, left=0.62, right=2.35, top=0.15, bottom=0.5)[0]
        for (line, x, summary), shift in zip(trained, _dodge([x for _, x, _ in trained]), strict=True):
            look = looks[line.row]
            axis.errorbar(x * shift, 100 * summary.mean, yerr=100 * (summary.sd or 0), color=look.colour, fmt=look.marker,
                          markersize=6.5, capsize=2.5, elinewidth=1.1, markeredgewidth=0)
        rules = [(summary.mean, line.label) for line, x, summary in points if x == 0]
        rates = [c.majority for c in table.columns if c.majority is not None]
        if rates and len(rates) == len(table.columns):
            rules.append((plain.fmean(rates), "Majority class"))
        for mean, _ in rules:
            axis.axhline(100 * mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(numticks=8))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.short(value)))
        axis.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        axis.margins(x=0.08, y=0.1)
        axis.set_xlabel("trained parameters, task head included (log scale)")
        axis.set_ylabel(f"{table.title_of(column)}, %")
        order = sorted(trained, key=lambda point: -point[2].mean)
        handles = [Line2D([], [], color=looks[x.row].colour, marker=looks[x.row].marker, linestyle="none", markersize=6.5,
                          markeredgewidth=0, label=f"{x.label}  {numbers.percent(s.mean)}") for x, _, s in order]
        handles += [Line2D([], [], color=MUTED, linestyle=(0, (4, 3)), linewidth=1,
                           label=f"{label}  {numbers.percent(mean)}") for mean, label in sorted(rules, reverse=True)]
        figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1 - 2.3 / 7.2, 0.55), handletextpad=0.4,
                      borderaxespad=0, labelspacing=0.55)
        said = "; ".join(f"{x.label} {numbers.percent(s.mean)} % with {numbers.short(size)}" for x, size, s in order)
        caption = (f"{table.title_of(column)} against trained parameters; bars are one standard deviation over seeds. "
                   "Lines with equal counts are set a little apart.")
        if absent:
            caption += f" Not drawn, for want of a complete result: {numbers.listing(absent)}."
        return finish(figure, f"{table.id}-parameters", caption,
                      f"Scatter plot of score against trained parameters for {table.title}. {said}.", folder)


def losses(table: StudyTable, looks: Mapping[str, Look], folder: Path) -> Figure | None:
    """Training loss per task: mean over seeds, lightly smoothed, the raw mean faint behind it."""
    curves = {(line.key, column.task): _curve(table.records[line.key], column.task)
              for line in table.lines for column in table.columns}
    shown = [line for line in table.lines if any(curves[line.key, c.task] is not None for c in table.columns)]
    if not shown:
        return None
    across = min(3, len(table.columns))
    down = -(-len(table.columns) // across)
    legend = 0.22 * -(-len(shown) // 4) + 0.1
    with style():
        figure = drawing(7.6 if across > 1 else 5.6, 2.35 * down + legend + 0.25)
        axes = panels(figure, across, down, left=0.5, right=0.12, top=0.3, bottom=0.5 + legend, wide=0.42, high=0.65)
        for axis, column in zip(axes, table.columns, strict=False):
            tops, lows = [], []
            for line in shown:
                curve = curves[line.key, column.task]
                if curve is None:
                    continue
                look, smooth = looks[line.row], _smooth(curve)
                raw = curve.iloc[:: max(1, len(curve) // CURVE_POINTS)]
                thin = smooth.iloc[:: max(1, len(smooth) // CURVE_POINTS)]
                axis.plot(raw.index, raw.to_numpy(), color=look.colour, alpha=0.22, linewidth=0.8)
                axis.plot(thin.index, thin.to_numpy(), color=look.colour, linestyle=look.dash, linewidth=1.5)
                tops.append(float(smooth.max()))
                lows.append(float(np.nanpercentile(curve.to_numpy(dtype=float), 1)))
            if tops:
                high, low = float(np.percentile(tops, 90)), min(lows)
                axis.set_ylim(low - 0.05 * (high - low), high + 0.12 * (high - low) + 1e-9)
            else:
                axis.text(0.5, 0.5, "no curves yet", transform=axis.transAxes, ha="center", color=MUTED)
            axis.set_title(column.title)
            axis.set_xlabel("step")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axis.yaxis.set_major_locator(MaxNLocator(5))
        for axis in axes[len(table.columns):]:
            axis.remove()
        axes[0].set_ylabel("training loss")
        handles = [Line2D([], [], color=looks[x.row].colour, linestyle=looks[x.row].dash, label=x.label) for x in shown]
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(shown)), handlelength=1.6, columnspacing=1.4,
                      borderaxespad=0.2)
        ends = [f"{line.label} on {c.title} ends at {float(_smooth(curve).iloc[-1]):.3g}" for line in shown
                for c in table.columns if (curve := curves[line.key, c.task]) is not None]
        return finish(figure, f"{table.id}-loss",
                      "Training loss, mean over seeds: lightly smoothed, with the raw mean faint behind it.",
                      f"Line plots of training loss for {table.title}. {'; '.join(ends)}.", folder)


def rank_maps(table: StudyTable, row: str, label: str, folder: Path) -> list[Figure]:
    """The ranks that a row's method chose, block by module kind: one map per task (and rank budget), one scale."""
    found: list[tuple[str, str, pd.DataFrame]] = []
    for line in table.lines:
        for column in table.columns if line.row == row else ():
            ranks = _ranks(table.records[line.key], column.task)
            if ranks:
                several = line.label != label
                name = f"{column.task}-r{line.rank}" if several else column.task
                found.append((name, column.title + (f", r = {line.rank}" if several else ""), rank_map.grid(ranks)))
    if not found:
        return []
    values = np.concatenate([grid.to_numpy(dtype=float).ravel() for _, _, grid in found])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return [_rank_map(table, name, title, label, grid, (low, high), folder) for name, title, grid in found]


def _rank_map(table: StudyTable, name: str, title: str, label: str, grid: pd.DataFrame, limits: tuple[float, float],
              folder: Path) -> Figure:
    values = grid.to_numpy(dtype=float)
    rows, columns = values.shape
    with style():
        figure = drawing(0.75 + 0.42 * columns, 1.45 + 0.25 * rows)
        axis = panels(figure, 1, 1, left=0.55, right=0.2, top=1.15, bottom=0.3)[0]
        span = limits[1] - limits[0] or 1.0
        axis.pcolormesh(np.ma.masked_invalid(values), cmap=ramp(), vmin=limits[0], vmax=limits[0] + span, edgecolors="none")
        axis.set_facecolor(GRID)
        for (i, j), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = (value - limits[0]) / span > 0.45
                axis.text(j + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=8,
                          color="#ffffff" if dark else "#12263a")
        axis.set_ylim(rows, 0)
        axis.set_xticks(np.arange(columns) + 0.5, [str(kind).replace("attention.", "attn.") for kind in grid.columns],
                        rotation=40, ha="left", rotation_mode="anchor")
        axis.set_yticks(np.arange(rows) + 0.5, [str(block) for block in grid.index])
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.grid(visible=False)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_ylabel("block")
        figure.text(0.5, 0.08 / figure.get_figheight(), title, ha="center", va="bottom", weight="bold")
        total = int(np.nansum(values))
        return finish(figure, f"{table.id}-ranks-{name}", f"{label} on {title}: ranks, {total} in all.",
                      f"Rank map of {label} on {title}. {_rank_alt(grid)}", folder, small=columns <= 8)


def _difference(axis: Axes, y: int, table: StudyTable, line: Line, column: str, look: Look) -> None:
    delta = table.differences.get((line.key, column))
    if delta is None:
        axis.axhspan(y - 0.3, y + 0.3, facecolor="none", edgecolor=GRID, hatch="////", linewidth=0)
        axis.text(0.5, y, "no result", transform=axis.get_yaxis_transform(), ha="center", va="center", fontsize=7.5,
                  color=MUTED)
        return
    mean = 100 * delta.mean
    if delta.interval is not None:
        axis.plot([100 * delta.interval.low, 100 * delta.interval.high], [y, y], color=look.colour, linewidth=2.2,
                  solid_capstyle="butt")
    for value in delta.per_seed if len(delta.per_seed) > 1 else ():
        axis.plot([100 * value] * 2, [y - 0.2, y + 0.2], color=look.colour, linewidth=1, alpha=0.75)
    axis.plot(mean, y, marker=look.marker, markersize=6.5, color=look.colour, markeredgecolor=look.colour,
              markeredgewidth=1.3, markerfacecolor=look.colour if delta.clear else "#fefefe")


def _difference_alt(table: StudyTable, lines: Sequence[Line]) -> str:
    said = []
    for line in lines:
        delta = table.differences.get((line.key, table.headline))
        if delta is None:
            said.append(f"{line.label}: no result")
        else:
            tail = f" {numbers.interval(delta.interval)}" if delta.interval else ""
            said.append(f"{line.label} {numbers.signed(delta.mean)}{tail}")
    return f"Differences to {table.reference_label}, {table.title_of(table.headline)}, in points: {'; '.join(said)}."


def _rank_alt(grid: pd.DataFrame) -> str:
    parts = []
    for kind in grid.columns:
        column = grid[kind].dropna()
        low, high = int(column.min()), int(column.max())
        parts.append(f"{kind} {low}" if low == high else f"{kind} {low} to {high}")
    return f"Ranks by module kind: {', '.join(parts)}."


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
        frame = read(record.curves) if record.spec.task.id == task else None
        if frame is not None and {"step", "loss"} <= set(frame.columns):
            found.append(frame.set_index("step")["loss"].replace([np.inf, -np.inf], np.nan))
    if not found:
        return None
    mean = pd.concat(found, axis=1).mean(axis=1).dropna()
    return mean if len(mean) else None


def _smooth(curve: pd.Series) -> pd.Series:
    """A centred moving average over about a twelfth of the curve."""
    return curve.rolling(max(1, len(curve) // 12), center=True, min_periods=1).mean()


def _dodge(sizes: Sequence[float]) -> list[float]:
    """Factors that set points of nearly equal size apart on a log axis."""
    factors = [1.0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    groups: list[list[int]] = []
    for i in order:
        if groups and sizes[i] <= 1.15 * sizes[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    for group in groups:
        for place, i in enumerate(sorted(group)):
            factors[i] = 1.13 ** (place - (len(group) - 1) / 2)
    return factors


__all__ = ["INK", "differences", "losses", "parameters", "rank_maps"]
