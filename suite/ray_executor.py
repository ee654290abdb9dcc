"""Runs packs on a Ray cluster: one warm actor per GPU, or per core where there is no GPU.

The driver (`suite run --executor ray`) gives out packs, holds the leases and hears of every event; an actor keeps one
`Worker`. The driver holds the leases because an actor may be on a node that does not see the results folder, and because
Ray ends a driver's actors with it: whose driver is dead is not being run. A node that sees the driver's results folder
writes records there itself, under the driver's leases: an actor that was given up, but lives on out of reach, finds its
lease gone and writes nothing. Any other node sends the files of a run, and the driver writes them.

The suite must be installed on every node, the same files and versions as here. A node where that is not so, or that
cannot have a base or data set of the study, is told of once and left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import platform
import queue
import secrets
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from suite import environment, ledger, limits, paths, records, supplies
from suite.errors import UserError
from suite.executor import Event, Listener, save_failure
from suite.faults import LostLeaseError, StorageError, storage
from suite.ledger import Lease
from suite.records import Record
from suite.specs import ENGINE_VERSION, RunSpec

#: A run is given up when its actor or node has died so many times: at first, and on two others.
ATTEMPTS = 3
LOOK = 2.0  # seconds between two looks at which nodes there are
PATIENCE = 10.0  # seconds that actors have to leave what they do
WAIT = 30.0  # seconds without an actor until that is said
NEWS = 0.2  # seconds between two messages of progress from one actor
#: Bytes of shared memory for a cluster of our own; what passes through it is records.
STORE = 100 * 2**20


@dataclass(frozen=True)
class _Greeting:
    """What an actor says of itself: whether it sees the driver's results folder, and why it cannot work, if so."""

    shared: bool
    problem: str | None


@dataclass(frozen=True)
class _Made:
    """A record, and the files of its folder where the driver cannot see them."""

    record: Record
    files: dict[str, bytes] | None


@dataclass
class _Hand:
    """An actor, where it is, what is awaited of it (a greeting or a stream), and the pack it holds: its leases, and the
    runs of which a record has come."""

    number: int
    node: str
    actor: Any
    awaited: Any
    ready: bool = False
    shared: bool = False
    pack: list[RunSpec] = field(default_factory=list)
    leases: list[Lease] = field(default_factory=list)
    made: set[str] = field(default_factory=set)

    def release(self) -> None:
        """Give back what is in hand."""
        for lease in self.leases:
            lease.release()
        self.pack, self.leases, self.made = [], [], set()


