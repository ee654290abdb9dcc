"""A sheet is a table ready to be read: words in cells, and the numbers behind them.

One sheet becomes HTML (by a template), Markdown, LaTeX, CSV, JSON and a terminal table: all of them agree.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from rich.table import Table

#: best: top of its column; clear: a difference that is more than noise; missing, failed, skipped: no number;
#: warn: a number with something wrong about it; faded: less certain or important; unverified: not checked.
Mark = Literal["best", "clear", "missing", "failed", "skipped", "warn", "faded", "unverified", "reference"]
Number = int | float | str | bool | None


@dataclass(frozen=True)
class Entry:
    """One cell: what it says, a raised sign after it, a small second line, a tooltip, and how it is set.

    `aside` is a second line for the page alone. `link` is the page that the text leads to, as a path from the site's
    folder; a site without that page shows the text alone.
    """

    text: str
    note: str = ""
    title: str = ""
    marks: frozenset[Mark] = frozenset()
    code: bool = False
    sign: str = ""
    aside: str = ""
    link: str = ""


@dataclass(frozen=True)
class Sheet:
    """A rectangular table. `data` holds the numbers in long form, one mapping per row of the CSV file.

    `words` are the columns of words, set left (the others are numbers); `aside` are columns for the page
    alone, which a paper's table and a terminal leave out. A line is drawn above the rows in `blocks`.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    data: tuple[Mapping[str, Number], ...]
    notes: tuple[str, ...] = ()
    words: frozenset[int] = field(default=frozenset({0}))
    aside: frozenset[int] = frozenset()
    blocks: frozenset[int] = frozenset()

    def shortened(self, most: int) -> Sheet:
        """The sheet with its first `most` rows for a page, and a note on where the others are; `data` stays whole."""
        if len(self.rows) <= most:
            return self
        note = f"The first {most} of {len(self.rows):,} rows; tables/{self.name}.csv has them all."
        return replace(self, rows=self.rows[:most], notes=(*self.notes, note))

    def csv(self) -> str:
        """The numbers in long form as CSV with a header line."""
        out = io.StringIO()
        write_csv(self.data, out)
        return out.getvalue()

    def markdown(self) -> str:
        """The sheet as a Markdown table, best and clear cells bold."""
        rule = ["---" if i in self.words else "--:" for i in range(len(self.header))]
        lines = ["| " + " | ".join(map(markdown, self.header)) + " |", "| " + " | ".join(rule) + " |"]
        for row in self.rows:
            lines.append("| " + " | ".join(_markdown_entry(item) for item in row) + " |")
        return "\n".join(lines)

    def latex(self, label: str) -> str:
        """The sheet as a LaTeX table, shrunk where wider than the text; title and notes are its caption."""
        shown = [i for i in range(len(self.header)) if i not in self.aside]
        columns = "".join("l" if i in self.words else "r" for i in shown)
        caption = " ".join(latex(text if text.endswith((".", "?", "!")) else f"{text}.")
                           for text in (self.title, *self.notes))
        head = " & ".join(_latex_head(self.header[i], i in self.words) for i in shown)
        lines = [r"% \usepackage{booktabs,graphicx}", r"\begin{table}[t]", r"\centering",
                 f"\\caption{{{caption}}}", f"\\label{{tab:{label}}}", r"\footnotesize",
                 r"\setlength{\tabcolsep}{4pt}",
                 r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
                 f"\\begin{{tabular}}{{@{{}}{columns}@{{}}}}", r"\toprule",
                 head + r" \\", r"\midrule"]
        for place, row in enumerate(self.rows):
            if place in self.blocks:
                lines.append(r"\addlinespace")
            lines.append(" & ".join(_latex_entry(row[i]) for i in shown) + r" \\")
        lines += [r"\bottomrule", r"\end{tabular}}", r"\end{table}"]
        return "\n".join(lines) + "\n"

    def terminal(self) -> Table:
        """The sheet for a terminal."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = [i for i in range(len(self.header)) if i not in self.aside]
        table = Table(title=Text(self.title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
                      padding=(0, 2, 0, 0), caption=Text("\n".join(self.notes)), caption_justify="left")
        for i in shown:
            words = i in self.words
            table.add_column(Text("\n".join(_two_lines(self.header[i], words))), vertical="bottom",
                             justify="left" if words else "right")
        for row in self.rows:
            table.add_row(*(Text(f"{row[i].text}{row[i].sign} {row[i].note}".strip(),
                                 style=_terminal_style(row[i])) for i in shown))
        return table

    def json(self) -> dict[str, Any]:
        """The sheet as plain data."""
        return {"name": self.name, "title": self.title, "rows": [dict(row) for row in self.data],
                "notes": list(self.notes)}


def write_csv(data: Sequence[Mapping[str, Number]], file: TextIO) -> None:
    """Rows as CSV with a header line of all their keys."""
    writer = csv.DictWriter(file, list(dict.fromkeys(key for row in data for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)


def entry(text: str, *marks: Mark, note: str = "", title: str = "", code: bool = False,
          sign: str = "", link: str = "") -> Entry:
    """An entry with marks."""
    return Entry(text, note, title, frozenset(marks), code, sign, link=link)


def markdown(text: str) -> str:
    """Plain text as Markdown that shows exactly this text, on one line, in a table's cell too."""
    text = re.sub(r"([\\`*|~]|(?<!\w)_|_(?!\w))", r"\\\1", re.sub(r"[\r\n\t]+", " ", text))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("](", "]\\(").replace("][", "]\\[")
    # At the start of a line these would make a heading, a list or a quotation.
    return re.sub(r"^(#+ |[-+] |>)", r"\\\1", re.sub(r"^(\d+)([.)] )", r"\1\\\2", text))


