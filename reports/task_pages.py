"""A page for every task: where its data comes from, how items read, its labels, and how every method did on it."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from reports import links, numbers, results
from reports.frame import Page
from reports.method_pages import prose
from reports.results import Made, Result
from reports.sheets import Entry, Number, Sheet, entry
from reports.study_page import Chapter
from reports.tables import task_title
from suite import assets, data, registry
from suite.errors import UserError
from suite.published import PublishedTable
from suite.task import Item, Source, Task

#: Its index, and its entry of the navigation.
AREA = "tasks/index.html"
#: Examples, and letters of a text, that a page shows.
EXAMPLES, LETTERS = 4, 400
#: Hardest items, most frequent answers and runs that a page lists.
HARDEST, ANSWERS, MOST_RUNS = 12, 6, 200
SPLITS = ("train", "validation", "test")
#: How a task of a kind is put to a model and scored.
KINDS = {
    "classification": "A task head, or a text-to-text base's word, says the label; the score is the share of right labels.",
    "choice": "The choices are ranked by their likelihood after the prompt; the score is the share of items whose right "
              "choice ranks first.",
    "generation": "The model writes an answer, from which lm-eval's filter takes what counts; the score is the share of "
                  "exact matches.",
}


@dataclass(frozen=True)
class Facts:
    """What is said of a task's items: how many answers of each kind there are by split, examples, and the prompts of scored
    items by id, and the parts of the test split."""

    answers: Mapping[str, Counter[str]]
    examples: tuple[Item, ...]
    prompts: Mapping[str, str]
    parts: frozenset[str]


@dataclass
class Misses:
    """How often the items of a task were asked and missed, over runs. `add` takes a run's predictions."""

    asked: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    expected: dict[str, str] = field(default_factory=dict)
    said: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, frame: pd.DataFrame) -> None:
        """Count a run's right and wrong answers: columns item, correct, expected, predicted."""
        self.runs += 1
        items, right = frame["item"].to_numpy(), frame["correct"].to_numpy(dtype=bool)
        self.asked.update(items.tolist())
        missed = np.flatnonzero(~right)
        names = items[missed].tolist()
        self.wrong.update(names)
        expected, predicted = frame["expected"].to_numpy()[missed], frame["predicted"].to_numpy()[missed]
        for item, wanted, given in zip(names, expected.tolist(), predicted.tolist(), strict=True):
            self.expected[item] = str(wanted)
            self.said.setdefault(item, Counter())[str(given)] += 1

    @property
    def always(self) -> int:
        """Items that every run missed that was asked them."""
        return sum(self.wrong[item] == asked for item, asked in self.asked.items())

    @property
    def never(self) -> int:
        """Items that no run missed."""
        return sum(not self.wrong[item] for item in self.asked)


@cache
def facts(task_id: str) -> Facts:
    """Facts of a registered task, read from its data. Raises `UserError` when the data is not on this machine or damaged."""
    task = registry.task(task_id)
    if not data.is_here(task):
        raise UserError(f"the data of task {task_id} is not on this machine")
    splits = data.splits(task_id)
    named = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    answers = {name: Counter(short(answer(task, item), 60) for item in items) for name, items in named.items()}
    prompts = {item.id: short(task.prompt(item)) for items in (splits.validation, splits.test) for item in items}
    parts = frozenset(item.part for item in splits.test if item.part)
    return Facts(answers, _examples(task, splits.train), prompts, parts)


def answer(task: Task, item: Item) -> str:
    """What is to be answered: the word of the label, or the text."""
    return task.answer(item).strip()


def label(task_id: str, said: object) -> str:
    """An answer as predictions hold it, as a reader knows it: the name of a label in place of its number."""
    task = registry.tasks().get(task_id)
    if task is not None and task.labels and str(said).isdecimal() and int(str(said)) < len(task.labels):
        return task.labels[int(str(said))]
    return str(said)


def prompts(task_id: str) -> Mapping[str, str]:
    """Prompts of scored items by id; none when the data is not on this machine or the task is not registered."""
    try:
        return facts(task_id).prompts
    except UserError:
        return {}