class Ray:
    """Actors of a Ray cluster, started when first needed, kept warm, and replaced where they or their nodes die.

    Args:
        address: of the cluster: HOST:PORT, or `auto` for the one that runs on this machine; None starts one here.
        workers: how many actors at most; None for one per GPU, or per core of a cluster without GPUs.
        threads: of each actor.
        listener: is told of every event.

    Raises `UserError` when Ray is not installed, the cluster cannot be reached, or it has nothing to compute on.
    """

    def __init__(self, address: str | None, workers: int | None, threads: int, listener: Listener) -> None:
        self.threads, self._most, self._listener = threads, workers, listener
        self._hands: list[_Hand] = []
        self._stillborn: Counter[str] = Counter()  # actors that died before they spoke, by node
        self._avoided: dict[str, str] = {}  # problem by node
        self._looked = 0.0
        self._identity = identity()
        self._token = secrets.token_hex(8)
        self._sign = paths.results() / f".ray-{self._token}"
        self._open = contextlib.ExitStack()
        # Ray prints what befalls its workers to standard output, where our JSON goes. We tell of it ourselves.
        self._open.enter_context(_silence())
        try:
            self._ray = _connect(address)
            self._class = self._ray.remote(_Actor)
            self._open.callback(self._ray.shutdown)  # ends a cluster of our own, leaves another
            self._open.callback(self._sign.unlink, missing_ok=True)
            self._sign.touch()
            resources = self._ray.cluster_resources()
            self.device = "cuda" if resources.get("GPU", 0) >= 1 else "cpu"
            self.workers = len(self._places())
            if not self.workers:
                raise UserError("the Ray cluster has neither a GPU nor a core to give; "
                                "add a node with `ray start --address`")
        except BaseException:
            self._open.close()
            raise

    def drain(self, packs: list[list[RunSpec]], tried: Counter[str]) -> list[list[RunSpec]]:
        """Run packs, in order, until none is left; returns those whose runs another process holds.

        Raises `UserError` when no node of the cluster can be used, `StorageError` when results cannot be kept.
        """
        todo = list(packs)
        needs = supplies.names(spec for pack in packs for spec in pack)
        elsewhere: list[list[RunSpec]] = []
        waiting: float | None = time.monotonic()  # since when no actor is ready; None when that has been said
        while todo or any(hand.pack for hand in self._hands):
            self._hire(needs, len(todo))
            for hand in self._hands:
                if hand.ready and not hand.pack:
                    self._give(hand, todo, elsewhere)
            awaited = {hand.awaited: hand for hand in self._hands if hand.pack or not hand.ready}
            if not self._hands and self._avoided and not self._nodes():
                raise UserError(next(iter(self._avoided.values())))
            if any(hand.ready for hand in self._hands):
                waiting = time.monotonic()
            elif waiting is not None and time.monotonic() - waiting > WAIT:
                waiting = None
                self._listener(Event("notice", 0, "", "waiting for a node of the Ray cluster to be free, or to join it"))
            if not awaited:
                if todo:
                    time.sleep(LOOK)
                continue
            ready, _ = self._ray.wait(list(awaited), num_returns=1, timeout=LOOK)
            if not paths.runs().is_dir():
                raise storage(FileNotFoundError(), paths.runs())
            for one in ready:
                self._hear(awaited[one], todo, elsewhere, tried)
        return elsewhere

    def stop(self) -> None:
        """End all actors; what is in hand leaves no trace. Ends the cluster too if it is ours."""
        with self._open:  # closes, whatever happens here
            calls = [hand.actor.leave.remote() for hand in self._hands if hand.ready]
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.wait(calls, num_returns=len(calls), timeout=PATIENCE) if calls else None
            for hand in self._hands:
                self._ray.kill(hand.actor)
                for spec in self._tell_saved(hand, hand.pack):
                    records.clear(spec.id)
                hand.release()
            self._hands.clear()

    def _nodes(self) -> dict[str, int]:
        """Places for actors by node, of nodes that are alive and can be used."""
        kind = "GPU" if self.device == "cuda" else "CPU"
        return {node["NodeID"]: int(node["Resources"].get(kind, 0)) for node in self._ray.nodes()
                if node["Alive"] and node["NodeID"] not in self._avoided}

    def _places(self) -> list[str]:
        """The node of every place, first places of all nodes first, as many as actors may be."""
        nodes = self._nodes()
        rounds = range(max(nodes.values(), default=0))
        return [node for turn in rounds for node, size in nodes.items() if turn < size][:self._most]

    def _hire(self, needs: tuple[list[str], list[str]], packs: int) -> None:
        """Start actors where places are free, as nodes that joined lately have; not more than there are packs."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        idle = sum(not hand.pack for hand in self._hands)
        free = Counter(self._places())
        free.subtract(hand.node for hand in self._hands)
        most = packs - idle if self._most is None else min(packs - idle, self._most - len(self._hands))
        for node in list(free.elements())[:max(0, most)]:
            taken = {hand.number for hand in self._hands}
            number = next(number for number in count() if number not in taken)
            self._hands.append(self._start(number, node, needs))

    def _start(self, number: int, node: str, needs: tuple[list[str], list[str]]) -> _Hand:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = self._class.options(
            num_cpus=1, num_gpus=1 if self.device == "cuda" else 0, max_restarts=0, max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(number, self.device, self.threads)
        return _Hand(number, node, actor, actor.greet.remote(self._identity, str(self._sign.absolute()), *needs))

    def _give(self, hand: _Hand, todo: list[list[RunSpec]], elsewhere: list[list[RunSpec]]) -> None:
        """Give an actor the next pack of which any run is left to be claimed."""
        while todo and not hand.pack:
            pack, *rest = limits.cut(todo.pop(0))
            todo[:0] = rest
            taken: list[RunSpec] = []
            for spec in pack:
                lease = ledger.claim(spec.id)
                if lease is None:
                    taken.append(spec)
                elif records.is_done(spec.id):  # another process may have finished it meanwhile
                    lease.release()
                else:
                    lease.files = [file.absolute() for file in lease.files]
                    hand.leases.append(lease)
                    hand.pack.append(spec)
            if taken:
                self._leave_to_others(hand, taken, elsewhere)
        if hand.pack:
            hand.awaited = hand.actor.run.options(num_returns="streaming").remote(hand.pack, hand.leases)

    def _leave_to_others(self, hand: _Hand, taken: list[RunSpec], elsewhere: list[list[RunSpec]]) -> None:
        elsewhere.append(taken)
        self._listener(Event("elsewhere", hand.number, taken[0].id))

    def _hear(self, hand: _Hand, todo: list[list[RunSpec]], elsewhere: list[list[RunSpec]], tried: Counter[str]) -> None:
        """Take what an actor has to say: its greeting, the next event or record, or the end of its pack."""
        try:
            if not hand.ready:
                greeting: _Greeting = self._ray.get(hand.awaited)
                hand.ready, hand.shared = greeting.problem is None, greeting.shared
                if greeting.problem is not None:
                    self._avoid(hand.node, greeting.problem, todo)
                return
            said = self._ray.get(next(hand.awaited))
        except StopIteration:
            if lost := [spec for spec in hand.pack if spec.id not in hand.made]:
                self._leave_to_others(hand, lost, elsewhere)
            hand.release()
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, StorageError | UserError):
                self._lose(hand, error, todo, tried)
            elif hand.shared:
                raise StorageError(str(cause)) from None
            else:
                self._avoid(hand.node, f"a node of the Ray cluster is left out: {cause}", todo)
        except self._ray.exceptions.RayError as error:
            self._lose(hand, error, todo, tried)
        else:
            if isinstance(said, Event):
                self._listener(said)
                return
            try:
                if said.files is not None:
                    records.write(said.record.id, said.files)
            except LostLeaseError:
                return
            hand.made.add(said.record.id)
            self._listener(Event("record", hand.number, said.record.id, record=said.record))

    def _avoid(self, node: str, problem: str, todo: list[list[RunSpec]]) -> None:
        """Leave out a node that cannot do what the others can; said once. What it has in hand is for others."""
        self._avoided[node] = problem
        self._listener(Event("notice", 0, "", problem))
        for hand in [hand for hand in self._hands if hand.node == node]:
            self._ray.kill(hand.actor)
            self._hands.remove(hand)
            if hand.pack:
                todo.insert(0, hand.pack)
            hand.release()

    def _lose(self, hand: _Hand, error: Exception, todo: list[list[RunSpec]], tried: Counter[str]) -> None:
        """An actor that died, alone or with its node, has its pack tried on others in halves; a run that it had alone is
        tried on two others, then recorded."""
        self._ray.kill(hand.actor)  # it may be only out of reach
        self._hands.remove(hand)
        self._looked = 0.0
        if not hand.ready:
            self._stillborn[hand.node] += 1
            if self._stillborn[hand.node] > 1 and hand.node in self._nodes():  # the suite is not there, say
                self._avoid(hand.node, f"a node of the Ray cluster is left out: {_last_line(error)}", todo)
            return
        half = -(-len(hand.pack) // 2)
        for part in (hand.pack[:half], hand.pack[half:]):
            left = self._tell_saved(hand, part)
            for spec in left:
                records.clear(spec.id)
            if not left:
                continue
            first = left[0].id
            tried[first] += len(hand.pack) == 1
            if tried[first] < ATTEMPTS:
                todo.insert(0 if len(hand.pack) > 1 else len(todo), left)
                self._listener(Event("notice", hand.number, first, "its Ray actor died; trying it again on another"))
                continue
            reason = f"its Ray actor or node died {ATTEMPTS} times (killed, perhaps out of memory)"
            try:
                record = save_failure(left[0], reason, str(error))
            except LostLeaseError:
                todo.append(left)
            else:
                self._listener(Event("record", hand.number, first, record=record))
        hand.release()

    def _tell_saved(self, hand: _Hand, pack: list[RunSpec]) -> list[RunSpec]:
        """Tell of records that an actor saved and had no time to tell of; returns the runs that are left."""
        found = records.load_many(spec.id for spec in pack)
        done = {run for run, record in found.items() if record.status in records.DONE}
        for run in done - hand.made:
            self._listener(Event("record", hand.number, run, record=found[run]))
        return [spec for spec in pack if spec.id not in done]


class _Actor:
    """One process of a node. All it computes is computed in one thread, so that its others can speak meanwhile."""

    def __init__(self, number: int, device: str, threads: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.number, self.device, self.threads = number, device, threads
        self._own: Path | None = None  # results folder of an actor that does not see the driver's
        self._worker: Any = None
        self._thread = ThreadPoolExecutor(1)
        self._leaving = threading.Event()

    def greet(self, wanted: Mapping[str, str], sign: str, base_ids: list[str], task_ids: list[str]) -> _Greeting:
        """Make ready for a study, whose driver has put `sign` into its results folder."""
        shared = Path(sign).exists()
        node = f"node {socket.gethostname()} of the Ray cluster is left out"
        own = identity()
        for name in {**wanted, **own}:
            here, there = (versions.get(name, "not installed") for versions in (wanted, own))
            if here != there:
                return _Greeting(shared, f"{node}: {name} is {there} there and {here} here; install the same on every node")
        try:
            supplies.fetch(base_ids, task_ids)
            if shared:
                os.environ["SUITE_RESULTS"] = str(Path(sign).parent)
            else:
                self._own = _own_results(f"{Path(sign).name.removeprefix('.')}-{self.number}")
                os.environ["SUITE_RESULTS"] = str(self._own)
        except (UserError, OSError) as error:
            return _Greeting(shared, f"{node}: {error}")
        return _Greeting(shared, None)

    def run(self, pack: list[RunSpec], leases: list[Lease]) -> Iterator[Event | _Made]:
        """Run a pack under the driver's leases; yields progress and records as they come."""
        said: queue.SimpleQueue[Event | _Made | None] = queue.SimpleQueue()
        last = ("", 0.0)

        def progress(phase: str, done: int, total: int) -> None:
            nonlocal last
            if self._leaving.is_set():
                raise SystemExit  # by way of every `finally`
            now = time.monotonic()
            if phase != last[0] or now - last[1] > NEWS:
                last = phase, now
                said.put(Event("progress", self.number, pack[0].id, phase, done, total))

        def work() -> None:
            try:
                if self._worker is None:
                    from suite.worker import Worker

                    self._worker = Worker(self.device, self.threads)
                with ledger.lent(leases if self._own is None else []):
                    for record in self._worker.run(pack, progress):
                        said.put(_Made(record, None if self._own is None else _take(record.id)))
            finally:
                said.put(None)

        done = self._thread.submit(work)
        while (news := said.get()) is not None:
            yield news
        done.result()

    def leave(self) -> None:
        """Stop what is being done, at its next step, and leave nothing behind. Returns when that is so."""
        self._leaving.set()
        self._thread.shutdown(wait=True)
        if self._own is not None:
            shutil.rmtree(self._own, ignore_errors=True)


