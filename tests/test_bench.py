"""`suite bench`: its arithmetic, its verdict, its sampling, and all three ways for real on a tiny sweep."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from suite import assets, bases, cli, paths, registry, study
from suite.bench import output, processes, workload
from suite.bench.figures import (
    Measured,
    RunResult,
    Spread,
    Way,
    differences,
    operations_per_token,
    ratio,
    same_runs,
    utilisation,
)
from suite.bench.sitting import Sitting, of_trainer
from suite.bench.workload import Run, Tolerance
from suite.errors import UserError

RUNS = [Run(4, 1e-3, seed) for seed in (0, 1, 2, 3)]


def result(run: Run, /, **changed: object) -> RunResult:
    made = RunResult(run, train=10.0, evaluate=2.0, score=0.80, items=500, losses=(0.7, 0.6, 0.5, 0.4), tokens=1000,
                     adapter=300, trained=310)
    return replace(made, **changed)  # type: ignore[arg-type]


def measured(wall: float, results: list[RunResult], lanes: float = 1.0) -> Measured:
    return Measured(wall, total=4, results=tuple(results), start_up=(5.0,), resident=2**30, device=None, lanes=lanes)


def way(id: str, walls: list[float], results: list[RunResult], lanes: float = 1.0) -> Way:
    return Way(id, f"way {id}", "float32", 1, [measured(wall, results, lanes) for wall in walls])


OURS = way("c", [40.0, 50.0, 60.0], [result(run) for run in RUNS], lanes=2.0)


def test_utilisation_counts_four_operations_per_frozen_and_six_per_trained_parameter() -> None:
    assert operations_per_token(10_000_000, 500_000) == 43_000_000
    assert utilisation(1000, 10_000_000, 500_000, peak=86e9) == pytest.approx(0.5)


def test_a_sample_stands_for_the_whole_sweep_and_ratios_are_taken_repeat_by_repeat() -> None:
    sampled = way("a", [100.0, 100.0, 150.0], [result(run) for run in RUNS[:2]])
    assert sampled.wall == Spread(200.0, 200.0, 300.0)
    assert sampled.per_run == 50.0
    assert ratio(sampled, OURS) == Spread(5.0, 4.0, 5.0)  # 200/40, 200/50, 300/60


def test_rates_count_the_wall_time_or_the_training_of_all_lanes() -> None:
    assert OURS.tokens_per_second() == Spread(80.0, pytest.approx(4000 / 60), 100.0)
    assert OURS.training_tokens_per_second().median == 4000 / (40.0 / 2)


def test_the_final_loss_is_the_last_quarter_and_a_logged_window_stands_for_its_steps() -> None:
    told = {"windows": [(4, 1.0), (8, 0.5)], "steps": 9, "train": 1.0, "evaluate": 1.0, "score": 0.5, "items": 4,
            "tokens": 9, "adapter": 1, "trained": 2, "test_loss": None}
    made = of_trainer(RUNS[0], told)
    assert made.losses == (1.0,) * 4 + (0.5,) * 5
    assert made.loss == 0.5
    assert result(RUNS[0]).loss == 0.4
    assert result(RUNS[0], losses=tuple(range(8))).loss == 6.5
    assert result(RUNS[0], losses=tuple(range(8)), test_loss=0.5).loss == 0.5


def test_the_same_work_within_the_tolerance_is_comparable() -> None:
    close = [result(run, score=0.81, losses=(0.9, 0.6, 0.5, 0.42)) for run in RUNS[:2]]
    assert differences([way("a", [1.0], close)], OURS, Tolerance()) == []
    theirs, own = same_runs(way("a", [1.0], close), OURS)
    assert (theirs["loss"], own["loss"]) == pytest.approx((0.42, 0.4))


@pytest.mark.parametrize(("changed", "words"), [
    ({"tokens": 1200}, "training tokens of run r4-lr0.001-seed0 are 1,200, in c 1,000"),
    ({"losses": (0.7, 0.6, 0.4)}, "updates of run r4-lr0.001-seed0 are 3, in c 4"),
    ({"adapter": 200}, "adapter scalars of run"),
    ({"trained": 700}, "trained scalars of run"),
    ({"items": 100}, "scored items of run"),
    ({"score": 0.70}, "mean score 70.0%, in c 80.0% over the same 2 runs; more than 3 points apart"),
    ({"losses": (0.7, 0.6, 0.5, 0.6)}, "mean final loss 0.600, in c 0.400"),
    ({"losses": (0.7, 0.6, 0.5, math.nan)}, "not finite"),
    ({"run": Run(8, 1e-3, 0)}, "has no counterpart"),
])
def test_other_work_is_not_comparable_and_says_why(changed: dict[str, object], words: str) -> None:
    other = way("a", [1.0], [result(run, **changed) for run in RUNS[:2]])
    found = differences([other], OURS, Tolerance())
    assert any(words in text for text in found), found


def sitting(baseline_score: float) -> Sitting:
    plain = way("a", [200.0, 220.0, 240.0], [result(run, score=baseline_score) for run in RUNS])
    slow, quick = way("b", [90.0, 100.0, 110.0], OURS.measured[0].results), way("b2", [80.0] * 3, [result(r) for r in RUNS])
    machine = {"hardware": {"gpu": None, "cores": 2, "cpu": "a CPU"},
               "packages": {"torch": "2", "transformers": "5", "peft": "0.21", "mlflow": "3"}}
    ways = [plain, slow, quick, OURS]
    return Sitting(workload.load("minilm-cpu"), ways, 10_000_000, {"float32": 1e11, "bfloat16": 5e10}, machine,
                   differences(ways[:-1], OURS, Tolerance()))


def test_the_page_holds_ours_against_the_best_tuned_baseline(tmp_path: Path) -> None:
    held = sitting(0.80)
    assert held.tuned.id == "b2"
    page = output.write(held, tmp_path).read_text(encoding="utf-8")
    assert "(a) took 4.4 (4.0 to 5.0) times as long" in page
    assert "way b2, 1.6 (1.3 to 2.0) times" in page
    found = json.loads((tmp_path / "bench.json").read_text(encoding="utf-8"))
    assert found["comparable"]
    assert [one["id"] for one in found["ways"]] == ["a", "b", "b2", "c"]
    assert found["ways"][3]["mfu"] == pytest.approx(80.0 * (4e7 + 1800) / 1e11)
    assert (tmp_path / "bench.png").stat().st_size > 5000


def test_no_ratio_is_claimed_where_the_work_differs() -> None:
    held = sitting(0.60)
    assert not held.comparable
    assert output.verdict(held).startswith("Not comparable: a: mean score 60.0%")
    assert "times" not in output.verdict(held)


@pytest.mark.parametrize("name", workload.names())
def test_a_workload_is_a_study_of_as_many_runs(name: str) -> None:
    found = workload.load(name)
    cells = study.cells(found.study(), found.scale)
    assert [Run.of(cell) for cell in cells]
    assert {Run.of(cell) for cell in cells} == set(found.runs)
    assert len(cells) == len(found.runs) == len(study.unique(cells))
    assert all(cell.spec.method.config["alpha"] == found.alpha for cell in cells)


def test_a_sample_is_spread_over_ranks_rates_and_seeds() -> None:
    found = workload.load("minilm-cpu")
    for count in (3, 4):
        sample = found.spread(count)
        assert len(set(sample)) == count
        assert {run.rank for run in sample} == {4, 16}
        assert len({run.learning_rate for run in sample}) == 3
        assert {run.seed for run in sample} == {0, 1}
    assert set(found.spread(12)) == set(found.spread(50)) == set(found.runs)


@pytest.mark.parametrize(("changed", "words"), [
    ({"ranks": []}, "ranks"), ({"recipe": {"learning_rate": 1.0}}, "recipe.learning_rate"),
    ({"recipe": {"schedule": "linear"}}, "the baselines know cosine only"), ({"unknown": 1}, "unknown key")])
def test_a_wrong_workload_is_refused_in_one_sentence(changed: dict[str, object], words: str, tmp_path: Path) -> None:
    content = yaml.safe_load((workload.FOLDER / "minilm-cpu.yaml").read_text(encoding="utf-8"))
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(content | changed), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        workload.load(str(file))
    with pytest.raises(UserError, match=r"unknown workload 'nothing': use .*minilm-cpu"):
        workload.load("nothing")


def test_processes_run_some_at_once_and_their_memory_is_that_of_the_tree(tmp_path: Path) -> None:
    hungry = "import time; held = bytearray(200 * 2**20); time.sleep(1.5)"
    nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hungry!r}])"
    one = processes.run([[sys.executable, "-c", nested]], 1, os.environ, tmp_path / "one")
    two = processes.run([[sys.executable, "-c", hungry]] * 2, 2, os.environ, tmp_path / "two")
    assert one.resident > 200 * 2**20
    assert two.resident > 400 * 2**20
    after = processes.run([[sys.executable, "-c", "import time; time.sleep(0.5)"]] * 2, 1, os.environ, tmp_path / "after")
    assert after.seconds > 1.0
    with pytest.raises(UserError, match=r"exit code 3: no such thing"):
        processes.run([[sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"]], 1, os.environ,
                      tmp_path / "failed")


def test_the_command_lists_workloads_and_says_when_a_gpu_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["suite", "bench"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert all(name in out for name in workload.names())
    monkeypatch.setattr(sys, "argv", ["suite", "bench", "minilm-b8"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == cli.WRONG
    assert "workload minilm-b8 needs a GPU and none is here" in capsys.readouterr().err


TINY = {
    "id": "tiny", "title": "Two runs", "device": "cpu", "base": "minilm", "task": "movie-sentiment", "train": 64, "test": 40,
    "ranks": [4], "learning_rates": [1e-3], "seeds": [0, 1], "sample": 2, "at_once": [1],
    "recipe": {"epochs": 1, "batch_size": 16, "max_length": 48, "warmup_ratio": 0.1}, "tolerance": {"score": 20.0},
}


@pytest.mark.slow
def test_a_tiny_sweep_three_ways_for_real(tmp_path: Path) -> None:
    assets.fetch("minilm")
    assets.fetch("hutto-2014")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    environment = {**os.environ, "SUITE_RESULTS": str(tmp_path / "results"), "SUITE_REPORTS": str(tmp_path / "out"),
                   "PYTHONPATH": str(paths.REPOSITORY)}
    done = subprocess.run([sys.executable, "-m", "suite", "bench", str(file), "--repeats", "1", "--json"], env=environment,
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["comparable"]
    assert [one["id"] for one in found["ways"]] == ["a", "b", "c"]
    layers = bases.shapes(bases.get("minilm"), registry.task("movie-sentiment")).layers
    for one in found["ways"]:
        repeat = one["repeats"][0]
        assert repeat["runs_made"] == 2
        for made in repeat["results"]:
            assert (made["steps"], made["items"]) == (4, 40)
            assert made["adapter"] == 4 * sum(x.in_features + x.out_features for x in layers)
            assert 0.5 < made["final_loss"] < 0.9
        assert 0 < one["mfu"] < one["mfu_training"] < 1.5
        assert one["start_up_seconds"] < repeat["wall_seconds"]
        assert one["resident_bytes"] > 2**28
    assert (tmp_path / "out" / "bench-tiny" / "bench.png").exists()
    assert (tmp_path / "out" / "bench-tiny" / "bench.md").exists()
