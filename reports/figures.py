"""How figures look, and how they are written: SVG in the page; PNG, SVG and PDF files, with their numbers as CSV.

Matplotlib draws with a few marked colours for ink, grid and paper. In the page these become CSS variables, so
that a figure follows the page's light or dark; in the files they stay what they are, dark on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Drawing

from reports.sheets import Number, write_csv

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, GRID, PAPER = "#1e2329", "#646c76", "#dfe3e7", "#fefefe"
#: One colour per row of a study, in the order of its file, those that are furthest apart first. Found by a search for the
#: largest smallest distance in OKLab as seen with full sight, protanopia and deuteranopia (Machado and others, 2009), of
#: these on white and of their lighter versions in `style.css` on near-black.
PALETTE = ("#23799d", "#541701", "#a19426", "#232684", "#864d04", "#4ca29c", "#663c4e", "#4b1441", "#348363",
           "#1d558f")
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--rule)", PAPER: "var(--panel)",
              **{colour: f"var(--row{place})" for place, colour in enumerate(PALETTE)}}
MARKERS = ("s", "P", "X", "o", "^", "v", "D", "<", ">", "h")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
STYLE: Mapping[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9.5,
    "axes.titleweight": "bold", "axes.labelsize": 9, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5, "text.color": INK, "axes.labelcolor": INK, "axes.titlecolor": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.edgecolor": MUTED, "axes.linewidth": 0.7, "axes.grid": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": PAPER, "axes.facecolor": "none",
    "savefig.facecolor": PAPER, "hatch.color": GRID, "hatch.linewidth": 0.8, "legend.frameon": False,
    "svg.fonttype": "none", "svg.hashsalt": "suite", "pdf.fonttype": 42, "lines.linewidth": 1.6,
    "axes.unicode_minus": True, "text.parse_math": False,
}


@dataclass(frozen=True)
class Look:
    """Colour, marker and dash of a row, the same in every figure."""

    colour: str
    marker: str
    dash: Any


@dataclass(frozen=True)
class Figure:
    """A figure ready for the page. `svg` is inline SVG; its files stand beside the page in `figures/`."""

    name: str
    caption: str
    alt: str
    svg: str
    width: int  # CSS pixels at which its text has the size it was drawn for
    formats: tuple[str, ...] = ("png", "svg", "csv")

    def file(self, suffix: str) -> str:
        """Where the page finds the file of a format."""
        return f"figures/{self.name}.{suffix}"


def looks(rows: Sequence[str]) -> dict[str, Look]:
    """A look for every row id: neighbours differ in colour, marker and dash, and no two of forty are alike."""
    return {row: Look(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)],
                      DASHES[(i + i // len(PALETTE)) % len(DASHES)]) for i, row in enumerate(rows)}


def drawing(width: float, height: float) -> Drawing:
    """An empty figure of a size in inches; call it inside `style()`."""
    return Drawing(figsize=(width, height), dpi=100)


def style() -> Any:
    """The context in which figures are drawn and written."""
    return mpl.rc_context(dict(STYLE))  # type: ignore[arg-type]


def finish(figure: Drawing, name: str, caption: str, alt: str, folder: Path, data: Sequence[Mapping[str, Number]],
           paper: bool = False) -> Figure:
    """Write the figure's files into `folder` and return it for the page. Same figure, same bytes.

    `data`: the numbers that are drawn, one mapping per row of the CSV file, all with the same keys.
    `paper`: write PDF too, with its fonts embedded as papers want them, which takes as long as all the rest.
    """
    out = io.StringIO()
    FigureCanvasSVG(figure).print_svg(out, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = out.getvalue()
    (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    figure.set_dpi(160)
    FigureCanvasAgg(figure).print_png(folder / f"{name}.png", metadata={"Software": None})
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        write_csv(data, file)
    if paper:
        nothing = dict.fromkeys(("Creator", "Producer", "CreationDate"))
        FigureCanvasPdf(figure).print_pdf(folder / f"{name}.pdf", metadata=nothing)
    formats = ("png", "svg", "pdf", "csv") if paper else ("png", "svg", "csv")
    return Figure(name, caption, alt, inline(text, name, alt), round(figure.get_figwidth() * 100), formats)


#: Coordinates need two decimals; texts such as tick labels keep all of theirs.
_SHORTER = re.compile(r"(\d+\.\d{2})\d+")


def inline(svg: str, name: str, alt: str) -> str:
    """Matplotlib's SVG file as an element of a page.

    It gets a name for readers who cannot see it, ids of its own, CSS variables for colours, the page's fonts.
    """
    body = svg[svg.index("<svg"):]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", body)
    body = re.sub(r"'DejaVu Sans'(?:, [^;\"]*?)?sans-serif|'DejaVu Sans'", "var(--font)", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    body = re.sub(r"\n\s*", "\n", body)
    body = re.sub(r' (?:d|transform|x|y)="[^"]*"', lambda found: _SHORTER.sub(r"\1", found[0]), body)
    head = re.match(r"<svg[^>]*>", body)
    assert head is not None
    box = re.search(r'viewBox="([^"]+)"', head[0])
    opening = (f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" '
               f'viewBox="{box[1] if box else "0 0 1 1"}" role="img" aria-label="{escape(alt)}">')
    return opening + body[head.end():]


def panels(figure: Drawing, columns: int, rows: int, share: bool = False, **margins: float) -> list[Axes]:
    """A flat list of axes. Margins in inches: left, right, top, bottom; wide and high lie between panels."""
    width, height = figure.get_size_inches()
    left, right = margins.get("left", 0.6) / width, 1 - margins.get("right", 0.15) / width
    top, bottom = 1 - margins.get("top", 0.35) / height, margins.get("bottom", 0.45) / height
    each = (right - left) * width / columns, (top - bottom) * height / rows
    between = {"wspace": margins.get("wide", 0.25) / each[0], "hspace": margins.get("high", 0.6) / each[1]}
    grid = figure.add_gridspec(rows, columns, left=left, right=right, top=top, bottom=bottom, **between)
    found: list[Axes] = []
    for i in range(rows * columns):
        shared = found[0] if found else None
        found.append(figure.add_subplot(grid[i // columns, i % columns], sharex=shared if share else None,
                                        sharey=shared if share else None))
    return found


@cache
def ramp() -> Any:
    """Light to dark blue for rank maps, none so light that it vanishes on white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ranks", ["#e3edf7", "#9cc3e4", "#4a8cc7", "#1c5a99", "#0b3663"])


def luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (parts in 0..1), as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
