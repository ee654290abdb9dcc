"""The figure of a study's nights: one line per row of a table, a panel per task, and a mark where a series steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.lines import Line2D

from reports import numbers
from reports.figures import MUTED, PAPER, Figure, Look, drawing, finish, panels, style
from reports.sheets import Number
from suite import history
from suite.history import Measure, Night

#: Nights drawn: the last ones.
MOST = 120
ACROSS = 3
_SAID: Mapping[Measure, tuple[str, float]] = {
    "score": ("mean score, %", 100), "loss": ("mean training loss", 1), "speed": ("tokens per second", 1),
    "memory": ("peak memory, GB", 1e-9)}


def figure(nights: Sequence[Night], table: str, measure: Measure, looks: Mapping[str, Look], labels: Mapping[str, str],
           folder: Path, prefix: str = "") -> Figure | None:
    """A measure of a table over the last nights. None with fewer than two nights, or where none has it.

    `looks`: by row id (`reports.figures.looks`); `labels`: what readers call a row. A row that stands with several budgets
    is named in the history by its id and budget. `prefix`: what its name begins with, where several studies share a folder.
    """
    nights = list(nights)[-MOST:]
    found = {(row, column): values for (where, row, column), values in history.series(nights, measure).items()
             if where == table and any(value is not None for value in values)}
    if len(nights) < 2 or not found:
        return None
    said, unit = _SAID[measure]
    columns = list(dict.fromkeys(column for _, column in found))
    rows = list(dict.fromkeys(row for row, _ in found))
    across = min(ACROSS, len(columns))
    down = -(-len(columns) // across)
    legend = 0.3 + 0.2 * -(-len(rows) // 4)
    steps = 0
    data: list[dict[str, Number]] = []
    with style():
        drawn = drawing(8.6, legend + 0.35 + 2.1 * down)
        axes = panels(drawn, across, down, left=0.7, right=0.15, top=0.3, bottom=0.4 + legend, high=0.65, wide=0.55)
        for axis in axes[len(columns):]:
            axis.set_visible(False)
        for axis, column in zip(axes, columns, strict=False):
            for row in rows:
                values = found.get((row, column))
                if values is None:
                    continue
                look = looks[row.partition(" ")[0]]
                at = [i for i, value in enumerate(values) if value is not None]
                axis.plot(at, [(values[i] or 0.0) * unit for i in at], color=look.colour, marker=look.marker, markersize=3,
                          linestyle=look.dash, linewidth=1.2)
                marks = {step.at: step for step in history.steps(values)}
                steps += len(marks)
                for place in marks:
                    axis.plot(place, (values[place] or 0.0) * unit, marker="o", markersize=10, markerfacecolor="none",
                              markeredgecolor=look.colour, markeredgewidth=1.4)
                data += [{"time": nights[i].time, "commit": nights[i].commit or "", "row": row, "task": column,
                          measure: values[i], "step": int(i in marks)} for i in at]
            for i, one in enumerate(nights):
                if one.red:
                    axis.axvline(i, color=MUTED, linewidth=0.8, linestyle=":")
            axis.set_title(column)
            shown = sorted({0, (len(nights) - 1) // 2, len(nights) - 1})
            axis.set_xticks(shown, [nights[i].time[5:10] for i in shown])  # month and day
            axis.set_xlim(-0.5, len(nights) - 0.5)
        axes[0].set_ylabel(said)
        names = [labels.get(row, row) for row in rows]
        lines = [Line2D([], [], color=looks[row.partition(" ")[0]].colour, marker=looks[row.partition(" ")[0]].marker,
                        linestyle=looks[row.partition(" ")[0]].dash, markersize=4) for row in rows]
        drawn.legend(lines, names, loc="lower center", ncols=min(4, len(rows)), facecolor=PAPER)
        caption = (f"{said[0].upper()}{said[1:]} of the last {len(nights)} nights, {nights[0].time[:10]} to "
                   f"{nights[-1].time[:10]}. A ring marks the first night of a step: a change of level that a permutation "
                   f"test finds at {history.ALPHA:g}. Dotted: nights that were red.")
        alt = (f"{said} of {numbers.several(len(rows), 'row')} on {numbers.several(len(columns), 'task')} over "
               f"{len(nights)} nights; {numbers.several(steps, 'step')}.")
        return finish(drawn, f"{prefix}{table}-nights-{measure}", caption, alt, folder, data)
