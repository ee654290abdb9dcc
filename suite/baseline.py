"""Baselines: stored snapshots of our own runs, and the comparison of today's with them.

A baseline is a folder `results/measured/<study>-<scale>-<name>/`, named by the class of machine it was made on:

    records.jsonl      one record a line, in the order of the study
    details.jsonl      per run: losses of four windows, gradient norms, right or wrong of every item (`drift.Trail`)
    items.json         ids and expected answers of the scored items, which runs share
    spare.jsonl        records of two further seeds, kept for a second look at what fails (only if asked for)
    accepted.jsonl     when, why and from which commit it was accepted, with old and new means; appended, never rewritten
    report.md, figures/, tables/

`accept` is the one way to write or replace one. `compare` says what has changed since; `confirm` takes the second look.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.console import Console

from suite import drift, history, jsonlines, paths, records, snapshot, statistics
from suite.drift import Items, Key, Run, Trail
from suite.errors import UserError, one_of
from suite.records import Record, Score
from suite.study import Cell, Scale, Study, select
from suite.study import cells as planned
from suite.verdicts import Finding

#: Seeds that no study uses, kept for a second look.
SPARE_SEEDS = (9001, 9002)
STATISTICAL = ("training", "evaluation", "pooled")


class Change(BaseModel):
    """Means of a row on a task in the baseline that was replaced (None: there was none) and in the new one, in 0..1;
    `low` and `high` bound the new mean's 95 % interval."""

    model_config = ConfigDict(extra="forbid")

    table: str
    row: str
    column: str
    old: float | None
    new: float
    seeds: int
    low: float | None
    high: float | None


class Acceptance(BaseModel):
    """One line of the log. `commit`: of the code that made the runs; `dirty` when its files were changed."""

    model_config = ConfigDict(extra="forbid")

    time: str
    reason: str
    commit: str | None
    dirty: bool | None
    runs: int
    changes: list[Change]


@dataclass(frozen=True)
class Baseline:
    """A stored baseline. `spare` holds the further seeds' runs, under their own keys."""

    study: str
    scale: str
    name: str
    runs: Mapping[Key, Run]
    spare: Mapping[Key, Run]
    log: Sequence[Acceptance]


def named(study: Study, scale: str, cell: Cell) -> str:
    """What the row of a cell is called in findings: its id, with budget and learning rate where the table has several."""
    edition = study.scales.get(scale)  # type: ignore[call-overload]
    table = edition.tables.get(cell.table) if edition else None
    name = cell.row
    if table is not None and cell.spec.budget is not None and len(table.budgets) > 1:
        name += f" {cell.spec.budget.text}"
    if table is not None and len(table.rates(cell.row)) > 1:
        name += f" rate={cell.spec.recipe.learning_rate:g}"
    return name


def accept(study: Study, scale: Scale, name: str, reason: str, spare: bool = False, console: Console | None = None) -> Path:
    """Write or replace a baseline from the study's records, and log why; returns its folder.

    `spare`: keep two further seeds of every run as well, run here where they have no record.
    Raises `UserError` for a name or reason that is none, and when a run of the study has no record or failed.
    """
    if not name or not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise UserError(f"--name {name!r}: name the class of machine in one word of letters, digits, - and _")
    if len(reason.split()) < 2:
        raise UserError(f"--reason {reason!r}: say in a few words why these numbers are right; the log keeps it")
    cells = planned(study, scale)
    known = records.load_many(cell.spec.id for cell in cells)
    further: list[Cell] = []
    if spare:
        further = planned(_spare(study, scale), scale)
        _run(study, scale, further, console)
    target = paths.measured() / f"{study.id}-{scale}-{name}"
    before = read(target) if (target / "details.jsonl").exists() else None
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        snapshot.write(study, scale, cells, known, draft)
        runs = drift.runs(cells, known)
        extra = drift.runs(further, records.load_many(cell.spec.id for cell in further))
        if spare:
            lines = {run.record.id: run.record.model_dump_json() for run in extra.values()}
            (draft / "spare.jsonl").write_text("\n".join(lines.values()) + "\n", encoding="utf-8")
        _write_details(draft, [*runs.values(), *extra.values()])
        log = [*(before.log if before else ()), _acceptance(study, scale, reason, before, runs)]
        (draft / "accepted.jsonl").write_text("".join(line.model_dump_json() + "\n" for line in log), encoding="utf-8")
        draft.chmod(0o755)
        if target.exists():
            os.replace(target, draft.with_name(f"{draft.name}-before"))
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(draft.with_name(f"{draft.name}-before"), ignore_errors=True)
    return target


