"""`suite regress`: what people and CI servers see, exit codes, and what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
import synthetic
import yaml
from mlflow import MlflowClient
from printed import NOISE, PRINTED, ROWS, TABLE

from suite import baseline, records, regression, study, tracking, verdict_output
from suite.errors import UserError
from suite.records import Record, Score
from suite.regression import Regression
from suite.verdicts import Finding
from tests.command import suite

#: What JUnit readers accept in an element, and the attributes that they need.
JUNIT = {"testsuites": {"testsuite"}, "testsuite": {"testcase"},
         "testcase": {"skipped", "failure", "system-out"}, "skipped": set(), "failure": set(), "system-out": set()}
NEEDED = {"testsuites": {"name", "tests", "failures", "errors", "skipped"},
          "testsuite": {"name", "tests", "failures", "errors", "skipped", "time", "timestamp"},
          "testcase": {"name", "classname", "time"}, "skipped": {"message"}, "failure": {"message", "type"},
          "system-out": set()}


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """A study held against a published table; its scores agree."""
    (tmp_path / "printed.yaml").write_text(yaml.safe_dump(PRINTED), encoding="utf-8")
    table = TABLE | {"published": {"table": str(tmp_path / "printed.yaml"), **TABLE["published"]}}
    path = tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump({
        "id": "ours", "title": "Ours", "paper": {"title": "A paper"}, "about": "For tests.", "rows": ROWS,
        "scales": {"paper": {"about": "", "tables": {"glue": table}}}}), encoding="utf-8")
    keep(path, ["full", "lora", "gora"])
    return path


def keep(path: Path, rows: Sequence[str], shift: float = 0.0, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> None:
    """Records of these rows, `shift` points from what is printed."""
    for cell in study.cells(study.load(str(path)), "paper"):
        if cell.row in rows and cell.spec.seed in seeds:
            mean = {"glue-sst2": 94.0, "glue-qnli": 92.0}[cell.spec.task.id] + shift
            score = Score(metric="accuracy", value=(mean + NOISE[cell.spec.seed]) / 100, items=872, stderr=0.01)
            records.save(Record(id=cell.spec.id, spec=cell.spec, status="finished", scores=[score]))


def regress(path: Path, *words: str) -> tuple[str, ...]:
    return "regress", str(path), "--scale", "paper", "--against", "published", *words


def test_agreement_is_green_and_a_fall_is_red(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = suite(monkeypatch, capsys, *regress(ours))
    assert (code, err) == (0, "")
    assert "GLUE (base t5-base) against printed (base google-t5/t5-base)" in out
    assert "ours at paper against published tables: nothing red (9 reproduced)." in out
    keep(ours, ["lora"], shift=-3)
    code, out, _ = suite(monkeypatch, capsys, *regress(ours))
    assert code == 1
    assert "RED, 3 of 9 fail (3 not reproduced, 6 reproduced)." in out
    assert out.index("not reproduced (red)") < out.index(" reproduced  ")
    code, out, _ = suite(monkeypatch, capsys, *regress(ours, "--only", "method=gora"))
    assert code == 0
    assert "(3 reproduced)" in out


def test_what_cannot_be_decided_is_loud_and_fails_when_asked(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    keep(ours, ["lora"], shift=4)
    keep(ours, ["gora"], shift=-1)  # on the edge of the margin
    code, out, _ = suite(monkeypatch, capsys, *regress(ours, "--json"))
    told = json.loads(out)
    assert (code, told["red"]) == (0, 0)
    assert told["counts"] == {"better": 3, "underpowered": 3, "reproduced": 3}
    _, out, _ = suite(monkeypatch, capsys, *regress(ours))
    assert "3 could not be decided: that is no pass." in out
    assert "3 better than published: look at why." in out
    for verdict in ("better", "underpowered"):
        code, out, _ = suite(monkeypatch, capsys, *regress(ours, "--json", "--fail-on", verdict))
        assert (code, json.loads(out)["red"]) == (1, told["counts"][verdict])
    code, _, err = suite(monkeypatch, capsys, *regress(ours, "--fail-on", "worse"))
    assert (code, err) == (2, "suite: --fail-on worse: use better or underpowered\n")


def test_a_summary_for_the_page_of_a_job(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    keep(ours, ["lora"], shift=-3)
    page = tmp_path / "summary.md"
    for _ in range(2):
        assert suite(monkeypatch, capsys, *regress(ours, "--markdown", str(page)))[0] == 1
    text = page.read_text(encoding="utf-8")
    assert text.startswith("## ❌ Ours: paper against published tables\n")
    assert text.count("## ❌ Ours") == 1
    rows = [line for line in text.splitlines() if line.startswith("| ❌ not reproduced | LoRA")]
    assert [row.split(" | ")[2] for row in rows] == ["glue-sst2", "glue-qnli", "avg"]
    assert len({line.count("|") for line in text.splitlines() if line.startswith("| ❌ not reproduced | LoRA")}) == 1
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))  # that file belongs to the job: it is added to
    suite(monkeypatch, capsys, *regress(ours, "--markdown", str(page)))
    assert page.read_text(encoding="utf-8").count("## ❌ Ours") == 2
    code, _, err = suite(monkeypatch, capsys, *regress(ours, "--markdown", str(tmp_path / "none" / "summary.md")))
    assert code == 2
    assert err.startswith(f"suite: --markdown {tmp_path / 'none' / 'summary.md'}: cannot be written")


def test_junit_has_a_case_for_every_finding(ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    keep(ours, ["lora"], shift=-3)
    keep(ours, ["gora"], shift=3)
    code, _, _ = suite(monkeypatch, capsys, *regress(ours, "--junit", str(tmp_path / "junit.xml")))
    assert code == 1
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    for element in root.iter():
        assert {child.tag for child in element} <= JUNIT[element.tag]
        assert NEEDED[element.tag] <= set(element.attrib)
    assert (root.get("tests"), root.get("failures"), root.get("errors"), root.get("skipped")) == ("9", "3", "0", "0")
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert len(cases) == 9
    failure = cases["LoRA on glue-sst2"].find("failure")
    assert failure is not None
    assert str(failure.get("message")).startswith("not reproduced: 91.00 here")
    assert "difference: -3.0" in str(failure.text)
    assert cases["GoRA on glue-sst2"].find("failure") is None


def test_every_call_is_kept_and_read_again(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    assert regression.latest("ours", "paper", "published") is None
    suite(monkeypatch, capsys, *regress(ours))
    keep(ours, ["lora"], shift=-3)
    suite(monkeypatch, capsys, *regress(ours))
    suite(monkeypatch, capsys, *regress(ours, "--only", "method=gora"))
    kept = list(regression.history("ours", "paper", "published"))
    assert [len(one.red) for one in kept] == [0, 3]
    assert kept[0].time < kept[1].time
    assert regression.latest("ours", "paper", "published") == kept[1]
    assert [one.only for one in regression.history("ours", "paper", "published", partial=True)] == [
        (), (), ("method=gora",)]
    assert list(kept[1].tables) == ["glue"]
    assert kept[1].tables["glue"][0].red
    broken = next(regression.folder("ours", "paper", "published").glob("*.json"))
    broken.write_text(broken.read_text(encoding="utf-8").replace('"findings"', '"finding"'), encoding="utf-8")
    with pytest.raises(UserError, match=r"is not a result of `suite regress` of this version .*delete it"):
        list(regression.history("ours", "paper", "published"))


def test_what_is_not_finite_survives_being_kept() -> None:
    numbers = {"p": float("nan"), "n": 2, "evidence": "x"}
    finding = Finding("published", "t", "r", "c", "underpowered", False, "said", numbers)
    made = Regression(study="s", scale="desk", against="published", time="2026-01-02T03:04:05.678+00:00",
                      findings=(finding,))
    again = regression.load(regression.keep(made))
    assert again.findings[0].numbers == {"p": None, "n": 2, "evidence": "x"}
    assert again.findings[0].said == "said"


def test_mlflow_has_a_run_with_counts_and_the_summary(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    keep(ours, ["lora"], shift=-3)
    code, _, err = suite(monkeypatch, capsys, *regress(ours, "--mlflow"))
    assert (code, err) == (1, "")
    client = MlflowClient(tracking.store_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("ours-verdicts").experiment_id])
    assert run.data.params == {"scale": "paper", "against": "published"}
    assert run.data.metrics == {"not_reproduced": 3, "reproduced": 6, "red": 3, "findings": 9}
    assert (run.data.tags["status"], run.info.status) == ("red", "FAILED")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"verdicts.json", "verdicts.md"}
    assert client.get_experiment_by_name("ours") is None


def test_a_server_that_is_away_costs_a_sentence(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, out, err = suite(monkeypatch, capsys, *regress(ours, "--mlflow"))
    assert code == 0
    assert "nothing red" in out
    assert err == ("suite: MLflow at http://127.0.0.1:9 does not show this result (the server does not answer); it is kept "
                   "in the results folder\n")


@pytest.mark.parametrize(("words", "sentence"), [
    (("gora", "--against", "published"),
     "study gora at desk: no run has a record; `suite run gora --scale desk` makes them"),
    (("gora", "--against", "baseline", "--scale", "moon"), "--scale moon: use desk, bench or paper"),
    (("gora", "--against", "published", "--name", "two-cores"), "--name is for --against baseline"),
    (("gora", "--against", "published", "--confirm"), "--confirm is for --against baseline"),
])
def test_a_wrong_word_is_one_sentence_and_exit_code_2(words: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    assert suite(monkeypatch, capsys, "regress", *words) == (2, "", f"suite: {sentence}\n")


def test_a_study_that_names_no_published_table_is_refused(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    content = yaml.safe_load(ours.read_text(encoding="utf-8"))
    del content["scales"]["paper"]["tables"]["glue"]["published"]
    ours.write_text(yaml.safe_dump(content), encoding="utf-8")
    sentence = "suite: study ours at paper: no table names a published one (key published)\n"
    assert suite(monkeypatch, capsys, *regress(ours)) == (2, "", sentence)


def test_a_study_without_a_baseline_is_refused(ours: Path, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = suite(monkeypatch, capsys, "regress", str(ours), "--scale", "paper", "--against", "baseline")
    assert code == 2
    assert err.startswith("suite: study ours has no baseline at paper; `suite baseline accept ours")


def test_against_a_baseline_what_was_not_run_again_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SUITE_MEASURED", str(tmp_path / "measured"))
    of = synthetic.study("desk", rows=["lora", "gora"], tasks=["movie-sentiment"])
    path = tmp_path / "synthetic.yaml"
    path.write_text(yaml.safe_dump(of.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    cells = study.cells(study.load(str(path)), "desk")
    for cell in cells:
        synthetic.record(cell)
    words = "regress", str(path), "--against", "baseline"
    baseline.accept(study.load(str(path)), "desk", "here", "numbers for this test")
    for cell in cells:
        synthetic.record(cell, finished="2026-02-03T04:05:06+00:00", started="2026-02-03T04:05:00+00:00")
    code, out, _ = suite(monkeypatch, capsys, *words, "--json")
    told = json.loads(out)
    assert (code, told["red"], told["baseline"]) == (0, 0, "here")
    assert told["counts"]["unchanged"] > 4
    shutil.rmtree(records.folder(cells[-1].spec.id))
    code, out, _ = suite(monkeypatch, capsys, *words, "--name", "here")
    assert code == 1
    assert "missing (red)" in out
    assert "synthetic at desk against the baseline here: RED" in out
    kept = list(regression.history("synthetic", "desk", "baseline"))
    assert [bool(one.red) for one in kept] == [False, True]
    assert {one.gate for one in kept[1].red} == {"presence"}


def test_a_desk_study_is_comparable_with_nothing(monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    for cell in study.cells(study.load("gora"), "desk", ["method=lora"]):
        records.save(Record(id=cell.spec.id, spec=cell.spec, status="finished",
                            scores=[Score(metric="accuracy", value=0.8, items=500, stderr=0.02)]))
    code, out, _ = suite(monkeypatch, capsys, "regress", "gora", "--against", "published", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["counts"] == {"not comparable": len(told["findings"])}
    assert {(one["table"], one["row"], one["column"]) for one in told["findings"]} >= {
        ("classification", "lora", "movie-sentiment"), ("word-problems", "lora", "asdiv")}


def test_equal_findings_are_told_in_one_line() -> None:
    found = study.load("gora")
    same = [Finding("published", "classification", row, "bigram-shift", "not comparable", False, "another base")
            for row in ("full", "lora")]
    quiet = [Finding("speed", "classification", row, "all", "unchanged", False, row) for row in ("full", "lora", "gora")]
    red = [Finding("evaluation", "classification", "lora rank=8, gora", "bigram-shift", "changed", True, "9 items flipped")]
    told = verdict_output.lines(found, [*red, *same, *quiet])
    assert [(one.verdict, one.rows, one.said) for one in told] == [
        ("changed", "LoRA, rank=8; GoRA", "9 items flipped"),
        ("not comparable", "Full fine-tuning; LoRA", "another base"),
        ("unchanged", "", "3 compared, nothing changed")]
