"""What a study found, in sentences. Every word depends on the numbers, none on a method."""

from __future__ import annotations

import statistics as plain
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import numbers
from reports.provenance import Totals
from reports.publication import Publication, column_name
from reports.tables import AVERAGE, ELSEWHERE, Line, StudyTable
from suite import bases
from suite.errors import UserError
from suite.published import AVERAGE as PUBLISHED_AVERAGE

if TYPE_CHECKING:
    from suite.study import Study

#: Names that a sentence lists before it says how many more there are.
LISTED = 8
#: What the word means in every sentence here.
CLEARLY = ("Clearly: not zero at the 5 % level, paired, over other seeds and other test items, adjusted for all "
           "differences of the table (Benjamini and Hochberg).")


@dataclass(frozen=True)
class Banner:
    """Why the numbers are no reproduction of the paper's, and what differs, table by table."""

    text: str
    tables: tuple[tuple[str, str], ...]


def state(totals: Totals) -> str:
    """How complete the study is."""
    planned = numbers.several(totals.planned, "planned run")
    if totals.recorded == 0:
        return f"None of the {planned} has been made yet, so there is nothing to compare."
    done = totals.fates.get("finished", 0)
    if done == totals.planned:
        return f"All {planned} finished."
    words = {"diverged": "diverged", "failed": "failed", "skipped": "skipped as not applicable",
             "missing": "not run yet"}
    rest = [f"{totals.fates[key]} {word}" for key, word in words.items() if totals.fates.get(key)]
    return f"{done} of {planned} finished; {numbers.listing(rest)}."


def table_sentences(table: StudyTable) -> list[str]:
    """What one table says: who is highest, what differs from the reference, what it costs."""
    scored = {line.key: summary.mean for line in table.lines
              if (summary := table.values[line.key, table.headline].summary) is not None}
    if not scored:
        return ["No row has a complete result yet."]
    found = [_highest(table, scored)]
    budgets: dict[str, list[Line]] = {}
    for line in table.lines:
        budgets.setdefault(line.budget if len(table.budgets) > 1 else "", []).append(line)
    for budget, lines in budgets.items():
        found += _against_reference(table, lines, budget, table.headline)
        if ELSEWHERE in table.averages:
            found += [f"Out of domain. {said}" for said in _against_reference(table, lines, budget, ELSEWHERE)]
    found += _cost(table, scored)
    without = [line for line in table.lines if line.key not in scored]
    skipped = [line.label for line in without if table.values[line.key, table.headline].state == "skipped"]
    missing = [line.label for line in without if line.label not in skipped]
    if skipped:
        found.append(f"Skipped as not applicable: {some(skipped)}.")
    if missing:
        found.append(f"No complete result yet: {some(missing)}.")
    return found


def setup(study: Study, scale: str, table: StudyTable) -> str:
    """On what, with how much data and by which recipe a table was made."""
    recipe = study.edition(scale).tables[table.id].recipe
    count = numbers.several(len(table.tasks), "task").capitalize()
    seeds = numbers.several(len(table.seeds), "seed").capitalize()
    budgets = f"Budget{'s' if len(table.budgets) > 1 else ''}: {numbers.listing(list(table.budgets))}. "
    return (f"Base: {base_title(table.base)}. {count}: {_tasks(table)}. {seeds} "
            f"({', '.join(map(str, table.seeds))}). {budgets if table.budgets else ''}AdamW, "
            f"{numbers.several(recipe.epochs, 'epoch')}, batches of {recipe.batch_size}, {recipe.schedule} "
            f"schedule; {_rates(study, scale, table)}.")


def _tasks(table: StudyTable) -> str:
    """The tasks with their numbers of items, tasks of equal size together."""
    groups: dict[tuple[int, int] | None, list[str]] = {}
    for column in table.columns:
        size = (column.train or 0, column.test) if column.test else None
        groups.setdefault(size, []).append(column.title)
    said = []
    for size, titles in groups.items():
        each = " each" if len(titles) > 1 else ""
        items = (f" ({numbers.count(size[0])} training and {numbers.count(size[1])} test items{each})"
                 if size is not None else "")
        said.append(numbers.listing(titles) + items)
    return "; ".join(said)


def _rates(study: Study, scale: str, table: StudyTable) -> str:
    """The learning rate or rates, or those of every row where they differ."""
    plan = study.edition(scale).tables[table.id]
    rates: dict[str, list[str]] = {}
    for row in dict.fromkeys(line.row for line in table.lines):
        own = numbers.listing([f"{rate:g}" for rate in plan.rates(row)])
        rates.setdefault(own, []).append(study.rows[row].label)
    if len(rates) == 1:
        return f"learning rate {next(iter(rates))} for every row"
    common = f"{plan.recipe.learning_rate:g}"
    said = [f"{rate} for {numbers.listing(rows)}" for rate, rows in rates.items() if rate != common]
    return f"learning rate {'; '.join(said)}" + (f"; {common} for the others" if common in rates else "")