def _write_details(folder: Path, runs: Sequence[Run]) -> None:
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for run in runs:
        places[run.record.id].append((run.cell.table, run.cell.row))
    trails = {run.record.id: run.trail.model_copy(update={"places": tuple(places[run.record.id])}) for run in runs}
    (folder / "details.jsonl").write_text("".join(trail.model_dump_json() + "\n" for trail in trails.values()),
                                          encoding="utf-8")
    items = {run.items.digest: run.items.model_dump() for run in runs if run.items}
    (folder / "items.json").write_text(json.dumps(items, ensure_ascii=False, separators=(",", ":")) + "\n",
                                       encoding="utf-8")


def _acceptance(study: Study, scale: str, reason: str, before: Baseline | None, runs: Mapping[Key, Run]) -> Acceptance:
    old, new = (_scores(study, scale, side) for side in (before.runs if before else {}, runs))
    changes = []
    for (table, row, column), scores in new.items():
        found = statistics.summarise([score.value for score in scores], scores[0].items)
        then = [score.value for score in old.get((table, row, column), ())]
        if found is not None:
            changes.append(Change(table=table, row=row, column=column, old=sum(then) / len(then) if then else None,
                                  new=found.mean, seeds=found.seeds, low=found.interval.low if found.interval else None,
                                  high=found.interval.high if found.interval else None))
    made = [run.record.environment for run in runs.values()]
    commits = list(dict.fromkeys(one.get("commit") for one in made))
    return Acceptance(time=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason,
                      commit=commits[0] if len(commits) == 1 else ", ".join(str(one) for one in commits),
                      dirty=any(one.get("dirty") for one in made), runs=len({run.record.id for run in runs.values()}),
                      changes=changes)


def _scores(study: Study, scale: str, runs: Mapping[Key, Run]) -> dict[tuple[str, str, str], list[Score]]:
    found: dict[tuple[str, str, str], list[Score]] = defaultdict(list)
    for run in runs.values():
        if run.record.score is not None:
            found[run.cell.table, named(study, scale, run.cell), run.cell.spec.task.id].append(run.record.score)
    return found


def names(study: str, scale: str) -> list[str]:
    """The baselines of a study at a scale."""
    start = f"{study}-{scale}-"
    return sorted(folder.name.removeprefix(start) for folder in paths.measured().glob(f"{start}*")
                  if (folder / "details.jsonl").exists())


def every() -> list[Path]:
    """The folders of all baselines."""
    return sorted(file.parent for file in paths.measured().glob("*/details.jsonl"))


def find(study: str, scale: str, name: str | None = None, record: Record | None = None) -> Baseline:
    """The baseline of that name; without one, the only one, or the only one made on the machine that made `record`.

    Raises `UserError` when there is none, or several fit.
    """
    there = names(study, scale)
    if name is not None and name not in there:
        raise UserError(f"--name {name}: study {study} at {scale} has baseline {one_of(there)}" if there else
                        _none(study, scale))
    if name is None and not there:
        raise UserError(_none(study, scale))
    found = [read(paths.measured() / f"{study}-{scale}-{one}") for one in ([name] if name else there)]
    if len(found) > 1 and record is not None:
        here = [one for one in found if any(drift.machine(run.record) == drift.machine(record) for run in one.runs.values())]
        found = here or found
    if len(found) > 1:
        raise UserError(f"study {study} at {scale} has several baselines: name one, {one_of([one.name for one in found])}")
    return found[0]


def _none(study: str, scale: str) -> str:
    return (f"study {study} has no baseline at {scale}; `suite baseline accept {study} --scale {scale} --name MACHINE "
            "--reason WHY` makes one of the runs that are there")