def markdown_code(text: str) -> str:
    """Text as a Markdown code span."""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if len(fence) == 1 else f"{fence} {text} {fence}"


def latex(text: str) -> str:
    """Plain text as LaTeX."""
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _markdown_entry(item: Entry) -> str:
    text = markdown(item.text)
    if item.code and text:
        return markdown_code(item.text).replace("|", "\\|")
    if item.marks & {"best", "clear"}:
        text = f"**{text}**"
    if "unverified" in item.marks:
        text = f"*{text}*"
    if item.sign:
        text += f"<sup>{markdown(item.sign)}</sup>"
    note = markdown(item.note or item.aside)
    return text if not note else f"{text} {note}" if note.startswith("[") else f"{text} ({note})"


def _terminal_style(item: Entry) -> str:
    if item.marks & {"best", "clear"}:
        return "bold"
    if item.marks & {"failed", "warn"}:
        return "red"
    return "dim" if item.marks & {"faded", "missing", "skipped", "unverified"} else ""


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "–": "--", "—": "---", "γ": r"$\gamma$", "α": r"$\alpha$",
    "β": r"$\beta$", "Δ": r"$\Delta$", "²": "$^2$", "×": r"$\times$", "≥": r"$\ge$", "≤": r"$\le$",
    "·": r"$\cdot$", "\u202f": r"\,", "\u00a0": "~", "…": r"\ldots{}", "†": r"\dag{}", "\n": " ", "\r": " ",
}


def _two_lines(text: str, words: bool) -> list[str]:
    """A long heading in two, so that a column of numbers is as narrow as they are."""
    first, _, rest = text.rpartition(" ")
    return [text] if words or not first or len(text) <= 8 else [first, rest]


def _latex_head(text: str, words: bool) -> str:
    lines = [latex(line) for line in _two_lines(text, words)]
    return lines[0] if len(lines) == 1 else f"\\shortstack[r]{{{lines[0]}\\\\{lines[1]}}}"


def _latex_entry(item: Entry) -> str:
    """The mean at full size, its spread and its note small."""
    mean, _, spread = item.text.partition(" ± ")
    text = latex(mean)
    if item.code and text:
        text = f"\\texttt{{{text}}}"
    if item.marks & {"best", "clear"}:
        text = f"\\textbf{{{text}}}"
    if "unverified" in item.marks:
        text = f"\\textit{{{text}}}"
    if spread:
        text += f"{{\\scriptsize\\,$\\pm$\\,{latex(spread)}}}"
    if item.sign:
        text += f"\\textsuperscript{{{latex(item.sign)}}}"
    return f"{text} {{\\scriptsize {latex(item.note)}}}" if item.note else text
