"""The papers' tables: every one loads, and every fault is said with its file and key."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from edits import Edit, drop, put

from suite import published
from suite.errors import UserError

TABLE: dict[str, Any] = {
    "id": "tiny",
    "paper": {"title": "A paper", "arxiv": "2501.00001", "table": "Table 1"},
    "base": "some/base",
    "protocol": {
        "train": "one epoch",
        "metric": "accuracy",
        "split": "test",
        "seeds": 3,
        "selection": "last step",
    },
    "columns": ["a", "b", "avg"],
    "rows": [
        {
            "method": "lora",
            "label": "LoRA",
            "rank": 8,
            "evidence": "secondary",
            "source": "arXiv 2501.00001",
            "cells": {
                "a": {"mean": 70.0, "sd": 0.5},
                "b": {"mean": 80.0, "evidence": "verbatim"},
                "avg": {"mean": 75.0},
            },
        },
        {
            "method": "gora",
            "label": "GoRA",
            "rank": 8,
            "evidence": "verbatim",
            "source": "arXiv 2501.00001",
            "cells": {"a": {"mean": 71.0}, "b": {"mean": None}},
        },
    ],
    "headline_claims": [{"text": "better", "value": 1.0, "evidence": "verbatim"}],
}


EMPTY = "a table without columns or rows must say under `missing` what is to be transcribed"


def written(folder: Path, table: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(table, sort_keys=False), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The sentence with which a file is refused, without the file's name that it begins with."""
    with pytest.raises(UserError) as caught:
        published.load(str(path))
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    return sentence.removeprefix(str(path)).removeprefix(": ")


@pytest.mark.parametrize("name", published.names())
def test_every_table_of_the_repository_loads(name: str) -> None:
    table = published.load(name)
    assert table.id == name
    assert table.paper.arxiv
    assert table.missing or any(cell.mean is not None for row in table.rows for cell in row.cells.values())


@pytest.mark.parametrize("name", published.names())
def test_percentages_and_judge_scores_lie_on_their_scale(name: str) -> None:
    for row in published.load(name).rows:
        for column, cell in row.cells.items():
            if column.endswith("-seconds") or column in ("us-per-token", "seconds-per-step", "steps", "trainable"):
                continue
            top = 10 if column == "mt-bench" else 100
            assert cell.mean is None or 0 <= cell.mean <= top


def test_there_are_tables_for_gora() -> None:
    assert {"gora_glue_t5base", "gora_llama31_8b", "gora_ablations"} <= set(published.names())


def test_headline_claims_follow_from_the_cells() -> None:
    glue, llama = published.load("gora_glue_t5base"), published.load("gora_llama31_8b")

    def mean(table: published.PublishedTable, method: str, column: str, rank: int | None = None) -> float:
        row = table.row(method, rank)
        assert row is not None
        found = row.cells[column].mean
        assert found is not None
        return found

    assert mean(glue, "gora", "avg") - mean(glue, "lora", "avg") == pytest.approx(5.88)
    assert mean(llama, "gora", "gsm8k", 8) - mean(llama, "lora", "gsm8k", 8) == pytest.approx(5.13)
    assert mean(llama, "gora", "gsm8k", 128) - mean(llama, "full", "gsm8k") == pytest.approx(2.05)


def test_cells_inherit_the_evidence_of_their_row(tmp_path: Path) -> None:
    row = published.load(str(written(tmp_path, TABLE))).rows[0]
    assert {column: cell.evidence for column, cell in row.cells.items()} == {
        "a": "secondary",
        "b": "verbatim",
        "avg": "secondary",
    }


def test_a_table_without_numbers_says_what_is_missing(tmp_path: Path) -> None:
    table = published.load(str(written(tmp_path, TABLE | {"columns": [], "rows": [], "missing": ["Table 1"]})))
    assert table.missing == ("Table 1",)
    assert table.row("lora") is None


def test_a_row_is_found_by_method_and_rank() -> None:
    table = published.load("gora_llama31_8b")
    found = [table.row("gora", rank) for rank in (128, None, 4)]
    assert [row.rank for row in found if row] == [128, 8, 8]
    assert table.row("no-such-method") is None


