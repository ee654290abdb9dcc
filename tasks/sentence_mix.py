"""Three questions about sentences, mixed: one model learns all of them with one head, and each is scored apart.

The sentiment of Amazon reviews and of tweets, and whether two words of a sentence are swapped. All have two labels,
but label 1 of the first two (positive) has nothing to do with that of the third (acceptable), and no item says which
question it belongs to: a model must tell from the sentence. Small encoders learn this in minutes, as they do not learn the
common-sense questions; it is the desk's way to see what a mixture of experts is worth.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from suite.splits import mixed
from suite.task import Splits, Task
from tasks.bigram_shift import BigramShift
from tasks.sentiment import AmazonSentiment, TweetSentiment

PARTS: tuple[type[Task], ...] = (AmazonSentiment, TweetSentiment, BigramShift)


class SentenceMix(Task):
    id = "sentence-mix"
    title = "Sentiment of two kinds and word order, mixed"
    kind = "classification"
    metric = "accuracy"
    labels = ("no", "yes")
    source = TweetSentiment.source
    sizes: ClassVar = {"train": 5634, "validation": 982, "test": 2384}
    mean_tokens = 20
    citation = f"{TweetSentiment.citation}; {BigramShift.citation}"

    def load(self, folder: Path | None) -> Splits:
        return mixed({part.id: part().load(folder) for part in PARTS}, self.id)
