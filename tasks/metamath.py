"""Arithmetic word problems: trained on MetaMathQA (Yu et al. 2024), scored on GSM8K (Cobbe et al. 2021).

A training item as it stands on the hub and as it is read:

    type "GSM_AnsAug"   query "The town of Belize has 400 homes. One fourth of ... do not have a fireplace?"
    response "One fourth of ... is 300 - 60 = 240.\\n#### 240\\nThe answer is: 240"

    text     "Q: The town of Belize has 400 homes. One fourth of ... do not have a fireplace?\\nA: "
    target   "One fourth of ... is 300 - 60 = 240.\\n#### 240"

A scored item has such a prompt too, and as target the number behind the last `####` of its answer.

The selection is LoRA-GA's (Outsider565/LoRA-GA at 89af7de, reproduce/data.py), which GoRA follows: only types
made from GSM8K, fewer than 512 tokens, the first 100,000 in the order of the file, the response cut before
"\\nThe answer is:". Three things differ:

- Tokens are counted by a rule (`tokens`), not by Llama-2's tokenizer, so that every base sees the same items.
  Few problems are near the limit.
- `validation` holds rewordings of one in a hundred of GSM8K's training questions, and no rewording of these
  is trained on; some of the 100,000 therefore come from further down the file. (The paper's code evaluates on
  rewordings of questions that it trains on.)
- Prompt, which ends in a space, and answer stand side by side; the paper's code puts a second space between.

Scored by exact match of the number behind the first `####` of what is generated
(lm_eval/metamath_gsm8k.yaml). Signs and decimals count; thousands separators and currency signs do not. The
paper's pattern, `####\\s*(\\d+)`, reads "1,200" as 1, in the reference too, and takes a missing answer for 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import yaml

from suite import hub
from suite.errors import UserError
from suite.splits import fraction
from suite.task import Item, Source, Splits, Task

GSM8K = Source(hub="openai/gsm8k", revision="740312add88f781978c0658806c59bc2815b9866", subset="main")
HELD_OUT = 0.01  # share of GSM8K's training questions whose rewordings are not trained on
TOKENS = 512
_TOKEN = re.compile(r"[^\W\d_]{1,6}|\d|[^\w\s]|_")
_ANSWER = re.compile(r"####\s*(.+)")
_YAML = Path(__file__).resolve().parent / "lm_eval" / "metamath_gsm8k.yaml"


class MetaMathGsm8k(Task):
    """100,000 solved rewordings of GSM8K's training questions, scored on GSM8K's test questions."""

    id = "metamath-gsm8k"
    title = "Word problems (MetaMathQA to GSM8K)"
    kind = "generation"
    metric = "exact_match"
    source = Source(
        hub="meta-math/MetaMathQA",
        revision="aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18",
        note="test: openai/gsm8k, subset main",
    )
    rows: ClassVar = {"train": 395_000, "test": 1_319}  # on the hub
    sizes: ClassVar = {"train": 100_000, "validation": 1_000, "test": 1_319}
    mean_tokens = 200
    citation = (
        "Yu et al. (2024), MetaMath: Bootstrap Your Own Mathematical Questions for Large Language Models, "
        "ICLR; Cobbe et al. (2021), Training Verifiers to Solve Math Word Problems, arXiv 2110.14168"
    )

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.source, GSM8K)

    @property
    def scored_on(self) -> str:
        return f"{GSM8K.hub}/{GSM8K.subset}:test"

    def load(self, folder: Path | None) -> Splits:
        found: dict[str, list[Item]] = {"train": [], "validation": [], "test": self._scored()}
        for item, question in self._problems():
            held = fraction(self.id, "held out", question) < HELD_OUT
            split = "validation" if held else "train"
            if len(found[split]) < self.sizes[split]:
                found[split].append(scored(item, str(item.target)) if held else item)
        for split, items in found.items():
            if len(items) < self.sizes[split]:
                raise UserError(
                    f"data set {self.source.hub}: {len(items):,} items of type GSM for {split} instead of "
                    f"{self.sizes[split]:,}"
                )
            items.sort(key=lambda item: fraction(self.id, "order", item.id))
        return Splits(**found)

    def lm_eval_config(self, test_file: Path) -> dict[str, object] | None:
        config = yaml.safe_load(_YAML.read_text(encoding="utf-8"))
        return {**config, "dataset_kwargs": {"data_files": {"test": str(test_file)}}}

    def _problems(self) -> Iterator[tuple[Item, str]]:
        """Problems made from GSM8K that are short enough, in order, each with its original question."""
        texts = ("type", "query", "response", "original_question")
        rows = hub.read(self.source, "train", texts=texts, rows=self.rows["train"])
        for number, row in enumerate(rows):
            if "GSM" not in row["type"]:
                continue
            target = row["response"].split("\nThe answer is:")[0]
            item = Item(f"{self.id}/train/{number}", prompt(row["query"]), target=target)
            if tokens(f"{item.text} {item.target}") < TOKENS:
                yield item, row["original_question"]

    def _scored(self) -> list[Item]:
        """GSM8K's test questions with their numbers."""
        rows = hub.read(GSM8K, "test", texts=("question", "answer"), rows=self.rows["test"])
        return [
            scored(Item(f"{self.id}/test/{number}", prompt(row["question"])), row["answer"])
            for number, row in enumerate(rows)
        ]


def prompt(question: str) -> str:
    """LoRA-GA's prompt. Ends in a space."""
    return f"Q: {question}\nA: "


def scored(item: Item, solution: str) -> Item:
    """The item with the number behind the last `####` of its solution as target.

    Raises `UserError` when the solution has no such mark.
    """
    found = _ANSWER.findall(solution)
    if not found:
        raise UserError(f"item {item.id}: its answer has no number behind '####'")
    return Item(id=item.id, text=item.text, target=found[-1].strip().replace(",", ""))


def tokens(text: str) -> int:
    """About how many tokens a text has: up to six letters, a digit and any other mark count one each."""
    return len(_TOKEN.findall(text))