def read(folder: Path) -> Baseline:
    """A baseline from its folder. Raises `UserError` naming the file that is not what it should be."""
    kept = _lines(folder / "records.jsonl", Record)
    spare = _lines(folder / "spare.jsonl", Record) if (folder / "spare.jsonl").exists() else []
    trails = {trail.run: trail for trail in _lines(folder / "details.jsonl", Trail)}
    try:
        content = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        items = {key: Items.model_validate(value) for key, value in content.items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'items.json'}: {str(error).splitlines()[0]}; bring it back from git") from None

    def runs(some: Iterable[Record]) -> dict[Key, Run]:
        found = {}
        for record in some:
            if record.id not in trails:
                raise UserError(f"{folder / 'details.jsonl'}: there is no line for run {record.id}; bring it back from git")
            trail = trails[record.id]
            for table, row in trail.places:
                run = Run(Cell(table, row, record.spec), record, trail, items.get(trail.items))
                found[run.key] = run
        return found

    log = _lines(folder / "accepted.jsonl", Acceptance)
    scale = next((scale for scale in ("desk", "bench", "paper") if f"-{scale}-" in folder.name), "desk")
    study, _, name = folder.name.partition(f"-{scale}-")
    return Baseline(study, scale, name, runs(kept), runs(spare), log)


def _lines(file: Path, kind: type[Any]) -> list[Any]:
    remedy = "bring it back from git"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {remedy}") from None
    return jsonlines.parse(text, kind, file, remedy)


def compare(study: Study, scale: Scale, cells: Sequence[Cell], known: Mapping[str, Record], only: Sequence[str] = (),
            name: str | None = None) -> list[Finding]:
    """What has changed since the baseline: findings of every gate.

    Args:
        cells: what is planned now, already filtered by `only`; `known`: its records, by run id.
        only: the filters that the baseline is to be seen through as well (`suite.study.select`).
        name: which baseline (None: the only one, or that of this machine).

    Raises `UserError` when there is no such baseline or it is damaged.
    """
    return _judge(study, scale, find(study.id, scale, name, next(iter(known.values()), None)), cells, known, only)


def _judge(study: Study, scale: str, against: Baseline, cells: Sequence[Cell], known: Mapping[str, Record],
           only: Sequence[str], spare: bool = False) -> list[Finding]:
    stored = {**against.runs, **(against.spare if spare else {})}
    chosen = {(cell.table, cell.row, cell.spec.id) for cell in select([run.cell for run in stored.values()], only)}
    before = {key: run for key, run in stored.items() if (run.cell.table, run.cell.row, run.cell.spec.id) in chosen}
    margins = {table: one.margins for table, one in study.edition(scale).tables.items()}
    first = next(iter(known.values()), None)
    spreads = history.spreads(history.load(study.id, scale), history.kind(first), against.name) if first else {}
    return drift.judge(before, drift.runs(cells, known), margins, lambda cell: named(study, scale, cell), spreads,
                       confirmed=spare)


def check(study: Study, scale: Scale, cells: Sequence[Cell], known: Mapping[str, Record], only: Sequence[str] = (),
          name: str | None = None, again: bool = False, console: Console | None = None) -> list[Finding]:
    """What `suite regress --against baseline` does: `compare`, with `again` a second look at what failed (`confirm`), and,
    where nothing was left out by `only`, a line in the history. Raises what these raise.
    """
    found = compare(study, scale, cells, known, only, name)
    if again:
        found = confirm(study, scale, cells, known, found, name, console)
    if not only:
        note(study, scale, cells, known, found, name)
    return found


def note(study: Study, scale: Scale, cells: Sequence[Cell], known: Mapping[str, Record], findings: Sequence[Finding],
         name: str | None = None) -> None:
    """Append this comparison to the study's history."""
    against = find(study.id, scale, name, next(iter(known.values()), None)).name
    runs = drift.runs(cells, known).values()
    history.add(study.id, scale, history.night(runs, lambda run: named(study, scale, run.cell), findings, against))