def short(text: str, most: int = LETTERS) -> str:
    """A text with its middle left out where it is long: prompts end with the question."""
    if len(text) <= most:
        return text
    head, tail = text[:most * 2 // 3], text[-(most // 3):]
    return f"{head.rpartition(' ')[0] or head} … {tail.partition(' ')[2] or tail}"


def pages(chapters: Sequence[Chapter], made: Sequence[Made], misses: Mapping[str, Misses],
          tables: Sequence[PublishedTable]) -> list[Page]:
    """The index of tasks, and a page for every registered one."""
    found: dict[str, list[Result]] = {}
    for result in results.results(chapters):
        if result.column is not None:
            found.setdefault(result.column.task, []).append(result)
    runs: dict[str, list[Made]] = {}
    for run in made:
        runs.setdefault(run.record.spec.task.id, []).append(run)
    tasks = sorted(registry.tasks().values(), key=lambda task: task.title.lower())
    index = _index(tasks, found, runs)
    intro = "Every registered task: where its data comes from, how an item reads, and how every method did on it."
    return [Page(AREA, "Tasks", "index_page.html.j2", {"lead": intro, "sheet": index}, AREA, (index,)),
            *(_page(task, found.get(task.id, []), runs.get(task.id, []), misses, tables) for task in tasks)]


def _page(task: Task, found: Sequence[Result], runs: Sequence[Made], misses: Mapping[str, Misses],
          tables: Sequence[PublishedTable]) -> Page:
    name = task.id
    measured = results.task_sheet(f"{name}-results", found) if found else None
    every = results.run_sheet(f"{name}-runs", runs) if runs else None
    known, why = _known(task, bool(runs))
    balance = _balance(f"{name}-answers", task, known)
    examples = _example_sheet(f"{name}-examples", task, known) if known else None
    names = {task.id, task.id.rsplit("-", 1)[-1], *(known.parts if known else ())}
    counted = misses.get(task.id)
    hardest = _hardest(f"{name}-hardest", task, counted) if counted else None
    context: dict[str, Any] = {
        "task": task, "about": prose(_about(task)), "sources": [_source(one) for one in task.sources],
        "kind": KINDS[task.kind], "balance": balance, "examples": examples, "why": why, "measured": measured,
        "every": every and every.shortened(MOST_RUNS), "misses": counted, "hardest": hardest, "decode": _decode(runs),
        "document": inspect.getdoc(sys.modules[type(task).__module__]) or "",
        "published": [(f"{table.paper.title}: {table.id}", links.published(table.id)) for table in tables
                      if names & set(table.columns)],
        "studies": {result.of.path: f"{result.of.study.title} ({result.of.scale})" for result in found},
    }
    sheets = tuple(sheet for sheet in (measured, hardest, balance, examples, every) if sheet is not None)
    return Page(links.task(task.id), task.title, "task.html.j2", context, AREA, sheets)


def _known(task: Task, recorded: bool) -> tuple[Facts | None, str]:
    """The facts of a task, or why there are none. Large sets of the hub are read only when something was run on them."""
    if any(source.hub for source in task.sources) and not recorded:
        return None, "Its data comes from the hub and nothing was run on it here, so no item is shown."
    try:
        return facts(task.id), ""
    except UserError as error:
        return None, f"No item is shown: {error}."


def _about(task: Task) -> str:
    """What a task is: its own docstring, else the beginning of its file's."""
    own = type(task).__doc__ or (inspect.getdoc(sys.modules[type(task).__module__]) or task.title).split("\n\n")[0]
    return " ".join(inspect.cleandoc(own).split())


def _source(source: Source) -> list[tuple[str, str]]:
    """Where data comes from, as names and values."""
    said: list[tuple[str, str]] = []
    if source.asset:
        asset = assets.get(source.asset)
        said += [("Package", f"{asset.package} {asset.version} ({asset.title})"), ("Archive", asset.archive),
                 ("SHA-256", asset.sha256)]
    if source.hub:
        said += [("Hub", source.hub + (f", subset {source.subset}" if source.subset else "")),
                 ("Revision", source.revision or "none")]
    return said + ([("Note", source.note)] if source.note else [])


def _decode(runs: Sequence[Made]) -> list[str]:
    """Every decode policy that runs had, as they recorded it."""
    found = [run.record.decode for run in runs if run.record.decode]
    return list(dict.fromkeys(", ".join(f"{key} {value}" for key, value in policy.items()) for policy in found))


def _balance(name: str, task: Task, known: Facts | None) -> Sheet:
    """Items of every split, and how often each answer is the right one."""
    sizes = task.sizes
    if known is None:
        rows = tuple((Entry(split), Entry(numbers.count(sizes[split]))) for split in SPLITS)
        return Sheet(name, "Splits", ("Split", "Items"), rows,
                     tuple({"split": split, "items": sizes[split]} for split in SPLITS))
    every = Counter[str]()
    for counts in known.answers.values():
        every.update(counts)
    shown = [word for word in task.labels if word in every] or [word for word, _ in every.most_common(ANSWERS)]
    if not task.labels and len(every) <= ANSWERS:
        shown.sort()
    rows_, content = [], []
    for split in SPLITS:
        counts, total = known.answers[split], known.answers[split].total()
        most = max(counts.values(), default=0)
        rows_.append((Entry(split), Entry(numbers.count(total)),
                      *(entry(numbers.count(counts[word]), note=numbers.share(counts[word] / total) if total else "")
                        for word in shown),
                      Entry(numbers.percent(most / total) if total else numbers.DASH)))
        said: dict[str, Number] = {"split": split, "items": total, "majority": most / total if total else None}
        content.append({**said, **{f"answer {word}": counts[word] for word in shown}})
    notes = ["Majority: percent of the most frequent answer of the split, what a constant answer scores on all of it."]
    if len(every) > len(shown):
        notes.append(f"The {len(shown)} most frequent of {len(every):,} different answers.")
    header = ("Split", "Items", *shown, "Majority")
    return Sheet(name, "Splits and answers", header, tuple(rows_), tuple(content), tuple(notes))


def _examples(task: Task, items: Sequence[Item]) -> tuple[Item, ...]:
    """The first training items, one of every answer or part where there are few of them."""
    found: dict[str, Item] = {}
    for item in items[:200]:
        found.setdefault(item.part or (answer(task, item) if task.kind != "generation" else item.id), item)
        if len(found) == EXAMPLES:
            break
    more = [item for item in items[:20] if item not in found.values()]
    return tuple([*found.values(), *more][:EXAMPLES])


def _example_sheet(name: str, task: Task, known: Facts) -> Sheet:
    rows, content = [], []
    for item in known.examples:
        rows.append((entry(item.id, code=True), Entry(short(task.prompt(item))), Entry(short(answer(task, item)))))
        content.append({"item": item.id, "prompt": task.prompt(item), "answer": task.answer(item)})
    notes = ["Training items, as a model reads and answers them. Long texts are cut in the middle."]
    if task.kind == "classification":
        notes.append("An encoder reads the text without the words around it, and a head on it says the label.")
    return Sheet(name, "Examples", ("Item", "Prompt", "Answer"), tuple(rows), tuple(content), tuple(notes),
                 frozenset({0, 1, 2}))


def _hardest(name: str, task: Task, misses: Misses) -> Sheet | None:
    """The items that the largest share of runs missed."""
    ranked = sorted(misses.wrong, key=lambda item: (-misses.wrong[item] / misses.asked[item], -misses.asked[item], item))
    if not ranked:
        return None
    texts = prompts(task.id)
    rows: list[tuple[Entry, ...]] = []
    content: list[Mapping[str, Number]] = []
    for item in ranked[:HARDEST]:
        given, times = misses.said[item].most_common(1)[0]
        wrong, asked = misses.wrong[item], misses.asked[item]
        text = short(texts.get(item, ""), 240) or numbers.DASH
        rows.append((entry(item, code=True), Entry(f"{wrong} of {asked}"), Entry(text),
                     Entry(short(label(task.id, misses.expected[item]), 80)),
                     entry(short(label(task.id, given), 80) or "(nothing)", title=numbers.several(times, "run"))))
        content.append({"item": item, "wrong": wrong, "asked": asked, "expected": misses.expected[item], "said": given})
    return Sheet(name, "Hardest items", ("Item", "Runs that missed it", "Prompt", "Right", "Most often said"), tuple(rows),
                 tuple(content), words=frozenset({0, 2, 3, 4}))


def _index(tasks: Sequence[Task], found: Mapping[str, Sequence[Result]], runs: Mapping[str, Sequence[Made]]) -> Sheet:
    rows: list[tuple[Entry, ...]] = []
    content: list[Mapping[str, Number]] = []
    for task in tasks:
        of = found.get(task.id, ())
        studies = "; ".join(dict.fromkeys(f"{result.of.study.id}, {result.of.scale}" for result in of))
        place = " and ".join(dict.fromkeys(source.asset or str(source.hub) for source in task.sources))
        rate = next((result.column.majority for result in of if result.column and result.column.majority is not None), None)
        made = len(runs.get(task.id, ()))
        rows.append((entry(task_title(task.id), link=links.task(task.id), note=task.id), Entry(task.title), Entry(task.kind),
                     Entry(task.metric.replace("_", " ")), *(Entry(numbers.count(task.sizes[split])) for split in SPLITS),
                     Entry(numbers.percent(rate) if rate is not None else numbers.DASH), Entry(place),
                     Entry(studies or numbers.DASH), Entry(str(made)) if made else entry(numbers.DASH, "faded")))
        content.append({"task": task.id, "version": task.version, "title": task.title, "kind": task.kind,
                        "metric": task.metric, **{split: task.sizes[split] for split in SPLITS}, "majority": rate,
                        "source": place, "studies": studies, "runs": made})
    header = ("Task", "What it is", "Kind", "Metric", *(split.capitalize() for split in SPLITS), "Majority", "Source",
              "Measured in", "Runs")
    notes = ("Majority: percent of the most frequent label of the items that runs were scored on.",)
    return Sheet("tasks", "Tasks", header, tuple(rows), tuple(content), notes, frozenset({0, 1, 2, 3, 8, 9}))
