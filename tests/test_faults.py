"""Faults on real parts: memory that runs out, disks that are full, folders that go, workers and drivers killed at any
moment, an MLflow server that dies or hangs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from test_executor import Driver, left, spec

from suite import assets, executor, ledger, limits, paths, records
from suite.faults import StorageError, full, out_of_memory
from suite.specs import RunSpec
from suite.worker import Worker

# Runs a run, then four at once with little more room than that took.
STARVED = """
import json, resource, sys
from suite import environment
from suite.specs import RunSpec
from suite.worker import Worker
from suite.worker import Worker

specs = [RunSpec.model_validate(one) for one in json.loads(sys.argv[1])]
worker = Worker()
worker.run(specs[:1])
environment.release()
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + int(float(sys.argv[2]) * 2**20),) * 2)
seen = []
made = worker.run(specs[1:], lambda *at: seen.append(at))
cut = [at for at in seen if at[0] in ("halve", "shrink")]
print(json.dumps([cut, [[one.status, one.pack and one.pack.size, one.trace] for one in made]]))
"""


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("PYTHONPATH", str(paths.REPOSITORY))
    paths.runs().mkdir(parents=True)


def as_json(specs: list[RunSpec]) -> str:
    return json.dumps([one.model_dump(mode="json") for one in specs])


def raised(act: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  what is raised is the question
        act()
    return caught.value


HUGE = 2**58


@pytest.mark.parametrize("act", [lambda: torch.empty(HUGE), lambda: bytearray(HUGE), lambda: np.zeros(HUGE, np.uint8)],
                         ids=["torch", "python", "numpy"])
def test_an_error_of_memory_is_known_as_such(act: Callable[[], Any]) -> None:
    error = raised(act)
    assert out_of_memory(error)
    assert not full(error)


FULL = Path("/dev/full")  # every byte written to it fails as on a full disk


@pytest.mark.parametrize("act", [
    lambda: FULL.write_text("some", encoding="utf-8"),
    lambda: pd.DataFrame({"a": range(100)}).to_parquet(FULL),
], ids=["text", "parquet"])
def test_an_error_of_room_is_known_as_such(act: Callable[[], Any]) -> None:
    error = raised(act)
    assert full(error)
    assert not out_of_memory(error)


def test_other_errors_are_neither(tmp_path: Path) -> None:
    for act in (lambda: torch.ones(2) @ torch.ones(3), lambda: int("x"), lambda: (tmp_path / "none").read_text()):
        error = raised(act)
        assert not full(error)
        assert not out_of_memory(error)


def test_a_limit_is_kept_for_its_kind_and_cuts_packs_evenly() -> None:
    pack = [spec(seed) for seed in range(7)]
    assert limits.cut(pack) == [pack]
    limits.learn(pack[0], 4)
    assert limits.cut(pack) == [pack[:4], pack[4:]]
    limits.learn(pack[0], 3)
    limits.learn(pack[0], 6)  # what did not fit once is not tried again
    assert [len(part) for part in limits.cut(pack)] == [3, 3, 1]
    other = pack[0].model_copy(update={"recipe": pack[0].recipe.model_copy(update={"max_length": 128})})
    assert limits.most(other) is None


@pytest.fixture
def parts() -> None:
    for asset in ("minilm", "hutto-2014"):
        assets.fetch(asset)


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(("room", "fits"), [(800, {1, 2}), (150, {1})])
def test_a_pack_that_runs_out_of_memory_is_halved_and_the_next_is_cut_before_it_starts(room: int, fits: set[int]) -> None:
    """Of a batch of 32 sentences, one run needs 0.4 GB: two fit into 0.8 GB more than one took, four do not. With little
    more than one took, what two failed attempts leave behind must not keep out the run alone, which did fit before."""
    wide = [one.model_copy(update={
        "task": one.task.model_copy(update={"train": 32}),
        "recipe": one.recipe.model_copy(update={"batch_size": 32, "max_length": 64})}) for one in map(spec, range(5))]
    command = [sys.executable, "-c", STARVED, as_json(wide), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    halved, made = json.loads(done.stdout.splitlines()[-1])
    assert halved[0] == ["halve", 2, 4]
    assert [status for status, _, _ in made] == ["finished"] * 4, made
    fitting = limits.most(wide[0])
    assert fitting in fits
    assert {size for _, size, _ in made} == {fitting}
    assert [len(part) for part in limits.cut(wide[1:])] == [fitting] * (4 // fitting)


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
def test_a_run_that_does_not_fit_alone_is_trained_in_parts_of_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(batch: int) -> RunSpec:
        one = spec(0)
        return one.model_copy(update={
            "task": one.task.model_copy(update={"train": 64}),
            "evaluation": one.evaluation.model_copy(update={"batch_size": 4}),
            "recipe": one.recipe.model_copy(update={"batch_size": batch, "max_length": 64})})

    command = [sys.executable, "-c", STARVED, as_json([of(2), of(64)]), "300"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cut, made = json.loads(done.stdout.splitlines()[-1])
    assert [status for status, _, _ in made] == ["finished"], made
    assert cut[0] == ["shrink", 32, 64]
    found = limits.known(of(64))
    assert found.items is not None
    assert found.items < 64
    parts = records.load(of(64).id)
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "elsewhere"))
    [whole] = Worker().run([of(64)])
    assert parts is not None
    assert parts.final_loss == pytest.approx(whole.final_loss, rel=1e-4)
    assert limits.known(of(64)) == limits.Limits()


def test_limits_tighten_to_one_item_and_then_to_activations_computed_again() -> None:
    one = spec(0)
    batch, seen = one.recipe.batch_size, []
    while (found := limits.tighten(one)) is not None:
        seen.append((found.items, found.recompute))
    assert seen[0] == (-(-batch // 2), False)
    assert seen[-2:] == [(1, False), (1, True)]
    limits.learn(one, 3)
    assert limits.known(one) == limits.Limits(runs=3, items=1, recompute=True)


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
def test_a_killed_pack_is_tried_in_halves_but_teaches_nothing_when_it_was_no_want_of_memory() -> None:
    pack, killed = [spec(0), spec(1)], []

    def listen(event: executor.Event) -> None:
        if event.kind == "progress" and not killed:
            killed.extend(psutil.Process().children())
            for child in killed:
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    executor.run([pack], 1, 1, "cpu", listen)
    made = records.load_many(one.id for one in pack)
    assert [(record.status, record.pack and record.pack.size) for record in made.values()] == [("finished", 1)] * 2
    assert limits.most(pack[0]) is None


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
def test_a_results_folder_that_goes_ends_the_sweep_and_it_goes_on_when_it_is_back() -> None:
    results, away = paths.results(), paths.results().with_name("away")

    def take_away(event: executor.Event) -> None:
        if event.kind == "progress" and results.exists():
            results.rename(away)

    with pytest.raises(StorageError, match="has gone; bring it back"):
        executor.run([[spec(0)]], 1, 1, "cpu", take_away)
    assert not paths.runs().exists()
    away.rename(results)
    executor.run([[spec(0)]], 1, 1, "cpu", lambda event: None)
    assert records.is_done(spec(0).id)
    assert left() == [spec(0).id]


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize("content", [b"", bytes(4096)], ids=["empty", "zeros"])
def test_a_record_that_a_power_cut_emptied_is_made_again_and_is_the_same(content: bytes) -> None:
    executor.run([[spec(0)]], 1, 1, "cpu", lambda event: None)
    before = outcome(spec(0).id)
    (records.folder(spec(0).id) / "record.json").write_bytes(content)
    assert not records.is_done(spec(0).id)
    executor.run([[spec(0)]], 1, 1, "cpu", lambda event: None)
    assert outcome(spec(0).id) == before
    assert left() == [spec(0).id]


def test_a_folder_that_cannot_be_written_is_named() -> None:
    ledger.folder().touch()
    with pytest.raises(StorageError, match=r"runs cannot be written \(.*\); make it writable"):
        ledger.claim(spec(0).id)


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
def test_killed_at_random_moments_a_sweep_ends_as_if_undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is killed, then its driver and all workers, then the next driver alone, which leaves a worker at work."""
    specs = [spec(seed) for seed in range(6)]
    draw = random.Random(time.time_ns())
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "calm"))
    calm = Driver(specs, tmp_path)
    assert calm.finish() == ""
    expected = {one.id: outcome(one.id) for one in specs}

    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    first = Driver(specs, tmp_path)
    for victim in ("worker", "all"):
        first.until("progress")
        time.sleep(draw.random())
        if victim == "all":
            os.killpg(first.process.pid, signal.SIGKILL)
        else:
            for child in workers(first):
                child.kill()
    first.process.communicate()
    second = Driver(specs, tmp_path)
    second.until("progress")
    time.sleep(draw.random())
    second.process.kill()
    second.process.communicate()
    last = Driver(specs, tmp_path)
    assert last.finish() == ""
    assert last.events[-1][0] == "end"
    assert {one.id: outcome(one.id) for one in specs} == expected
    made = [run for driver in (first, second, last) for run in driver.made()]
    assert len(made) == len(set(made))
    assert left() == sorted(one.id for one in specs)


