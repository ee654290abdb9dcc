"""Runs packs on this machine in warm worker processes, and shares a study with other `suite run` processes.

A run is claimed by a lease (`suite.ledger`), so nobody does it twice and nothing has to be cleaned up after a crash. A
record is written whole or not at all; what has a record is not run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, Literal, Protocol

from suite import environment, ledger, limits, paths, records
from suite.errors import UserError
from suite.faults import StorageError, storage
from suite.records import Record
from suite.specs import RunSpec

if TYPE_CHECKING:
    from suite.worker import Worker


@dataclass(frozen=True)
class Event:
    """Something a listener may show. `kind`: a worker moved on (`progress`), a run ended (`record`), a run is in
    another process's hands (`elsewhere`), or something befell a run or, with no run, all of them (`notice`, in words
    in `phase`)."""

    kind: Literal["progress", "record", "elsewhere", "notice"]
    worker: int
    run: str
    phase: str = ""
    done: int = 0
    total: int = 0
    record: Record | None = None


LOOK = 2.0  # seconds between two looks at whether the results folder is still there

Listener = Callable[[Event], None]


@dataclass
class _Hand:
    """A worker process, the line to it, the pack it holds, and the runs of it whose records were told."""

    number: int
    process: BaseProcess
    line: Connection
    pack: list[RunSpec] = field(default_factory=list)
    told: set[str] = field(default_factory=set)


def run(packs: Sequence[Sequence[RunSpec]], workers: int, threads: int, device: str, listener: Listener) -> None:
    """Run every pack to its records. Returns when each run has a record, made here or by another process.

    Raises `KeyboardInterrupt`, and `StorageError` when results cannot be kept, after stopping the workers; finished
    runs keep their records, others leave nothing.
    """
    finish(packs, Local(workers, threads, device, listener))


class Pool(Protocol):
    """Workers of one kind."""

    def drain(self, packs: list[list[RunSpec]], tried: Counter[str]) -> list[list[RunSpec]]:
        """Run packs, in order, until none is left; returns those whose runs another process holds.
        `tried` counts how often each run's worker has died."""

    def stop(self) -> None:
        """End all workers at once. What is in hand leaves no trace."""


def finish(packs: Sequence[Sequence[RunSpec]], pool: Pool,
           more: Callable[[], Sequence[Sequence[RunSpec]]] = tuple) -> None:
    """Have a pool run every pack to its records, and stop it whatever happens. As `run` otherwise.

    `more` is asked whenever all is done, and gives further packs that follow from the records, or none to end it.
    """
    waiting = [list(pack) for pack in packs]
    tried: Counter[str] = Counter()
    try:
        try:
            paths.runs().mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage(error, paths.runs()) from error
        while waiting:
            elsewhere = pool.drain(waiting, tried)
            waiting = [left for pack in elsewhere if (left := [s for s in pack if not records.is_done(s.id)])]
            if waiting:
                time.sleep(2)
            else:
                waiting = [list(pack) for pack in more()]
    finally:
        pool.stop()


