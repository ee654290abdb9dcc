"""Who is at which run: leases with heartbeats, by which several processes and machines share one results folder.

A lease is a small file: a random token, the process and a hash of its machine, kept fresh by the holder's heartbeat. It
has expired when the heartbeat stops for its lifetime, and at once when its process has died on this machine.

The leases of a run form a chain. The first comer makes `RUN`; whoever takes over from the holder with token T makes
`RUN.T`; the last of the chain holds the run. A file appears with its content by a hard link, which only one process can
make, so there is one heir. The holder removes the chain, oldest first, when it is done.

Clocks of machines are not compared: a heartbeat sets the file's time by the file system's clock, and so does a
file made to ask what time it is.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from suite import paths
from suite.faults import LostLeaseError, StorageError, storage

_held: dict[str, Lease] = {}
_guard = threading.Lock()


def lifetime() -> float:
    """Seconds without a heartbeat after which a lease is free: `$SUITE_LEASE_SECONDS`, else 60. The heart beats six times
    as often."""
    return float(os.environ.get("SUITE_LEASE_SECONDS", 60))


def folder() -> Path:
    """Where leases stand, beside the runs."""
    return paths.runs() / ".leases"


@dataclass(frozen=True)
class _Link:
    """One file of a chain, as read: whose it is, when its heart beat last, and for how long that counts."""

    path: Path
    token: str
    process: int
    machine: str
    lifetime: float
    beat: float

    def expired(self, now: float) -> bool:
        return now - self.beat > self.lifetime or (self.machine == _machine() and not _alive(self.process))


@dataclass
class Lease:
    """A run in this process's hands, as a context: released on leaving it. `lost` when another process took it over."""

    run: str
    token: str
    files: list[Path] = field(default_factory=list)
    lost: bool = False

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def renew(self) -> None:
        """One heartbeat, unless the lease is lost. Raises `OSError` when the folder cannot be reached."""
        mine = _read(self.files[-1])
        if mine is None and not paths.runs().is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(paths.runs()))
        self.lost = self.lost or mine is None or mine.token != self.token or _after(self.run, self.token).exists()
        if not self.lost:
            os.utime(self.files[-1])

    def release(self) -> None:
        """Give the run back. What cannot be removed now expires by itself."""
        with _guard:
            _held.pop(self.run, None)
        try:
            self.renew()
            if not self.lost:
                for file in self.files:
                    file.unlink()
        except OSError:
            pass


def claim(run_id: str) -> Lease | None:
    """Make a run this process's own until it is released; None when it is in other hands.

    Raises `StorageError` when a lease cannot be written.
    """
    try:
        folder().mkdir(exist_ok=True)  # a results folder that has gone is not made again
        before = _chain(run_id)
        if before and not before[-1].expired(_now()):
            return None
        lease = Lease(run_id, secrets.token_hex(8))
        own = _after(run_id, before[-1].token) if before else folder() / run_id
        if not _make(own, lease.token):
            return None
        chain = _chain(run_id)
        if [link.token for link in chain] != [*(link.token for link in before), lease.token]:
            own.unlink(missing_ok=True)  # the run was given back meanwhile: this link hangs in the air
            return None
    except OSError as error:
        raise storage(error, paths.runs()) from error
    lease.files = [link.path for link in chain]
    with _guard:
        _held[run_id] = lease
    _start_heart()
    return lease


@contextmanager
def lent(leases: Collection[Lease]) -> Iterator[None]:
    """Write records, inside, under leases that another process took for this one and keeps fresh."""
    with _guard:
        _held.update((lease.run, lease) for lease in leases)
    try:
        yield
    finally:
        with _guard:
            for lease in leases:
                _held.pop(lease.run, None)


def check(run_id: str) -> None:
    """Say whether this process may write the run's record; a run that it never claimed is free to write.

    Raises `LostLeaseError` when another process has taken the run over, `StorageError` when the folder has gone.
    """
    lease = _held.get(run_id)
    if lease is None:
        return
    try:
        lease.renew()
    except OSError as error:
        raise storage(error, paths.runs()) from error
    if lease.lost:
        raise LostLeaseError(run_id)


def holders() -> dict[str, float]:
    """Runs that are in somebody's hands, and the seconds since the holder's last heartbeat."""
    try:
        now = _now()
        runs = [name for name in os.listdir(folder()) if "." not in name]
    except OSError:  # nothing has been run here, or this may only be read
        return {}
    last = {run: chain[-1] for run in runs if (chain := _chain(run))}
    return {run: max(0.0, now - link.beat) for run, link in last.items() if not link.expired(now)}


def sweep() -> None:
    """Remove the leases of killed processes, and what belongs to no chain."""
    try:
        for run_id in [name for name in os.listdir(folder()) if "." not in name]:
            if lease := claim(run_id):
                lease.release()
        now, names = _now(), os.listdir(folder())
        chains = {link.path.name for name in names if "." not in name for link in _chain(name)}
        for name in set(names) - chains:
            if now - (folder() / name).stat().st_mtime > lifetime():
                (folder() / name).unlink()
    except (OSError, StorageError):  # nothing is there, or another process is sweeping too
        pass


def _after(run_id: str, token: str) -> Path:
    return folder() / f"{run_id}.{token}"


def _chain(run_id: str) -> list[_Link]:
    """The leases of a run, first to last."""
    found: list[_Link] = []
    path = folder() / run_id
    while (link := _read(path)) is not None:
        found.append(link)
        path = _after(run_id, link.token)
    return found


def _read(path: Path) -> _Link | None:
    """A lease, or None when there is none. It is opened first: that makes a network file system ask its server."""
    try:
        with open(path, encoding="utf-8") as file:
            beat = os.fstat(file.fileno()).st_mtime
            try:
                said = json.loads(file.read())
                return _Link(path, said["token"], said["process"], said["machine"], said["lifetime"], beat)
            except (ValueError, KeyError, TypeError):  # cut off by a crash of the machine
                return _Link(path, "damaged", 0, "", lifetime(), beat)
    except FileNotFoundError:
        return None


def _make(path: Path, token: str) -> bool:
    """Make a lease file whole; whether this process was the first."""
    said = {"token": token, "process": os.getpid(), "machine": _machine(), "lifetime": lifetime()}
    draft = folder() / f".{token}"
    try:
        draft.write_text(json.dumps(said), encoding="utf-8")
        try:
            os.link(draft, path)
        except FileExistsError:
            return draft.stat().st_nlink == 2  # a network file system may make the link and still say no
        return True
    finally:
        draft.unlink(missing_ok=True)


def _now() -> float:
    """The file system's time."""
    with tempfile.TemporaryFile(dir=folder()) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime


@cache
def _machine() -> str:
    """A hash that is the same for all processes that see one another's process ids, and for no others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8") + os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = str(psutil.boot_time())
    return hashlib.sha256(f"{socket.gethostname()} {boot}".encode()).hexdigest()[:16]


def _alive(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@cache
def _start_heart() -> None:
    threading.Thread(target=_beat, daemon=True, name="lease heartbeat").start()


def _beat() -> None:
    pause = threading.Event()
    while not pause.wait(lifetime() / 6):
        with _guard:
            leases = list(_held.values())
        for lease in leases:
            try:
                lease.renew()
            except OSError:  # found again when the record is to be written
                continue
