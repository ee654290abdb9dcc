"""One cell of a table: mean, spread and interval of the scores that seeds gave."""

from __future__ import annotations

import statistics as plain
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

CONFIDENCE = 0.95

Basis = Literal["t over seeds", "wilson", "none"]


@dataclass(frozen=True)
class Interval:
    """A two-sided interval at `CONFIDENCE`."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Summary:
    """A score over seeds. `sd` (ddof 1) is None with fewer than two seeds; `items` counts those of one seed.

    The interval says where the mean over *other seeds* would lie, on the same items (t over seeds); with one seed there is
    no such knowledge, and it says where this run's score on *other items* would lie (Wilson, JASA 1927).
    """

    mean: float
    sd: float | None
    seeds: int
    items: int
    interval: Interval | None
    basis: Basis


def summarise(scores: Sequence[float], items: int = 0) -> Summary | None:
    """Mean, spread and interval of the scores (each in 0..1) that seeds gave on `items` test items.

    Several seeds: t interval, cut to 0..1. One seed on n items: Wilson interval of the share of right items.
    Returns None without scores. Raises `ValueError` for a score outside 0..1 or not finite.
    """
    values = [float(score) for score in scores]
    if not values:
        return None
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ValueError(f"scores must lie in 0..1, got {values}")
    if len(values) == 1:
        return Summary(values[0], None, 1, items, _wilson(values[0], items), "wilson" if items else "none")
    mean, sd = plain.fmean(values), plain.stdev(values)
    interval = Interval(mean, mean)
    if sd > 0:
        error = sd / len(values) ** 0.5
        low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=error)
        interval = Interval(max(0.0, float(low)), min(1.0, float(high)))
    return Summary(mean, sd, len(values), items, interval, "t over seeds")


def average(columns: Sequence[Sequence[float]]) -> Summary | None:
    """The mean of the columns' means. Spread and interval come from the per-seed averages, so they need columns of
    equal length, with the same seeds in the same order; otherwise there is a mean alone. None if a column is empty."""
    if not columns or not all(columns):
        return None
    mean = plain.fmean(plain.fmean(column) for column in columns)
    seeds = min(len(column) for column in columns)
    if len({len(column) for column in columns}) == 1 and seeds > 1:
        summary = summarise([plain.fmean(values) for values in zip(*columns, strict=True)])
        if summary is not None:
            return summary
    return Summary(mean, None, seeds, 0, None, "none")


def _wilson(share: float, items: int) -> Interval | None:
    if items <= 0:
        return None
    right = min(items, max(0, round(share * items)))
    found = stats.binomtest(right, items).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))
