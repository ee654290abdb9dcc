"""The papers' tables: every one is there and loads, and every fault is said with its file, line and key."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from suite import paths, published
from suite.errors import UserError, one_of
from suite.measures import MEASURES
from suite.published import PublishedTable

DOCS = paths.REPOSITORY / "docs" / "published.md"
#: How many rows, columns, cells, and numbers of each evidence every table has. Change a line with its table.
EXPECTED = {row["id"]: row for row in csv.DictReader((Path(__file__).parent / "published_tables.csv").open())}


def edited(folder: Path, name: str, old: str, new: str) -> Path:
    """A real table with one edit, at its first occurrence."""
    text = (paths.published() / f"{name}.yaml").read_text(encoding="utf-8")
    assert old in text
    path = folder / f"{name}.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


def refusal(path: Path) -> str:
    """The sentence with which a file is refused, without the file's name that it begins with."""
    with pytest.raises(UserError) as caught:
        published.load(str(path))
    sentence = str(caught.value)
    assert sentence.startswith(str(path))
    assert "\n" not in sentence
    return sentence.removeprefix(str(path)).removeprefix(": ")


def test_every_table_is_there_with_all_its_cells() -> None:
    found = {}
    for name in published.names():
        table = published.load(name)
        counts = [len(table.rows), len(table.columns), sum(len(row.cells) for row in table.rows),
                  *(table.evidence.get(level, 0) for level in published.EVIDENCE_LABELS)]
        header = ["rows", "columns", "cells", *published.EVIDENCE_LABELS]
        found[name] = {"id": name, **{key: str(count) for key, count in zip(header, counts, strict=True)}}
    assert found == EXPECTED


@pytest.mark.parametrize("name", published.names())
def test_every_table_says_where_it_is_from_and_what_is_missing(name: str) -> None:
    table = published.load(name)
    assert table.paper.arxiv or table.paper.version or "README" in table.paper.table or "source" in table.paper.table
    assert table.missing or table.numbers == sum(len(row.cells) for row in table.rows) > 0


def test_tables_name_only_tables_that_exist() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in paths.published().glob("*.yaml")}
    named = {name for text in texts.values() for name in re.findall(r"(?<![\w/])[a-z0-9]\w+\.yaml", text)}
    assert len(named) > 10
    assert named <= set(texts)
    assert not [name for name, text in texts.items() if re.search(r"(?<![\w.])(/work|notes/|papers/)", text)]


def test_every_measure_is_used_by_a_table() -> None:
    assert {name for table in map(published.load, published.names()) for name in table.measures} == set(MEASURES)


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


def test_cells_inherit_the_evidence_of_their_row() -> None:
    row = published.load("lora_pro").rows[0]
    assert row.evidence is None
    assert {column: cell.evidence for column, cell in row.cells.items()} == {
        "mt-bench": "recalled", "gsm8k": "secondary", "humaneval": "recalled"}
    row = published.load("lora_pro").rows[1]
    assert {cell.evidence for cell in row.cells.values()} == {row.evidence} == {"recalled"}


def test_a_table_without_numbers_says_what_is_missing() -> None:
    table = published.load("lorasc")
    assert "sweep over the noise scale" in table.missing
    assert (table.row("lora"), table.numbers, table.places, table.evidence) == (None, 0, 0, {})
    assert table.protocol.unknown == ("train", "metric", "split", "selection", "seeds")


def test_a_row_is_found_by_method_rank_and_base() -> None:
    table = published.load("gora_llama31_8b")
    found = [table.row("gora", rank) for rank in (128, None, 4)]
    assert [row.rank for row in found if row] == [128, 8, 8]
    assert table.row("no-such-method") is None
    dora = published.load("commonsense_dora_table1")
    assert dora.bases[0] == dora.base == "meta-llama/Llama-2-7b-hf"
    cells = [dora.cell("lora", "avg", 32, base) for base in (None, "yahma/llama-7b-hf", "google/gemma-2b")]
    assert [cell and cell.mean for cell in cells] == [77.6, 74.7, None]
    assert [row.rank for row in dora.rows_of("dora", base="yahma/llama-13b-hf")] == [16, 32]
    assert len(dora.rows_of("dora", rank=16)) == 4
    assert dora.cell("lora", "no-such-column") is None


