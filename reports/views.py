"""Study tables as sheets: the measured scores, the differences to the reference, and what they cost."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable, Sequence

from reports import links, numbers
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import AVERAGE, FATES, Fate, Line, StudyTable, Value
from suite.records import Record
from suite.statistics import Difference

MAJORITY = "Majority class"
FINDS = "Finds: the smallest true difference that would be found in 80 of 100 such experiments, tested alone at 5 %."
_WORDS = {"missing": "not run yet", "failed": "failed", "skipped": "skipped", "diverged": "diverged"}


def measured(table: StudyTable) -> Sheet:
    """The table to look at first: scores, what they are above the reference, and what a run costs."""
    compared = len(table.lines) > 1
    header = ["Row", "Trained parameters", *map(table.title_of, table.column_ids)]
    header += [*([delta_title(table)] if compared else []), "Run time", "Peak memory"]
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    if any(column.majority is not None for column in table.columns):
        empty = (Entry(""),) * (3 if compared else 2)
        rows.append((entry(MAJORITY, "faded"), Entry(""), *_majority_entries(table), *empty))
        data += [{"row": "majority", "label": MAJORITY, "column": c.id, "mean_percent": 100 * c.majority}
                 for c in table.columns if c.majority is not None]
    blocks = {len(rows)} - {0}
    for above, line in zip((None, *table.lines), table.lines, strict=False):
        if above is not None and above.budget != line.budget:
            blocks.add(len(rows))
        name = entry(line.label, *_if(table.is_reference(line), "reference"), link=links.method(line.method))
        scores = [value_entry(table.values[line.key, c], c in table.averages) for c in table.column_ids]
        delta = [_headline_entry(table, line)] if compared else []
        rows.append((name, _size_entry(table, line), *scores, *delta, *_price(table, line)))
        data += [_value_data(table, line, c) for c in table.column_ids]
    last = len(header)
    return Sheet(f"{table.id}-measured", table.title, tuple(header), tuple(rows), tuple(data),
                 tuple(_measured_notes(table, compared)), aside=frozenset({last - 2, last - 1}),
                 blocks=frozenset(blocks))


def differences(table: StudyTable) -> Sheet:
    """Every line minus its reference, in percentage points: paired 95 % intervals, and what could have been found."""
    reference = table.reference_label
    header = ("Row", *map(table.title_of, table.column_ids))
    rows, data = [], []
    for line in table.lines:
        if table.is_reference(line):
            continue
        cells = [difference_entry(table.differences.get((line.key, c))) for c in table.column_ids]
        rows.append((Entry(line.label, link=links.method(line.method)), *cells))
        data += [_difference_data(table, line, c) for c in table.column_ids]
    notes = [f"Percentage points, paired by item and seed. {interval_words(table)} {FINDS}", bold_words(table)]
    return Sheet(f"{table.id}-difference", f"Difference to {reference}", header, tuple(rows), tuple(data),
                 tuple(notes))


def costs(table: StudyTable) -> Sheet:
    """Wall-clock seconds by phase, speed, padding and memory of every line: medians over its runs."""
    header = ("Row", "Runs", "Load", "Prepare", "Train", "Evaluate", "Save", "Total", "Tokens/s", "Padding",
              "Memory", "Training", "Device memory", "Adapter file")
    rows, data = [], []
    for line in table.lines:
        done = _scored(table, line)
        cost = _costs(done)
        data.append({**_place(line), "runs": len(done), **cost})
        rows.append((Entry(line.label), entry(str(len(done))) if done else _nothing(),
                     *(_cost_entry(cost, key, write) for key, write in _COSTS)))
    notes = ["Medians over a row's runs; a run that shared a pack is charged its share of the pack's time. "
             "Memory is the highest of any run, for the whole process, base included: over everything it did, and while it "
             "trained. A warm process also holds what earlier runs left."]
    estimates = [record.timings.prepare for found in table.records.values() for record in found
                 if record.prepare.get("ranks")]
    if estimates:
        notes.append(f"Gradients are estimated once, in up to {numbers.seconds(max(estimates))}, and read "
                     "again by later runs: a median may leave that out.")
    shown = [i for i in range(len(header)) if i < 2 or any(row[i].text != numbers.DASH for row in rows)]
    return Sheet(f"{table.id}-cost", "Time, speed and memory", tuple(header[i] for i in shown),
                 tuple(tuple(row[i] for i in shown) for row in rows), tuple(data), tuple(notes))


def interval_words(table: StudyTable) -> str:
    """What the intervals of a table's differences take for noise."""
    if len(table.seeds) < 2:
        return "In brackets: the 95 % interval over other test items, for this one seed."
    known = [delta for delta in table.differences.values() if delta.error is not None]
    alone = " (over items alone where the two have one seed in common)" if not all(x.over_seeds for x in known) else ""
    return f"In brackets: the 95 % interval over other seeds and other test items{alone}."


