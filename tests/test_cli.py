"""The command line: what people type, what they see, exit codes, and one sentence for a wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from suite import ledger, paths, published, records
from suite import study as studies
from suite.records import Record
from tests.command import suite

STUDY = Path("suite/studies/gora.yaml")


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SUITE_REPORTS", str(tmp_path / "reports"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.parametrize("kind", ["methods", "tasks", "bases", "studies", "published"])
def test_lists_are_the_same_for_people_and_programs(kind: str, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = suite(monkeypatch, capsys, "list", kind, "--json")
    rows = json.loads(out)
    assert code == 0
    assert rows
    code, out, _ = suite(monkeypatch, capsys, "list", kind)
    assert code == 0
    assert all(str(row["id"]) in out for row in rows)


def test_published_tables_are_listed_on_one_line_each(monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = suite(monkeypatch, capsys, "list", "published")
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.strip()}
    assert len(lines) == len(published.names()) + 2  # the header and the rule under it
    assert lines["gora_glue_t5base"] == "gora_glue_t5base GoRA t5-base 14 × 6 74 of 84 12 verbatim, 62 secondary gora"
    assert lines["dota"] == "dota DoTA not transcribed… 0 × 0 none yet dota"
    rows = json.loads(suite(monkeypatch, capsys, "list", "published", "--json")[1])
    (gora,) = [row for row in rows if row["id"] == "gora_glue_t5base"]
    assert (gora["rows"], gora["columns"], gora["numbers"], gora["arxiv"]) == (14, 6, 74, "2502.12171")
    assert (gora["evidence"], gora["studies"]) == ({"verbatim": 12, "secondary": 62}, ["gora"])
    (lorasc,) = [row for row in rows if row["id"] == "lorasc"]
    assert len(lorasc["missing"]) == 7


@pytest.mark.parametrize(("kind", "text", "found"), [
    ("published", "SubZero", ["subzero_opt13b"]),
    ("published", "glue-mrpc-f1", ["adamix_glue_bert_base", "adamix_glue_roberta_large"]),
    ("published", "2410.08305", ["rac_lora"]),
    ("published", "no such thing", []),
    ("studies", "slow cascades", ["lorasc"]),
])
def test_a_list_can_be_narrowed_to_what_it_is_about(kind: str, text: str, found: list[str],
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(suite(monkeypatch, capsys, "list", kind, "--about", text, "--json")[1])
    assert [row["id"] for row in rows] == found


def test_a_published_table_is_shown_with_what_a_reader_must_know(monkeypatch: pytest.MonkeyPatch,
                                                                 capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = suite(monkeypatch, capsys, "show", "published", "gora_llama31_8b")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    table = published.load("gora_llama31_8b")
    (row,) = [line for line in lines if line.startswith("rsLoRA")]
    cells = table.rows_of("rslora")[0].cells
    assert row == "rsLoRA 8 " + " ".join(
        f"{cell.mean:.2f} ± {cell.sd:.2f} {cell.evidence[0].upper()}" for cell in cells.values())
    assert all(caveat.split()[0] in out for caveat in table.caveats)
    assert "points of a judge from 0 to 10: mt-bench" in lines
    _, out, _ = suite(monkeypatch, capsys, "show", "published", "mole_nlp")
    assert "nli-avg 79.2 V 78.8 V 80.5 V" in [" ".join(line.split()) for line in out.splitlines()]
    _, out, _ = suite(monkeypatch, capsys, "show", "published", "lorasc")
    assert "Missing: sweep over the noise scale" in out
    told = json.loads(suite(monkeypatch, capsys, "show", "published", "lorasc", "--json")[1])
    assert (told["rows"], told["id"]) == ([], "lorasc")
    code, _, err = suite(monkeypatch, capsys, "show", "published", "lorask")
    assert code == 2
    assert err.startswith("suite: unknown published table 'lorask': use lorasc")


def test_plan_shows_every_run_and_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = suite(monkeypatch, capsys, "plan", "gora", "--json")
    made = json.loads(out)
    assert code == 0
    assert len(made["runs"]) == 58
    assert sum(len(pack) for pack in made["packs"]) == len({run["id"] for run in made["runs"]})
    code, out, _ = suite(monkeypatch, capsys, "plan", "gora", "--only", "method=gora", "--only", "seed=0")
    assert code == 0
    assert "GoRA" in out
    assert "rsLoRA" not in out
    assert not (tmp_path / "results" / "runs").exists()


def test_status_and_report_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = suite(monkeypatch, capsys, "status", "gora", "--json")
    assert code == 0
    assert {run["status"] for run in json.loads(out)} == {"missing"}
    code, out, _ = suite(monkeypatch, capsys, "report", "gora", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["runs"]["missing"] == 58
    assert Path(told["report"]) == tmp_path / "reports" / "gora-desk" / "index.html"
    assert (tmp_path / "reports" / "gora-desk" / "report.md").exists()
    assert not (paths.results() / "mlflow.db").exists()  # that is for `suite sync`


def test_sync_fills_mlflow_from_the_records_and_doubles_nothing(monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    found = studies.load("gora")
    for cell in studies.cells(found, "desk", ["method=gora"])[:2]:
        records.save(Record(id=cell.spec.id, spec=cell.spec, status="skipped", reason="for this test"))
    expected: list[tuple[int, int]] = [(2, 0), (0, 2)]
    for created, unchanged in expected:
        code, out, _ = suite(monkeypatch, capsys, "sync", "gora", "--json")
        assert code == 0
        assert json.loads(out) == {"created": created, "unchanged": unchanged, "updated": 0, "problem": None}
    code, out, _ = suite(monkeypatch, capsys, "sync", "gora")
    assert (code, out) == (0, "0 runs created, 0 replaced, 2 were there already.\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    code, _, err = suite(monkeypatch, capsys, "sync", "gora")
    assert code == 1
    assert "the server does not answer" in err


def test_status_says_what_is_running_and_when_it_last_showed_life(monkeypatch: pytest.MonkeyPatch,
                                                                  capsys: pytest.CaptureFixture[str]) -> None:
    run = studies.cells(studies.load("gora"), "desk", ["method=gora"])[0].spec.id
    records.paths.runs().mkdir(parents=True)
    with ledger.claim(run) or pytest.fail("nobody else is here"):
        _, out, _ = suite(monkeypatch, capsys, "status", "gora", "--json")
        (running,) = [one for one in json.loads(out) if one["status"] == "running"]
        assert running["run"] == run
        assert 0 <= running["heartbeat"] < 60
        assert "last heartbeat" in suite(monkeypatch, capsys, "status", "gora")[1]
    assert "last heartbeat" not in suite(monkeypatch, capsys, "status", "gora")[1]


@pytest.mark.parametrize(("words", "sentence"), [
    (("plan", "nonsense"), "unknown study 'nonsense'"),
    (("plan", "gora", "--scale", "moon"), "--scale moon: use desk, bench or paper"),
    (("run", "gora", "--only", "method=dora9"), "--only method=dora9"),
    (("status", "gora", "--only", "colour=red"), "write key=value with key table, task, method, rank, budget, rate or seed"),
    (("export", "0123456789ab"), "no such run has a record"),
    (("export", "0123456789ab", "--format", "gguf"), "--format gguf: use peft, merged, sparse, tensor or own"),
    (("ui", "--host", "0.0.0.0"), "use 127.0.0.1 or localhost"),
])
def test_a_wrong_word_is_one_sentence_and_exit_code_2(words: tuple[str, ...], sentence: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = suite(monkeypatch, capsys, *words)
    assert code == 2
    assert not out
    assert err.startswith("suite: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists() or not any((tmp_path / "results").rglob("*.json"))


def changed(tmp_path: Path, edit: Any) -> str:
    study = yaml.safe_load(STUDY.read_text(encoding="utf-8"))
    edit(study, study["scales"]["desk"]["tables"]["classification"])
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("edit", "sentence"), [
    (lambda study, table: table.pop("fair") and table.update(tasks=["imdb9"], train=8), "unknown task 'imdb9'"),
    (lambda study, table: table.update(base="bert9"), "unknown base 'bert9'"),
    (lambda study, table: study["rows"]["lora"].update(method="lora9"), "unknown method 'lora9'"),
    (lambda study, table: table.update(colour="red"), "colour: unknown key"),
    (lambda study, table: table["recipe"].update(learning_rate=-1.0), "learning_rate"),
    (lambda study, table: table.update(budgets=[{"rank": 4096}]), "rank 4096 is larger than layer"),
])
def test_a_fault_in_a_study_file_is_one_sentence(edit: Any, sentence: str, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = suite(monkeypatch, capsys, "run", changed(tmp_path, edit))
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_a_results_folder_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "file"))
    code, _, err = suite(monkeypatch, capsys, "run", "gora")
    assert code == 2
    assert "cannot be written" in err
    assert "SUITE_RESULTS" in err


def test_the_module_is_the_command() -> None:
    environment = {**os.environ, "COLUMNS": "100"}
    told = subprocess.run([sys.executable, "-m", "suite", "--help"], capture_output=True, text=True, env=environment,
                          check=True).stdout
    for command in ("doctor", "list", "plan", "run", "status", "sync", "report", "export", "ui"):
        assert command in told