def test_only_scores_that_were_read_may_gate() -> None:
    table = published.load("gora_llama31_8b")
    assert {cell.evidence for row in table.rows for column, cell in row.cells.items() if table.may_gate(row, column)} == {
        "verbatim", "secondary"}
    assert [cell.may_gate for cell in table.rows_of("rslora")[0].cells.values()] == [False, True, True]
    costs = published.load("malora_inter_domain")
    row = costs.row("malora")
    assert row is not None
    assert not costs.may_gate(row, "us-per-token")
    assert costs.may_gate(row, "gsm8k")
    assert not costs.may_gate(row, "no-such-column")


def test_columns_say_what_they_count() -> None:
    gora, lora = published.load("gora_glue_t5base"), published.load("lora_glue")
    assert gora.measure("glue-cola") is MEASURES["accuracy"]
    assert lora.measure("glue-cola") is MEASURES["matthews"]
    sparta = published.load("sparta_notebooks")
    assert sparta.scores == ("sst2-accuracy", "sst2-mcc", "sst2-f1")
    assert sparta.measure("eval-loss").better == "lower"
    with pytest.raises(KeyError):
        sparta.measure("avg")


def test_averages_are_of_the_columns_that_the_paper_averages() -> None:
    assert published.load("adalora_glue_debertav3").averaged("avg")[0] == ("glue-mnli", "glue-mnli-mm")
    assert published.load("malora_inter_domain").averaged("avg")[0] == ("medmcqa",)
    assert published.load("gora_clip_vit_b16").averaged("avg") == ()
    assert published.load("gora_glue_t5base").averaged("glue-rte") == ()


GORA, CELL = "gora_glue_t5base", "{glue-mnli: {mean: 85.30, sd: 0.04}"
EXCEPTION = "; correct it or add a caveat that begins 'avg exception:' and names the row's label and the printed number"
EMPTY = "a table without columns or rows must say under `missing` what is to be transcribed"
ROW_KEYS = "method, label, base, rank, evidence, cells or source"
TABLE_KEYS = one_of(list(PublishedTable.model_fields))
ALL_MEASURES = one_of(list(MEASURES))
NO_MAPPING = f"the file must be a mapping with the keys {', '.join(PublishedTable.model_fields)}"