def confirm(study: Study, scale: Scale, cells: Sequence[Cell], known: Mapping[str, Record], findings: Sequence[Finding],
            name: str | None = None, console: Console | None = None) -> list[Finding]:
    """A second look at what failed a statistical gate: the rows and tasks that are red there are run with two fresh seeds,
    and judged anew together with them. What is red by the presence, setup, speed or memory gate stays as it is.

    A red common shift is looked at again over all rows of its task. Raises `UserError` when the baseline keeps no runs of
    the fresh seeds.
    """
    failed = [finding for finding in findings if finding.red and finding.gate in STATISTICAL]
    if not failed:
        return list(findings)
    against = find(study.id, scale, name, next(iter(known.values()), None))
    if not against.spare:
        raise UserError(f"baseline {study.id}-{scale}-{against.name} keeps no fresh seeds to confirm with; accept it with "
                        "--spare next time")
    places = {(finding.table, finding.row, finding.column) for finding in failed}

    def asked(cell: Cell) -> bool:
        rows = (named(study, scale, cell), "all")
        return any((cell.table, row, cell.spec.task.id) in places for row in rows)

    fresh = [cell for cell in planned(_spare(study, scale), scale) if asked(cell)]
    stored = {run.record.id: run.record.started for run in against.spare.values()}
    for run, record in records.each(dict.fromkeys(cell.spec.id for cell in fresh)):
        if stored.get(run) == record.started:  # the baseline's own, made here: it would be held against itself
            shutil.rmtree(record.folder)
    _run(study, scale, fresh, console)
    again = [cell for cell in cells if asked(cell)]
    both = dict(known) | records.load_many(cell.spec.id for cell in fresh)
    limited = Baseline(against.study, against.scale, against.name,
                       {key: run for key, run in against.runs.items() if asked(run.cell)},
                       {key: run for key, run in against.spare.items() if asked(run.cell)}, against.log)
    second = {_place(finding): finding
              for finding in _judge(study, scale, limited, [*again, *fresh], both, (), spare=True)
              if finding.gate in STATISTICAL}
    return [second.get(_place(finding), finding) if finding in failed else finding for finding in findings]


def _place(finding: Finding) -> tuple[str, str, str, str, Any]:
    return finding.gate, finding.table, finding.row, finding.column, finding.numbers.get("measure")


def _spare(study: Study, scale: Scale) -> Study:
    """The study with the seeds that are kept for a second look."""
    edition = study.edition(scale)
    tables = {name: table.model_copy(update={"seeds": SPARE_SEEDS}) for name, table in edition.tables.items()}
    return study.model_copy(update={"scales": {**study.scales, scale: edition.model_copy(update={"tables": tables})}})


def _run(study: Study, scale: Scale, cells: Sequence[Cell], console: Console | None) -> None:
    from suite import sweep

    result = sweep.run(study, scale, cells, None, None, console or Console(stderr=True, highlight=False))
    if result.left or result.stopped:
        raise UserError(result.stopped or f"{result.left} runs of fresh seeds failed or were stopped; nothing was changed")


def summary() -> tuple[list[str], list[list[Any]]]:
    """All baselines as a table: what they hold and when they were accepted."""
    rows: list[list[Any]] = []
    for folder in every():
        one = read(folder)
        last = one.log[-1]
        size = sum(file.stat().st_size for file in folder.glob("*.json*")) / 2**20
        rows.append([one.study, one.scale, one.name, last.runs, "yes" if one.spare else "no", len(one.log), last.time,
                     (last.commit or "")[:12], f"{size:.2f}", last.reason])
    return ["study", "scale", "name", "runs", "fresh seeds", "accepted", "last", "commit", "MB", "reason"], rows


def shown(one: Baseline) -> tuple[list[str], list[list[Any]]]:
    """A baseline's means by row and task, beside those that it replaced."""
    rows = [[change.table, change.row, change.column, round(100 * change.new, 2), change.seeds,
             "—" if change.low is None or change.high is None else f"{100 * change.low:.1f} to {100 * change.high:.1f}",
             "—" if change.old is None else round(100 * change.old, 2)] for change in one.log[-1].changes]
    return ["table", "row", "task", "mean %", "seeds", "95 % interval", "before"], rows


__all__ = ["Acceptance", "Baseline", "Change", "accept", "check", "compare", "confirm", "every", "find", "named", "names",
           "note", "read", "shown", "summary"]
