"""Real faults in real runs: MiniLM is trained and SmolLM2-135M answers, a baseline is accepted, and then each fault is put
into the code that the runs go through."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from benchmarks.gate import FAULTS, Laboratory, nothing, red, study
from suite import assets, baseline, paths, records
from suite.study import Study, cells
from suite.worker import Worker

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    for asset in ("minilm", "hutto-2014", "smollm2-135m"):
        assets.fetch(asset)
    return Laboratory(tmp_path_factory.mktemp("laboratory"), study())


@pytest.mark.parametrize("name", list(FAULTS))
def test_a_fault_turns_its_gate_red_and_no_other(laboratory: Laboratory, name: str) -> None:
    fault = FAULTS[name]
    found = laboratory.trial(name, fault.inject, fault.only)
    gates = red(found) - {"speed", "memory"}  # other processes share the machine
    assert fault.must <= gates <= fault.must | fault.may, [finding.said for finding in found if finding.red]
    table = fault.only[0].removeprefix("table=")
    assert {finding.table for finding in found if finding.red and finding.gate in gates} == {table}
    said = " ".join(finding.said for finding in found if finding.red)
    assert WORDS[name] in said


#: What the findings must tell, beside being red.
WORDS = {
    "sampling": "the loss did not move: look at what evaluates",
    "padding": "decode.padding: right where the baseline has left",
    "rate": "look at what trains", "sign-start": "gora on movie-sentiment: the loss moved",
    "sign-evaluation": "the loss did not move: look at what evaluates", "labels": "expected answers: 2 of 200 are others",
    "skipped": "amazon-sentiment, all rows: 1 of 1 run that the baseline has are lacking",
}


def test_runs_made_again_are_equal_bit_for_bit(laboratory: Laboratory) -> None:
    found = laboratory.trial("again", nothing, ("table=sentiment", "method=rslora"))
    assert not red(found)
    moved = [finding.numbers["moved"] for finding in found if finding.gate == "training"]
    assert moved == [0.0] * 5
    assert {(finding.numbers["lost"], finding.numbers["gained"]) for finding in found if finding.gate == "evaluation"} == {
        (0, 0)}
    assert [finding.numbers.get("own") for finding in found if finding.gate == "presence"] == [3, 1, 1]


def test_a_first_alarm_is_looked_at_again_with_fresh_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A curve that was wrong once, and whose fresh seeds train as they did, is green after the second look."""
    for asset in ("minilm", "hutto-2014"):
        assets.fetch(asset)
    for name in ("RESULTS", "MEASURED"):
        monkeypatch.setenv(f"SUITE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(paths.REPOSITORY))
    whole = study()
    edition = whole.scales["desk"]
    of: Study = whole.model_copy(update={"scales": {"desk": edition.model_copy(
        update={"tables": {"shops": edition.tables["shops"]}})}})
    planned = cells(of, "desk")
    console = Console(stderr=True)
    worker = Worker()
    for cell in [*planned, *cells(baseline._spare(of, "desk"), "desk")]:
        worker.run([cell.spec])
    baseline.accept(of, "desk", "here", "the first runs here", spare=True, console=console)
    assert [run.cell.spec.seed for run in baseline.find(of.id, "desk").spare.values()] == list(baseline.SPARE_SEEDS)

    record = records.load(planned[0].spec.id)
    assert record is not None
    curves = pd.read_parquet(record.folder / "curves.parquet")
    curves.assign(loss=curves["loss"] + 0.01).to_parquet(record.folder / "curves.parquet", index=False)
    known = {record.id: record}
    first = baseline.compare(of, "desk", planned, known)
    assert red(first) == {"training"}
    second = baseline.confirm(of, "desk", planned, known, first, console=console)
    assert len(second) == len(first)
    assert not red(second)
    (looked,) = [finding for finding in second if finding.gate == "training"]
    assert looked.numbers["seeds"] == 3
    fresh = records.load_many(run.record.id for run in baseline.find(of.id, "desk").spare.values())
    stored = {run.record.id: run.record.started for run in baseline.find(of.id, "desk").spare.values()}
    assert all(record.started != stored[run] for run, record in fresh.items())  # made again, not read
