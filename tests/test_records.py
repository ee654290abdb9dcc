"""Records: whole or not at all, and read back as they were written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from suite import paths, records
from suite.errors import UserError
from suite.records import Data, Memory, Pack, Record, Score, Status, Throughput, Timings, Trainable
from suite.specs import BaseRef, Budget, Decode, Evaluation, MethodRef, Recipe, RunSpec, TaskRef

SPEC = RunSpec(
    base=BaseRef(id="minilm", revision="1"),
    task=TaskRef(id="movies", version=1, train=16, test=4),
    method=MethodRef(id="lora", version=1, config={"rank": 4, "alpha": 16.0, "target_modules": None}),
    budget=Budget(rank=4),
    recipe=Recipe(learning_rate=1e-3, precision="bfloat16"),
    evaluation=Evaluation(decode=Decode(max_new_tokens=8)),
    seed=3,
)
CURVES = pd.DataFrame(
    {"step": [1, 2], "loss": [0.7, float("nan")], "gradient_norm": [1.0, 2.0], "learning_rate": [1e-3, 0]}
)
PREDICTIONS = pd.DataFrame(
    {
        "item": ["a", "b", "c", "é"],
        "expected": [0, 1, 1, 0],
        "predicted": [0, 1, 0, 0],
        "correct": [True, True, False, True],
    }
)

# Begins to save a record and stops with everything written but not yet moved to its place.
HALF = """
import sys, time
from suite import records
record = records.Record.model_validate_json(sys.stdin.read())
with records.writing(record.id) as scratch:
    (scratch / "record.json").write_text(record.model_dump_json(), encoding="utf-8")
    print("ready", flush=True)
    time.sleep(60)
"""
# Saves a record over and over.
LOOP = """
import sys
from suite import records
record = records.Record.model_validate_json(sys.stdin.read())
records.save(record)
print("ready", flush=True)
while True:
    records.save(record)
"""


@contextmanager
def writer(script: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has been given a full record and has said that it is ready; killed in the end."""
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(paths.REPOSITORY)},
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(full().model_dump_json())
        child.stdin.close()
        assert child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))


def record(status: Status = "finished") -> Record:
    return Record(id=SPEC.id, spec=SPEC, status=status)


def full() -> Record:
    """A record with every part filled."""
    return Record(
        id=SPEC.id,
        spec=SPEC,
        status="finished",
        reason="none",
        scores=[Score(metric="accuracy", value=0.75, items=4, stderr=0.2165)],
        final_loss=0.123456789012345,
        trainable=Trainable(adapter=100, head=10, total=110, share=1e-5),
        data=Data(fingerprint="f" * 16, train=16, test=4, truncated=1, majority=0.5),
        timings=Timings(load=1.0, prepare=2.0, train=3.0, evaluate=4.0, save=0.5),
        throughput=Throughput(steps=2, tokens=1000, padding=0.1, tokens_per_second=3.3),
        memory=Memory(resident=2**33, device=None),
        pack=Pack(size=3, position=1),
        decode={"do_sample": False, "max_new_tokens": 8},
        prepare={"ranks": {"layer.0": 4, "layer.1": 7}},
        environment={"python": "3.11", "packages": {"torch": "2.13.0"}},
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:10+00:00",
        trace="line 1\nline 2",
    )


def test_a_record_is_read_back_as_it_was_written() -> None:
    adapter = {"layer.A": torch.arange(6, dtype=torch.float32).reshape(2, 3)}
    saved = records.save(full(), CURVES, PREDICTIONS, adapter)
    found = records.load(SPEC.id)
    assert found == saved
    assert found is not None
    assert found.spec.id == SPEC.id
    assert found.adapter_bytes == (found.folder / "adapter.safetensors").stat().st_size
    assert found == full().model_copy(update={"adapter_bytes": found.adapter_bytes})
    assert found.timings.total == 10.5


def test_tables_and_adapters_are_read_back_as_they_were_written() -> None:
    from safetensors.torch import load_file

    adapter = {"layer.A": torch.randn(2, 3).bfloat16(), "head.bias": torch.zeros(2)}
    saved = records.save(record(), CURVES, PREDICTIONS, adapter)
    curves, predictions = saved.curves(), saved.predictions()
    assert curves is not None
    assert predictions is not None
    pd.testing.assert_frame_equal(curves, CURVES)
    pd.testing.assert_frame_equal(predictions, PREDICTIONS)
    found = load_file(saved.folder / "adapter.safetensors")
    assert found.keys() == adapter.keys()
    assert all(torch.equal(found[name], adapter[name]) for name in adapter)


def test_parts_that_a_run_does_not_have_are_absent() -> None:
    saved = records.save(record("skipped"))
    assert sorted(path.name for path in saved.folder.iterdir()) == ["record.json"]
    assert (saved.curves(), saved.predictions(), saved.score, saved.adapter_bytes) == (None, None, None, None)


def left() -> list[str]:
    """What stands in the results folder, half-written or whole."""
    return [path.name for path in (*paths.runs().iterdir(), *paths.runs().glob(".drafts/*")) if path.name != ".drafts"]


def test_saving_again_replaces_every_file() -> None:
    records.save(record("failed"), CURVES, PREDICTIONS, {"A": torch.zeros(1)})
    records.save(record())
    assert [path.name for path in records.folder(SPEC.id).iterdir()] == ["record.json"]
    assert left() == [SPEC.id]