@pytest.mark.parametrize(
    ("name", "old", "new", "line", "sentence"),
    [
        (GORA, "id: gora_glue_t5base", "id: gora", "id: gora", "id: 'gora' must be the file's name, 'gora_glue_t5base'"),
        (GORA, "    glue-sst2: {data", "    glue-rte: {data", "    glue-rte: {data", "conventions.columns.glue-rte: "
         "unknown column; use glue-mnli, glue-sst2, glue-cola, glue-qnli, glue-mrpc or avg"),
        (GORA, "selection: last-step", "selection: the best", "  selection: the best", "conventions.selection: "
         "input should be 'last-step', 'best-on-validation' or 'best-on-test' (got 'the best')"),
        (GORA, "base: ", "notes: x\nbase: ", "notes: x", f"notes: unknown key; use {TABLE_KEYS}"),
        (GORA, "    rank: 8", "    ranks: 8", "    ranks: 8", f"rows.1.ranks: unknown key; use {ROW_KEYS}"),
        (GORA, "sd: 0.04", "std: 0.04", "std: 0.04", "rows.1.cells.glue-mnli.std: unknown key; use mean, sd or evidence"),
        (GORA, "  seeds: 3", "  epochs: 3", "protocol:", "protocol.seeds: field required"),
        (GORA, "  seeds: 3", "  seeds: 3\n  epochs: 3", "  epochs: 3", "protocol.epochs: unknown key; "
         "use train, metric, split, seeds, selection, statistic, rank or notes"),
        (GORA, "  split: ", "  # split: ", "protocol:", "protocol.split: field required"),
        (GORA, "    evidence: secondary", "    evidence: hearsay", "    evidence: hearsay", "rows.0.evidence: "
         "input should be 'verbatim', 'secondary', 'recalled' or 'derived' (got 'hearsay')"),
        (GORA, "    evidence: secondary\n", "", "    cells: {glue-mnli: {mean: 86.33",
         "rows.0.cells.glue-mnli.evidence: field required"),
        (GORA, "{glue-mnli: {mean: 85.30", "{glue-rte: {mean: 85.30", "{glue-rte",
         "rows.1.cells.glue-rte: unknown column; use glue-mnli, glue-sst2, glue-cola, glue-qnli, glue-mrpc or avg"),
        (GORA, CELL, "{glue-mnli: {mean: 853.0, sd: 0.04}", "853.0",
         "rows.1.cells.glue-mnli.mean: must be from 0 to 100, being percent of right answers (got 853)"),
        (GORA, CELL, "{glue-mnli: {mean: .nan}", ".nan",
         "rows.1.cells.glue-mnli.mean: input should be a finite number (got nan)"),
        (GORA, CELL, "{glue-mnli: {mean: 85.3O}", "85.3O", "rows.1.cells.glue-mnli.mean: "
         "input should be a valid number, unable to parse string as a number (got '85.3O')"),
        (GORA, CELL, "{glue-mnli: 85.30", "{glue-mnli: 85.30,", "rows.1.cells.glue-mnli: "
         "input should be a valid dictionary or instance of PublishedCell (got 85.3)"),
        (GORA, "sd: 0.04", "sd: -0.04", "sd: -0.04",
         "rows.1.cells.glue-mnli.sd: input should be greater than or equal to 0 (got -0.04)"),
        (GORA, "avg: {mean: 87.91}", "avg: {mean: 89.71}", "89.71", "rows.0.cells.avg: the average of Full is printed 89.71 "
         f"but its cells give 87.906{EXCEPTION}"),
        (GORA, "avg exception: the printed LoRA average", "avg exception: the printed rsLoRA average", "avg: {mean: 82.08}",
         f"rows.1.cells.avg: the average of LoRA is printed 82.08 but its cells give 82.006{EXCEPTION}"),
        (GORA, "columns: [glue-mnli,", "columns: [glue-mnli, glue-mnli,", "columns:",
         "columns.1: the column 'glue-mnli' stands twice"),
        (GORA, "  accuracy: [glue-mnli, ", "  accuracy: [", "columns:", "columns.0: 'glue-mnli' stands under no measure; "
         f"add it under `measures` to what it counts: {ALL_MEASURES}"),
        (GORA, "  accuracy: [", "  accurcy: [", "  accurcy: [", f"measures.accurcy: unknown measure; use {ALL_MEASURES}"),
        (GORA, "  mean: [avg]", "  mean: [average]", "  mean: [average]", "measures.mean.0: unknown column 'average'; "
         "use glue-mnli, glue-sst2, glue-cola, glue-qnli, glue-mrpc or avg"),
        (GORA, "  mean: [avg]", "  mean: [avg]\n  f1: [glue-mrpc]", "  f1:",
         "measures.f1.0: 'glue-mrpc' stands under 'accuracy' already"),
        (GORA, '  arxiv: "2502.12171"', '  arxiv: 2502.12171', "  arxiv:",
         "paper.arxiv: input should be a valid string (got 2502.12171)"),
        ("mixlora_router_loss", "{mean: 0.001}", "{mean: 0}", 26,
         "rows.1: the row MixLoRA stands twice, here and in rows.0; "
         "rows must differ in method, label, rank, base, source or a setting"),
        ("svft_math", "    base: \"google/gemma-2b\"\n", "", "  - method: full",
         "rows.0: the row must name its `base`, because the table's is 'per row'"),
        ("mole_nlp", "  nli-avg: [anli-r1, anli-r2, anli-r3, qnli]\n", "", "nli-avg]", "columns.37: say under `averages` "
         "which columns 'nli-avg' is the mean of, or [] when they are not in the table"),
        ("mole_nlp", "  nli-avg: [anli-r1", "  nli-avg: [anli", "  nli-avg: [anli",
         "averages.nli-avg.0: unknown column 'anli'; use wmt14-en-fr-bleu, "),
        ("adamix_glue_bert_base", "averages:\n  avg:", "averages:\n  glue-rte:", "  glue-rte:",
         "averages.glue-rte: no column of measure 'mean'; use avg"),
        ("adamix_glue_bert_base", "glue-qqp-f1, glue-mrpc-f1, glue-cola, glue-rte, glue-stsb]\nrows",
         "glue-qqp, glue-mrpc-f1, glue-cola, glue-rte, glue-stsb]\nrows", "avg: {mean: 84.5}",
         f"rows.7.cells.avg: the average of AdaMix is printed 84.5 but its cells give 84.900{EXCEPTION}"),
        ("lorasc", "missing:", "caveat:", "caveat:", f"caveat: unknown key; use {TABLE_KEYS}"),
        (GORA, "columns: [glue-mnli, glue-sst2, glue-cola, glue-qnli, glue-mrpc, avg]", "columns: []", "id:", EMPTY),
    ],
)
def test_a_fault_is_said_with_its_line_and_key(
    tmp_path: Path, name: str, old: str, new: str, line: str | int, sentence: str
) -> None:
    path = edited(tmp_path, name, old, new)
    lines = path.read_text(encoding="utf-8").splitlines()
    where = line if isinstance(line, int) else next(n for n, text in enumerate(lines, 1) if line in text)
    assert refusal(path).startswith(f", line {where}: {sentence}")