def bold_words(table: StudyTable) -> str:
    """What a bold difference means in a table."""
    if len(table.seeds) < 2:
        return "None is bold: one seed makes no claim about a method."
    tested = sum(delta.p is not None for delta in table.differences.values())
    few = (" Two seeds know their own noise poorly: where that is large, 1 in 10 such tests may be wrong, not 1 in 20."
           if len(table.seeds) == 2 else "")
    return ("Bold: not zero at the 5 % level over seeds and items, adjusted for the table's "
            f"{numbers.several(tested, 'difference')} (Benjamini and Hochberg).{few}")


def delta_title(table: StudyTable) -> str:
    """What heads the column of headline differences."""
    if table.headline == AVERAGE or len(table.columns) == 1:
        return f"Δ {table.reference_label}"
    return f"Δ {table.reference_label}, {table.title_of(table.headline)}"


def value_entry(value: Value, is_average: bool = False) -> Entry:
    """A measured cell: the number, or the word for why there is none."""
    if value.summary is None:
        return _no_number(value, is_average)
    summary = value.summary
    text = numbers.percent(summary.mean)
    if summary.sd is not None:
        text += f" ± {numbers.percent(summary.sd)}"
    title = numbers.several(summary.seeds, "seed")
    if summary.items:
        title += f", {numbers.several(summary.items, 'item')}"
    if summary.interval is not None:
        title += f"; 95 % interval {numbers.interval(summary.interval, sign=False)} ({summary.basis})"
    note = _counts(value, FATES[1:])
    return entry(text, *_if(value.top, "best"), *_if(bool(note), "warn"), note=note, title=title)


def difference_entry(delta: Difference | None) -> Entry:
    """A difference with its interval, and what could have been found."""
    if delta is None:
        return _nothing("the two have no seed in common yet")
    text = numbers.signed(delta.mean)
    title = f"by seed: {', '.join(map(numbers.signed, delta.per_seed))}"
    if delta.interval is None or delta.detectable is None:
        return entry(text, "faded", note="no interval", title=f"no predictions to pair; {title}")
    title = f"{numbers.several(delta.items, 'item')}; {title}"
    if delta.identical:
        return entry(text, "faded", note="same answers", title=title)
    p, q, over = ((delta.p, delta.q, "seeds and items") if delta.p is not None else
                  (delta.p_items, delta.q_items, "items for this seed"))
    if p is not None:
        title += f"; p {numbers.chance(p)} over {over}"
    if q is not None:
        title += f", adjusted {numbers.chance(q)}"
    if delta.effect is not None:
        title += f"; won {numbers.percent(delta.effect, 0)} % of the answers that differ"
    found = f"{numbers.interval(delta.interval)}, finds\u00a0{numbers.percent(delta.detectable)}"
    return entry(text, *_if(delta.clear, "clear"), note=found, title=title)


def _no_number(value: Value, is_average: bool) -> Entry:
    counts = _counts(value, FATES)
    if is_average:
        return _nothing(f"an average needs every task: {counts}")
    if value.state == "missing":
        return _nothing("not run yet" if value.planned else "not planned")
    return entry(value.state, "skipped" if value.state == "skipped" else "failed", title=counts)


