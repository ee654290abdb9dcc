"""The contract of a task: where its items come from, how an item reads, how it is scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

Kind = Literal["classification", "generation", "choice"]


@dataclass(frozen=True)
class Item:
    """One example. `id` is stable across machines and runs: results are paired by it.

    Classification: `text` (and `pair`) with an integer `label`. Generation: `text` is the prompt and `target`
    the string to be produced. An encoder reads `text` and `pair`; a text-to-text base reads `Task.prompt` and
    writes `Task.answer`. Choice: `text` is the prompt, `choices` the continuations that are ranked by their
    likelihood, `label` the right one and `target` its continuation. `part` names the part of a task that has several.
    """

    id: str
    text: str
    pair: str | None = None
    label: int | None = None
    target: str | None = None
    choices: tuple[str, ...] = ()
    part: str | None = None


@dataclass(frozen=True)
class Splits:
    """Fixed splits, each in its fixed order. No text stands in two of them."""

    train: Sequence[Item]
    validation: Sequence[Item]
    test: Sequence[Item]


@dataclass(frozen=True)
class Source:
    """Where data comes from: a packaged asset (id in `suite.assets`), or the hub at a revision."""

    asset: str | None = None
    hub: str | None = None
    revision: str | None = None
    subset: str | None = None
    note: str = ""


class Task(ABC):
    """One data set with fixed splits, a reading, and a metric. Subclasses are found by `suite.registry`.

    A correction to the data, the splits, the prompt or the metric raises `version`; published results keep
    theirs.
    """

    id: ClassVar[str]
    version: ClassVar[int] = 1
    title: ClassVar[str]
    kind: ClassVar[Kind]
    metric: ClassVar[str]  # "accuracy" (share of items), "exact_match" (share of items)
    source: ClassVar[Source]
    labels: ClassVar[tuple[str, ...]] = ()  # names (and, for text-to-text bases, words) of labels 0, 1, ...
    sizes: ClassVar[dict[str, int]]  # items per split, known without the data
    mean_tokens: ClassVar[int]  # rough tokens per item (prompt and target), for time estimates only
    citation: ClassVar[str] = ""
    unseen: ClassVar[frozenset[str]] = frozenset()  # parts of the test split that are not trained on

    @abstractmethod
    def load(self, folder: Path | None) -> Splits:
        """Read all items from the unpacked asset folder (None for hub sources).

        Raises `UserError` when a file, a column or a split is not what the task's version says it is.
        """

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that `load` reads; `source` is where the training items come from."""
        return (self.source,)

    @property
    def scored_on(self) -> str | None:
        """The public split that `test` is, whole, as OWNER/NAME/SUBSET:SPLIT of the model hub; None: a split of our own."""
        return None

    def prompt(self, item: Item) -> str:
        """What a text-to-text base reads: the item's text, and its pair on a line of its own."""
        return item.text if item.pair is None else f"{item.text}\n{item.pair}"

    def answer(self, item: Item) -> str:
        """What a text-to-text base is to write: the item's target, or the word of its label."""
        if item.target is not None:
            return item.target
        assert item.label is not None, f"{item.id} has neither target nor label"
        return self.labels[item.label]

    def lm_eval_config(self, test_file: Path) -> dict[str, object] | None:
        """The task's `lm-eval` configuration over a local JSON-lines file, for generation tasks."""
        return None


@dataclass
class TaskData:
    """A task's items as one run uses them, with a fingerprint of exactly these items."""

    task: Task
    train: Sequence[Item]
    validation: Sequence[Item]
    test: Sequence[Item]
    fingerprint: str = field(default="")
