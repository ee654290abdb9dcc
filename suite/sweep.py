"""Runs what a study lacks, from plan to records to MLflow, and says where a study stands."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from filelock import Timeout
from rich.console import Console
from rich.text import Text

from suite import assets, bases, executor, hub, paths, plan, records, registry, study, tracking
from suite.display import Display, duration
from suite.errors import UserError
from suite.specs import RunSpec
from suite.study import Cell, Scale, Study

STATES = ("finished", "running", "failed", "diverged", "skipped", "missing")


@dataclass
class SweepResult:
    """What a call of `run` did: runs made by status, and how many were there before."""

    before: int
    made: dict[str, int] = field(default_factory=dict)
    left: int = 0
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failed(self) -> int:
        return self.made.get("failed", 0)

    def as_json(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"before": self.before, "made": self.made, "left": self.left, "seconds": round(self.seconds, 1),
                "interrupted": self.interrupted}

    def sentence(self, study_id: str, scale: str) -> str:
        """One line for the end of the command."""
        made = sum(self.made.values())
        counts = ", ".join(f"{count} {status}" for status, count in self.made.items())
        again = f"`suite run {study_id} --scale {scale}`"
        if self.interrupted:
            return f"Stopped: {self.before + made} runs are kept, {self.left} are left; {again} goes on."
        if not made:
            return f"Nothing to run: all {self.before} runs of {study_id} at {scale} are there."
        tail = f" {again} tries the failed ones again." if self.failed else ""
        return f"{made} runs in {duration(self.seconds)}: {counts}.{tail}"


def run(found: Study, scale: Scale, cells: Sequence[Cell], workers: int | None, pack: int | None,
        console: Console) -> SweepResult:
    """Run every cell that has no record, show how it goes on `console`, and bring MLflow in line. `pack`: how many runs
    train together (None: as many as the planner finds best).

    Raises `UserError` before anything starts when the results folder cannot be written, or a base or data set cannot
    be had.
    """
    _writable()
    device, count, threads = _workers(workers)
    made = plan.make(found, scale, cells, pack_size=pack, machine=plan.local(scale, count, run=True))
    by_id = {spec.id: spec for spec in study.unique(cells)}
    todo = [by_id[run_id] for group in made.packs for run_id in group]
    result = SweepResult(before=len(by_id) - len(todo))
    if not todo:
        return result
    _fetch(todo, console)
    labels = {cell.spec.id: name(found, cell) for cell in cells}
    expected = {run.id: run.seconds for run in made.runs}
    workers_used = min(count, len(made.packs))
    console.print(Text(f"{found.id} at {scale}: {len(todo)} runs to make, {result.before} there already; "
                       f"{workers_used} worker{'s' if workers_used > 1 else ''} on {device}."))
    began = time.monotonic()
    with Display(console, todo, result.before, labels, expected) as display, \
            _Tracker(found, scale, cells) as tracker:
        def listen(event: executor.Event) -> None:
            display(event)
            if event.record is not None:
                tracker.wake()

        try:
            executor.run([[by_id[i] for i in group] for group in made.packs], count, threads, device, listen)
        except KeyboardInterrupt:
            result.interrupted = True
    result.seconds = time.monotonic() - began
    result.made = dict(Counter(display.ended.values()))
    result.left = sum(not records.is_done(spec.id) for spec in todo)
    if tracker.problem:
        console.print(Text(tracker.problem, style="yellow"))
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


def status(found: Study, cells: Sequence[Cell]) -> list[RunState]:
    """Where every cell stands; `running` when some `suite run` on this file system holds it."""
    states = []
    for cell in cells:
        record = records.load(cell.spec.id)
        state: str = record.status if record else "missing"
        if (record is None or record.status == "failed") and _claimed(cell.spec.id):
            state = "running"
        states.append(RunState(cell.spec.id, cell.table, cell.row, cell.spec.task.id, cell.rank, cell.spec.seed, state,
                               record.score.value if record and record.score else None,
                               record.reason if record else "", name(found, cell)))
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
    several = any(len(table.rates(cell.row)) > 1 for edition in found.scales.values()
                  for name, table in edition.tables.items() if name == cell.table)
    rate = f", rate {cell.spec.recipe.learning_rate:g}" if several else ""
    return f"{found.rows[cell.row].label}{size} on {cell.spec.task.id}{rate}, seed {cell.spec.seed}"


class _Tracker:
    """Brings MLflow in line with the records in the background, so that its pages can be watched while runs go on."""

    PAUSE = 20.0  # seconds between two fills

    def __init__(self, found: Study, scale: Scale, cells: Sequence[Cell]) -> None:
        self.study, self.scale, self.cells = found, scale, cells
        self.problem: str | None = None
        self._told = False
        self._news, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Tracker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._news.set()
        self._thread.join()
        if self._told:
            self._fill()

    def wake(self) -> None:
        """Tell that a record has been written."""
        self._told = True
        self._news.set()

    def _work(self) -> None:
        while not self._end.is_set():
            self._news.wait()
            if self._end.is_set():
                return
            self._news.clear()
            self._fill()
            self._end.wait(self.PAUSE)

    def _fill(self) -> None:
        known = records.load_many(cell.spec.id for cell in self.cells)
        self.problem = tracking.sync(self.study, self.scale, self.cells, known).problem


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
        probe = paths.runs() / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{paths.runs()} cannot be written ({error.strerror}); set SUITE_RESULTS to another folder") \
            from None


def _fetch(todo: Sequence[RunSpec], console: Console) -> None:
    """Have every base and data set at hand before a worker starts, or say in one sentence what cannot be had."""
    found = [bases.get(base) for base in dict.fromkeys(spec.base.id for spec in todo)]
    tasks = [registry.task(task) for task in dict.fromkeys(spec.task.id for spec in todo)]
    sources = [source for task in tasks for source in task.sources]
    hub.require(found, sources)
    wanted = [*(base.asset for base in found), *(source.asset for source in sources)]
    for asset in dict.fromkeys(asset for asset in wanted if asset):
        assets.fetch(asset, lambda text: console.print(Text(text, style="dim")))


def _claimed(run_id: str) -> bool:
    lock = executor.claim(run_id)
    try:
        with lock.acquire(blocking=False):
            return False
    except Timeout:
        return True