def test_the_example_of_the_docs_loads_and_is_refused_as_they_say(tmp_path: Path) -> None:
    text = DOCS.read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    told = re.search(r"^suite: results/published/my_adapter_glue\.yaml(, line .*)$", text, re.MULTILINE)
    assert example
    assert told
    path = tmp_path / "my_adapter_glue.yaml"
    path.write_text(example[1], encoding="utf-8")
    table = published.load(str(path))
    assert (table.places, table.numbers, table.protocol.statistic) == (8, 5, "median")
    path.write_text(example[1].replace("mean: 94.4", "mean: 944"), encoding="utf-8")
    assert refusal(path) == told[1]
    path.write_text(example[1].replace("avg exception", "average"), encoding="utf-8")
    assert refusal(path).endswith(EXCEPTION)


def test_the_docs_name_only_tables_that_exist() -> None:
    named = set(re.findall(r"`([a-z0-9]+_\w+)`", DOCS.read_text(encoding="utf-8")))
    assert len(named) > 10
    assert named <= {*EXPECTED, "lora_ga"}


def test_an_average_is_only_held_against_a_full_row(tmp_path: Path) -> None:
    path = edited(tmp_path, GORA, CELL, "{glue-mnli: {mean: null}")
    cell = published.load(str(path)).rows[1].cells["glue-mnli"]
    assert (cell.mean, cell.may_gate) == (None, False)
    assert published.load(str(path)).numbers == published.load(GORA).numbers - 1


def test_a_table_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    path = edited(tmp_path, GORA, "base: google-t5/t5-base", "base: google-t5/t5-small")
    assert published.load(str(path)).base == "google-t5/t5-small"
    edited(tmp_path, GORA, "base: google-t5/t5-base", "base: google-t5/t5-large")
    assert published.load(str(path)).base == "google-t5/t5-large"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id: [1, 2", ", line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        (b"id: tiny\nbase: x\nid: other\n", ", line 3: not YAML: the key 'id' stands twice"),
        (b"", NO_MAPPING),
        (b"- id: tiny\n", NO_MAPPING),
        (b"id: caf\xe9\n", "is not UTF-8 text"),
        (b"id: \x00\n", "not YAML: cannot be parsed"),
    ],
)
def test_what_is_no_table_at_all_is_said(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_bytes(content)
    assert refusal(path) == sentence


def test_an_unknown_table_is_refused_with_those_like_it(tmp_path: Path) -> None:
    for name, like in (("malora", "malora_ablation, malora_inter_domain"), (str(tmp_path / "lorasc2.yaml"), "lorasc, "),
                       ("gora_gleu_t5base", "gora_ablations, gora_clip_vit_b16, gora_glue_t5base or "),
                       ("zzz", "adalora_components, ")):
        with pytest.raises(UserError) as caught:
            published.load(name)
        assert str(caught.value).startswith(f"unknown published table {name!r}: use {like}")
        assert str(caught.value).endswith(f"; `suite list published` shows all {len(EXPECTED)}")


def test_a_table_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    assert "cannot be read" in refusal(tmp_path / "folder.yaml")