@pytest.mark.parametrize(
    ("status", "done"), [("finished", True), ("diverged", True), ("skipped", True), ("failed", False)]
)
def test_failed_runs_are_not_done(status: Status, done: bool) -> None:
    assert not records.is_done(SPEC.id)
    records.save(record(status))
    assert records.is_done(SPEC.id) is done


def test_only_records_that_exist_are_loaded() -> None:
    records.save(record())
    assert records.load_many(["missing", SPEC.id]) == {SPEC.id: record()}
    assert records.load("missing") is None


def test_a_folder_without_a_record_is_no_run() -> None:
    records.folder(SPEC.id).mkdir(parents=True)
    assert records.load(SPEC.id) is None
    assert not records.is_done(SPEC.id)
    records.save(record())
    assert records.is_done(SPEC.id)


def test_an_error_in_the_middle_leaves_nothing() -> None:
    def begin() -> None:
        with records.writing(SPEC.id) as scratch:
            (scratch / "record.json").write_text(record().model_dump_json(), encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert left() == []


def test_an_error_in_the_middle_leaves_the_earlier_record() -> None:
    records.save(record("failed"))
    with pytest.raises(AttributeError):
        records.save(record(), curves="no table")  # type: ignore[arg-type]
    assert records.load(SPEC.id) == record("failed")


def test_a_process_killed_in_the_middle_leaves_nothing_that_reads_as_a_record() -> None:
    with writer(HALF) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert records.load(SPEC.id) is None
    assert not records.folder(SPEC.id).exists()
    records.save(full())
    assert left() == [SPEC.id]


def test_a_reader_sees_a_whole_record_or_none_while_it_is_saved_over_and_over() -> None:
    with writer(LOOP):
        end = time.monotonic() + 0.5
        seen = [records.load(SPEC.id) for _ in iter(lambda: time.monotonic() < end, False)]
    assert full() in seen
    assert all(found in (None, full()) for found in seen)


@pytest.mark.parametrize("content", [b"", b"{", b'{"id": "x", "spec": {"ba', bytes(900), b"\xff\xfe\x00\x01"],
                         ids=["empty", "cut", "cut later", "zeros", "not text"])
def test_what_a_power_cut_leaves_is_as_no_record_and_is_replaced(content: bytes) -> None:
    records.save(full(), CURVES, PREDICTIONS)
    (records.folder(SPEC.id) / "record.json").write_bytes(content)
    assert records.load(SPEC.id) is None
    assert not records.is_done(SPEC.id)
    assert dict(records.each([SPEC.id])) == records.load_many([SPEC.id]) == {}
    assert records.OnDisk([SPEC.id]).get(SPEC.id) is None
    records.save(full())
    assert records.load(SPEC.id) == full()
    assert left() == [SPEC.id]


def test_files_are_on_the_disk_before_they_get_their_name_and_the_name_before_the_run_counts_as_saved(
        monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls as they are made, with what each was for; they do their work."""
    told: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        told.append(("disk", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def watched_replace(source: Any, target: Any) -> None:
        told.append(("name", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    records.save(record(), CURVES, PREDICTIONS, {"a": torch.ones(2)})
    *files, draft, name, runs = told
    assert set(files) == {("disk", "curves.parquet"), ("disk", "predictions.parquet"), ("disk", "adapter.safetensors"),
                          ("disk", "record.json")}
    assert draft[0] == "disk"
    assert draft[1].startswith(SPEC.id)
    assert (name, runs) == (("name", SPEC.id), ("disk", "runs"))
    told.clear()
    paths.write_json(paths.results() / "some.json", {})
    assert [what for what, _ in told] == ["disk", "name", "disk"]
    assert told[1:] == [("name", "some.json"), ("disk", paths.results().name)]


def test_records_on_disk_are_a_mapping_that_reads_when_asked() -> None:
    found = records.OnDisk([SPEC.id, "missing", SPEC.id])
    assert (len(found), list(found), SPEC.id in found) == (0, [], False)
    records.save(record())
    assert dict(found) == {SPEC.id: record()}
    assert "missing" not in found
    assert "other" not in found
    records.save(record("failed"))
    assert found[SPEC.id].status == "failed"


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b'{"id": "x"}',
        json.dumps(
            json.loads(Record(id="x", spec=SPEC, status="failed").model_dump_json()) | {"more": 1}
        ).encode(),
        json.dumps(
            json.loads(Record(id="x", spec=SPEC, status="failed").model_dump_json()) | {"status": "fine"}
        ).encode(),
    ],
    ids=["a list", "keys missing", "unknown key", "unknown status"],
)
def test_a_damaged_record_is_said_in_one_sentence(content: bytes) -> None:
    records.folder(SPEC.id).mkdir(parents=True)
    path = records.folder(SPEC.id) / "record.json"
    path.write_bytes(content)
    for ask in (records.load, records.is_done):
        with pytest.raises(UserError) as caught:
            ask(SPEC.id)
        assert str(caught.value).startswith(f"{path} is not a record of this version of the suite (")
        assert str(caught.value).endswith("delete its folder to run it again")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PAR1 cut off"])
def test_a_damaged_table_is_an_error_that_readers_can_name(content: bytes) -> None:
    saved = records.save(record(), CURVES, PREDICTIONS)
    for name, ask in (("curves", saved.curves), ("predictions", saved.predictions)):
        (saved.folder / f"{name}.parquet").write_bytes(content)
        with pytest.raises((OSError, ValueError)):
            ask()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_score_that_could_not_be_read_again_is_refused_at_once(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Score(metric="accuracy", value=value, items=1, stderr=0.0)
