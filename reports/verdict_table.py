"""What the last `suite regress` said of a study, as a table of its page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from reports import numbers
from reports.frame import day
from reports.sheets import Entry, Mark, Number, Sheet, entry
from suite import regression
from suite.errors import UserError
from suite.regression import Regression
from suite.verdicts import Finding


@dataclass(frozen=True)
class Verdicts:
    """The last comparison of one kind: a sentence, when it was made, and its findings (`sheet`)."""

    heading: str
    sentence: str
    when: str
    red: bool
    sheet: Sheet


def last(study: str, scale: str) -> tuple[list[Verdicts], list[str]]:
    """The last comparison with published tables and with each kind of baseline, and sentences on files that cannot be
    read."""
    found, problems = [], []
    for against in get_args(regression.Against):
        try:
            made = regression.latest(study, scale, against)
        except UserError as error:
            problems.append(str(error))
            continue
        if made is not None:
            found.append(Verdicts(f"Against {'published tables' if against == 'published' else 'the baseline'}",
                                  made.sentence, day(made.time), bool(made.red), _sheet(made)))
    return found, problems


def _sheet(made: Regression) -> Sheet:
    """One row per finding; red ones first."""
    order = {verdict: place for place, verdict in enumerate(regression.ORDER)}
    findings = sorted(made.findings, key=lambda one: (not one.red, order[one.verdict]))
    rows = tuple((entry(one.verdict, *_mark(one)), Entry(one.gate), Entry(one.table or numbers.DASH),
                  Entry(one.row or numbers.DASH), Entry(one.column or numbers.DASH), Entry(one.said)) for one in findings)
    data: list[dict[str, Number]] = [{
        "verdict": one.verdict, "red": one.red, "gate": one.gate, "table": one.table, "row": one.row,
        "column": one.column, "said": one.said, **one.numbers} for one in findings]
    return Sheet(f"verdicts-{made.against}", f"Verdicts against {made.baseline or 'published tables'}",
                 ("Verdict", "Gate", "Table", "Row", "Column", "Why"), rows, tuple(data), (),
                 frozenset({0, 1, 2, 3, 4, 5}))


def _mark(one: Finding) -> list[Mark]:
    if one.red:
        return ["failed"]
    return ["faded"] if one.verdict == "not comparable" else ["best"] if one.verdict == "reproduced" else []
