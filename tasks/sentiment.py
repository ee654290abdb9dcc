"""Short texts with the mean of about twenty human sentiment ratings, as two classes.

Hutto & Gilbert (2014) had sentences from four places rated from -4 (extremely negative) to 4 (extremely positive).
An item of movie-sentiment, as it stands in the file and as it is read:

    3   -0.6   Effective but too tepid biopic          ->  text "Effective but too tepid biopic", label 0 (negative)

The label is the sign of the mean rating. Texts whose mean is nearer to zero than 0.5 are left out: raters did not agree
on a sign, so a label would be noise. Of texts that differ in case and punctuation only, the first stays. Sentences of
the same Amazon review or New York Times article, and tweets that are rewordings of one another, stay in one split.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import ClassVar

from suite.errors import UserError
from suite.splits import distinct, normalised, split
from suite.task import Item, Source, Splits, Task

NEUTRAL = 0.5  # |mean rating| below this gives no label

# Words by which the contrived tweets differ from the tweets that they reword.
_BOOSTERS = frozenset((
    *("absolutely", "best", "especially", "extremely", "fucking", "major", "really"),
    *("seriously", "so", "super", "totally", "uber", "very", "worse"),
))


class Sentiment(Task):
    """What the four tasks share. `group` gives the review, article or wording that must stay in one split."""

    kind = "classification"
    metric = "accuracy"
    labels = ("negative", "positive")
    citation = (
        "Hutto & Gilbert (2014), VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text, "
        "ICWSM"
    )
    source = Source(asset="hutto-2014", note="vaderSentiment 3.2.1, additional_resources/hutto_ICWSM_2014.tar.gz")
    file: ClassVar[str]
    rows: ClassVar[int]

    def group(self, row: str, text: str) -> str:
        return row

    def load(self, folder: Path | None) -> Splits:
        rows = []
        for row, rating, text in read(folder, self.file, self.rows):
            if abs(rating) >= NEUTRAL:
                item = Item(id=f"{self.id}/{row}", text=text, label=int(rating > 0))
                rows.append((item, self.group(row, text)))
        return split(distinct(rows), self.id)


def read(folder: Path | None, file: str, rows: int) -> list[tuple[str, float, str]]:
    """Id, mean rating and text of every line. Raises `UserError` when the file is not the expected one."""
    assert folder is not None, "the ratings come from a packaged asset"
    try:
        lines = (folder / file).read_text(encoding="utf-8-sig").splitlines()
        found = [line.split("\t") for line in lines if line]
        parsed = [(row, float(rating), html.unescape(html.unescape(text)).strip()) for row, rating, text in found]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / file} is not a file of sentiment ratings ({error})") from None
    if len(parsed) != rows:
        raise UserError(f"{folder / file} has {len(parsed)} lines instead of {rows}")
    return parsed


class MovieSentiment(Sentiment):
    id = "movie-sentiment"
    title = "Sentiment of snippets from movie reviews"
    file = "movieReviewSnippets_GroundTruth.txt"
    rows = 10605
    sizes: ClassVar = {"train": 6568, "validation": 1000, "test": 2502}
    mean_tokens = 27


class AmazonSentiment(Sentiment):
    id = "amazon-sentiment"
    title = "Sentiment of sentences from Amazon product reviews"
    file = "amazonReviewSnippets_GroundTruth.txt"
    rows = 3708
    sizes: ClassVar = {"train": 1878, "validation": 326, "test": 764}
    mean_tokens = 23

    def group(self, row: str, text: str) -> str:
        return row.split("_")[0]  # the review


class NytSentiment(Sentiment):
    id = "nyt-sentiment"
    title = "Sentiment of sentences from New York Times editorials"
    file = "nytEditorialSnippets_GroundTruth.txt"
    rows = 5190
    sizes: ClassVar = {"train": 1804, "validation": 310, "test": 817}
    mean_tokens = 26

    def group(self, row: str, text: str) -> str:
        return row.split("_")[0]  # the article


class TweetSentiment(Sentiment):
    id = "tweet-sentiment"
    title = "Sentiment of tweets"
    file = "tweets_GroundTruth.txt"
    rows = 4200
    sizes: ClassVar = {"train": 2142, "validation": 339, "test": 797}
    mean_tokens = 23

    def group(self, row: str, text: str) -> str:
        words = [word for word in normalised(re.sub(r"http\S+", "", text)).split() if word not in _BOOSTERS]
        return " ".join(words) or row
