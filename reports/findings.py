"""What a study found, in sentences. Every word depends on the numbers; nothing is assumed about any method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reports import numbers
from reports.provenance import Totals, single_item
from reports.tables import AVERAGE, StudyTable

if TYPE_CHECKING:
    from suite.study import Study


def state(totals: Totals) -> str:
    """How complete the study is."""
    if totals.recorded == 0:
        return f"None of the {numbers.several(totals.planned, 'planned run')} has been made yet, so there is nothing to compare."
    done = totals.fates.get("finished", 0)
    if done == totals.planned:
        return f"All {numbers.several(totals.planned, 'planned run')} finished."
    words = {"diverged": "diverged", "failed": "failed", "skipped": "skipped as not applicable", "missing": "not run yet"}
    rest = [f"{totals.fates[key]} {word}" for key, word in words.items() if totals.fates.get(key)]
    return f"{done} of {numbers.several(totals.planned, 'planned run')} finished; {numbers.listing(rest)}."


def table_sentences(table: StudyTable) -> list[str]:
    """What one table says: its reference, what differs clearly, what cannot be told apart, what is missing."""
    column = table.headline
    over = f"averaged over {numbers.several(len(table.columns), 'task')}" if column == AVERAGE else table.title_of(column)
    clear, open_, weak = [], [], []
    for line in table.lines:
        delta = table.differences.get((line.key, column))
        if delta is None:
            continue
        shown = f"{line.label} ({numbers.signed(delta.mean)})"
        if delta.clear:
            clear.append(shown)
        elif delta.interval is not None and delta.interval.excludes_zero:
            weak.append(shown)
        else:
            open_.append(shown)
    found = [_levels(table, over)] if _levels(table, over) else []
    reference = table.reference_label
    if clear:
        found.append(f"Clearly different from {reference}: {numbers.listing(clear)} points.")
    if weak:
        why = "from one seed only" if len(table.seeds) < 2 else "but with one seed only, or seeds that disagree"
        found.append(f"Beyond the noise of the test items, {why}, so no claim: {numbers.listing(weak)} points.")
    if open_:
        found.append(f"Not told apart from {reference}: {numbers.listing(open_)} points.")
    intervals = sum(1 for delta in table.differences.values() if delta.interval is not None)
    if intervals >= 10:
        found.append(f"The table holds {intervals} intervals; at 95 % about {max(1, round(intervals * 0.05))} would "
                     "exclude zero by chance alone.")
    missing = [line.label for line in table.lines if table.values[line.key, column].summary is None]
    if missing and len(missing) < len(table.lines):
        found.append(f"Without a complete result: {numbers.listing(missing)}.")
    return found or ["No line has a result yet."]


def slices(table: StudyTable) -> str:
    """How small the data of a table is, plainly; empty while nothing has run."""
    known = [column for column in table.columns if column.test]
    if not known:
        return ""
    sizes = sorted({(column.train or 0, column.test or 0) for column in known})
    parts = [f"{numbers.count(train)} training and {numbers.count(test)} test items" for train, test in sizes]
    each = " each" if len(known) > 1 and len(sizes) == 1 else ""
    smallest = min(column.test or 1 for column in known)
    return (f"A small slice of the data: {' or '.join(parts)}{each}, {numbers.several(len(table.seeds), 'seed')}; one "
            f"test item moves a single run's score by {single_item(smallest)} points.")


def banner(study: Study, scale: str, table: StudyTable, base: str, bench: str) -> str:
    """Why numbers of the small scales are no reproduction of the paper's. Empty at the paper's own scale."""
    if scale == "paper":
        return ""
    tasks = numbers.listing([column.title for column in table.columns])
    return (f"Not a reproduction of the paper's numbers. This is scale {scale}: the same kind of table on another base "
            f"({table.base} instead of {base}) and other data ({tasks} instead of {bench}). Only the shape of the "
            "comparison carries over.")


def _levels(table: StudyTable, over: str) -> str:
    """The reference's score, the best line, and the majority class to measure both by."""
    column = table.headline
    scored = [(summary.mean, line) for line in table.lines
              if (summary := table.values[line.key, column].summary) is not None]
    if not scored:
        return ""
    best, line = max(scored, key=lambda pair: pair[0])
    anchors = [mean for mean, x in scored if table.is_reference(x)]
    text = f"On {table.base}, {over}: "
    if anchors and not table.is_reference(line):
        text += f"{table.reference_label} scores {numbers.percent(max(anchors))} %; "
    text += f"the highest score is {numbers.percent(best)} % by {line.label}"
    rates = [column.majority for column in table.columns if column.majority is not None]
    if rates and len(rates) == len(table.columns):
        text += f"; always answering the most frequent label gives {numbers.percent(sum(rates) / len(rates))} %"
    return text + "."