def _counts(value: Value, of: Sequence[Fate]) -> str:
    """`1 of 2 not run yet`, `1 diverged and 1 failed of 6`."""
    found = [(value.fates[fate], _WORDS.get(fate, fate)) for fate in of if value.fates.get(fate)]
    if len(found) == 1:
        return f"{found[0][0]} of {value.planned} {found[0][1]}"
    return f"{numbers.listing([f'{n} {word}' for n, word in found])} of {value.planned}" if found else ""


def _nothing(why: str = "not run yet") -> Entry:
    """A cell without a number."""
    return entry(numbers.DASH, "missing", title=why)


def _headline_entry(table: StudyTable, line: Line) -> Entry:
    if table.is_reference(line):
        return entry("reference", "faded")
    return difference_entry(table.differences.get((line.key, table.headline)))


def _measured_notes(table: StudyTable, compared: bool) -> list[str]:
    metrics = {column.metric for column in table.columns if column.metric}
    score = metrics.pop().replace("_", " ").capitalize() if len(metrics) == 1 else "Score"
    spread = (f"mean ± standard deviation over {len(table.seeds)} seeds" if len(table.seeds) > 1
              else "one seed, so the spread over seeds is unknown")
    over = "" if len(table.seeds) > 1 else " for this seed"
    notes = [f"{score} in percent: {spread}. Bold: the highest of its column and all that may be as good{over}; the "
             "truly best row is among them in 95 of 100 tables (paired differences to the highest, adjusted after Holm)."]
    if compared:
        same = " at the same budget (the last, for rows without one)" if len(table.budgets) > 1 else ""
        notes.append(f"{delta_title(table)}: points above {table.reference_label}{same}. {interval_words(table)} "
                     f"{bold_words(table)} {FINDS}")
    if any(column.majority is not None for column in table.columns):
        notes.append("Majority class: always answering the most frequent label of the test items.")
    if any(value.fates.get("diverged") and value.summary for value in table.values.values()):
        notes.append("Diverged runs count with the score that they ended with.")
    return notes


def _majority_entries(table: StudyTable) -> list[Entry]:
    rates = [column.majority for column in table.columns]
    if table.has_average:
        known = [rate for rate in rates if rate is not None]
        rates.append(plain.fmean(known) if len(known) == len(rates) else None)
    return [entry(numbers.percent(rate) if rate is not None else numbers.DASH, "faded") for rate in rates]


def _size_entry(table: StudyTable, line: Line) -> Entry:
    """Trained scalars, and their share of the base."""
    size = table.sizes.get(line.key)
    if size is None:
        return _nothing()
    if size.low == size.high:
        return Entry(numbers.count(size.low), aside=numbers.share(size.share_low))
    return Entry(f"{numbers.short(size.low)} to {numbers.short(size.high)}",
                 aside=numbers.share((size.share_low + size.share_high) / 2),
                 title=f"{numbers.count(size.low)} to {numbers.count(size.high)}, by task")


def price(table: StudyTable, line: Line) -> tuple[float | None, float | None]:
    """Median seconds of a line's runs and the highest memory in bytes: the device's where there is one."""
    seconds, memory = (_costs(_scored(table, line))[key] for key in _price_keys(table, line))
    return (None if seconds is None else float(seconds)), (None if memory is None else float(memory))


def _price(table: StudyTable, line: Line) -> tuple[Entry, Entry]:
    cost = _costs(_scored(table, line))
    seconds, memory = _price_keys(table, line)
    return _cost_entry(cost, seconds, numbers.seconds), _cost_entry(cost, memory, numbers.size)


def _price_keys(table: StudyTable, line: Line) -> tuple[str, str]:
    device = any(record.memory is not None and record.memory.device is not None for record in _scored(table, line))
    return "total_s", "device_bytes" if device else "resident_bytes"


def _scored(table: StudyTable, line: Line) -> list[Record]:
    return [record for record in table.records[line.key] if record.scores]


def _place(line: Line) -> dict[str, Number]:
    return {"row": line.row, "label": line.label, "budget": line.budget, "rank": line.rank}


