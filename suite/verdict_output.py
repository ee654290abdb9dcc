"""The result of a `suite regress` for people (terminal, Markdown) and for CI servers (JUnit)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from rich import box
from rich.table import Table
from rich.text import Text

from suite import published
from suite.regression import Regression
from suite.verdicts import Finding, Gate, Verdict

if TYPE_CHECKING:
    from suite.study import Study

_STYLES: dict[Verdict, str] = {
    "not reproduced": "red", "changed": "red", "missing": "yellow", "better": "yellow", "underpowered": "yellow",
    "reproduced": "green", "unchanged": "green", "not comparable": "dim"}
_SIGNS: dict[Verdict, str] = {"not reproduced": "❌", "changed": "❌", "missing": "⚠️", "better": "⚠️", "underpowered": "⚠️",
                              "reproduced": "✅", "unchanged": "✅", "not comparable": "➖"}
#: What a gate looks at, in front of people.
GATES: dict[Gate, str] = {"published": "published number", "training": "training", "evaluation": "scores",
                          "pooled": "all methods at once", "speed": "speed", "memory": "memory", "presence": "what was run"}
#: Verdicts of which each finding is not worth a line: equal ones are told together.
_TOGETHER: frozenset[Verdict] = frozenset({"not comparable", "missing"})


@dataclass(frozen=True)
class Told:
    """A line of a table of verdicts: what is said of one finding, or of several of which the same is to be said."""

    verdict: Verdict
    red: bool
    what: str
    rows: str
    columns: str
    said: str


def lines(study: Study, scale: str, findings: Sequence[Finding]) -> list[Told]:
    """The findings of one table as lines: unchanged ones are counted by gate, and equal reasons are told once."""
    groups: dict[tuple[object, ...], list[Finding]] = {}
    for position, one in enumerate(findings):
        key: tuple[object, ...] = (position,)
        if not one.red and one.verdict == "unchanged":
            key = (one.verdict, one.gate)
        elif one.verdict in _TOGETHER:
            key = (one.verdict, one.red, one.gate, one.said)
        groups.setdefault(key, []).append(one)
    found = []
    for same in groups.values():
        first, several = same[0], len(same) > 1
        counted = several and first.verdict == "unchanged"
        rows = "" if counted else ", ".join(dict.fromkeys(row_name(study, scale, one) for one in same))
        columns = "" if counted else ", ".join(dict.fromkeys(one.column for one in same))
        found.append(Told(first.verdict, first.red, GATES[first.gate], rows, columns,
                          f"{len(same)} compared, nothing changed" if counted else first.said))
    return found


def row_name(study: Study, scale: str, finding: Finding) -> str:
    """A finding's row in front of people: `lora@8` is `LoRA, rank 8`, or `LoRA` where the table has one budget."""
    row, _, rest = finding.row.partition("@")
    name = study.rows[row].label if row in study.rows else row
    table = study.edition(scale).tables.get(finding.table)
    if not rest or (table is not None and len(table.budgets) == 1 and len(table.rates(row)) == 1):
        return name
    return f"{name}, rank {rest}" if rest.isdigit() else f"{name}, {rest}"


def heading(study: Study, made: Regression, table: str) -> str:
    """The title of a table of verdicts: ours, and what it is held against."""
    ours = study.edition(made.scale).tables.get(table)
    title = ours.title if ours else table or "The study as a whole"
    if made.against == "published" and ours and ours.published:
        source = published.load(ours.published.table)
        title += f" (base {ours.base}) against {source.id} (base {source.base})"
    return title


