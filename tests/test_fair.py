"""The fair protocol: what comes next follows from the records, nothing is chosen on test data, and the report says it all.

Scores here are made up, records and predictions are real files; tests/test_fair_run.py trains.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pytest

from reports import fair as pages
from reports import study_page
from reports.tables import measure
from suite import fair, records, snapshot
from suite import study as studies
from suite.errors import UserError
from suite.records import Data, Record, Score
from suite.statistics import difference
from suite.study import Cell, Grid, Study
from tests import command

GRID = {"lowest": 1e-3, "highest": 1e-2, "extensions": 3}
FAIR: dict[str, Any] = {"grid": GRID, "tuning_seeds": [7, 8], "test_seeds": [20, 21, 22], "validation": 100}
BUILT_IN = ("gora", "malora", "lorasc", "sparta", "dota")
#: How good a row is at a rate, on validation data or on test data.
Score_of = Callable[[Cell], float]


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SUITE_REPORTS", str(tmp_path / "out"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def content(**table: Any) -> dict[str, Any]:
    """A study file with one fair table."""
    return {
        "id": "small", "title": "A small study", "about": "For tests.", "paper": {"title": "None"},
        "rows": {"base": {"method": "untouched", "label": "Untouched base"},
                 "head": {"method": "head", "label": "Head only"}, "lora": {"method": "lora", "label": "LoRA"},
                 "rslora": {"method": "rslora", "label": "rsLoRA"}},
        "scales": {"desk": {"about": "Tiny.", "tables": {"main": {
            "title": "Main table", "base": "minilm", "tasks": ["movie-sentiment", "bigram-shift"],
            "rows": ["base", "head", "lora", "rslora"], "reference": "lora", "budgets": [{"rank": 4}], "seeds": [0, 1],
            "train": 48, "test": 200, "recipe": {"learning_rate": 2e-3, "batch_size": 8, "max_length": 48},
            "fair": FAIR, **table}}}}}


def study(**table: Any) -> Study:
    return Study.model_validate(content(**table))


def finish(cell: Cell, share: float, status: Literal["finished", "diverged", "skipped", "failed"] = "finished") -> None:
    """A record of a run that answered this share right; which items are hard is the same for all runs of a split."""
    spec = cell.spec
    items = spec.task.test or 100
    hard = np.random.default_rng([len(spec.task.id), spec.evaluation.split == "test"]).permutation(items)
    right = hard < round(share * items)
    scored = status in ("finished", "diverged")
    value = float(right.mean())
    score = Score(metric="accuracy", value=value, items=items, stderr=math.sqrt(value * (1 - value) / items))
    records.save(Record(id=spec.id, spec=spec, status=status, scores=[score] if scored else [], reason="for this test",
                        data=Data(fingerprint="f" * 16, train=48, test=items, truncated=0, majority=0.5)),
                 predictions=pd.DataFrame({"item": [f"{spec.task.id}/{i}" for i in range(items)], "correct": right})
                 if scored else None)


def sweep(of: Study, score: Score_of, rounds: int = 20) -> list[list[Cell]]:
    """Make the runs that come next until none is left; returns them round by round."""
    made: list[list[Cell]] = []
    for _ in range(rounds):
        left = [cell for cell in fair.cells(of, "desk") if not records.is_done(cell.spec.id)]
        if not left:
            return made
        made.append(left)
        for cell in left:
            finish(cell, score(cell))
    raise AssertionError("the search does not end")


def peak(**best: float) -> Score_of:
    """Rows that are best at a rate of their own, and fall by three points a step of the grid."""
    def score(cell: Cell) -> float:
        if cell.row == "base":
            return 0.5
        return 0.9 - 0.03 * round(abs(4 * math.log10(cell.spec.recipe.learning_rate / best[cell.row])))
    return score


def of_row(of: Study, row: str) -> fair.Tuning:
    return next(one for one in fair.survey(of, "desk") if one.row == row)


def tried(of: Study, row: str) -> list[float]:
    return [point.rate for point in of_row(of, row).points]


PEAKS = peak(head=1e-2, lora=3.2e-3, rslora=1e-3)


def test_a_grid_is_a_lattice_of_two_digits() -> None:
    grid = Grid(lowest=1e-4, highest=3.2e-3)
    assert grid.rates() == (1e-4, 1.8e-4, 3.2e-4, 5.6e-4, 1e-3, 1.8e-3, 3.2e-3)
    assert grid.rates(2, 1) == (3.2e-5, 5.6e-5, *grid.rates(), 5.6e-3)
    assert Grid(lowest=1e-1, highest=1e1, per_decade=1).rates() == (0.1, 1.0, 10.0)


def test_every_row_gets_the_same_grid_and_is_extended_while_its_best_is_at_an_end() -> None:
    of = study()
    first, second, third, *rest = sweep(of, PEAKS)
    assert not rest
    grid = Grid(**GRID).rates()
    tuning = [cell for cell in first if cell.spec.evaluation.split == "validation"]
    for row in ("head", "lora", "rslora"):
        assert sorted({cell.spec.recipe.learning_rate for cell in tuning if cell.row == row}) == list(grid)
    assert len(tuning) == 3 * len(grid) * 2 * 2
    assert {cell.row for cell in second if cell.spec.evaluation.split == "validation"} == {"head", "rslora"}
    assert {cell.row for cell in second if cell.spec.evaluation.split == "test"} == {"lora"}
    assert {cell.spec.evaluation.split for cell in third} == {"test"}
    assert tried(of, "head") == [*grid, 0.018]
    assert tried(of, "rslora") == [5.6e-4, *grid]
    assert tried(of, "lora") == list(grid)
    assert [one.chosen for one in fair.survey(of, "desk")] == [None, 1e-2, 3.2e-3, 1e-3]
    assert not any(one.edge for one in fair.survey(of, "desk"))


def test_a_best_that_never_turns_is_left_at_the_end_and_said() -> None:
    of = study()
    sweep(of, peak(head=10.0, lora=3.2e-3, rslora=1e-6))
    up, down = of_row(of, "head"), of_row(of, "rslora")
    assert (up.chosen, up.edge, tried(of, "head")[-1], len(up.points)) == (0.056, "highest", 0.056, 8)
    assert (down.chosen, down.edge, tried(of, "rslora")[0], len(down.points)) == (1.8e-4, "lowest", 1.8e-4, 8)
    said = " ".join(pages.sections(of, "desk", None)["main"].sentences)
    assert "stands at an end of what was tried" in said
    assert "Head only (0.056, the highest)" in said
    assert "rsLoRA (0.00018, the lowest)" in said
    assert "LoRA (0.0032" not in said


def test_a_diverged_run_counts_as_the_worst_even_if_it_scored_well() -> None:
    of = study()
    for cell in fair.cells(of, "desk"):
        rate = cell.spec.recipe.learning_rate
        if cell.spec.evaluation.split == "validation" and rate >= 5.6e-3:
            finish(cell, 0.99, "diverged")
        else:
            finish(cell, PEAKS(cell))
    lora = of_row(of, "lora")
    assert lora.chosen == 3.2e-3
    assert [point.score for point in lora.points][-2:] == [0.0, 0.0]
    assert [point.diverged for point in lora.points] == [0, 0, 0, 4, 4]
    assert of_row(of, "head").chosen == 3.2e-3


def test_one_diverged_run_of_four_pulls_the_mean_down() -> None:
    of = study()
    for cell in fair.cells(of, "desk"):
        worst = cell.row == "lora" and cell.spec.recipe.learning_rate == 3.2e-3 and cell.spec.seed == 7 \
            and cell.spec.task.id == "bigram-shift"
        finish(cell, PEAKS(cell), "diverged" if worst else "finished")
    lora = of_row(of, "lora")
    assert lora.points[2].score == pytest.approx(0.9 * 3 / 4)
    assert lora.chosen == 1.8e-3


def test_of_equal_scores_the_lower_rate_is_chosen() -> None:
    of = study()
    sweep(of, lambda cell: 0.7 if cell.spec.recipe.learning_rate in (1.8e-3, 5.6e-3) else 0.6)
    assert of_row(of, "lora").chosen == 1.8e-3


def test_one_rate_is_chosen_over_all_tasks_and_seeds() -> None:
    of = study()
    best = {"movie-sentiment": 1.8e-3, "bigram-shift": 5.6e-3}

    def score(cell: Cell) -> float:
        if cell.spec.evaluation.split == "test" or cell.row == "base":
            return 0.5
        return 0.9 - 0.1 * abs(4 * math.log10(cell.spec.recipe.learning_rate / best[cell.spec.task.id])) \
            - (0.05 if cell.spec.recipe.learning_rate == 1.8e-3 else 0)
    sweep(of, score)
    assert of_row(of, "lora").chosen == 3.2e-3  # level with 5.6e-3 over both, and lower
    section = pages.sections(of, "desk", None)["main"]
    assert section.rates is not None
    assert {(row["row"], row["best_movie-sentiment"], row["best_bigram-shift"]) for row in section.rates.data} == {
        (row, 1.8e-3, 5.6e-3) for row in ("head", "lora", "rslora")}


def test_what_comes_next_hangs_on_the_records_alone() -> None:
    """However the work was cut or ordered, and whatever of it is there: the same runs are asked for, none twice."""
    of = study()
    rounds = sweep(of, PEAKS)
    whole = {cell.spec.id for cells in rounds for cell in cells}
    assert sum(map(len, rounds)) == len(whole)
    chosen = [one.chosen for one in fair.survey(of, "desk")]
    assert {cell.spec.id for cell in fair.cells(of, "desk")} == whole
    rng = np.random.default_rng(0)
    for run in whole:
        records.paths.runs().joinpath(run, "record.json").unlink()
    seen: set[str] = set()
    for _ in range(1000):
        left = [cell for cell in fair.cells(of, "desk") if not records.is_done(cell.spec.id)]
        if not left:
            break
        for place in rng.permutation(len(left))[:9]:
            assert left[place].spec.id not in seen
            seen.add(left[place].spec.id)
            finish(left[place], PEAKS(left[place]))
    assert seen == whole
    assert [one.chosen for one in fair.survey(of, "desk")] == chosen


def test_a_failed_run_is_tried_again_and_holds_its_row_back() -> None:
    of = study()
    cells = fair.cells(of, "desk")
    bad = next(cell for cell in cells if cell.row == "lora" and cell.spec.evaluation.split == "validation")
    for cell in cells:
        finish(cell, PEAKS(cell), "failed" if cell is bad else "finished")
    assert of_row(of, "lora").chosen is None
    assert not of_row(of, "lora").settled
    left = [cell for cell in fair.cells(of, "desk") if not records.is_done(cell.spec.id) and cell.row == "lora"]
    assert [cell.spec.id for cell in left] == [bad.spec.id]
    finish(bad, PEAKS(bad))
    assert of_row(of, "lora").chosen == 3.2e-3


def test_a_skipped_row_ends_without_a_rate() -> None:
    of = study()
    for cell in fair.cells(of, "desk"):
        finish(cell, PEAKS(cell), "skipped" if cell.row == "head" else "finished")
    head = of_row(of, "head")
    assert (head.settled, head.chosen, head.test) == (True, None, ())
    assert {one.row: one.stage for one in fair.progress(of, "desk")}["head"] == "skipped"


def test_nothing_is_tuned_where_nothing_is_trained() -> None:
    of = study()
    base = of_row(of, "base")
    paper = [cell.spec.id for cell in studies.cells(of, "desk") if cell.row == "base"]
    assert (base.points, base.settled) == ((), True)
    assert [cell.spec.id for cell in base.test] == paper


def test_runs_at_the_studys_own_rates_are_those_of_the_paper_protocol() -> None:
    of = study()
    whole = {cell.spec.id for cell in studies.cells(of, "desk")}
    assert {cell.spec.id for cell in fair.paper(of, "desk")} == whole
    part = study(fair=FAIR | {"rows": ["lora", "head"], "tasks": ["bigram-shift"]})
    asked = fair.cells(part, "desk")
    assert {cell.row for cell in asked} == {"lora", "head"}
    assert {cell.spec.task.id for cell in asked} == {"bigram-shift"}
    assert {cell.spec.id for cell in fair.paper(part, "desk")} < whole


def test_a_fair_block_changes_no_run_of_the_paper_protocol() -> None:
    with_block, without = study(), study(fair=None)
    assert [c.spec.id for c in studies.cells(with_block, "desk")] == [c.spec.id for c in studies.cells(without, "desk")]


@pytest.mark.parametrize("name", BUILT_IN)
def test_tuning_sees_no_test_item_and_seeds_are_fresh(name: str) -> None:
    of = studies.load(name)
    for scale in ("desk", "bench"):
        tables = fair.tested(of, scale).edition(scale).tables
        assert tables
        least, most = fair.expected(of, scale)
        for cell in {cell.spec.id: cell for cell in [*least, *most]}.values():
            table = of.edition(scale).tables[cell.table]
            stage = fair.stage(of, scale, cell)
            assert table.fair is not None
            assert (cell.spec.evaluation.split == "validation") == (stage == "tuning")
            assert cell.spec.seed in {"tuning": table.fair.tuning_seeds, "test": table.fair.test_seeds,
                                      "paper": table.seeds}[stage]
        rows = {(one.table, one.row, str(one.budget)): one for one in fair.survey(of, scale)}
        for key, one in rows.items():
            grid = of.edition(scale).tables[key[0]].fair.grid.rates()  # type: ignore[union-attr]
            assert tuple(point.rate for point in one.points) in (grid, ())


def test_test_scores_change_no_choice() -> None:
    of = study()
    sweep(of, PEAKS)
    before = [(one.row, one.chosen, len(one.points)) for one in fair.survey(of, "desk")]
    rng = np.random.default_rng(1)
    for cell in fair.cells(of, "desk"):
        if cell.spec.evaluation.split == "test":
            finish(cell, float(rng.random()))
    assert [(one.row, one.chosen, len(one.points)) for one in fair.survey(of, "desk")] == before
    for cell in fair.cells(of, "desk"):
        if cell.spec.evaluation.split == "validation":
            finish(cell, 1 - PEAKS(cell))
    assert [(one.row, one.chosen, len(one.points)) for one in fair.survey(of, "desk")] != before


def test_only_leaves_runs_out_but_no_choice_is_made_without_them() -> None:
    of = study()
    only = ["task=movie-sentiment"]
    for cell in fair.cells(of, "desk", only):
        finish(cell, PEAKS(cell))
    assert not [cell for cell in fair.cells(of, "desk", only) if not records.is_done(cell.spec.id)]
    assert all(one.chosen is None for one in fair.survey(of, "desk"))
    with pytest.raises(UserError, match="--only rate=7"):
        fair.cells(of, "desk", ["rate=7"])


def test_expected_runs_with_and_without_extensions() -> None:
    of = study()
    least, most = (len({cell.spec.id for cell in cells}) for cells in fair.expected(of, "desk"))
    paper, grid, tests = 14, 3 * 5 * 4, 3 * 2 * 3
    assert least == paper + grid + tests
    assert most == least + 3 * 3 * 4
    sweep(of, PEAKS)
    done = len(fair.cells(of, "desk"))
    assert [len({cell.spec.id for cell in cells}) for cells in fair.expected(of, "desk")] == [done, done]


def test_progress_says_the_stage() -> None:
    of = study()
    stages = lambda: {one.row: (one.stage, one.runs, one.asked) for one in fair.progress(of, "desk")}  # noqa: E731
    assert stages()["lora"] == ("grid", 0, 20)
    for cell in fair.cells(of, "desk"):
        finish(cell, PEAKS(cell))
    assert stages() == {"base": ("done", 2, 2), "head": ("extension", 20, 24), "lora": ("test", 0, 6),
                        "rslora": ("extension", 20, 24)}
    sweep(of, PEAKS)
    assert {stage for stage, *_ in stages().values()} == {"done"}


@pytest.mark.parametrize(("block", "sentence"), [
    ({"tuning_seeds": [0, 7]}, "fair.tuning_seeds: 0 stands in seeds too"),
    ({"test_seeds": [1]}, "fair.test_seeds: 1 stands in seeds too"),
    ({"test_seeds": [20, 8]}, "fair.test_seeds: 8 stands in fair.tuning_seeds too"),
    ({"tuning_seeds": [7, 7]}, "fair.tuning_seeds must not name anything twice"),
    ({"rows": ["head"]}, "fair.rows: the reference 'lora' must be among them"),
    ({"rows": ["lora", "gora"]}, "fair.rows: 'gora' is none of the table's rows base, head, lora or rslora"),
    ({"tasks": ["asdiv"]}, "fair.tasks: 'asdiv' is none of the table's tasks movie-sentiment or bigram-shift"),
    ({"budgets": [{"rank": 8}]}, "fair.budgets: rank=8 is none of the table's budgets rank=4"),
    ({"grid": GRID | {"lowest": 1.2e-3}}, "lowest: 0.0012 is none of 4 rates a decade; near it are 0.00056, 0.001 or"),
    ({"grid": GRID | {"highest": 1.8e-3}}, "a grid has at least three rates"),
    ({"grid": GRID | {"points": 3}}, "fair.grid.points: unknown key; use lowest, highest, per_decade or extensions"),
    ({"validation": 0}, "fair.validation"),
])
def test_a_wrong_fair_block_is_one_sentence(block: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(content(fair=FAIR | block)), encoding="utf-8")
    with pytest.raises(UserError) as wrong:
        studies.load(str(path))
    assert sentence in str(wrong.value)
    assert str(wrong.value).startswith(f"{path}: scales.desk.tables.main")


@pytest.mark.parametrize(("table", "sentence"), [
    ({"learning_rates": {"head": [1e-3, 1e-2]}}, "row 'head' has several learning rates"),
    ({"evaluation": {"split": "validation"}}, "the table must score its test split"),
])
def test_a_table_that_cannot_be_fair_is_refused(table: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        study(**table)


def test_a_study_without_a_fair_block_says_so() -> None:
    with pytest.raises(UserError, match="study small at desk: no table has a `fair` block"):
        fair.cells(study(fair=None), "desk")
    with pytest.raises(UserError, match="use --scale desk or bench"):
        fair.cells(studies.load("gora"), "paper")


# The command line.

def suite(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The command's exit code, its standard output without line breaks, its standard error."""
    code, out, err = command.suite(monkeypatch, capsys, *words)
    return code, " ".join(out.split()), err


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(content()), encoding="utf-8")
    return str(path)


