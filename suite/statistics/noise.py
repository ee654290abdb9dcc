"""How sure a number is: spread and intervals of one cell, and paired differences between two.

Two questions are kept apart. The interval of a *cell* says where the mean over other seeds would lie (t over seeds);
with one seed there is no such knowledge, and the interval says where the score on other test items would lie (Wilson).
The interval of a *difference* is paired: both methods answered the same items with the same seeds, so what is hard for
both cancels. It says what other test items would give *for these seeds*; how much seeds matter is shown by `per_seed`.
"""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
#: Seed of every bootstrap: the same records give the same report.
BOOTSTRAP_SEED = 20250213

#: Right or wrong of one run, by item id.
Outcomes = pd.Series
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
    """A score over seeds. `sd` (ddof 1) is None with fewer than two seeds; `items` counts those of one seed."""

    mean: float
    sd: float | None
    seeds: int
    items: int
    interval: Interval | None
    basis: Basis


@dataclass(frozen=True)
class Difference:
    """Method minus reference, paired. `interval` is None when there are no common items to resample.

    `per_seed` holds the difference of each seed in order; `identical` says that both gave the same outcome on every
    item, in which case the interval has no width and means nothing more than that.
    """

    mean: float
    interval: Interval | None
    per_seed: tuple[float, ...]
    items: int
    identical: bool = False

    @property
    def clear(self) -> bool:
        """The interval excludes zero, there is more than one seed, and no seed points the other way."""
        if self.interval is None or not self.interval.excludes_zero or len(self.per_seed) < 2:
            return False
        return all(value * self.mean > 0 for value in self.per_seed)


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


def difference(method: Mapping[int, Outcomes], reference: Mapping[int, Outcomes]) -> Difference | None:
    """The paired difference of two methods on one task: outcomes by item id, by seed.

    Only seeds and items that both have are used. Items are resampled with all their seeds together: an item asked
    under several seeds is one item, not several. Every seed keeps its weight. None when nothing is common.
    """
    return average_difference([(method, reference)])


def average_difference(
    tasks: Sequence[tuple[Mapping[int, Outcomes], Mapping[int, Outcomes]]],
) -> Difference | None:
    """The mean over tasks of the paired differences, items resampled within each task.

    None when a task has nothing in common. `per_seed` covers the seeds that every task has.
    """
    parts = [_paired(method, reference) for method, reference in tasks]
    if not parts or any(part.empty for part in parts):
        return None
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    draws = np.mean([_bootstrap(part.to_numpy(dtype=float), rng) for part in parts], axis=0)
    seeds = [seed for seed in parts[0].columns if all(seed in part.columns for part in parts)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Difference(
        mean=plain.fmean(float(part.mean().mean()) for part in parts),
        interval=Interval(float(low), float(high)),
        per_seed=tuple(plain.fmean(float(part[seed].mean()) for part in parts) for seed in seeds),
        items=sum(len(part) for part in parts),
        identical=all(bool((part.fillna(0.0) == 0).all(axis=None)) for part in parts),
    )


def _wilson(share: float, items: int) -> Interval | None:
    if items <= 0:
        return None
    right = min(items, max(0, round(share * items)))
    found = stats.binomtest(right, items).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return Interval(float(found.low), float(found.high))


def _paired(method: Mapping[int, Outcomes], reference: Mapping[int, Outcomes]) -> pd.DataFrame:
    """Differences of outcomes, items x seeds, with NaN where a seed lacks an item that another has."""
    columns: dict[int, Outcomes] = {}
    for seed in sorted(set(method) & set(reference)):
        delta = (method[seed].astype(float) - reference[seed].astype(float)).dropna()
        if not delta.empty:
            columns[seed] = delta
    return pd.DataFrame(columns)


def _bootstrap(deltas: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Resampled means of `deltas [items, seeds]`.

    Drawing items with replacement is drawing how often each *kind* of item comes up, where a kind is a pattern of
    outcomes over the seeds. There are few kinds, so one multinomial draw per resample does the work of many.
    """
    if np.isfinite(deltas).all():  # every seed has every item: the mean over seeds is all that counts
        deltas = deltas.mean(axis=1, keepdims=True)
    kinds, counts = np.unique(np.nan_to_num(deltas, nan=np.inf), axis=0, return_counts=True)
    drawn = rng.multinomial(len(deltas), counts / counts.sum(), size=RESAMPLES).astype(np.float64)
    present = np.isfinite(kinds)
    totals = drawn @ np.where(present, kinds, 0.0)
    answered = drawn @ present.astype(np.float64)
    per_seed = np.divide(totals, answered, out=np.full_like(totals, np.nan), where=answered > 0)
    means: NDArray[np.float64] = np.nan_to_num(np.nanmean(per_seed, axis=1))
    return means


__all__ = ["CONFIDENCE", "Difference", "Interval", "Summary", "average", "average_difference", "difference",
           "summarise"]
