"""Study tables as sheets: the measured scores, the differences to the reference, and what they cost."""

from __future__ import annotations

import statistics as plain
from collections.abc import Callable, Iterable

from reports import numbers
from reports.sheets import Entry, Mark, Number, Sheet, entry
from reports.tables import AVERAGE, FATES, Line, StudyTable, Value
from suite.records import Record
from suite.statistics import Difference

MAJORITY = "Majority class"
_WORDS = {"missing": "not run yet", "failed": "failed", "skipped": "skipped", "diverged": "diverged"}


def measured(table: StudyTable) -> Sheet:
    """Mean ± standard deviation in percent, with what is trained, and the majority class where there is one."""
    header = ["Row", "Trained", "Share", *(table.title_of(c) for c in table.column_ids)]
    rows: list[tuple[Entry, ...]] = []
    data: list[dict[str, Number]] = []
    if any(column.majority is not None for column in table.columns):
        rows.append(_majority_row(table))
        data += [{"row": "majority", "label": MAJORITY, "column": c.task, "mean_percent": 100 * c.majority}
                 for c in table.columns if c.majority is not None]
    for line in table.lines:
        name = entry(line.label, *(["reference"] if table.is_reference(line) else []))
        cells = [value_entry(table.values[line.key, c], c == AVERAGE) for c in table.column_ids]
        rows.append((name, *_size_entries(table, line), *cells))
        data += [_value_data(table, line, c) for c in table.column_ids]
    spread = "± is the standard deviation over seeds" if len(table.seeds) > 1 else "one seed: no spread is known"
    notes = [f"Percent; {spread}. Bold: the highest of its column."]
    if any(column.majority is not None for column in table.columns):
        notes.append("Majority class: the score of always answering the most frequent label of the test items.")
    if any(v.fates.get("diverged") and v.summary for v in table.values.values()):
        notes.append("Diverged runs count with the score that they ended with.")
    return Sheet(f"{table.id}-measured", table.title, tuple(header), tuple(rows), tuple(data), tuple(notes))


def differences(table: StudyTable) -> Sheet:
    """Every line minus its reference, with paired 95 % intervals, in percentage points."""
    reference = table.reference_label
    header = ("Row", *(table.title_of(c) for c in table.column_ids))
    rows, data = [], []
    for line in table.lines:
        if table.is_reference(line):
            continue
        cells = [difference_entry(table.differences.get((line.key, c))) for c in table.column_ids]
        rows.append((Entry(line.label), *cells))
        data += [_difference_data(table, line, c) for c in table.column_ids]
    notes = ("Percentage points, with the 95 % interval of a bootstrap over test items, paired by item and seed. It "
             "says what other test items would give for these seeds, not what other seeds would give.",
             "Bold: the interval excludes zero and every one of at least two seeds points the same way.")
    return Sheet(f"{table.id}-difference", f"Difference to {reference}", header, tuple(rows), tuple(data), notes)


def costs(table: StudyTable) -> Sheet:
    """Wall-clock seconds by phase, speed, padding and memory of every line: medians over its runs."""
    header = ("Row", "Runs", "Load", "Prepare", "Train", "Evaluate", "Save", "Total", "Tokens/s", "Padding",
              "Peak memory", "Device memory", "Adapter file")
    rows, data = [], []
    for line in table.lines:
        done = [r for r in table.records[line.key] if r.scores]
        cost = _costs(done)
        data.append({"row": line.row, "label": line.label, "rank": line.rank, "runs": len(done), **cost})
        rows.append((Entry(line.label), entry(str(len(done)) if done else numbers.DASH, *_absent(not done)),
                     *(_cost_entry(cost, key, write) for key, write in _COSTS)))
    notes = ["Phases are medians over the line's runs, per run; a run in a pack is charged its share. Peak memory is the "
             "highest of any run, for the whole process, base included."]
    if any(r.prepare.get("ranks") for found in table.records.values() for r in found):
        notes.append("Prepare holds the gradient estimate only in the run that made it; later runs read the cached "
                     "one. The longest prepare of a line is in the CSV file.")
    return Sheet(f"{table.id}-cost", "Time, speed and memory", header, tuple(rows), tuple(data), tuple(notes))


def value_entry(value: Value, is_average: bool = False) -> Entry:
    """A measured cell: the number, or the word for why there is none."""
    if value.summary is None:
        return _no_number(value, is_average)
    summary = value.summary
    text = numbers.percent(summary.mean)
    if summary.sd is not None:
        text += f" ± {numbers.percent(summary.sd)}"
    title = f"{numbers.several(summary.seeds, 'seed')}"
    if summary.items:
        title += f", {numbers.several(summary.items, 'item')}"
    if summary.interval is not None:
        title += f"; 95 % interval {numbers.interval(summary.interval, sign=False)} ({summary.basis})"
    wrong = [f"{value.fates[f]} of {value.planned} {_WORDS[f]}" for f in FATES[1:] if value.fates.get(f)]
    marks: list[Mark] = (["best"] if value.best else []) + (["warn"] if wrong else [])  # type: ignore[assignment]
    return entry(text, *marks, note="" if value.complete else ", ".join(wrong), title=title)


