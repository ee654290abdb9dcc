"""GLUE: LoRA-GA's prompts to the letter, fixed splits, clear words about data that is not as it should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from copies import parquet

from suite import hub, registry
from suite.errors import UserError
from suite.splits import normalised
from suite.task import Item, Splits
from tasks.glue import Glue

IDS = ("glue-mnli", "glue-sst2", "glue-cola", "glue-qnli", "glue-mrpc")
#: The class names that the hub stores; label words differ for MRPC only.
HUB_NAMES = {
    "glue-mnli": ["entailment", "neutral", "contradiction"],
    "glue-sst2": ["negative", "positive"],
    "glue-cola": ["unacceptable", "acceptable"],
    "glue-qnli": ["entailment", "not_entailment"],
    "glue-mrpc": ["not_equivalent", "equivalent"],
}


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of copies; what `datasets` makes of them stays beside it."""
    monkeypatch.setenv("SUITE_DATASETS", str(tmp_path / "copies"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "copies"


def task(task_id: str) -> Glue:
    found = registry.task(task_id)
    assert isinstance(found, Glue)
    return found


def rows(of: Glue, count: int, split: str) -> list[dict[str, Any]]:
    """Rows with the columns of the hub; first sentences come in pairs, as MNLI's in threes."""
    made = []
    for number in range(count):
        texts = {column: f"{split} {column} {number}." for column in of.columns}
        texts[of.columns[0]] = f"{split} first sentence {number // 2 if len(of.columns) == 2 else number}."
        made.append({**texts, "label": number % len(of.labels), "idx": number})
    return made


def put(folder: Path, of: Glue, monkeypatch: pytest.MonkeyPatch, train: Any = 60, scored: Any = 9) -> None:
    """A copy of the repository with one subset, and a task that expects its number of rows."""
    train = rows(of, train, "train") if isinstance(train, int) else train
    scored = rows(of, scored, "scored") if isinstance(scored, int) else scored
    splits = {"train": train, of.reported: scored}
    assert of.source.subset
    parquet(folder / "nyu-mll" / "glue", {of.source.subset: splits}, HUB_NAMES[of.id])
    monkeypatch.setattr(type(of), "rows", (len(train), len(scored)))


def parts(splits: Splits) -> dict[str, list[Item]]:
    return {name: list(part) for name, part in vars(splits).items()}


@pytest.mark.parametrize(
    ("task_id", "item", "prompt", "answer"),
    [
        (
            "glue-mnli",
            Item("i", "A soccer game.", "Some men play.", label=2),
            "classify the semantic similarity of the text: A soccer game.\nSome men play.\nresult: ",
            "contradiction",
        ),
        (
            "glue-sst2",
            Item("i", "a gripping film", label=1),
            "classify the sentiment of the text: a gripping film\nresult: ",
            "positive",
        ),
        (
            "glue-cola",
            Item("i", "They drank the pub.", label=0),
            "classify the grammaticality of the text: They drank the pub.\nresult: ",
            "unacceptable",
        ),
        (
            "glue-qnli",
            Item("i", "Who?", "Denver.", label=1),
            "classify the semantic similarity of the question and the sentence: Who?\nDenver.\nresult: ",
            "not_entailment",
        ),
        (
            "glue-mrpc",
            Item("i", "He left.", "He went.", label=0),
            "classify the semantic similarity of the text: He left.\nHe went.\nresult: ",
            "different",
        ),
    ],
)
def test_prompts_and_label_words_are_lora_gas(task_id: str, item: Item, prompt: str, answer: str) -> None:
    assert task(task_id).prompt(item) == prompt
    assert task(task_id).answer(item) == answer


@pytest.mark.parametrize("task_id", IDS)
def test_declared_sizes_follow_from_the_rows_on_the_hub(task_id: str) -> None:
    of = task(task_id)
    train, scored = of.rows
    held = min(train // 10, 1000)
    assert of.sizes == {"train": train - held, "validation": held, "test": scored}


@pytest.mark.parametrize("task_id", IDS)
def test_it_reads_the_hubs_own_format(task_id: str, copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = task(task_id)
    put(copies, of, monkeypatch)
    splits = of.load(None)
    assert [len(part) for part in parts(splits).values()] == [54, 6, 9]
    first = next(item for item in splits.test if item.id == f"{of.id}/{of.reported}/3")
    assert first.label == 3 % len(of.labels)
    assert first.text == f"scored first sentence {1 if len(of.columns) == 2 else 3}."
    assert first.pair == (f"scored {of.columns[1]} 3." if len(of.columns) == 2 else None)
    assert all(item.target is None for part in parts(splits).values() for item in part)


def test_validation_comes_from_train_and_the_reported_split_stays_whole(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = task("glue-mrpc")
    put(copies, of, monkeypatch)
    splits = of.load(None)
    assert {item.id.split("/")[1] for item in [*splits.train, *splits.validation]} == {"train"}
    assert sorted(item.id for item in splits.test) == [f"glue-mrpc/validation/{n}" for n in range(9)]
    first_sentences = [{item.text for item in part} for part in (splits.train, splits.validation)]
    assert not first_sentences[0] & first_sentences[1]
    assert parts(of.load(None)) == parts(splits)


def test_a_training_item_that_stands_in_the_reported_split_is_left_out(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = task("glue-sst2")
    train, scored = rows(of, 40, "train"), rows(of, 5, "scored")
    train[7]["sentence"] = scored[2]["sentence"].upper()
    put(copies, of, monkeypatch, train, scored)
    splits = of.load(None)
    assert "glue-sst2/train/7" not in {item.id for item in [*splits.train, *splits.validation]}
    seen = {normalised(item.text) for item in [*splits.train, *splits.validation]}
    assert not seen & {normalised(item.text) for item in splits.test}
    assert len(splits.test) == 5


def test_a_missing_column_is_named(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = task("glue-qnli")
    wrong = [{"question": "Who?", "context": "Denver.", "label": 0}]
    put(copies, of, monkeypatch, wrong, wrong)
    with pytest.raises(UserError, match=r"\(qnli, train\): there is no column 'sentence'; there are q"):
        of.load(None)


def test_a_column_of_numbers_is_no_text(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = task("glue-cola")
    wrong = [{"sentence": n, "label": 0, "idx": n} for n in range(5)]
    put(copies, of, monkeypatch, wrong, wrong)
    with pytest.raises(UserError, match="column 'sentence' does not hold text"):
        of.load(None)


def test_splits_with_other_columns_than_each_other_are_refused(
    copies: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    of = task("glue-cola")
    put(copies, of, monkeypatch, [{"text": "A sentence.", "label": 0}])
    capsys.readouterr()
    with pytest.raises(UserError, match="glue cannot be read") as told:
        of.load(None)
    assert "\n" not in str(told.value)
    assert capsys.readouterr() == ("", "")


def test_another_number_of_rows_is_said(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = task("glue-mrpc")
    put(copies, of, monkeypatch)
    monkeypatch.setattr(type(of), "rows", (3668, 408))
    with pytest.raises(UserError, match="60 rows instead of 3,668"):
        of.load(None)


def test_the_secret_labels_of_a_test_split_are_refused(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of = task("glue-cola")
    train = rows(of, 5, "train")
    train[3]["label"] = -1
    put(copies, of, monkeypatch, train)
    with pytest.raises(UserError, match=r"row 3 has label -1; labels are 0 to 1"):
        of.load(None)


def test_a_damaged_file_and_an_unknown_subset_take_one_sentence(
    copies: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(copies, task("glue-cola"), monkeypatch)
    with pytest.raises(UserError, match=r"sst2.* cannot be read") as told:
        task("glue-sst2").load(None)
    assert "\n" not in str(told.value)
    (copies / "nyu-mll" / "glue" / "cola" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 cut off")
    with pytest.raises(UserError, match=r"cola.* cannot be read") as told:
        task("glue-cola").load(None)
    assert "\n" not in str(told.value)


def test_without_copy_cache_or_hub_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="and HF_HUB_OFFLINE is set; go online, or set SUITE_DATASETS to"):
        task("glue-mrpc").load(None)


def test_require_names_everything_that_cannot_be_had(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suite import bases

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(copies / "no such cache"))
    wanted = [bases.get("minilm"), bases.get("t5-base")]
    sources = [source for name in IDS for source in task(name).sources]
    with pytest.raises(UserError) as told:
        hub.require(wanted, sources)
    assert str(told.value).startswith(
        "google-t5/t5-base, nyu-mll/glue: not on this machine, and HF_HUB_OFFLINE is set; go online,"
    )
    (copies / "nyu-mll" / "glue").mkdir(parents=True)
    hub.require([bases.get("minilm")], sources)


def test_what_is_in_the_cache_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from suite import bases

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    base, source = bases.get("t5-base"), task("glue-mrpc").source
    snapshot = tmp_path / "hub" / "models--google-t5--t5-base" / "snapshots" / base.revision
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    made = tmp_path / "cache" / "nyu-mll___glue" / "mrpc" / "0.0.0" / str(source.revision)
    made.mkdir(parents=True)
    (made / "dataset_info.json").touch()
    hub.require([base], [source])