class Local:
    """Worker processes of this machine, started when first needed and kept warm.

    Every worker has a line of its own: one that is killed in the middle of a message closes its line and harms no
    other.
    """

    def __init__(self, workers: int, threads: int, device: str, listener: Listener) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.workers, self.threads, self.device, self.listener = workers, threads, device, listener
        self.hands: list[_Hand] = []
        self.memory_kills = environment.memory_kills()

    def drain(self, packs: list[list[RunSpec]], tried: Counter[str]) -> list[list[RunSpec]]:
        """Run packs, in order, until none is left; returns those whose runs another process holds."""
        todo = list(packs)
        elsewhere: list[list[RunSpec]] = []
        for hand in self.hands:
            self._give(hand, todo)
        while True:
            while todo and len(self.hands) < self.workers:
                taken = {hand.number for hand in self.hands}
                self.hands.append(self._hire(next(number for number in count() if number not in taken)))
                self._give(self.hands[-1], todo)
            busy = {hand.line: hand for hand in self.hands if hand.pack}
            if not busy:
                return elsewhere
            ready = wait(list(busy), timeout=LOOK)
            if not paths.runs().is_dir():
                raise storage(FileNotFoundError(), paths.runs())
            for line in ready:
                hand = busy[line]  # type: ignore[index]
                try:
                    message, content = hand.line.recv()
                except (EOFError, OSError):
                    self._replace(hand, todo, tried)
                    continue
                if message == "event":
                    if content.record is not None:
                        hand.told.add(content.run)
                    self.listener(content)
                    continue
                if message == "stop":
                    raise StorageError(content)
                left = [spec for spec in hand.pack if spec.id in content]
                if left:
                    elsewhere.append(left)
                    self.listener(Event("elsewhere", hand.number, left[0].id))
                self._give(hand, todo)

    def stop(self) -> None:
        """End all workers at once. A run in hand leaves no trace but its released claim."""
        for hand in self.hands:
            if hand.pack:
                hand.process.terminate()
            hand.line.close()  # an idle worker leaves when its line ends
        for hand in self.hands:
            hand.process.join(5)
            if hand.process.is_alive():
                hand.process.kill()
                hand.process.join()
        self.hands.clear()

    def _hire(self, number: int) -> _Hand:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_work, args=(self.threads, self.device, number, theirs), daemon=True)
        # Ctrl-C is the driver's to handle, from the worker's first instant on: the mask is inherited.
        resource_tracker.ensure_running()  # which, if started with the worker, would lift the mask
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        return _Hand(number, process, ours)

    def _give(self, hand: _Hand, todo: list[list[RunSpec]]) -> None:
        hand.pack, *rest = limits.cut(todo.pop(0)) if todo else [[]]
        hand.told = set()
        todo[:0] = rest
        if hand.pack:
            with contextlib.suppress(OSError):  # a worker that died idle is found by its line's end
                hand.line.send(hand.pack)

    def _replace(self, hand: _Hand, todo: list[list[RunSpec]], tried: Counter[str]) -> None:
        """A worker that died (killed, out of memory) has its pack tried in halves; a run that it had alone is tried
        once more, then recorded."""
        hand.line.close()
        hand.process.join()
        self.hands.remove(hand)
        code, alone = hand.process.exitcode, len(hand.pack) == 1
        half = -(-len(hand.pack) // 2)
        if self._memory_was_short(code) and not alone:
            limits.learn(hand.pack[0], half)
        for part in (hand.pack[:half], hand.pack[half:]):
            found = records.load_many(spec.id for spec in part)
            done = {run for run, record in found.items() if record.status in records.DONE}
            left = [spec for spec in part if spec.id not in done]
            for run in done - hand.told:  # it died between saving and telling
                self.listener(Event("record", hand.number, run, record=found[run]))
            if not left:
                continue
            if not alone:
                todo.insert(0, left)
            elif not tried[left[0].id]:
                tried[left[0].id] += 1
                todo.append(left)
            elif (record := record_death(left[0], code)) is not None:
                self.listener(Event("record", hand.number, record.id, record=record))
            else:
                todo.append(left)

    def _memory_was_short(self, code: int | None) -> bool:
        """Whether the kernel killed for want of memory since this was last asked: anybody may send signal 9."""
        before, self.memory_kills = self.memory_kills, environment.memory_kills()
        return code == -signal.SIGKILL and before is not None and self.memory_kills != before


def record_death(spec: RunSpec, code: int | None) -> Record | None:
    """The record of a run whose worker died twice, or None when another process has taken the run over meanwhile."""
    lease = ledger.claim(spec.id)
    if lease is None:
        return None
    with lease:
        reason = f"the worker process died twice with exit code {code} (killed, perhaps out of memory)"
        return save_failure(spec, reason, f"{reason}; a killed process leaves no trace of its own\n")


def save_failure(spec: RunSpec, reason: str, trace: str) -> Record:
    """The record of a run that whoever had it could not record, saved. Raises what `records.save` raises."""
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return records.save(Record(id=spec.id, spec=spec, status="failed", started=now, finished=now, reason=reason,
                               trace=trace))


def serve(worker: Worker, pack: Sequence[RunSpec], number: int, tell: Listener) -> set[str]:
    """What a worker does with a pack, in whatever process it lives: claim the runs, run what is not done, tell it.

    Returns the ids of runs that another process holds. Raises `StorageError` when results cannot be kept.
    """
    taken: set[str] = set()
    with contextlib.ExitStack() as leases:
        mine: list[RunSpec] = []
        for spec in pack:
            lease = ledger.claim(spec.id)
            if lease is None:
                taken.add(spec.id)
                continue
            leases.enter_context(lease)
            if not records.is_done(spec.id):  # another process may have finished it meanwhile
                mine.append(spec)
        if mine:
            name = mine[0].id
            made = worker.run(mine, lambda *at: tell(Event("progress", number, name, *at)))
            for record in made:
                tell(Event("record", number, record.id, record=record))
            taken |= {spec.id for spec in mine} - {record.id for record in made}  # lost while they ran
    return taken


def _work(threads: int, device: str, number: int, line: Connection) -> None:
    """Body of a worker process: take a pack, serve it, say so, until the line ends."""
    signal.signal(signal.SIGTERM, _leave)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    def say(message: str, content: Any) -> None:
        with contextlib.suppress(OSError):  # the driver is gone: what is in hand is finished all the same
            line.send((message, content))

    worker = None
    while True:
        try:
            pack: list[RunSpec] = line.recv()
        except (EOFError, OSError):
            return
        if worker is None:
            from suite.worker import Worker

            worker = Worker(device, threads)
        try:
            say("idle", serve(worker, pack, number, lambda event: say("event", event)))
        except (StorageError, UserError) as error:
            say("stop", str(error))
            return


def _leave(*_: object) -> None:
    """Leave by way of every `finally`, so that no half-written folder stays."""
    raise SystemExit(143)