def workers(driver: Driver) -> list[psutil.Process]:
    return [child for child in psutil.Process(driver.process.pid).children() if "spawn_main" in " ".join(child.cmdline())]


def outcome(run_id: str) -> tuple[Any, ...]:
    """All that a run says of itself but for times, to the last bit."""
    record = records.load(run_id)
    assert record is not None
    tables = [frame.to_json(double_precision=15) for frame in (record.curves(), record.predictions()) if frame is not None]
    return record.status, record.scores, record.final_loss, *tables, (record.folder / "adapter.safetensors").read_bytes()


# On a disk of less than what one run leaves; then with room; then, where a disk can be mounted, when it may only be read.
DISK = """
mount -t tmpfs -o size=900k none "$SUITE_RESULTS" || exit 9
"$@"; echo "code $?"; ls -A "$SUITE_RESULTS/runs" "$SUITE_RESULTS/runs/.leases" "$SUITE_RESULTS/runs/.drafts"
mount -o remount,size=64m "$SUITE_RESULTS"
"$@"; echo "code $?"; find "$SUITE_RESULTS/runs" -name record.json
mount -o remount,ro "$SUITE_RESULTS"
"$@"; echo "code $?"
"""
LIMIT = """
(ulimit -f 800; "$@"); echo "code $?"; ls -A "$SUITE_RESULTS/runs"{,/.leases,/.drafts}
"$@"; echo "code $?"; find "$SUITE_RESULTS/runs" -name record.json
chmod -w "$SUITE_RESULTS/runs"; echo "code 2"
"""