def banner(study: Study, scale: str, found: Sequence[tuple[StudyTable, Publication | None]]) -> Banner | None:
    """What stands above the numbers of the small scales. None at the paper's own scale."""
    if scale == "paper":
        return None
    rows = []
    for table, beside in found:
        if beside is None:
            continue
        theirs = numbers.listing([column_name(c) for c in beside.columns if c != PUBLISHED_AVERAGE])
        ours = numbers.listing([column.title for column in table.columns])
        said = f"{base_title(table.base)} instead of {beside.table.base}; {ours} instead of {theirs}." if theirs else \
            f"{base_title(table.base)}; {ours}. The paper's table is not transcribed."
        rows.append((table.title, said))
    return Banner(f"Scale {scale} makes tables of the same kind on other bases and other data. Directions "
                  "may carry over to the paper's setting; sizes do not.", tuple(rows))


def base_title(base: str) -> str:
    """A base's title, or its id when it is not one of ours."""
    try:
        return bases.get(base).title
    except UserError:
        return base


def _highest(table: StudyTable, scored: dict[str, float]) -> str:
    """The highest score and what is level with it; the reference and the majority class beside it."""
    column = table.headline
    over = (f"average of {len(table.columns)} columns" if len(table.tasks) < len(table.columns)
            else f"average of {len(table.columns)} tasks") if column == AVERAGE else table.title_of(column)
    best = max(table.lines, key=lambda line: scored.get(line.key, -1.0))
    text = f"Highest ({over}): {best.label}, {numbers.percent(scored[best.key])} %"
    if not table.values[best.key, column].complete:
        text += " from a part of its runs"
    level = [line.label for line in table.lines
             if table.values[line.key, column].top and scored.get(line.key) != scored[best.key]]
    if level:
        text += f", not told apart from {some(level)}"
    anchor = table.reference[best.key]
    if anchor.key != best.key and anchor.key in scored:
        text += f". {anchor.label}: {numbers.percent(scored[anchor.key])} %"
    rates = [column.majority for column in table.columns if column.majority is not None]
    if rates and len(rates) == len(table.columns):
        text += f". Always the most frequent label: {numbers.percent(plain.fmean(rates))} %"
    return text + "."


def _against_reference(table: StudyTable, lines: Sequence[Line], budget: str, column: str) -> list[str]:
    """How lines differ from their reference in a column; of several budgets, those of one at a time."""
    above: list[str] = []
    below: list[str] = []
    weak: list[str] = []
    level: list[str] = []
    finds: list[float] = []
    known = [(delta, line) for line in lines
             if (delta := table.differences.get((line.key, column))) is not None]
    for delta, line in sorted(known, key=lambda pair: -pair[0].mean):
        said = f"{line.name} ({numbers.signed(delta.mean)})"
        if delta.clear:
            (above if delta.mean > 0 else below).append(said)
        elif delta.clear_on_items:
            weak.append(said)
        else:
            level.append(said)
            finds += [delta.detectable] if delta.detectable is not None else []
    if not known:
        return []
    reference = table.reference_label
    if not budget and len(table.budgets) > 1:
        reference = table.reference[known[0][1].key].label
    several = len(table.seeds) > 1
    found = [f"{said}: {some(names)}{tail}." for said, names, tail in (
        (f"Clearly above {reference}", above, ""), (f"Clearly below {reference}", below, ""),
        ("Different for these seeds, not clear for others" if several else
         "Different for this one seed, which says nothing of others", weak, ""),
        (f"Not told apart from {reference}", level, _finds(finds))) if names]
    return [f"At {budget}. {' '.join(found)}"] if budget else found


def _finds(points: Sequence[float]) -> str:
    """What the experiment would have found between rows that it did not tell apart."""
    if not points:
        return ""
    low, high = numbers.percent(min(points)), numbers.percent(max(points))
    size = f"{low} points" if low == high else f"{low} to {high} points, depending on the row,"
    return f"; true differences of {size} would be found in 80 of 100 such experiments"


def _cost(table: StudyTable, scored: dict[str, float]) -> list[str]:
    """What a run of the reference, of the highest row, and of the dearest row takes."""
    times = {key: plain.median(record.timings.total for record in table.records[key] if record.scores)
             for key in scored}
    lines = {line.key: line for line in table.lines}
    best = max(scored, key=lambda key: scored[key])
    dearest = max(times, key=lambda key: times[key])
    anchor = table.reference[best].key
    shown = [key for key in dict.fromkeys((anchor, best, dearest)) if key in times]
    if not any(times[key] for key in shown):
        return []
    said = [f"{lines[key].label}: {numbers.seconds(times[key])}" for key in shown]
    tail = f" (the longest of {len(times)} rows)" if dearest == shown[-1] and len(times) > 1 else ""
    return [f"Run time. {'; '.join(said)}{tail}."]


def some(names: Sequence[str]) -> str:
    """`a, b and c`; a long list ends with how many more there are."""
    if len(names) <= LISTED:
        return numbers.listing(list(names))
    return numbers.listing([*names[:LISTED - 1], f"{len(names) - LISTED + 1} more"])
