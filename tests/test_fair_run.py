"""The fair protocol for real: a small study on MiniLM, from the command line through tuning to the report."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from suite import assets, data, fair, paths, records
from suite import study as studies
from suite.study import Study
from suite.worker import Worker

pytestmark = pytest.mark.slow

GRID = {"lowest": 1e-5, "highest": 1e-3, "per_decade": 1, "extensions": 2}
STUDY: dict[str, Any] = {
    "id": "fairly", "title": "A small fair study", "about": "For tests.", "paper": {"title": "None"},
    # LoRA learns more the higher the grid goes. B of the wild row takes steps so large that its numbers overflow.
    "rows": {"lora": {"method": "lora", "label": "LoRA"},
             "wild": {"method": "lora-plus", "label": "Wild", "options": {"lr_ratio_b": 1e25}}},
    "scales": {"desk": {"about": "Tiny.", "tables": {"main": {
        "title": "Main table", "base": "minilm", "tasks": ["movie-sentiment"], "rows": ["lora", "wild"],
        "reference": "lora", "budgets": [{"rank": 8}], "seeds": [0], "train": 160, "test": 40,
        "recipe": {"learning_rate": 2e-3, "batch_size": 8, "max_length": 40},
        "fair": {"grid": GRID, "tuning_seeds": [7], "test_seeds": [20, 21], "validation": 80}}}}},
}


class World:
    """A folder with the study file and results of its own, and the command that works on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "fairly.yaml"
        self.file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        self.environment = {**os.environ, "SUITE_RESULTS": str(folder / "results"), "SUITE_REPORTS": str(folder / "out"),
                            "PYTHONPATH": str(paths.REPOSITORY), "HF_HUB_OFFLINE": "1"}
        self.environment.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-m", "suite", *words], env=self.environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True, cwd=self.folder, start_new_session=True)

    def suite(self, *words: str) -> str:
        done = self.start(*words)
        told, errors = done.communicate(timeout=200)
        assert done.returncode == 0, errors
        return told

    def made(self) -> dict[str, float]:
        """When every record was written, by run."""
        found = (self.folder / "results" / "runs").glob("*/record.json")
        return {path.parent.name: path.stat().st_mtime for path in found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A sweep that is killed in its grid, and gone on with by two processes at once."""
    assets.fetch("minilm")
    assets.fetch("hutto-2014")
    made = World(tmp_path_factory.mktemp("world"))
    begun = made.start("run", str(made.file), "--protocol", "fair")
    while len(made.made()) < 2:
        assert begun.poll() is None, begun.communicate()[1]
        time.sleep(0.2)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.communicate()
    before = made.made()
    assert len(before) < 8  # the first round: six of the grid, two of the paper's protocol
    both = [made.start("run", str(made.file), "--protocol", "fair", "--workers", "1", *report) for report in
            ((), ("--report",))]
    told = [one.communicate(timeout=250) for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    assert "What is left of the gains over LoRA" in told[1][0]
    after = made.made()
    assert {run: after[run] for run in before} == before  # what was done is not done again
    counted = [int(line.split(" runs in ")[0]) for _, errors in told for line in errors.splitlines() if " runs in " in line]
    assert sum(counted) == len(after) - len(before)
    return made


@pytest.fixture
def known(world: World, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setenv("SUITE_RESULTS", world.environment["SUITE_RESULTS"])
    monkeypatch.setenv("SUITE_REPORTS", world.environment["SUITE_REPORTS"])
    return studies.load(str(world.file))


def test_every_row_is_settled_and_only_what_was_needed_was_run(world: World, known: Study) -> None:
    needed = {cell.spec.id for cell in fair.cells(known, "desk")}
    assert set(world.made()) == needed
    assert {one.stage for one in fair.progress(known, "desk")} == {"done"}


def test_grids_are_extended_at_both_ends_and_a_diverged_rate_is_the_worst(known: Study) -> None:
    lora, wild = fair.survey(known, "desk")
    assert lora.points[-1].rate > 1e-3
    assert wild.points[0].rate < 1e-5
    assert wild.points[-1].score == 0.0
    assert {record.status for record in wild.points[-1].records.values()} == {"diverged"}
    for one in (lora, wild):
        rates = [point.rate for point in one.points]
        assert all(10 * low == pytest.approx(high) for low, high in itertools.pairwise(rates))
        scores = {point.rate: record.score.value if record.status == "finished" else 0.0 for point in one.points
                  for record in point.records.values() if record.score is not None}
        assert one.chosen == min(rate for rate in rates if scores[rate] == max(scores.values()))
        assert (one.edge is None) == (one.chosen not in (rates[0], rates[-1]))
        assert one.edge is None or len(rates) == 5


def test_the_same_command_again_runs_nothing(world: World, known: Study) -> None:
    before = world.made()
    world.suite("run", str(world.file), "--protocol", "fair")
    assert world.made() == before
    told = json.loads(world.suite("status", str(world.file), "--protocol", "fair", "--json"))
    assert {run["status"] for run in told["runs"]} <= {"finished", "diverged"}
    assert [row["row"] for row in told["rows"]] == ["lora", "wild"]


def test_page_and_files_show_both_protocols(world: World) -> None:
    folder = world.folder / "out" / "fairly-desk"
    page = (folder / "index.html").read_text(encoding="utf-8")
    for words in ("What is left of the gains over LoRA", "Learning rates that were chosen", "Validation score against"):
        assert words in page
    assert "fairly-desk/figures" not in page
    for name in ("tables/main-fair-gains.csv", "tables/main-fair-rates.tex", "figures/main-fair-curves.svg",
                 "figures/main-fair-curves.csv"):
        assert (folder / name).stat().st_size > 100


def test_mlflow_keeps_validation_and_test_scores_apart(world: World) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{world.folder / 'results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fairly")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == len(world.made())
    for run in runs:
        tuning = run.data.params["evaluation.split"] == "validation"
        assert ("validation_score" in run.data.metrics) == tuning
        assert ("score" in run.data.metrics) != tuning


def test_changed_test_labels_change_no_tuning_run(known: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tuning runs on data whose test labels are all turned round give the same answers, so the same choice."""
    lora = fair.survey(known, "desk")[0]
    cells = [cell for point in lora.points[-2:] for cell in point.cells]
    before = {cell.spec.id: records.load(cell.spec.id) for cell in cells}
    honest = data.splits("movie-sentiment")
    turned = replace(honest, test=[replace(item, label=1 - (item.label or 0)) for item in honest.test])
    monkeypatch.setattr(data, "splits", lambda task: turned)
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))
    data.load.cache_clear()
    worker = Worker()
    for cell in cells:
        (record,) = worker.run([cell.spec])
        first = before[cell.spec.id]
        assert first is not None
        assert record.data is not None
        assert first.data is not None
        assert record.data.fingerprint != first.data.fingerprint  # the test data did change
        assert (record.scores, record.final_loss) == (first.scores, first.final_loss)
    data.load.cache_clear()