def test_plan_says_what_it_takes_with_and_without_further_rates(file: str, monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = suite(monkeypatch, capsys, "plan", file, "--protocol", "fair")
    assert code == 0
    assert "5 rates from 0.001 to 0.01, up to 3 more for a row whose best is at an end; tuning on validation items with " \
        "seeds 7, 8, test with seeds 20, 21, 22." in out
    assert "First round: 74 runs" in out
    assert re.search(r"92 runs, \d+ minutes if no row needs more rates, 128 runs, \d+ minutes if all take all they may", out)
    assert not records.paths.runs().exists()
    code, _, err = suite(monkeypatch, capsys, "plan", file, "--protocol", "fair", "--budget", "rank=2")
    assert (code, err.count("\n")) == (2, 1)
    assert "leave --base and --budget out" in err


def test_status_and_report_say_the_stage_and_the_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                       capsys: pytest.CaptureFixture[str]) -> None:
    few = {"tasks": ["movie-sentiment"], "rows": ["lora", "rslora"], "seeds": [0],
           "fair": FAIR | {"tuning_seeds": [7], "test_seeds": [20]}}
    of, file = study(**few), tmp_path / "small.yaml"
    file.write_text(json.dumps(content(**few)), encoding="utf-8")
    for cell in fair.cells(of, "desk"):
        finish(cell, PEAKS(cell))
    code, out, _ = suite(monkeypatch, capsys, "status", str(file), "--protocol", "fair")
    assert code == 0
    assert "Study small at desk, fair protocol" in out
    assert "main LoRA rank 4 test 0 of 1 0.001 to 0.01 0.0032" in out
    assert "main rsLoRA rank 4 extension 5 of 6 0.00056 to 0.01 —" in out
    sweep(of, PEAKS)
    code, out, _ = suite(monkeypatch, capsys, "report", str(file), "--protocol", "fair")
    assert code == 0
    assert "What is left of the gains over LoRA" in out
    assert "Learning rates that were chosen" in out