def terminal(study: Study, made: Regression) -> list[Table | Text]:
    """What is printed: a table for every table of the study, and the sentence that sums up."""
    shown: list[Table | Text] = []
    several = made.against == "baseline"
    for name, findings in made.tables.items():
        table = Table(title=heading(study, made, name), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("verdict", no_wrap=True)
        if several:
            table.add_column("looked at")
        for column in ("row", "column", "what was found"):
            table.add_column(column)
        for told in lines(study, made.scale, findings):
            verdict = Text(f"{told.verdict} (red)", "bold red") if told.red else Text(told.verdict, _STYLES[told.verdict])
            what = [told.what] if several else []
            table.add_row(verdict, *map(Text, [*what, told.rows, told.columns, told.said]))
        shown.append(table)
    return [*shown, Text(made.sentence, style="bold red" if made.red else "bold")]


def markdown(study: Study, made: Regression) -> str:
    """A summary for the page of a CI job: the sentence, counts, and a table of what deserves a line; what cannot be compared
    is folded away."""
    commit = f", commit `{made.commit[:12]}`{' with changed files' if made.dirty else ''}" if made.commit else ""
    only = f", only {' '.join(f'`{one}`' for one in made.only)}" if made.only else ""
    head = [f"## {'❌' if made.red else '✅'} {study.title}: {made.scale} against "
            + (f"baseline {made.baseline}" if made.baseline else "published tables"),
            "", made.sentence, "",
            "| " + " | ".join(f"{_SIGNS[verdict]} {verdict}" for verdict in made.counts) + " |",
            "|" + "---:|" * len(made.counts),
            "| " + " | ".join(map(str, made.counts.values())) + " |", ""]
    body, several = [], made.against == "baseline"
    for name, findings in made.tables.items():
        told = lines(study, made.scale, findings)
        loud = [one for one in told if one.red or one.verdict != "not comparable"]
        quiet = [one for one in told if one not in loud]
        body += [f"### {heading(study, made, name)}", ""]
        if loud:
            body += [*_markdown_table(loud, several), ""]
        if quiet:
            count = sum(one.verdict == "not comparable" and not one.red for one in findings)
            body += ["<details>", f"<summary>{count} not comparable, and why</summary>", "",
                     *_markdown_table(quiet, several), "", "</details>", ""]
    return "\n".join([*head, *body, f"`suite regress {made.study} --scale {made.scale} --against {made.against}`, "
                                    f"{made.time}{commit}{only}.", ""])


def junit(study: Study, made: Regression) -> str:
    """JUnit XML: a test suite for every table, a test case for every finding.

    Red findings are failures; what was not decided or not compared counts as skipped, with the reason.
    """
    name = f"suite regress {made.study} {made.scale} {made.against}"
    root = ElementTree.Element("testsuites", {"name": name})
    totals: Counter[str] = Counter()
    for table, findings in made.tables.items():
        suite = ElementTree.SubElement(root, "testsuite", {"name": f"{made.study}.{made.scale}.{table}"})
        counts: Counter[str] = Counter()
        for one in findings:
            place = ", ".join(filter(None, (row_name(study, made.scale, one), one.column))) or "whole table"
            case = ElementTree.SubElement(suite, "testcase", {
                "classname": f"{made.study}.{made.scale}.{made.against}.{table}.{one.gate}",
                "name": f"{place} ({GATES[one.gate]})", "time": "0"})
            counts["tests"] += 1
            said = f"{one.verdict}: {one.said}"
            if one.red:
                counts["failures"] += 1
                failure = ElementTree.SubElement(case, "failure", {"type": one.verdict, "message": said})
                failure.text = "\n".join(f"{key}: {value}" for key, value in one.numbers.items())
            elif one.verdict in ("underpowered", "not comparable", "missing"):
                counts["skipped"] += 1
                ElementTree.SubElement(case, "skipped", {"message": said})
            else:
                ElementTree.SubElement(case, "system-out").text = said
        totals += counts
        when = datetime.fromisoformat(made.time).strftime("%Y-%m-%dT%H:%M:%S")
        for key, value in {**_counted(counts), "time": "0", "timestamp": when}.items():
            suite.set(key, value)
    for key, value in _counted(totals).items():
        root.set(key, value)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _counted(counts: Counter[str]) -> dict[str, str]:
    return {key: str(counts[key]) for key in ("tests", "failures", "errors", "skipped")}


def _markdown_table(told: Sequence[Told], gates: bool) -> list[str]:
    header = ["verdict", *(["looked at"] if gates else []), "row", "column", "what was found"]
    found = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for one in told:
        verdict = f"{'❌' if one.red else _SIGNS[one.verdict]} {one.verdict}"
        cells = [verdict, *([one.what] if gates else []), one.rows, one.columns, one.said]
        found.append(f"| {' | '.join(map(_escaped, cells))} |")
    return found


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