def _value_data(table: StudyTable, line: Line, column: str) -> dict[str, Number]:
    value, size = table.values[line.key, column], table.sizes.get(line.key)
    s = value.summary
    low, high = (s.interval.low, s.interval.high) if s and s.interval else (None, None)
    return {
        **_place(line), "column": column,
        "mean_percent": _percent(s.mean if s else None), "sd_percent": _percent(s.sd if s else None),
        "low_percent": _percent(low), "high_percent": _percent(high),
        "interval": s.basis if s else None, "seeds": s.seeds if s else 0, "items": s.items if s else None,
        "state": value.state, "top": value.top, "planned": value.planned,
        **{fate: value.fates.get(fate, 0) for fate in FATES},
        "trained_low": size.low if size else None, "trained_high": size.high if size else None,
        "share": (size.share_low + size.share_high) / 2 if size else None,
    }


def _difference_data(table: StudyTable, line: Line, column: str) -> dict[str, Number]:
    delta = table.differences.get((line.key, column))
    found = delta.interval if delta else None
    return {
        **_place(line), "column": column,
        "reference": table.reference[line.key].key,
        "difference_points": 100 * delta.mean if delta else None,
        "low_points": 100 * found.low if found else None, "high_points": 100 * found.high if found else None,
        "seeds": len(delta.per_seed) if delta else 0, "items": delta.items if delta else None,
        "over": None if delta is None or delta.error is None else "seeds and items" if delta.over_seeds else "items",
        "error_points": _percent(delta.error if delta else None), "dof": delta.dof if delta else None,
        "finds_points": _percent(delta.detectable if delta else None),
        "p": delta.p if delta else None, "q": delta.q if delta else None,
        "p_items": delta.p_items if delta else None, "q_items": delta.q_items if delta else None,
        "won_percent": _percent(delta.won if delta else None), "lost_percent": _percent(delta.lost if delta else None),
        "clear": delta.clear if delta else None,
        "by_seed_points": " ".join(f"{100 * x:.4f}" for x in delta.per_seed) if delta else None,
    }


_COSTS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("load_s", numbers.seconds), ("prepare_s", numbers.seconds), ("train_s", numbers.seconds),
    ("evaluate_s", numbers.seconds), ("save_s", numbers.seconds), ("total_s", numbers.seconds),
    ("tokens_per_second", numbers.count), ("padding", numbers.share), ("resident_bytes", numbers.size),
    ("training_bytes", numbers.size), ("device_bytes", numbers.size),
    ("adapter_bytes", numbers.size),
)


def _costs(done: list[Record]) -> dict[str, Number]:
    times = [r.timings for r in done]
    speed = [r.throughput for r in done if r.throughput is not None]
    memory = [r.memory for r in done if r.memory is not None]
    return {
        "load_s": _median(t.load for t in times), "prepare_s": _median(t.prepare for t in times),
        "train_s": _median(t.train for t in times), "evaluate_s": _median(t.evaluate for t in times),
        "save_s": _median(t.save for t in times), "total_s": _median(t.total for t in times),
        "prepare_longest_s": max((t.prepare for t in times), default=None),
        "tokens_per_second": _median(s.tokens_per_second for s in speed),
        "padding": _median(s.padding for s in speed),
        "resident_bytes": max((m.resident for m in memory), default=None),
        "training_bytes": max((m.training for m in memory if m.training is not None), default=None),
        "device_bytes": max((m.device for m in memory if m.device is not None), default=None),
        "adapter_bytes": _median(r.adapter_bytes for r in done if r.adapter_bytes is not None),
    }


def _cost_entry(cost: dict[str, Number], key: str, write: Callable[[float], str]) -> Entry:
    value = cost[key]
    if value is not None:
        return entry(write(float(value)))
    return entry(numbers.DASH, "faded") if cost["total_s"] is not None else _nothing()


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return plain.median(found) if found else None


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _if(true: bool, mark: Mark) -> list[Mark]:
    return [mark] if true else []
