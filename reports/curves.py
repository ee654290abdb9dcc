"""A run's curves as small drawings: inline SVG written by hand, since a site has thousands of them."""

from __future__ import annotations

from html import escape

import numpy as np
import pandas as pd
from numpy.typing import NDArray

#: Columns of a run's curves that are drawn, with their titles.
DRAWN = {"loss": "Training loss", "gradient_norm": "Gradient norm", "learning_rate": "Learning rate"}
#: Size of a drawing, and its margins: left, right, top, bottom.
WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 22
#: Points of a curve: of more, the lowest and the highest of every stretch are drawn, so that no spike is lost.
POINTS = 240

Numbers = NDArray[np.float64]


def drawings(curves: pd.DataFrame) -> list[tuple[str, str]]:
    """Title and SVG of every curve that has a finite value. `curves` has a column `step` and any of `DRAWN`."""
    steps = curves["step"].to_numpy(dtype=np.float64)
    found = [(title, drawing(title, steps, curves[column].to_numpy(dtype=np.float64)))
             for column, title in DRAWN.items() if column in curves]
    return [(title, svg) for title, svg in found if svg]


def drawing(title: str, steps: Numbers, values: Numbers) -> str:
    """One curve as an `svg` element: a line with gaps where values are not finite, its range, and its first and last step.
    Empty when no value is finite."""
    finite = np.isfinite(values)
    if not finite.any():
        return ""
    low, high = float(values[finite].min()), float(values[finite].max())
    first, last = float(steps[0]), float(steps[-1])
    x = LEFT + (steps - first) / ((last - first) or 1.0) * (WIDTH - LEFT - RIGHT)
    span = high - low
    heights = (values - low) / span if span > 0 else np.full_like(values, 0.5)
    y = HEIGHT - BOTTOM - heights * (HEIGHT - TOP - BOTTOM)
    kept = _kept(values)
    lines = "".join(_line(x[part], y[part]) for part in _stretches(kept, finite))
    ends = values[finite]
    said = f"{title}: {_text(ends[0])} at first, {_text(ends[-1])} at last, between {_text(low)} and {_text(high)}"
    if not finite.all():
        said += f"; not finite at {int((~finite).sum())} of {len(values)} steps"
    bottom = HEIGHT - BOTTOM
    ends_of_y = [(TOP, high), (bottom, low)] if span > 0 else [((TOP + bottom) / 2, high)]
    labels = [_label(LEFT - 6, place + 4, _text(value), "end") for place, value in ends_of_y]
    labels.append(_label(LEFT, HEIGHT - 6, f"step {first:.0f}", "start"))
    labels.append(_label(WIDTH - RIGHT, HEIGHT - 6, f"{last:.0f}", "end"))
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">'
            f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="var(--muted)" stroke-width=".7"/>'
            f'<g fill="none" stroke="var(--accent)" stroke-width="1.4" stroke-linejoin="round">{lines}</g>'
            f'{"".join(labels)}</svg>')


def _kept(values: Numbers) -> NDArray[np.intp]:
    """Places of the values to draw."""
    if len(values) <= POINTS:
        return np.arange(len(values))
    found: set[int] = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(len(values)), POINTS // 2):
        part = values[stretch]
        if np.isfinite(part).all():
            found |= {int(stretch[part.argmin()]), int(stretch[part.argmax()])}
        else:
            found |= {int(place) for place in stretch}
    return np.array(sorted(found))


def _stretches(kept: NDArray[np.intp], finite: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """The kept links in runs of finite values."""
    if finite.all():
        return [kept]
    breaks = np.flatnonzero(~finite[kept])
    return [part[finite[part]] for part in np.split(kept, breaks) if finite[part].any()]


def _line(x: Numbers, y: Numbers) -> str:
    points = [f"{one:.1f} {other:.1f}" for one, other in zip(x.tolist(), y.tolist(), strict=True)]
    return f'<path d="M{"L".join(points)}{"h.1" if len(points) == 1 else ""}"/>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="11" fill="var(--muted)">{escape(text)}</text>'


def _text(value: float) -> str:
    return f"{value:.{2 if 0 < abs(value) < 1e-3 else 3}g}".replace("-", "−")
