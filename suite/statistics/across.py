"""Methods over several tasks: mean ranks with a critical difference, performance profiles, and Pareto fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

from suite.statistics.cells import CONFIDENCE, Interval
from suite.statistics.decisions import Outcomes

#: Seed of all draws: the same records give the same report.
SEED = 20250213
DRAWS = 4000


@dataclass(frozen=True)
class Ranking:
    """Mean ranks over tasks (1: best everywhere), in the order of the methods.

    `intervals` hold what other seeds and items would give, each at `CONFIDENCE`; `over_seeds` is false when every method of
    some task has one seed alone, so that the noise of seeds is unknown. Two methods whose mean ranks are `critical` or more apart are told apart, all
    pairs considered at once.
    """

    means: tuple[float, ...]
    intervals: tuple[Interval, ...]
    critical: float
    over_seeds: bool

    def groups(self) -> list[tuple[int, ...]]:
        """Largest sets of neighbours in mean rank that are not told apart, best first, each of two or more."""
        order = sorted(range(len(self.means)), key=lambda i: self.means[i])
        found: list[tuple[int, ...]] = []
        for first in range(len(order)):
            group = tuple(i for i in order[first:] if self.means[i] - self.means[order[first]] < self.critical)
            if len(group) > 1 and not (found and set(group) <= set(found[-1])):
                found.append(group)
        return found


def rank(tasks: Sequence[Sequence[Mapping[int, Outcomes]]], sources: Sequence[str] | None = None) -> Ranking | None:
    """Mean ranks of methods over tasks: `tasks[t][m]` are outcomes by item id, by seed, of method m on task t.

    Friedman's test and Nemenyi's critical difference (Demsar, JMLR 2006) know nothing but the ranks and need many tasks:
    with three tasks and nine methods that difference is 6.9 of at most 8 ranks. Here the noise of every mean is known, so
    means are drawn again with it and ranked again. Noise of items is that of the observed covariance between methods, which
    answered the same items; noise of seeds is taken as alike for all methods of a task (as one critical difference for all
    pairs takes it), with the tails of t. A method that answers alike under every seed has none.
    The critical difference is the level that the largest error among all pairs stays below in `CONFIDENCE` of the draws.
    The tasks are taken as they are: nothing is said about others. Tasks of one source (parts of one task) share the luck
    of their runs. None with fewer than two tasks or three methods (whose ranks say too little), or when a method lacks a
    task or all share no item of it.
    """
    if len(tasks) < 2 or len(tasks[0]) < 3:
        return None
    known = [_noise(task) for task in tasks]
    if any(noise is None for noise in known):
        return None
    sources = sources or [str(place) for place in range(len(tasks))]
    rng = np.random.default_rng(SEED)
    luck = {source: rng.standard_normal((DRAWS, len(tasks[0]))) for source in dict.fromkeys(sources)}
    found, drawn = [], []
    for noise, source in zip((noise for noise in known if noise is not None), sources, strict=True):
        items = rng.standard_normal((DRAWS, len(noise.means))) @ noise.spread
        # The same luck of a run for all parts of its task, with tails as heavy as the number of seeds asks for.
        runs = luck[source] / np.sqrt(rng.chisquare(max(1, noise.dof), (DRAWS, 1)) / max(1, noise.dof))
        found.append(stats.rankdata(-noise.means))
        drawn.append(stats.rankdata(-(noise.means + items + noise.by_run * runs), axis=1))
    means, ranks = np.mean(found, axis=0), np.mean(drawn, axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(ranks, [tail, 100 - tail], axis=0)
    error = ranks - means
    critical = float(np.quantile(error.max(axis=1) - error.min(axis=1), CONFIDENCE))  # the largest error of any pair
    return Ranking(tuple(means.tolist()), tuple(map(Interval, low.tolist(), high.tolist())), critical,
                   all(noise.dof > 0 for noise in known if noise is not None))


def profile(scores: Sequence[Sequence[Sequence[float]]], behind: Sequence[float]) -> NDArray[np.float64]:
    """Performance profiles (Dolan and Moré, Math. Program. 2002, with differences for ratios): methods x `behind`.

    `scores[t][m]` are the scores of method m on task t by seed. The share of runs, every task with equal weight, that are
    at most so far behind the best mean of their task. Raises `ValueError` when a method lacks a task.
    """
    if not all(all(of) for of in scores):
        raise ValueError("every method needs a score on every task")
    reached = []
    for task in scores:
        best = max(sum(of) / len(of) for of in task)
        gaps = [np.asarray([best - score for score in of]) for of in task]
        reached.append([(gap[:, None] <= np.asarray(behind) + 1e-12).mean(axis=0) for gap in gaps])
    return np.mean(reached, axis=0)


def front(scores: Sequence[float], costs: Sequence[float]) -> list[bool]:
    """Which methods are on the Pareto front: none scores at least as high at no more cost, with one of the two better."""
    points = list(zip(scores, costs, strict=True))
    return [not any(other[0] >= own[0] and other[1] <= own[1] and other != own for other in points) for own in points]


@dataclass(frozen=True)
class _Noise:
    """One task: every method's mean, a square root of the covariance of the means over items, and the standard error of
    each mean over runs, estimated from all methods with `dof` degrees of freedom (0: one seed, nothing known)."""

    means: NDArray[np.float64]
    spread: NDArray[np.float64]
    by_run: NDArray[np.float64]
    dof: int


def _noise(task: Sequence[Mapping[int, Outcomes]]) -> _Noise | None:
    """None when a method has nothing, or all of them have no item in common."""
    series = [outcomes for of in task for outcomes in of.values()]
    if not all(task) or not series:
        return None
    index = series[0].index
    for other in series:
        if other.index is not index:
            index = index.intersection(other.index)
    if len(index) == 0:
        return None
    answers = [np.stack([_values(outcomes, index) for outcomes in of.values()], axis=1) for of in task]
    items = np.stack([found.mean(axis=1) for found in answers], axis=1)
    items = items - items.mean(axis=0)
    sizes, vectors = np.linalg.eigh(items.T @ items / len(index) ** 2)
    varied = [found.shape[1] == 1 or bool((found != found[:, :1]).any()) for found in answers]
    dof = sum(found.shape[1] - 1 for found, varies in zip(answers, varied, strict=True) if varies)
    total = sum((found.shape[1] - 1) * _of_runs(found) for found, varies in zip(answers, varied, strict=True) if varies)
    of_runs = max(0.0, total / dof) if dof else 0.0
    return _Noise(np.array([found.mean() for found in answers]), (vectors * np.sqrt(np.clip(sizes, 0, None))).T,
                  np.array([(varies * of_runs / found.shape[1]) ** 0.5
                            for found, varies in zip(answers, varied, strict=True)]), dof)


def _of_runs(answers: NDArray[np.float64]) -> float:
    """Variance of the luck of a run, without bias, so below zero at times: spread over seeds less that of single answers."""
    items, seeds = answers.shape
    if seeds < 2 or items < 2:
        return 0.0
    means = answers.mean(axis=0)
    rest = answers - answers.mean(axis=1, keepdims=True) - means + answers.mean()
    return float(means.var(ddof=1)) - float((rest * rest).sum()) / ((items - 1) * (seeds - 1) * items)


def _values(outcomes: pd.Series, index: pd.Index) -> NDArray[np.float64]:
    return (outcomes if outcomes.index is index else outcomes.reindex(index)).to_numpy(dtype=float)
