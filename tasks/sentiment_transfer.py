"""Sentiment learned from movie reviews, tested on movie reviews and on three places that were not trained on.

Training and validation items are those of movie-sentiment. The test split has four parts, each the test split of its
own task: movie (in domain), amazon, tweets and nyt (out of domain). A text that is also tested elsewhere stays in one
place only: in the first part that has it, and never in the training or validation split.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from suite.splits import normalised
from suite.task import Item, Splits, Task
from tasks.sentiment import AmazonSentiment, MovieSentiment, NytSentiment, Sentiment, TweetSentiment

PARTS: dict[str, type[Sentiment]] = {"movie": MovieSentiment, "amazon": AmazonSentiment, "tweets": TweetSentiment,
                                     "nyt": NytSentiment}


class SentimentTransfer(Task):
    id = "sentiment-transfer"
    title = "Sentiment, from movie reviews to products, tweets and news"
    kind = "classification"
    metric = "accuracy"
    labels = Sentiment.labels
    citation = Sentiment.citation
    source = Sentiment.source
    sizes: ClassVar = {"train": 6568, "validation": 1000, "test": 4879}
    mean_tokens = 25
    unseen = frozenset({"amazon", "tweets", "nyt"})

    def load(self, folder: Path | None) -> Splits:
        found = {part: task().load(folder) for part, task in PARTS.items()}
        tested: set[str] = set()
        test = [item for part, splits in found.items() for item in _of(part, splits.test, tested)]
        train = _of("movie", found["movie"].train, tested)
        return Splits(train=train, validation=_of("movie", found["movie"].validation, tested), test=test)


def _of(part: str, items: Iterable[Item], seen: set[str]) -> list[Item]:
    """The items whose text has not been seen, which it now is, as items of a part."""
    kept = []
    for item in items:
        text = normalised(item.text)
        if text not in seen:
            seen.add(text)
            kept.append(replace(item, part=part))
    return kept