def difference_entry(delta: Difference | None) -> Entry:
    """A difference with its interval."""
    if delta is None:
        return entry(numbers.DASH, "missing", title="one of the two has no result")
    text = numbers.signed(delta.mean)
    if delta.interval is None:
        return entry(text, "faded", note="no interval", title="no predictions to resample")
    title = f"{numbers.several(delta.items, 'item')}; by seed: {', '.join(map(numbers.signed, delta.per_seed))}"
    if delta.identical:
        return entry(text, "faded", note="same answers", title=title)
    return entry(text, *(["clear"] if delta.clear else []), note=numbers.interval(delta.interval), title=title)


def _no_number(value: Value, is_average: bool) -> Entry:
    counts = ", ".join(f"{value.fates[f]} of {value.planned} {_WORDS.get(f, f)}" for f in FATES if value.fates.get(f))
    if is_average:
        return entry(numbers.DASH, "missing", title=f"an average needs every task: {counts}")
    if value.state == "missing":
        return entry(numbers.DASH, "missing", title="not run yet" if value.planned else "not planned")
    mark: Mark = "skipped" if value.state == "skipped" else "failed"
    return entry(value.state, mark, title=counts)


def _majority_row(table: StudyTable) -> tuple[Entry, ...]:
    rates = [column.majority for column in table.columns]
    cells = [entry(numbers.percent(rate) if rate is not None else numbers.DASH, "faded") for rate in rates]
    if table.has_average:
        known = [rate for rate in rates if rate is not None]
        mean = numbers.percent(plain.fmean(known)) if len(known) == len(rates) else numbers.DASH
        cells.append(entry(mean, "faded"))
    return (entry(MAJORITY, "faded"), entry("0", "faded"), entry(numbers.DASH, "faded"), *cells)


def _size_entries(table: StudyTable, line: Line) -> tuple[Entry, Entry]:
    size = table.sizes.get(line.key)
    if size is None:
        return entry(numbers.DASH, "missing", title="not run yet"), entry(numbers.DASH, "missing")
    exact = numbers.count(size.low)
    if size.low == size.high:
        return entry(exact), entry(numbers.share(size.share_low))
    title = f"{exact} to {numbers.count(size.high)}, by task"
    return (entry(f"{numbers.short(size.low)} to {numbers.short(size.high)}", title=title),
            entry(numbers.share((size.share_low + size.share_high) / 2), title=title))


def _value_data(table: StudyTable, line: Line, column: str) -> dict[str, Number]:
    value, size = table.values[line.key, column], table.sizes.get(line.key)
    s = value.summary
    scaled: Callable[[float | None], float | None] = lambda x: None if x is None else 100 * x  # noqa: E731
    return {
        "row": line.row, "label": line.label, "rank": line.rank, "column": column,
        "mean_percent": scaled(s.mean if s else None), "sd_percent": scaled(s.sd if s else None),
        "low_percent": scaled(s.interval.low if s and s.interval else None),
        "high_percent": scaled(s.interval.high if s and s.interval else None),
        "interval": s.basis if s else None, "seeds": s.seeds if s else 0, "items": s.items if s else None,
        "state": value.state, "planned": value.planned, **{f: value.fates.get(f, 0) for f in FATES},
        "trained_low": size.low if size else None, "trained_high": size.high if size else None,
        "share": (size.share_low + size.share_high) / 2 if size else None,
    }


def _difference_data(table: StudyTable, line: Line, column: str) -> dict[str, Number]:
    delta = table.differences.get((line.key, column))
    found = delta.interval if delta else None
    return {
        "row": line.row, "label": line.label, "rank": line.rank, "column": column,
        "reference": table.reference[line.key].key,
        "difference_points": 100 * delta.mean if delta else None,
        "low_points": 100 * found.low if found else None, "high_points": 100 * found.high if found else None,
        "seeds": len(delta.per_seed) if delta else 0, "items": delta.items if delta else None,
        "clear": delta.clear if delta else None,
        "by_seed_points": " ".join(f"{100 * x:.4f}" for x in delta.per_seed) if delta else None,
    }


_COSTS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("load_s", numbers.seconds), ("prepare_s", numbers.seconds), ("train_s", numbers.seconds),
    ("evaluate_s", numbers.seconds), ("save_s", numbers.seconds), ("total_s", numbers.seconds),
    ("tokens_per_second", numbers.count), ("padding", numbers.share), ("resident_bytes", numbers.size),
    ("device_bytes", numbers.size), ("adapter_bytes", numbers.size),
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
        "device_bytes": max((m.device for m in memory if m.device is not None), default=None),
        "adapter_bytes": _median(r.adapter_bytes for r in done if r.adapter_bytes is not None),
    }


def _cost_entry(cost: dict[str, Number], key: str, write: Callable[[float], str]) -> Entry:
    value = cost[key]
    return entry(write(float(value))) if value is not None else entry(numbers.DASH, "faded")


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return plain.median(found) if found else None


def _absent(absent: bool) -> list[Mark]:
    return ["missing"] if absent else []
