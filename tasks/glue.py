"""Five GLUE tasks (Wang et al. 2019), as the T5-base tables of LoRA-GA, GoRA and their followers use them.

An item of glue-mrpc as it stands on the hub, as an encoder reads it, and as a text-to-text base reads it:

    sentence1 "Legislation making it harder for consumers to erase their debts ..."     label 1
    sentence2 "Legislation making it harder for people to erase their debts ..."        idx 17

    text, pair  the two sentences                                                       label 1
    prompt      "classify the semantic similarity of the text: Legislation ...\\nLegislation ...\\nresult: "
    answer      "equivalent"

Prompts and label words are LoRA-GA's (Outsider565/LoRA-GA at 89af7de, reproduce/data.py), the space at the
end included. T5's vocabulary has no newline and reads it as a space, so T5 is not told where the first
sentence ends. These are not the prompts with which T5 was pretrained on these very tasks.

Splits. The papers train on GLUE's training split, report on its validation split (matched for MNLI), because
its test labels are secret, and hold nothing out. Here `test` is that validation split, whole. `validation` is
cut from the training split, a tenth of it but at most 1,000 items, so that nothing is selected on the split
that is reported. This costs MRPC 11 of its 115 steps, CoLA 27 of 268, SST-2 31 of 2,105. Items that share
their first sentence stay together, and a training item whose text stands in the reported split is left out,
so `sizes` may be off by a few. (SST-2 trains on phrases of the same reviews: its validation score flatters.)

The metric is accuracy for every task, as in those papers; CoLA's own would be Matthews correlation. Always
answering `acceptable` scores 69.13 % on CoLA, always `equivalent` 68.38 % on MRPC.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from suite import hub
from suite.errors import UserError
from suite.splits import hold_out, normalised
from suite.task import Item, Source, Splits, Task

REVISION = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
_NOTE = "one subset of GLUE; test is its validation split, validation is cut from its training split"


def _source(subset: str) -> Source:
    return Source(hub="nyu-mll/glue", revision=REVISION, subset=subset, note=_NOTE)


class Glue(Task):
    """What the five tasks share.

    `columns`: the sentence, or the two sentences, of a row. `rows`: rows of the training and of the reported
    split on the hub. `instruction`: how LoRA-GA's prompt begins.
    """

    kind = "classification"
    metric = "accuracy"
    citation = (
        "Wang, Singh, Michael, Hill, Levy & Bowman (2019), GLUE: A Multi-Task Benchmark and Analysis "
        "Platform for Natural Language Understanding, ICLR"
    )
    columns: ClassVar[tuple[str, ...]]
    instruction: ClassVar[str]
    reported: ClassVar[str] = "validation"
    rows: ClassVar[tuple[int, int]]

    @property
    def scored_on(self) -> str:
        return f"{self.source.hub}/{self.source.subset}:{self.reported}"

    def prompt(self, item: Item) -> str:
        """LoRA-GA's prompt. Ends in a space."""
        return f"{self.instruction}: {super().prompt(item)}\nresult: "

    def load(self, folder: Path | None) -> Splits:
        train = self._items("train", self.rows[0])
        test = self._items(self.reported, self.rows[1])
        grouped = ((item, normalised(item.text)) for item in train)
        return hold_out(grouped, test, self.id, validation=min(len(train) // 10, 1000))

    def _items(self, split: str, count: int) -> list[Item]:
        """The rows of a split, in order. Raises `UserError` like `hub.read`, or for a stray label."""
        rows = hub.read(self.source, split, texts=self.columns, rows=count, others=("label",))
        items = []
        for number, row in enumerate(rows):
            if row["label"] not in range(len(self.labels)):
                raise UserError(
                    f"data set {self.source.hub} ({self.source.subset}, {split}): row {number} has label "
                    f"{row['label']!r}; labels are 0 to {len(self.labels) - 1}"
                )
            text, *pair = (row[column] for column in self.columns)
            second = pair[0] if pair else None
            items.append(Item(f"{self.id}/{split}/{number}", text, second, label=row["label"]))
        return items


class Mnli(Glue):
    id = "glue-mnli"
    title = "Inference (MNLI, matched)"
    source = _source("mnli")
    columns = ("premise", "hypothesis")
    instruction = "classify the semantic similarity of the text"
    labels = ("entailment", "neutral", "contradiction")
    reported = "validation_matched"
    rows = (392_702, 9_815)
    sizes: ClassVar = {"train": 391_702, "validation": 1_000, "test": 9_815}
    mean_tokens = 55


class Sst2(Glue):
    id = "glue-sst2"
    title = "Sentiment (SST-2)"
    source = _source("sst2")
    columns = ("sentence",)
    instruction = "classify the sentiment of the text"
    labels = ("negative", "positive")
    rows = (67_349, 872)
    sizes: ClassVar = {"train": 66_349, "validation": 1_000, "test": 872}
    mean_tokens = 25


class Cola(Glue):
    id = "glue-cola"
    title = "Acceptability (CoLA)"
    source = _source("cola")
    columns = ("sentence",)
    instruction = "classify the grammaticality of the text"
    labels = ("unacceptable", "acceptable")
    rows = (8_551, 1_043)
    sizes: ClassVar = {"train": 7_696, "validation": 855, "test": 1_043}
    mean_tokens = 25


class Qnli(Glue):
    id = "glue-qnli"
    title = "Question answering as inference (QNLI)"
    source = _source("qnli")
    columns = ("question", "sentence")
    instruction = "classify the semantic similarity of the question and the sentence"
    labels = ("entailment", "not_entailment")
    rows = (104_743, 5_463)
    sizes: ClassVar = {"train": 103_743, "validation": 1_000, "test": 5_463}
    mean_tokens = 70


class Mrpc(Glue):
    id = "glue-mrpc"
    title = "Paraphrase (MRPC)"
    source = _source("mrpc")
    columns = ("sentence1", "sentence2")
    instruction = "classify the semantic similarity of the text"
    labels = ("different", "equivalent")
    rows = (3_668, 408)
    sizes: ClassVar = {"train": 3_302, "validation": 366, "test": 408}
    mean_tokens = 65