# The report.

def test_the_report_puts_both_protocols_side_by_side(tmp_path: Path) -> None:
    of = study()

    def score(cell: Cell) -> float:
        own = {"base": 0.5, "head": 0.6, "lora": 0.7, "rslora": 0.9}[cell.row]
        if cell.spec.evaluation.split == "test" and cell.spec.seed >= 20:  # tuned alike, rsLoRA is no better
            own = {"base": 0.5, "head": 0.65, "lora": 0.85, "rslora": 0.86}[cell.row]
        return own if cell.spec.evaluation.split == "test" else PEAKS(cell)
    sweep(of, score)
    section = pages.sections(of, "desk", tmp_path)["main"]
    assert section.gains is not None
    assert section.rates is not None
    assert section.curves is not None
    found = {row["row"]: row for row in section.gains.data if row["column"] == "average"}
    assert found["rslora"]["gain_paper_points"] == pytest.approx(20)
    assert found["rslora"]["gain_fair_points"] == pytest.approx(1)
    assert found["rslora"]["change_points"] == pytest.approx(-19)
    assert found["rslora"]["change_high"] < 0
    assert found["head"]["change_points"] == pytest.approx(-10)
    assert found["lora"]["change_points"] is None
    assert (found["lora"]["rate_paper"], found["lora"]["rate_fair"]) == (2e-3, 3.2e-3)
    said = " ".join(section.sentences)
    assert "Clearly above LoRA at the study's own rates, not told apart from it with fair tuning: " \
        "rsLoRA (+1.0; at its own rate +20.0)" in said
    rates = {row["row"]: row for row in section.rates.data}
    assert (rates["rslora"]["chosen"], rates["rslora"]["runs"], rates["lora"]["runs"]) == (1e-3, 24, 20)
    assert {row["rate"] for row in section.curves.data if row["row"] == "rslora"} == {5.6e-4, *Grid(**GRID).rates()}
    assert section.figure is not None
    for suffix in section.figure.formats:
        assert (tmp_path / f"main-fair-curves.{suffix}").stat().st_size > 500


