"""Runs what a study lacks, from plan to records to MLflow, and says where a study stands."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from suite import calibration, executor, ledger, paths, plan, records, study, supplies, tracking
from suite.display import Display, duration
from suite.errors import UserError
from suite.faults import StorageError, storage
from suite.specs import RunSpec
from suite.study import Cell, Scale, Study

#: Bytes that must be free at the start: about what a small run leaves.
ROOM = 2**18
STATES = ("finished", "running", "failed", "diverged", "skipped", "missing")


@dataclass
class SweepResult:
    """What a call of `run` did: runs made by status, and how many were there before. `stopped` says why results could not
    be kept, when that ended it."""

    before: int
    made: dict[str, int] = field(default_factory=dict)
    left: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    stopped: str | None = None

    @property
    def failed(self) -> int:
        return self.made.get("failed", 0)

    def as_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"before": self.before, "made": self.made, "left": self.left, "seconds": round(self.seconds, 1),
                "interrupted": self.interrupted, "stopped": self.stopped}

    def sentence(self, study_id: str, scale: str, protocol: str = "paper") -> str:
        """One line for the end of the command."""
        made = sum(self.made.values())
        counts = ", ".join(f"{count} {status}" for status, count in self.made.items())
        again = f"`suite run {study_id} --scale {scale}{'' if protocol == 'paper' else f' --protocol {protocol}'}`"
        if self.stopped:
            kept = f"{self.before + made} runs are kept, {self.left} are left; then {again} goes on."
            return f"Stopped: {self.stopped}. {kept}"
        if self.interrupted:
            return f"Stopped: {self.before + made} runs are kept, {self.left} are left; {again} goes on."
        if not made:
            return f"Nothing to run: all {self.before} runs of {study_id} at {scale} are there."
        tail = f" {again} tries the failed ones again." if self.failed else ""
        return f"{made} runs in {duration(self.seconds)}: {counts}.{tail}"


def settle(found: Study, scale: Scale, console: Console) -> None:
    """Measure, once for this machine, which precision is quicker for every base of a table that leaves it open (`auto`).

    Raises `UserError` when a base or its data cannot be had.
    """
    import torch

    for name, table in found.edition(scale).tables.items():
        if table.recipe.precision == "auto" and not torch.cuda.is_available():
            specs = calibration.representatives(study.unique(study.cells(found, scale, [f"table={name}"])))
            for spec in specs[:1]:
                supplies.fetch(*supplies.names([spec]), lambda text: console.print(Text(text, style="dim")))
                speeds = calibration.compare(spec)
                console.print(Text(f"{spec.base.id} here: " + ", ".join(
                    f"{speed:,.0f} tokens/s in {way}" for way, speed in speeds.items()), style="dim"))


def run(found: Study, scale: Scale, cells: Sequence[Cell], workers: int | None, pack: int | None,
        console: Console, on: Literal["local", "ray"] = "local", ray_address: str | None = None,
        more: Callable[[], Sequence[Cell]] | None = None) -> SweepResult:
    """Run every cell that has no record, on this machine or a Ray cluster (see `ray_executor.Ray` for its address), show
    how it goes on `console`, and bring MLflow in line. `pack`: how many runs train together (None: as many as the planner
    finds best). `more`: gives all cells that follow from the records there are, those of before among them; it is asked
    when all is done that was known, until nothing new comes.

    Raises `UserError` before anything starts when the results folder cannot be written, a base or data set cannot be
    had, or there is no Ray to run on. When results can no longer be kept, the sweep ends and the result says why.
    """
    _writable()
    device, count, threads = _workers(workers)
    made = plan.make(found, scale, cells, pack_size=pack, machine=plan.local(scale, count, run=True))
    by_id = {spec.id: spec for spec in study.unique(cells)}
    todo = [by_id[run_id] for group in made.packs for run_id in group]
    result = SweepResult(before=len(by_id) - len(todo))
    if not todo:
        return result
    ledger.sweep()
    supplies.fetch(*supplies.names(todo), lambda text: console.print(Text(text, style="dim")))
    labels = {cell.spec.id: name(found, cell) for cell in cells}
    expected = {run.id: run.seconds for run in made.runs}
    asked = list(todo)
    began = time.monotonic()

    def following() -> list[list[RunSpec]]:
        """Packs of what follows from the records, if anything does that was not tried in this call."""
        while more is not None:
            tracker.cells = more()
            new = [cell for cell in tracker.cells if cell.spec.id not in by_id]
            if not new:
                break
            further = plan.make(found, scale, new, pack_size=pack, machine=plan.local(scale, count, run=True))
            by_id.update({cell.spec.id: cell.spec for cell in new})
            labels.update({cell.spec.id: name(found, cell) for cell in new})
            expected.update({run.id: run.seconds for run in further.runs})
            if further.packs:
                todo = [by_id[run_id] for group in further.packs for run_id in group]
                asked.extend(todo)
                display.more(todo)
                console.print(Text(f"{found.id} at {scale}: {len(todo)} runs more, which follow from these."))
                return [[by_id[i] for i in group] for group in further.packs]
        return []

    with Display(console, todo, result.before, labels, expected) as display, \
            _Tracker(found, scale, cells, console) as tracker:
        def listen(event: executor.Event) -> None:
            display(event)
            if event.record is not None:
                tracker.wake(event.record.id)

        try:
            pool: executor.Pool
            if on == "ray":
                from suite.ray_executor import Ray

                pool = ray = Ray(ray_address, workers, threads, listen)
                device, count = ray.device, ray.workers
            else:
                pool = executor.Local(count, threads, device, listen)
            used = min(count, len(made.packs))
            console.print(Text(f"{found.id} at {scale}: {len(todo)} runs to make, {result.before} there already; "
                               f"{used} worker{'s' if used > 1 else ''} on {device}."))
            executor.finish([[by_id[i] for i in group] for group in made.packs], pool, following)
        except KeyboardInterrupt:
            result.interrupted = True
        except StorageError as error:
            result.stopped = str(error)
            tracker.leave()
    result.seconds = time.monotonic() - began
    result.made = dict(Counter(display.ended.values()))
    done = sum(status in records.DONE for status in display.ended.values())
    result.left = len(asked) - done if result.stopped else sum(not records.is_done(spec.id) for spec in asked)
    return result


@dataclass(frozen=True)
class RunState:
    """Where one planned run stands."""

    run: str
    table: str
    row: str
    task: str
    rank: int | None
    seed: int
    status: str
    score: float | None
    reason: str
    name: str
    heartbeat: float | None = None  # seconds since the last sign of life, of a run that is running


def status(found: Study, cells: Sequence[Cell]) -> list[RunState]:
    """Where every cell stands; `running` when some `suite run` on this file system holds it."""
    held = ledger.holders()  # asked first: a run that ends meanwhile has its record
    states = []
    for cell in cells:
        record = records.load(cell.spec.id)
        state: str = record.status if record else "missing"
        beat = held.get(cell.spec.id)
        if beat is not None and (record is None or record.status == "failed"):
            state = "running"
        states.append(RunState(cell.spec.id, cell.table, cell.row, cell.spec.task.id, cell.rank, cell.spec.seed, state,
                               record.score.value if record and record.score else None,
                               record.reason if record else "", name(found, cell),
                               beat if state == "running" else None))
    return states


def summary(states: Sequence[RunState]) -> tuple[list[str], list[list[Any]]]:
    """Counts of states by table and row."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for one in states:
        groups.setdefault((one.table, one.row), Counter())[one.status] += 1
    rows = [[table, row, sum(counts.values()), *(counts[state] for state in STATES)]
            for (table, row), counts in groups.items()]
    totals = Counter(one.status for one in states)
    rows.append(["all", "", len(states), *(totals[state] for state in STATES)])
    return ["table", "row", "planned", *STATES], rows