def identity() -> dict[str, str]:
    """What must be equal on every node for equal numbers: versions, and the suite's own files."""
    found = hashlib.sha256()
    for package in ("suite", "methods", "tasks"):
        for path in sorted((paths.REPOSITORY / package).rglob("*.py")):
            found.update(str(path.relative_to(paths.REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return {"python": ".".join(platform.python_version_tuple()[:2]), **environment.versions(), "engine": str(ENGINE_VERSION),
            "the suite's code": found.hexdigest()[:12]}


def _connect(address: str | None) -> Any:
    """The Ray module, connected. A cluster that is started here ends with this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"--executor ray needs Ray, which is not installed; run `{environment.INSTALL_RAY}`") from None
    if address is None:
        try:
            ray.init(address="local", num_cpus=environment.cores(), include_dashboard=False,
                     object_store_memory=STORE, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # of no narrower class when a node takes too long
            ray.shutdown()
            raise UserError(f"Ray could not be started on this machine ({_last_line(error)})") from None
        return ray
    if address != "auto":
        _knock(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        what = "no Ray cluster runs on this machine; start one with `ray start --head`, or leave --ray-address out" \
            if address == "auto" and isinstance(error, ConnectionError) else " ".join(str(error).split())
        raise UserError(f"--ray-address {address}: {what}") from None
    return ray


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
        yield


def _knock(address: str) -> None:
    """Ask in seconds what Ray would try for minutes: whether anything answers there."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"--ray-address {address}: use HOST:PORT of a cluster's head, or auto")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except OSError as error:
        raise UserError(f"--ray-address {address}: no Ray cluster answers there ({error.strerror or error}); "
                        "use HOST:PORT as `ray start --head` printed it") from None


def _own_results(name: str) -> Path:
    """A results folder for an actor that does not see the driver's, with the node's own cache in it."""
    folder, cache = paths.results().absolute() / name, paths.cache().absolute()
    shutil.rmtree(folder, ignore_errors=True)  # of a dead actor
    cache.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "cache").symlink_to(cache)
    return folder


def _take(run_id: str) -> dict[str, bytes]:
    """The files of a run's folder, which goes."""
    folder = records.folder(run_id)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return files


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