@pytest.mark.slow
@pytest.mark.usefixtures("parts")
def test_a_full_disk_ends_the_sweep_with_a_sentence_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """On a real full disk where one can be mounted, else with a limit on the size of files, which is said alike."""
    study = tmp_path / "small.yaml"
    study.write_text(json.dumps(SMALL), encoding="utf-8")
    command = [sys.executable, "-m", "suite", "run", str(study), "--workers", "1"]
    own = ["unshare", "-Urm", "sh", "-c"]
    disk = subprocess.run([*own, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode == 0
    shell = [*own, DISK] if disk else ["bash", "-c", LIMIT]
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    done = subprocess.run([*shell, "sh", *command], capture_output=True, text=True, check=False, env=environment)
    first, second, third = [part.split("\n", 1) for part in f"\n{done.stdout}".split("\ncode ")[1:]]
    assert (first[0], second[0], third[0]) == ("1", "0", "2"), done.stderr
    assert [line for line in first[1].splitlines() if line and not line.endswith(":")] == [".drafts", ".leases"], first
    assert second[1].count("record.json") == 1
    said = " ".join(done.stderr.split())  # a long path wraps the lines elsewhere
    assert "there is no room left for" in said
    assert "0 runs are kept, 1 are left" in said
    assert "Traceback" not in said
    if disk:
        assert "cannot be written (Read-only file system)" in said


SMALL = {
    "id": "small", "title": "A small study", "about": "For tests.", "paper": {"title": "None"},
    "rows": {"lora": {"method": "lora", "label": "LoRA"}},
    "scales": {"desk": {"about": "Tiny.", "tables": {"main": {
        "title": "Main table", "base": "minilm", "tasks": ["movie-sentiment"], "rows": ["lora"], "reference": "lora",
        "budgets": [{"rank": 8}], "seeds": [0], "train": 16, "test": 16,
        "recipe": {"learning_rate": 2e-3, "batch_size": 8, "max_length": 32}}}}},
}