def name(found: Study, cell: Cell) -> str:
    """What a run is called in front of people."""
    size = f" r={cell.rank}" if cell.rank else ""
    own = cell.spec.recipe.learning_rate
    usual = any(table.rates(cell.row) == (own,) for edition in found.scales.values()
                for name, table in edition.tables.items() if name == cell.table)
    validation = cell.spec.evaluation.split == "validation"
    task = f"{cell.spec.task.id}{' (validation)' if validation else ''}"
    rate = "" if usual and not validation else f", rate {own:g}"
    return f"{found.rows[cell.row].label}{size} on {task}{rate}, seed {cell.spec.seed}"


class _Tracker:
    """Brings MLflow in line with the records in the background, so that its pages can be watched while runs go on. What
    goes wrong is said once."""

    PAUSE = 20.0  # seconds between two fills

    def __init__(self, found: Study, scale: Scale, cells: Sequence[Cell], console: Console) -> None:
        self.study, self.scale, self.cells, self.console = found, scale, cells, console
        self._told = self._left = self._complained = False
        self._made: set[str] = set()  # records that MLflow does not show yet
        self._news, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Tracker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._news.set()
        self._thread.join()
        if self._told and not self._left:
            self._fill([cell.spec.id for cell in self.cells])

    def wake(self, run_id: str) -> None:
        """Tell that a record has been written."""
        self._told = True
        self._made.add(run_id)
        self._news.set()

    def leave(self) -> None:
        """Do without the last fill."""
        self._left = True

    def _work(self) -> None:
        while not self._end.is_set():
            self._news.wait()
            if self._end.is_set():
                return
            self._news.clear()
            made = list(self._made)  # in one step, while others are added
            if self._fill(made):
                self._made.difference_update(made)
            self._end.wait(self.PAUSE)

    def _fill(self, run_ids: Sequence[str]) -> bool:
        try:
            known = records.load_many(run_ids)
        except UserError as error:
            problem: str | None = str(error)
        else:
            problem = tracking.sync(self.study, self.scale, self.cells, known).problem
        if problem and not self._complained and not self._left:
            self._complained = True
            self.console.print(Text(problem, style="yellow"))
        return problem is None


def _workers(asked: int | None) -> tuple[str, int, int]:
    """Device, number of worker processes and threads of each."""
    import torch

    from suite.environment import cores

    if torch.cuda.is_available():
        return "cuda", asked or 1, 1
    return "cpu", asked or cores(), 1


def _writable() -> None:
    try:
        paths.runs().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=paths.runs()) as probe:
            probe.write(bytes(ROOM))
    except OSError as error:
        raise UserError(str(storage(error, paths.runs()))) from None


