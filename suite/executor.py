"""Runs packs on this machine in warm worker processes, and shares a study with other `suite run` processes.

A run is claimed by an operating-system lock that dies with its process, so nobody does it twice and nothing has to be
cleaned up after a crash. A record is written whole or not at all; what has a record is not run again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any, Literal

from filelock import FileLock, Timeout

from suite import paths, records
from suite.records import Record
from suite.specs import RunSpec


@dataclass(frozen=True)
class Event:
    """Something a listener may show. `kind`: a worker moved on (`progress`), a run ended (`record`), or a run is in
    another process's hands (`elsewhere`)."""

    kind: Literal["progress", "record", "elsewhere"]
    worker: int
    run: str
    phase: str = ""
    done: int = 0
    total: int = 0
    record: Record | None = None


Listener = Callable[[Event], None]


@dataclass
class _Hand:
    """A worker process and the pack it holds."""

    number: int
    process: BaseProcess
    inbox: Any
    pack: list[RunSpec] = field(default_factory=list)


def claim(run_id: str) -> FileLock:
    """The lock that makes a run somebody's own while it is held."""
    folder = paths.runs() / ".claims"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{run_id}.lock")


def run(packs: Sequence[Sequence[RunSpec]], workers: int, threads: int, device: str, listener: Listener) -> None:
    """Run every pack to its records. Returns when each run has a record, made here or by another process.

    Raises `KeyboardInterrupt` after stopping the workers; finished runs keep their records, others leave nothing.
    """
    local = Local(workers, threads, device, listener)
    waiting = [list(pack) for pack in packs]
    tried: set[str] = set()
    try:
        while waiting:
            elsewhere = local.drain(waiting, tried)
            waiting = [left for pack in elsewhere if (left := [s for s in pack if not records.is_done(s.id)])]
            if waiting:
                time.sleep(2)
    finally:
        local.stop()


class Local:
    """Worker processes of this machine, started when first needed and kept warm."""

    def __init__(self, workers: int, threads: int, device: str, listener: Listener) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.outbox: Any = self.context.Queue()
        self.workers, self.threads, self.device, self.listener = workers, threads, device, listener
        self.hands: list[_Hand] = []

    def drain(self, packs: list[list[RunSpec]], tried: set[str]) -> list[list[RunSpec]]:
        """Run packs, in order, until none is left; returns those whose runs another process holds."""
        todo = list(packs)
        elsewhere: list[list[RunSpec]] = []
        while len(self.hands) < min(self.workers, len(todo)):
            self.hands.append(self._hire(len(self.hands)))
        for hand in self.hands:
            self._give(hand, todo)
        while any(hand.pack for hand in self.hands):
            try:
                message = self.outbox.get(timeout=0.5)
            except queue.Empty:
                self._replace_the_dead(todo, tried)
                continue
            number, kind, content = message
            hand = self.hands[number]
            if kind == "event":
                self.listener(content)
            elif kind == "idle":
                taken = {spec.id for spec in content}
                left = [spec for spec in hand.pack if spec.id in taken]
                if left:
                    elsewhere.append(left)
                    self.listener(Event("elsewhere", number, left[0].id))
                self._give(hand, todo)
        return elsewhere

    def stop(self) -> None:
        """End all workers at once. A run in hand leaves no trace but its released claim."""
        for hand in self.hands:
            if hand.pack:
                hand.process.terminate()
            else:
                with contextlib.suppress(OSError, ValueError):
                    hand.inbox.put(None)
        for hand in self.hands:
            hand.process.join(5)
            if hand.process.is_alive():
                hand.process.kill()
                hand.process.join()
        self.hands.clear()

    def _hire(self, number: int) -> _Hand:
        inbox = self.context.Queue()
        process = self.context.Process(target=_work, args=(number, self.threads, self.device, inbox, self.outbox),
                                       daemon=True)
        process.start()
        return _Hand(number, process, inbox)

    def _give(self, hand: _Hand, todo: list[list[RunSpec]]) -> None:
        hand.pack = todo.pop(0) if todo else []
        if hand.pack:
            hand.inbox.put(hand.pack)

    def _replace_the_dead(self, todo: list[list[RunSpec]], tried: set[str]) -> None:
        """A worker that died (killed, out of memory) has its pack tried once more, run by run, then recorded."""
        for hand in self.hands:
            if not hand.pack or hand.process.is_alive():
                continue
            code = hand.process.exitcode
            for spec in hand.pack:
                if records.is_done(spec.id):
                    continue
                if spec.id not in tried:
                    tried.add(spec.id)
                    todo.append([spec])
                    continue
                now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
                record = records.save(Record(
                    id=spec.id, spec=spec, status="failed", started=now, finished=now,
                    reason=f"the worker process died twice with exit code {code} (killed, perhaps out of memory)"))
                self.listener(Event("record", hand.number, spec.id, record=record))
            fresh = self._hire(hand.number)
            hand.process, hand.inbox = fresh.process, fresh.inbox
            self._give(hand, todo)


def _work(number: int, threads: int, device: str, inbox: Any, outbox: Any) -> None:
    """Body of a worker process: take a pack, claim its runs, run them, say so, until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parent = os.getppid()
    worker = None
    while True:
        try:
            pack = inbox.get(timeout=5)
        except queue.Empty:
            if os.getppid() != parent:
                return  # the driver is gone
            continue
        if pack is None:
            return
        if worker is None:
            from suite.worker import Worker

            worker = Worker(device, threads)
        with contextlib.ExitStack() as claims:
            mine: list[RunSpec] = []
            taken: list[RunSpec] = []
            for spec in pack:
                try:
                    claims.enter_context(claim(spec.id).acquire(blocking=False))
                except Timeout:
                    taken.append(spec)
                    continue
                if not records.is_done(spec.id):  # another process may have finished it meanwhile
                    mine.append(spec)
            if mine:
                name = mine[0].id

                def progress(phase: str, done: int, total: int, name: str = name) -> None:
                    outbox.put((number, "event", Event("progress", number, name, phase, done, total)))

                for record in worker.run(mine, progress):
                    outbox.put((number, "event", Event("record", number, record.id, record=record)))
        outbox.put((number, "idle", taken))