def test_a_snapshot_keeps_the_tuning_runs_too(tmp_path: Path) -> None:
    of = study()
    sweep(of, PEAKS)
    cells = studies.cells(of, "desk")
    folder = tmp_path / "kept"
    folder.mkdir()
    snapshot.write(of, "desk", cells, records.load_many(cell.spec.id for cell in cells), folder)
    kept = [json.loads(line)["id"] for name in ("records.jsonl", "fair.jsonl")
            for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    assert sorted(kept) == sorted({cell.spec.id for cell in fair.cells(of, "desk")})
    assert "Learning rates that were chosen" in (folder / "report.md").read_text(encoding="utf-8")


def test_flat_is_within_one_paired_standard_error_of_the_best() -> None:
    """Items are equally hard for all, so a rate that is two items of 100 worse differs on these two alone."""
    of = study(tasks=["movie-sentiment"], rows=["lora", "rslora"], fair=FAIR | {"tuning_seeds": [7]})
    shares = {1e-3: 0.70, 1.8e-3: 0.79, 3.2e-3: 0.80, 5.6e-3: 0.78, 1e-2: 0.80 - 0.001}
    sweep(of, lambda cell: shares.get(cell.spec.recipe.learning_rate, 0.5))
    found = pages.curve(of_row(of, "lora"))
    # 0.01 with error 0.01: as good. 0.02 with error sqrt(.02 * .98 / 99): worse, so 0.01 behind it is out of reach.
    assert found.flat == (1.8e-3, 3.2e-3)
    error = found.errors[2]
    assert error == pytest.approx(math.sqrt(0.8 * 0.2 / 99))


def test_the_page_and_markdown_have_the_fair_part_in_every_state(tmp_path: Path) -> None:
    of = study()
    states: list[str] = []
    for step in itertools.count():
        chapter = study_page.chapter(of, "desk")
        page, _ = study_page.draw(chapter, tmp_path / str(step))
        told = (tmp_path / str(step) / "report.md").read_text(encoding="utf-8")
        assert "fair tuning" in told
        states.append(told)
        names = {sheet.name for sheet in page.sheets}
        assert ("main-fair-gains" in names) == (step > 0)
        left = [cell for cell in fair.cells(of, "desk") if not records.is_done(cell.spec.id)]
        if not left:
            break
        for cell in left[:len(left) if step else 30]:
            finish(cell, PEAKS(cell))
    assert "Fair tuning has not been run yet: `suite run small --scale desk --protocol fair`" in states[0].replace("\\", "")
    assert "0 of 3 rows settled" in states[1]
    assert "3 of 3 rows settled" in states[-1]
    assert "| LoRA | 0.0032 |" in states[-1]


def test_change_adds_the_errors_of_both_gains() -> None:
    rng = np.random.default_rng(3)

    def gain(seeds: range, skill: float) -> Any:
        own = {seed: pd.Series((rng.random(300) < 0.7 + skill).astype(float)) for seed in seeds}
        other = {seed: pd.Series((rng.random(300) < 0.7).astype(float)) for seed in seeds}
        return difference(own, other)
    after, before = gain(range(3), 0.02), gain(range(10, 12), 0.1)
    found = pages.change(after, before)
    assert found is not None
    assert found.interval is not None
    assert found.mean == pytest.approx(after.mean - before.mean)
    half = (found.interval.high - found.interval.low) / 2
    error = math.hypot(after.error, before.error)
    assert half >= 1.96 * error
    assert half <= 12.8 * error
    assert pages.change(None, before) is None


def simulated(rng: np.random.Generator, items: int, hard: np.ndarray, seeds: int, gain: float) -> Any:
    """A gain on shared items: noise of seeds, of items and of both, as runs have it."""
    luck = 0.15 * rng.standard_normal(seeds)
    special = 0.5 * rng.standard_normal(items)  # how the method differs from the reference on an item
    own = {seed: pd.Series((gain + luck[seed] + special + 0.6 * rng.standard_normal(items) > hard).astype(float))
           for seed in range(seeds)}
    other = {seed: pd.Series((0.6 * rng.standard_normal(items) > hard).astype(float)) for seed in range(seeds)}
    return difference(own, other)


def test_the_interval_of_a_change_covers_what_it_promises() -> None:
    """No change in truth: the interval at 95 % must hold zero in 95 of 100 simulated experiments, or a little more often."""
    rng = np.random.default_rng(11)
    trials, inside = 400, 0
    for _ in range(trials):
        hard = rng.standard_normal(200)
        found = pages.change(simulated(rng, 200, hard, 3, 0.3), simulated(rng, 200, hard, 2, 0.3))
        assert found is not None
        assert found.interval is not None
        inside += found.interval.low <= 0 <= found.interval.high
    assert inside / trials >= 0.95 - 2 * math.sqrt(0.95 * 0.05 / trials), inside / trials


def test_the_desk_edition_of_gora_is_as_large_as_its_comment_says() -> None:
    gora = studies.load("gora")
    least, most = fair.expected(gora, "desk")
    assert (len({c.spec.id for c in least}), len({c.spec.id for c in most})) == (144, 180)
    assert set(fair.tested(gora, "desk").edition("desk").tables["classification"].rows) >= {
        "lora", "rslora", "lora-plus", "gora", "gora-lora-plus", "full"}
    assert len(measure(fair.counterpart(gora, "desk"), "desk", fair.paper(gora, "desk"), {})) == 1
