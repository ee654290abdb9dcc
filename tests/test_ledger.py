"""Leases among real processes: one holder at a time, whoever is killed, stopped or late."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from suite import ledger, paths, records
from suite.faults import LostLeaseError, StorageError
from suite.records import Record
from suite.specs import BaseRef, Evaluation, MethodRef, Recipe, RunSpec, TaskRef

RUN = "0123456789ab"
SPEC = RunSpec(base=BaseRef(id="minilm", revision="1"), task=TaskRef(id="movies", version=1),
               method=MethodRef(id="head", version=1, config={}), budget=None, recipe=Recipe(learning_rate=1e-3),
               evaluation=Evaluation(), seed=0)

# Claims a run when told, says whether it got it, and holds it until told to give it back.
HOLDER = """
import sys
from suite import ledger
from suite.faults import LostLeaseError
print("ready", flush=True)
lease = None
for word in map(str.strip, sys.stdin):
    if word == "claim":
        lease = ledger.claim("0123456789ab")
        print("mine" if lease else "taken", flush=True)
    elif word == "check":
        try:
            ledger.check("0123456789ab")
            print("mine", flush=True)
        except LostLeaseError:
            print("lost", flush=True)
    elif word == "release":
        lease.release()
        print("released", flush=True)
"""

# Takes and gives back a run as fast as it can; the first two die with it in hand; says `two at once` when it was not alone.
RACER = """
import os, random, signal, sys, time
from pathlib import Path
from suite import ledger
mark, end = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2])
seed = int(sys.argv[3])
draw = random.Random(seed)
turns = 0
while time.monotonic() < end:
    with ledger.claim("0123456789ab") or open(os.devnull) as lease:
        if not isinstance(lease, ledger.Lease):
            continue
        turns += 1
        try:
            owner = int(mark.read_text() or 0) if mark.exists() else 0
            if owner and Path(f"/proc/{owner}/stat").exists() and " Z " not in Path(f"/proc/{owner}/stat").read_text():
                print("two at once", flush=True)
        except FileNotFoundError:
            pass
        mark.write_text(str(os.getpid()))
        time.sleep(draw.random() / 500)
        if seed < 2 and turns == 4 + seed:
            print(turns, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        mark.unlink()
print(turns, flush=True)
"""


class Holder:
    """Another process that can hold the run."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True)
        self.hear()

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PYTHONPATH", str(paths.REPOSITORY))
    paths.runs().mkdir(parents=True)


@pytest.fixture
def others() -> Iterator[list[Holder]]:
    made = [Holder() for _ in range(3)]
    yield made
    for one in made:
        one.end()


def files() -> list[str]:
    return sorted(os.listdir(ledger.folder()))


def test_a_run_has_one_holder_and_leaves_nothing_behind(others: list[Holder]) -> None:
    first, second, *_ = others
    assert first.ask("claim") == "mine"
    assert second.ask("claim") == "taken"
    assert ledger.claim(RUN) is None
    assert list(ledger.holders()) == [RUN]
    assert 0 <= ledger.holders()[RUN] < 30
    assert first.ask("release") == "released"
    assert files() == []
    with ledger.claim(RUN) or pytest.fail("the run was given back"):
        assert second.ask("claim") == "taken"
        assert ledger.claim(RUN) is None
    assert (files(), ledger.holders()) == ([], {})


def test_a_lease_does_not_say_whose_machine_it_is(others: list[Holder]) -> None:
    others[0].ask("claim")
    said = (ledger.folder() / RUN).read_text(encoding="utf-8")
    assert f'"process": {others[0].process.pid}' in said
    assert not any(name and name in said for name in (os.uname().nodename, os.environ.get("USER", ""), str(Path.home())))


def test_a_dead_holder_has_one_heir_at_once(others: list[Holder]) -> None:
    first, *heirs = others
    assert first.ask("claim") == "mine"
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()
    assert ledger.holders() == {}
    for heir in heirs:
        heir.tell("claim")
    assert sorted(heir.hear() for heir in heirs) == ["mine", "taken"]
    assert list(ledger.holders()) == [RUN]


def test_a_holder_that_was_asleep_loses_the_run_and_does_not_disturb_its_heir(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_LEASE_SECONDS", "2")
    asleep, heir = Holder(), Holder()
    try:
        assert asleep.ask("claim") == "mine"
        time.sleep(4)
        assert heir.ask("claim") == "taken"  # the heart beats
        os.kill(asleep.process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 60
        while heir.ask("claim") == "taken":
            assert time.monotonic() < deadline
            time.sleep(0.2)
        os.kill(asleep.process.pid, signal.SIGCONT)
        assert asleep.ask("check") == "lost"
        assert asleep.ask("release") == "released"
        assert heir.ask("check") == "mine"
        assert list(ledger.holders()) == [RUN]
        assert heir.ask("release") == "released"
        assert files() == []
    finally:
        asleep.end()
        heir.end()


def test_processes_that_race_and_die_are_never_two_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACER, str(tmp_path / "mark"), "4"]
    racers = [subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
              for seed in range(4)]
    told = [racer.communicate(timeout=60) for racer in racers]
    assert all(not error for _, error in told), told
    lines = [line for out, _ in told for line in out.splitlines()]
    assert "two at once" not in lines
    assert sum(map(int, lines)) > 20
    assert [racer.returncode for racer in racers] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    ledger.sweep()
    assert [name for name in files() if "." not in name] == []


def test_an_heir_keeps_the_first_from_saving_a_second_record(others: list[Holder]) -> None:
    record = Record(id=RUN, spec=SPEC, status="skipped")
    lease = ledger.claim(RUN)
    assert lease is not None
    os.utime(ledger.folder() / RUN, (0, 0))  # as if the heart had not beaten for long
    assert others[0].ask("claim") == "mine"
    with pytest.raises(LostLeaseError):
        records.save(record)
    assert records.load(RUN) is None
    lease.release()
    assert others[0].ask("release") == "released"
    assert os.listdir(paths.runs()) == [".leases"]
    assert records.save(record) == record


def test_a_lease_that_a_crash_of_the_machine_cut_off_expires_like_any_other(others: list[Holder]) -> None:
    ledger.folder().mkdir()
    (ledger.folder() / RUN).touch()
    assert others[0].ask("claim") == "taken"
    os.utime(ledger.folder() / RUN, (0, 0))
    assert others[0].ask("claim") == "mine"
    assert others[0].ask("release") == "released"
    assert files() == []


def test_a_results_folder_that_has_gone_is_said_and_not_made_again() -> None:
    lease = ledger.claim(RUN)
    paths.results().rename(paths.results().with_name("moved"))
    with pytest.raises(StorageError, match="has gone; bring it back"):
        ledger.check(RUN)
    with pytest.raises(StorageError, match="has gone; bring it back"):
        ledger.claim("other")
    assert not paths.results().exists()
    assert lease is not None
    paths.results().with_name("moved").rename(paths.results())
    ledger.check(RUN)  # back in time
    lease.release()
    assert files() == []
