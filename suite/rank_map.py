"""A rank map: the rank (or any number) of every adapted layer, laid out as blocks by module kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<block>\d+)\.(?P<kind>.+)$")
#: Words of a layer's name that tell a reader nothing.
_IDLE = frozenset({"self", "layer", "dense", "mlp", "self_attn", "0", "1", "2"})


def grid(values: Mapping[str, float]) -> pd.DataFrame:
    """Layer values by name as a table: one row per block, one column per module kind, both in model order.

    `encoder.layer.3.attention.self.query` stands in row `3`, column `attention.query`. Bases with two stacks
    (an encoder and a decoder) have rows `encoder 3` and `decoder 3`. Layers outside any block stand in
    row `-`.
    """
    places = {name: _place(name) for name in values}
    stacks = {stack for stack, _, _ in places.values() if stack}
    table: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        stack, block, kind = places[name]
        row = block if len(stacks) < 2 or not stack else f"{stack.split('.')[0]} {block}"
        table.setdefault(row, {})[kind] = value
    columns = list(dict.fromkeys(kind for _, _, kind in places.values()))
    return pd.DataFrame.from_dict(table, orient="index", columns=columns)


def draw(ranks: Mapping[str, int], title: str) -> Figure:
    """The ranks as a heat map with their numbers; cells of layers that are not adapted stay empty."""
    from matplotlib.figure import Figure

    cells = grid(ranks)
    values = cells.to_numpy(dtype=float)
    figure = Figure(figsize=(1.8 + 1.05 * len(cells.columns), 1.7 + 0.3 * len(cells)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=0)
    axes.set_xticks(range(len(cells.columns)), [str(kind) for kind in cells.columns], rotation=30, ha="right")
    axes.set_yticks(range(len(cells)), [str(block) for block in cells.index])
    axes.set_ylabel("block")
    axes.set_title(title)
    highest = max(ranks.values(), default=1)
    for (row, column), value in _numbers(values):
        colour = "black" if value > 0.6 * highest else "white"
        axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, label="rank")
    return figure


def _place(name: str) -> tuple[str, str, str]:
    """The stack, block and kind of a layer: its name before the first number, that number, the rest."""
    found = _BLOCK.match(name)
    if found is None:
        return "", "-", name.rsplit(".", 1)[-1]
    words = found["kind"].split(".")
    telling = [word for word in words if word not in _IDLE]
    return found["stack"], found["block"], ".".join(telling or words)


def _numbers(values: object) -> list[tuple[tuple[int, int], float]]:
    import numpy as np

    cells = np.ndenumerate(np.asarray(values, dtype=float))
    return [((int(row), int(column)), float(v)) for (row, column), v in cells if np.isfinite(v)]
