"""Has the order of two adjacent words been swapped? The bigram-shift probe of Conneau et al. (2018) on other sentences.

Two items, the second with `a` and `model` swapped:

    "The Son's Room is a triumph of gentility that earns its moments of pathos."   label 1 (untouched)
    "A finely tuned mood piece, model a of menacing atmosphere."                    label 0 (swapped)

The sentences are those of the rated New York Times editorials and movie snippets of Hutto & Gilbert (2014): 5 to 12
words, from a capital to a full stop, question or exclamation mark. (Conneau et al. take 5 to 28 words and 100,000
training sentences; with the few thousand at hand, small encoders learn nothing from longer ones.) Half of every split
is swapped. A swapped sentence never stands beside its original: each sentence is used once. The first word of a
sentence is not moved (its capital would tell), nor is a word with punctuation, nor are two equal words swapped. Some
swaps leave a good sentence ("an old red car"), so a perfect score is out of reach for man and machine.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from suite.splits import distinct, fraction, split
from suite.task import Item, Source, Splits, Task
from tasks.sentiment import read

_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
_SENTENCE_END = re.compile(r"[.?!:]\W*$")
_FILES = (
    ("nyt", "nytEditorialSnippets_GroundTruth.txt", 5190),
    ("movie", "movieReviewSnippets_GroundTruth.txt", 10605),
)


class BigramShift(Task):
    """Untouched sentence or one with two neighbours swapped: acceptability, as CoLA asks for it, made by rule."""

    id = "bigram-shift"
    title = "Acceptability: are two adjacent words swapped?"
    kind = "classification"
    metric = "accuracy"
    source = Source(asset="hutto-2014", note="sentences of vaderSentiment 3.2.1, swapped here")
    labels = ("unacceptable", "acceptable")
    sizes: ClassVar = {"train": 2264, "validation": 317, "test": 823}
    mean_tokens = 15
    citation = (
        "Conneau, Kruszewski, Lample, Barrault & Baroni (2018), What you can cram into a single $&!#* vector: Probing "
        "sentence embeddings for linguistic properties, ACL (the recipe)"
    )

    def load(self, folder: Path | None) -> Splits:
        rows = []
        for place, file, count in _FILES:
            for row, _, text in read(folder, file, count):
                if _is_sentence(text) and swap_places(text):
                    article = row.split("_")[0]
                    rows.append((Item(id=f"{self.id}/{place}/{row}", text=text), f"{place}/{article}"))
        whole = split(distinct(rows), self.id)
        return Splits(_half(whole.train), _half(whole.validation), _half(whole.test))


def swap_places(text: str) -> list[int]:
    """Places i of the text's words such that words i and i + 1 may be swapped."""
    words = text.split()
    return [
        i
        for i in range(1, len(words) - 1)
        if _WORD.fullmatch(words[i])
        and _WORD.fullmatch(words[i + 1])
        and words[i].lower() != words[i + 1].lower()
        and not _SENTENCE_END.search(words[i - 1])
    ]


def swapped(item: Item) -> str:
    """The text with one pair of neighbours swapped, chosen by a hash of the item's id."""
    words = item.text.split()
    places = swap_places(item.text)
    i = places[int(fraction(item.id, "place") * len(places))]
    words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _is_sentence(text: str) -> bool:
    return 5 <= len(text.split()) <= 12 and text[0].isupper() and text[-1] in ".?!"


def _half(items: Sequence[Item]) -> list[Item]:
    """Swap every other item in the order of a hash of their ids; the order of the split stays."""
    ranked = sorted(items, key=lambda item: fraction(item.id, "swap"))
    shifted = {item.id for item in ranked[::2]}
    return [
        Item(id=item.id, text=swapped(item), label=0)
        if item.id in shifted
        else Item(id=item.id, text=" ".join(item.text.split()), label=1)
        for item in items
    ]
