"""Sentiment in four places at once: one model learns movie snippets, Amazon reviews, tweets and editorials together.

Training takes one text of each place in turn and no item says where it comes from; each place is scored apart, and the
score is the mean of the four. Small encoders learn this in minutes, as they do not learn the common-sense questions: it is
the desk's way to see what a mixture of experts is worth on data of several kinds.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from suite.splits import mixed
from suite.task import Splits, Task
from tasks.sentiment import Sentiment
from tasks.sentiment_transfer import PARTS


class SentimentMix(Task):
    id = "sentiment-mix"
    title = "Sentiment in four places, mixed"
    kind = "classification"
    metric = "accuracy"
    labels = Sentiment.labels
    source = Sentiment.source
    sizes: ClassVar = {"train": 7212, "validation": 1975, "test": 4879}
    mean_tokens = 25
    citation = Sentiment.citation

    def load(self, folder: Path | None) -> Splits:
        return mixed({part: task().load(folder) for part, task in PARTS.items()}, self.id)
