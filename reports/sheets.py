"""A sheet is a table ready to be read: words in cells, and the numbers behind them.

One sheet becomes HTML (by a template), Markdown, LaTeX, CSV, JSON and a terminal table, so that all of them agree.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

#: best: highest of its column; clear: a difference that is more than noise; missing, failed, skipped: no number;
#: warn: a number with something wrong about it; faded: less certain or less important; unverified: not checked.
Mark = Literal["best", "clear", "missing", "failed", "skipped", "warn", "faded", "unverified", "reference"]
Number = int | float | str | bool | None


@dataclass(frozen=True)
class Entry:
    """One cell: what it says, a small second line, a longer explanation, and how it is set."""

    text: str
    note: str = ""
    title: str = ""
    marks: frozenset[Mark] = frozenset()
    code: bool = False


@dataclass(frozen=True)
class Sheet:
    """A rectangular table. `data` holds the numbers in long form, one mapping per row of the CSV file."""

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    data: tuple[Mapping[str, Number], ...]
    notes: tuple[str, ...] = ()
    words: frozenset[int] = field(default=frozenset({0}))  # columns of words, set left; the others are numbers

    def csv(self) -> str:
        """The numbers in long form as CSV with a header line."""
        out = io.StringIO()
        fields = list(dict.fromkeys(key for row in self.data for key in row))
        writer = csv.DictWriter(out, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.data)
        return out.getvalue()

    def markdown(self) -> str:
        """The sheet as a Markdown table, best and clear cells bold."""
        lines = ["| " + " | ".join(_md(h) for h in self.header) + " |",
                 "|" + "|".join(" :-- " if i in self.words else " --: " for i in range(len(self.header))) + "|"]
        for row in self.rows:
            lines.append("| " + " | ".join(_md_entry(entry) for entry in row) + " |")
        return "\n".join(lines)

    def latex(self) -> str:
        """The sheet as a LaTeX `tabular` for the booktabs package."""
        columns = "".join("l" if i in self.words else "r" for i in range(len(self.header)))
        lines = [f"% {_ascii(self.title)}", f"\\begin{{tabular}}{{{columns}}}", "\\toprule",
                 " & ".join(_tex(h) for h in self.header) + " \\\\", "\\midrule"]
        lines += [" & ".join(_tex_entry(entry) for entry in row) + " \\\\" for row in self.rows]
        lines += ["\\bottomrule", "\\end{tabular}"]
        lines += [f"% {_ascii(note)}" for note in self.notes]
        return "\n".join(lines) + "\n"

    def terminal(self) -> Table:
        """The sheet for a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, caption="\n".join(self.notes),
                      caption_justify="left", pad_edge=False)
        for index, name in enumerate(self.header):
            table.add_column(name, justify="left" if index in self.words else "right", no_wrap=index not in self.words)
        for row in self.rows:
            table.add_row(*(Text(_with_note(entry), style=_terminal_style(entry)) for entry in row))
        return table

    def json(self) -> dict[str, Any]:
        """The sheet as plain data."""
        return {"name": self.name, "title": self.title, "rows": [dict(row) for row in self.data],
                "notes": list(self.notes)}


def entry(text: str, *marks: Mark, note: str = "", title: str = "", code: bool = False) -> Entry:
    """An entry with marks."""
    return Entry(text, note, title, frozenset(marks), code)


def plain(texts: Sequence[str]) -> tuple[Entry, ...]:
    """A row of unmarked entries."""
    return tuple(Entry(text) for text in texts)


def _with_note(item: Entry) -> str:
    return f"{item.text} {item.note}".strip()


def _md(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _md_entry(item: Entry) -> str:
    text = _md(item.text)
    if item.code and text:
        return f"`{text}`"
    if item.marks & {"best", "clear"}:
        text = f"**{text}**"
    if "unverified" in item.marks:
        text = f"*{text}*"
    return f"{text} ({_md(item.note)})" if item.note else text


def _terminal_style(item: Entry) -> str:
    if item.marks & {"best", "clear"}:
        return "bold"
    if item.marks & {"failed", "warn"}:
        return "red"
    return "dim" if item.marks & {"faded", "missing", "skipped", "unverified"} else ""


_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "γ": r"$\gamma$",
    "α": r"$\alpha$", "β": r"$\beta$", "Δ": r"$\Delta$", "²": "$^2$", "×": r"$\times$", "≥": r"$\ge$", "≤": r"$\le$",
    "\u202f": r"\,", "\u00a0": "~", "…": r"\ldots{}", "†": r"\dag{}", "\n": " ",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _tex_entry(item: Entry) -> str:
    text = _tex(item.text)
    if item.code and text:
        return f"\\texttt{{{text}}}"
    if item.marks & {"best", "clear"}:
        text = f"\\textbf{{{text}}}"
    if "unverified" in item.marks:
        text = f"\\textit{{{text}}}"
    return f"{text} {{\\scriptsize {_tex(item.note)}}}" if item.note else text


def _ascii(text: str) -> str:
    return " ".join(text.split())