def test_every_kind_of_evidence_has_words_for_readers() -> None:
    used = {
        cell.evidence
        for name in published.names()
        for row in published.load(name).rows
        for cell in row.cells.values()
    }
    assert used <= set(published.EVIDENCE_LABELS)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("rows", 0, "cells", "c", {"mean": 1.0}), "rows.0.cells.c: unknown column; use a, b or avg"),
        (drop("rows", 1, "evidence"), "rows.1.cells.a.evidence: field required"),
        (
            put("rows", 1, "evidence", "hearsay"),
            "rows.1.cells.a.evidence: input should be 'verbatim', 'secondary', "
            "'recalled' or 'derived' (got 'hearsay')",
        ),
        (
            put("rows", 0, "cells", "avg", "mean", 75.1),
            "rows.0.cells.avg: the average of LoRA is printed 75.1 but its cells give 75.000; correct it or "
            "add a caveat that begins 'avg exception:' and names the row's label and the printed number",
        ),
        (put("id", "other"), "id: 'other' must be the file's name, 'tiny'"),
        (
            put("notes", "x"),
            "notes: unknown key; use id, paper, base, protocol, columns, rows, headline_claims, caveats, missing or "
            "conventions",
        ),
        (put("rows", 0, "ranks", 8), "rows.0.ranks: unknown key; use method, label, rank, cells or source"),
        (
            put("rows", 0, "cells", "a", "std", 1),
            "rows.0.cells.a.std: unknown key; use mean, sd or evidence",
        ),
        (
            put("protocol", "epochs", 1),
            "protocol.epochs: unknown key; use train, metric, split, seeds, selection, rank or notes",
        ),
        (drop("protocol", "split"), "protocol.split: field required"),
        (put("columns", ["a", "b", "a"]), "columns: a column stands twice"),
        (put("conventions", {"columns": {"c": {"metric": "f1"}}}), "conventions.columns.c: unknown column; use a, b or avg"),
        (
            put("conventions", {"selection": "the best"}),
            "conventions.selection: input should be 'last-step', 'best-on-validation' or 'best-on-test' (got 'the best')",
        ),
        (put("columns", []), EMPTY),
        (put("rows", []), EMPTY),
        (
            put("rows", 0, "cells", "a", "sd", -0.1),
            "rows.0.cells.a.sd: input should be greater than or equal to 0 (got -0.1)",
        ),
        (
            put("rows", 0, "cells", "a", "mean", float("nan")),
            "rows.0.cells.a.mean: input should be a finite number (got nan)",
        ),
        (
            put("rows", 0, "cells", "a", "mean", "seventy"),
            "rows.0.cells.a.mean: input should be a valid number, unable to parse string as a number "
            "(got 'seventy')",
        ),
        (
            put("rows", 0, "cells", "a", 70.0),
            "rows.0.cells.a: input should be a valid dictionary or instance of PublishedCell (got 70.0)",
        ),
    ],
)
def test_a_fault_is_said_with_its_key(tmp_path: Path, change: Edit, sentence: str) -> None:
    table = copy.deepcopy(TABLE)
    change(table)
    assert refusal(written(tmp_path, table)) == sentence


def test_a_wrong_average_is_excused_by_a_caveat_that_names_row_and_number(tmp_path: Path) -> None:
    table = copy.deepcopy(TABLE)
    table["rows"][0]["cells"]["avg"]["mean"] = 75.1
    table["caveats"] = ["avg exception: the paper prints 75.2 for GoRA."]
    assert "average of LoRA" in refusal(written(tmp_path, table))
    table["caveats"] = ["avg exception: the paper prints 75.1 for LoRA."]
    assert published.load(str(written(tmp_path, table))).caveats


def test_an_average_is_only_held_against_a_full_row(tmp_path: Path) -> None:
    table = copy.deepcopy(TABLE)
    table["rows"][1]["cells"]["avg"] = {"mean": 12.0}
    assert published.load(str(written(tmp_path, table))).rows[1].cells["avg"].mean == 12.0


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id: [1, 2", ", line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        (b"id: tiny\nbase: x\nid: other\n", ", line 3: not YAML: the key 'id' stands twice"),
        (
            b"",
            "the file must be a mapping with the keys id, paper, base, protocol, columns, rows, "
            "headline_claims, caveats, missing, conventions",
        ),
        (
            b"- id: tiny\n",
            "the file must be a mapping with the keys id, paper, base, protocol, columns, rows, "
            "headline_claims, caveats, missing, conventions",
        ),
        (b"id: caf\xe9\n", "is not UTF-8 text"),
        (b"id: \x00\n", "not YAML: cannot be parsed"),
    ],
)
def test_what_is_no_table_at_all_is_said(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_bytes(content)
    assert refusal(path) == sentence


def test_an_unknown_table_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    for name in ("no-such-table", str(tmp_path / "absent.yaml")):
        with pytest.raises(
            UserError, match=r"unknown published table '.*': use .*gora_ablations, gora_glue_t5base"
        ):
            published.load(name)
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.yaml")
