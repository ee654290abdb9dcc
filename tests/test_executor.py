"""Worker processes on the real MiniLM: shared studies, killed workers, Ctrl-C. Nothing here is stubbed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from suite import assets, bases, executor, ledger, paths, records, registry
from suite.executor import Event
from suite.specs import BaseRef, Budget, Evaluation, MethodRef, Recipe, RunSpec, TaskRef

pytestmark = pytest.mark.slow

# Runs the specs that it is given as JSON, each a pack of its own, and prints every event.
DRIVER = """
import json, signal, sys
from suite import executor
from suite.specs import RunSpec

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background deaf to it

def tell(event):
    status = event.record.status if event.record else ""
    print(json.dumps([event.kind, event.run, event.phase, status]), flush=True)

if __name__ == "__main__":
    packs = [[RunSpec.model_validate(spec)] for spec in json.loads(sys.argv[1])]
    try:
        print(json.dumps(["begin", "", "", ""]), flush=True)
        executor.run(packs, 1, 1, "cpu", tell)
        print(json.dumps(["end", "", "", ""]), flush=True)
    except KeyboardInterrupt:
        print(json.dumps(["interrupted", "", "", ""]), flush=True)
"""


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch("minilm")
    assets.fetch("hutto-2014")
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PYTHONPATH", str(paths.REPOSITORY))


def spec(seed: int) -> RunSpec:
    """One LoRA run on 16 items."""
    lora, task, base = registry.method("lora"), registry.task("movie-sentiment"), bases.get("minilm")
    return RunSpec(
        base=BaseRef(id=base.id, revision=base.revision),
        task=TaskRef(id=task.id, version=task.version, train=16, test=16),
        method=MethodRef(id=lora.id, version=lora.version, config=lora.Config().model_dump(mode="json")),
        budget=Budget(rank=8),
        recipe=Recipe(learning_rate=1e-3, batch_size=8, max_length=32),
        evaluation=Evaluation(),
        seed=seed,
    )


class Driver:
    """A `suite run` in miniature: a process, in a group of its own, that runs specs and tells its events."""

    def __init__(self, specs: list[RunSpec], folder: Path) -> None:
        script = folder / "driver.py"
        script.write_text(DRIVER, encoding="utf-8")
        content = json.dumps([spec.model_dump(mode="json") for spec in specs])
        self.process = subprocess.Popen(
            [sys.executable, str(script), content],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.events: list[list[str]] = []

    def until(self, kind: str) -> list[str]:
        """Read events until one of this kind has come."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1][0] == kind:
                return self.events[-1]
        raise AssertionError(f"no {kind} among {self.events}")

    def finish(self) -> str:
        """Read the rest; returns what was written to the error stream."""
        output, errors = self.process.communicate(timeout=120)
        self.events.extend(json.loads(line) for line in output.splitlines())
        return errors

    def made(self) -> list[str]:
        return [run for kind, run, _, _ in self.events if kind == "record"]


def left() -> list[str]:
    """What stands in the folder of runs, leases and half-written runs among it."""
    folders = paths.runs(), ledger.folder(), records.drafts()
    return sorted(path.name for folder in folders if folder.exists() for path in folder.iterdir() if path not in folders)


def claimed(run_id: str) -> bool:
    return run_id in ledger.holders()


def test_two_processes_share_a_study_and_do_no_run_twice(tmp_path: Path) -> None:
    specs = [spec(seed) for seed in range(4)]
    ids = [spec.id for spec in specs]
    drivers = [Driver(specs, tmp_path), Driver(specs, tmp_path)]
    errors = [driver.finish() for driver in drivers]
    assert [driver.process.returncode for driver in drivers] == [0, 0], errors
    assert sorted(run for driver in drivers for run in driver.made()) == sorted(ids)
    assert left() == sorted(ids)
    assert {records.load(run).status for run in ids} == {"finished"}  # type: ignore[union-attr]


def test_a_killed_worker_has_its_run_tried_once_more_and_then_recorded_as_failed() -> None:
    """The first run's worker is killed once, the second run's twice."""
    once, twice = spec(0).id, spec(1).id
    deaths = Counter({once: 1, twice: 2})
    events: list[Event] = []

    def listen(event: Event) -> None:
        events.append(event)
        if event.kind == "progress" and deaths[event.run] > 0:
            deaths[event.run] -= 1
            for child in multiprocessing.active_children():
                os.kill(child.pid or 0, signal.SIGKILL)

    executor.run([[spec(0)], [spec(1)]], 1, 1, "cpu", listen)
    assert [event.run for event in events if event.kind == "record"] in ([once, twice], [twice, once])
    assert records.is_done(once)
    failed = records.load(twice)
    assert failed is not None
    assert (failed.status, records.is_done(twice)) == ("failed", False)
    assert failed.reason == "the worker process died twice with exit code -9 (killed, perhaps out of memory)"
    assert not multiprocessing.active_children()
    assert left() == sorted([once, twice])


def test_ctrl_c_leaves_whole_records_only_and_a_second_call_goes_on(tmp_path: Path) -> None:
    specs = [spec(seed) for seed in range(3)]
    driver = Driver(specs, tmp_path)
    first = driver.until("record")[1]
    driver.until("progress")
    os.killpg(driver.process.pid, signal.SIGINT)
    errors = driver.finish()
    assert driver.events[-1][0] == "interrupted"
    assert "Traceback" not in errors
    assert "KeyboardInterrupt" not in errors
    done = [spec.id for spec in specs if records.is_done(spec.id)]
    assert first in done
    assert len(done) < 3
    assert left() == sorted(done)
    assert not any(claimed(spec.id) for spec in specs)

    again: list[str] = []
    executor.run(
        [[spec] for spec in specs],
        1,
        1,
        "cpu",
        lambda event: again.append(event.run) if event.kind == "record" else None,
    )
    assert sorted(again) == sorted({spec.id for spec in specs} - set(done))
    assert left() == sorted(spec.id for spec in specs)


@pytest.mark.parametrize("seconds", [0.1, 0.3, 0.6])
def test_ctrl_c_while_workers_start_is_quiet(tmp_path: Path, seconds: float) -> None:
    driver = Driver([spec(0)], tmp_path)
    driver.until("begin")
    time.sleep(seconds)
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.finish() == ""
    assert driver.events[-1][0] == "interrupted"
    assert not paths.runs().exists() or left() == []


def test_workers_whose_driver_is_killed_finish_what_they_have_and_leave(tmp_path: Path) -> None:
    specs = [spec(0), spec(1)]
    driver = Driver(specs, tmp_path)
    driver.until("progress")
    workers = psutil.Process(driver.process.pid).children(recursive=True)
    driver.process.kill()
    driver.finish()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert left() == [specs[0].id]
    assert records.is_done(specs[0].id)
    assert not claimed(specs[0].id)
