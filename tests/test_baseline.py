"""Baselines on the disk: accepting, reading, comparing with them, and the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from synthetic import World, study, world
from typer.testing import CliRunner

from suite import baseline, cli, history, paths, records
from suite import study as studies
from suite.errors import UserError
from suite.records import Record
from suite.study import Study
from suite.verdicts import Finding

WHY = "first numbers of this machine"


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SUITE_MEASURED", str(tmp_path / "measured"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, World]:
    """Three rows on two tasks, made up and accepted once; every test works on a copy."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_RESULTS", str(folder / "results"))
        patch.setenv("SUITE_MEASURED", str(folder / "measured"))
        of = world(study(rows=["head", "lora", "gora"], tasks=["movie-sentiment", "amazon-sentiment"], published=None))
        patch.setattr(baseline, "planned", lambda study, scale: of.cells)
        accept(of)
    return folder, of


@pytest.fixture
def unaccepted(made: tuple[Path, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """The runs, without a baseline. What is planned are the made-up cells."""
    folder, of = made
    monkeypatch.setattr(baseline, "planned", lambda study, scale: of.cells)
    shutil.copytree(folder / "results", tmp_path / "results")
    return World(of.study, of.scale, of.cells, dict(of.records))


@pytest.fixture
def small(made: tuple[Path, World], unaccepted: World, tmp_path: Path) -> World:
    """The runs and their baseline `two-cores`."""
    shutil.copytree(made[0] / "measured", tmp_path / "measured")
    return unaccepted


def stored() -> Path:
    return paths.measured() / "synthetic-desk-two-cores"


def accept(of: World, name: str = "two-cores", reason: str = WHY) -> Path:
    return baseline.accept(of.study, "desk", name, reason)


def compare(of: World, known: dict[str, Record] | None = None, only: tuple[str, ...] = ()) -> list[Finding]:
    cells = studies.select(of.cells, only)
    return baseline.compare(of.study, "desk", cells, of.records if known is None else known, only)


def red(found: list[Finding]) -> set[str]:
    return {finding.gate for finding in found if finding.red}


def test_what_was_accepted_is_read_again(small: World) -> None:
    folder = stored()
    assert sorted(path.name for path in folder.iterdir()) == [
        "accepted.jsonl", "details.jsonl", "figures", "items.json", "records.jsonl", "report.md", "tables"]
    found = baseline.read(folder)
    assert (found.study, found.scale, found.name) == ("synthetic", "desk", "two-cores")
    assert len(found.runs) == len(small.cells) == 12
    run = next(run for run in found.runs.values() if run.cell.row == "lora")
    predictions = run.record.predictions()
    assert predictions is not None
    assert run.items is not None
    assert run.items.ids == tuple(predictions["item"])
    assert run.trail.bits(500).tolist() == predictions["correct"].tolist()
    curves = run.record.curves()
    assert curves is not None
    assert run.trail.first == curves["loss"][0]
    assert run.trail.norms == {1: 1.0, 10: 1.0}
    assert sum(run.trail.losses[i] or 0 for i in range(4)) / 4 == pytest.approx(curves["loss"].mean(), rel=1e-6)


def test_it_is_small_enough_for_git(small: World) -> None:
    folder = stored()
    per_run = sum((folder / name).stat().st_size for name in ("details.jsonl", "records.jsonl")) / len(small.records)
    assert per_run < 6000
    assert (folder / "items.json").stat().st_size < 30_000


def test_the_same_records_are_green_and_said_to_be_the_same(small: World) -> None:
    found = compare(small)
    assert not red(found)
    assert "12 of them are the baseline's own, not made again" in found[0].said


def test_a_run_that_is_not_there_is_red_unless_it_was_not_asked_for(small: World) -> None:
    without = {run: record for run, record in small.records.items() if record.spec.method.id != "gora"}
    assert red(compare(small, without)) == {"presence"}
    assert not red(compare(small, without, ("method=lora,head",)))


def test_a_damaged_table_of_now_is_red(small: World) -> None:
    (small.record("lora", "movie-sentiment").folder / "predictions.parquet").write_bytes(b"PAR1 cut off")
    found = [finding for finding in compare(small) if finding.red]
    assert {(finding.gate, finding.row, finding.verdict) for finding in found} == {
        ("training", "lora", "missing"), ("evaluation", "lora", "missing")}


def test_a_curve_that_moved_is_found_from_the_disk(small: World) -> None:
    file = small.record("lora", "movie-sentiment").folder / "curves.parquet"
    curves = pd.read_parquet(file)
    curves["loss"] += 0.01
    curves.to_parquet(file, index=False)
    assert {(one.gate, one.row, one.column) for one in compare(small) if one.red} == {
        ("training", "lora", "movie-sentiment")}


def test_replacing_keeps_the_log_with_old_and_new_means(small: World) -> None:
    score = small.record("lora", "movie-sentiment").scores[0]
    before = [small.record("lora", "movie-sentiment", seed).scores[0].value for seed in (0, 1)]
    for seed in (0, 1):
        changed = small.record("lora", "movie-sentiment", seed).model_copy(
            update={"scores": [score.model_copy(update={"value": 0.5})]})
        tables = changed.curves(), changed.predictions()
        small.records[changed.id] = records.save(changed, *tables)
    folder = accept(small, reason="the optimiser was mended")
    first, second = baseline.read(folder).log
    assert (first.reason, second.reason) == (WHY, "the optimiser was mended")
    assert {change.old for change in first.changes} == {None}
    (change,) = [one for one in second.changes if (one.row, one.column) == ("lora", "movie-sentiment")]
    assert (change.old, change.new, change.seeds) == (pytest.approx(sum(before) / 2), 0.5, 2)
    assert first.commit == small.record("lora", "movie-sentiment").environment["commit"]


@pytest.mark.parametrize(("name", "reason", "said"), [
    ("two cores", WHY, "--name 'two cores': name the class of machine in one word"),
    ("../up", WHY, "--name '../up'"),
    ("two-cores", "because", "--reason 'because': say in a few words"),
])
def test_a_wrong_name_or_reason_is_refused(unaccepted: World, name: str, reason: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        accept(unaccepted, name, reason)
    assert not paths.measured().exists()


def test_a_study_that_is_not_whole_is_refused_and_the_old_baseline_stays(small: World) -> None:
    folder = stored()
    before = (folder / "records.jsonl").read_bytes()
    gone = small.record("lora", "movie-sentiment")
    (gone.folder / "record.json").unlink()
    with pytest.raises(UserError, match="1 of 12 runs have no record or failed"):
        accept(small, reason="another try of it")
    assert (folder / "records.jsonl").read_bytes() == before
    assert [path.name for path in paths.measured().iterdir()] == [folder.name]


def test_without_a_baseline_the_sentence_says_how_to_make_one(unaccepted: World) -> None:
    with pytest.raises(UserError, match="study synthetic has no baseline at desk; `suite baseline accept"):
        compare(unaccepted)


def test_a_name_that_is_none_is_told_those_there_are(small: World) -> None:
    with pytest.raises(UserError, match="--name h100: study synthetic at desk has baseline two-cores"):
        baseline.find("synthetic", "desk", "h100")


def test_of_several_baselines_the_one_of_this_machine_is_taken(small: World) -> None:
    other = stored().with_name("synthetic-desk-h100")
    shutil.copytree(stored(), other)
    text = (other / "records.jsonl").read_text().replace("Some processor", "Another processor")
    (other / "records.jsonl").write_text(text)
    here = next(iter(small.records.values()))
    assert baseline.find("synthetic", "desk", record=here).name == "two-cores"
    with pytest.raises(UserError, match="has several baselines: name one, h100 or two-cores"):
        baseline.find("synthetic", "desk")


@pytest.mark.parametrize("file", ["records.jsonl", "details.jsonl", "items.json", "accepted.jsonl"])
def test_a_damaged_file_is_named(small: World, file: str) -> None:
    folder = stored()
    (folder / file).write_text('{"half": \n', encoding="utf-8")
    with pytest.raises(UserError, match=rf"{file}.*bring it back from git"):
        compare(small)


def test_rows_are_called_by_budget_and_rate_where_there_are_several() -> None:
    of: Study = study(rows=["head", "lora"], budgets=[{"rank": 4}, {"rank": 8}], learning_rates={"lora": [1e-3, 2e-3]})
    made = world(of)
    assert {baseline.named(of, "desk", cell) for cell in made.cells} == {
        "head", *(f"lora rank={rank} rate={rate}" for rank in (4, 8) for rate in ("0.001", "0.002"))}


def test_a_comparison_is_kept_in_the_history(small: World) -> None:
    assert baseline.check(small.study, "desk", small.cells, small.records, ("method=lora",))
    assert history.load("synthetic", "desk") == []  # a part is no night
    assert baseline.check(small.study, "desk", small.cells, small.records) == compare(small)
    (night,) = history.load("synthetic", "desk")
    assert (night.against, night.red, len(night.points)) == ("two-cores", 0, 6)
    point = next(point for point in night.points if (point.row, point.column) == ("lora", "movie-sentiment"))
    scores = [small.record("lora", "movie-sentiment", seed).scores[0].value for seed in (0, 1)]
    assert point.score == pytest.approx(sum(scores) / 2)
    assert len((paths.history() / "synthetic-desk.jsonl").read_bytes()) < 2000


def test_a_second_look_needs_fresh_seeds(small: World) -> None:
    failed = Finding("training", "classification", "lora", "movie-sentiment", "changed", True, "it moved")
    assert baseline.confirm(small.study, "desk", small.cells, small.records, []) == []
    with pytest.raises(UserError, match="keeps no fresh seeds to confirm with; accept it with --spare next time"):
        baseline.confirm(small.study, "desk", small.cells, small.records, [failed])


def test_the_command_accepts_lists_and_shows(unaccepted: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.study.load", lambda name: unaccepted.study)
    run = CliRunner()

    done = run.invoke(cli.app, ["baseline", "accept", "synthetic", "--name", "two-cores", "--reason", WHY])
    assert done.exit_code == 0, done.output
    assert done.output.strip() == str(tmp_path / "measured" / "synthetic-desk-two-cores")
    listed = json.loads(run.invoke(cli.app, ["baseline", "list", "--json"]).output)
    assert [(one["study"], one["name"], one["runs"], one["reason"]) for one in listed] == [
        ("synthetic", "two-cores", 12, WHY)]
    shown = run.invoke(cli.app, ["baseline", "show", "synthetic"]).output
    assert "Baseline synthetic-desk-two-cores" in shown
    assert "12 runs: " + WHY in shown
    assert run.invoke(cli.app, ["baseline", "accept", "synthetic", "--name", "x"]).exit_code == 2
