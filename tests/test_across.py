"""Ranks, profiles and fronts over tasks: by hand, and against noise whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from suite.statistics import Interval, Ranking, adjust, difference, front, profile, rank

INDEX = pd.RangeIndex(250)


def task(rng: np.random.Generator, skills: list[float], seeds: int, runs: float = 0.1) -> list[dict[int, pd.Series]]:
    """Outcomes of methods of given skills that answer the same items."""
    difficulty = rng.normal(0, 1.6, len(INDEX))
    luck = rng.normal(0, runs, (len(skills), seeds, 1)) + rng.normal(0, 0.8, (len(skills), seeds, len(INDEX)))
    right = np.array(skills)[:, None, None] + luck > difficulty
    return [{s: pd.Series(of[s], index=INDEX) for s in range(seeds)} for of in right]


def near(repeats: int) -> float:
    """Three Monte-Carlo standard errors of a rate of 5 %."""
    return 3 * math.sqrt(0.05 * 0.95 / repeats)


def apart(ranking: Ranking | None) -> bool:
    assert ranking is not None
    return max(ranking.means) - min(ranking.means) >= ranking.critical


def test_mean_ranks_are_means_of_ranks() -> None:
    rng = np.random.default_rng(1)
    found = rank([task(rng, [3.0, 0.0, 1.0, -1.0], 5), task(rng, [3.0, 0.0, -1.0, 1.0], 5)])
    assert found is not None
    assert found.means == (1.0, 3.0, 3.0, 3.0)
    assert found.over_seeds
    assert found.intervals[0] == Interval(1.0, 1.0)


def test_equal_methods_share_their_rank() -> None:
    rng = np.random.default_rng(2)
    one, other, third = task(rng, [2.0, 0.0, 0.0], 1)
    found = rank([[one, other, other], [third, one, one]])
    assert found is not None
    assert found.means == ((1 + 3) / 2, (2.5 + 1.5) / 2, (2.5 + 1.5) / 2)
    assert not found.over_seeds


def test_too_little_is_not_ranked() -> None:
    rng = np.random.default_rng(3)
    one = task(rng, [1.0, 1.0, 1.0], 2)
    assert rank([one]) is None
    assert rank([one[:2], one[:2]]) is None
    assert rank([one, [*one[:2], {}]]) is None
    elsewhere = {seed: right.set_axis(INDEX + 1000) for seed, right in one[2].items()}
    assert rank([one, [*one[:2], elsewhere]]) is None


@pytest.mark.parametrize(("methods", "tasks", "seeds"), [(3, 3, 2), (5, 2, 3), (9, 3, 2), (5, 5, 5)])
def test_methods_that_are_alike_are_rarely_told_apart(methods: int, tasks: int, seeds: int) -> None:
    """Whichever pair it is: the critical difference is for all of them at once."""
    rng = np.random.default_rng(4)
    repeats = 100
    wrong = sum(apart(rank([task(rng, [1.0] * methods, seeds) for _ in range(tasks)])) for _ in range(repeats))
    assert wrong / repeats <= 0.05 + near(repeats)


def test_methods_that_differ_are_told_apart_where_ranks_alone_could_not() -> None:
    rng = np.random.default_rng(5)
    skills = np.linspace(0, 1.6, 9).tolist()
    found = [rank([task(rng, skills, 3) for _ in range(3)]) for _ in range(20)]
    nemenyi = 3.102 * math.sqrt(9 * 10 / (6 * 3))
    assert all(apart(ranking) for ranking in found)
    assert np.mean([ranking.critical for ranking in found if ranking]) < 0.7 * nemenyi
    for ranking in found:
        assert ranking is not None
        assert ranking.means[8] < ranking.means[0]


def test_parts_of_one_task_share_the_luck_of_their_runs() -> None:
    """A lucky run is lucky on all parts, so their mean rank is less sure than that of as many tasks."""
    rng = np.random.default_rng(6)
    parts = [task(rng, [1.0] * 5, 3, runs=0.5) for _ in range(4)]
    apart_, together = rank(parts), rank(parts, ["one"] * 4)
    assert apart_ is not None
    assert together is not None
    assert apart_.means == together.means
    widths = [np.mean([i.high - i.low for i in ranking.intervals]) for ranking in (apart_, together)]
    assert widths[1] > 1.15 * widths[0]


def test_groups_are_the_largest_that_are_not_told_apart() -> None:
    nothing = tuple(Interval(0, 0) for _ in range(5))
    assert Ranking((1.0, 4.9, 2.0, 3.0, 4.1), nothing, 1.5, True).groups() == [(0, 2), (2, 3), (3, 4), (4, 1)]
    assert Ranking((1.0, 4.9, 2.0, 3.0, 4.1), nothing, 9.0, True).groups() == [(0, 2, 3, 4, 1)]
    assert Ranking((1.0, 4.9, 2.0, 3.0, 4.1), nothing, 0.5, True).groups() == []


def test_the_truly_best_is_among_those_tied_with_the_highest() -> None:
    """As a table marks them: the highest is found first, then Holm over one-sided tests against it."""
    rng = np.random.default_rng(7)
    repeats, left_out, without = 300, 0, 0
    for _ in range(repeats):
        methods = task(rng, [1.02, 1.0, 1.0, 1.0, 1.0, 0.2], 3, runs=0.03)
        means = [np.mean([right.mean() for right in of.values()]) for of in methods]
        best = int(np.argmax(means))
        found = {i: difference(methods[best], of) for i, of in enumerate(methods) if i != best}
        p = {i: delta.p_above for i, delta in found.items() if delta is not None and delta.p_above is not None}
        adjusted = dict(zip(p, adjust(list(p.values()), "holm"), strict=True))
        left_out += adjusted.get(0, 1.0) <= 0.05
        without += adjusted.get(5, 1.0) <= 0.05
    assert left_out / repeats <= 0.05 + near(repeats)
    assert without / repeats > 0.9


def test_a_profile_counts_the_runs_near_the_best() -> None:
    scores = [[[0.9, 0.9], [0.8, 0.9], [0.5, 0.7]], [[0.6, 0.5], [0.7, 0.7], [0.7, 0.1]]]
    found = profile(scores, [0.0, 0.1, 0.2, 0.6])
    assert found.tolist() == [[0.5, 0.75, 1.0, 1.0], [0.75, 1.0, 1.0, 1.0], [0.25, 0.25, 0.5, 1.0]]
    with pytest.raises(ValueError, match="every method needs a score on every task"):
        profile([[[0.9], []]], [0.0])


def test_the_front_holds_what_nothing_beats_for_less() -> None:
    assert front([0.9, 0.8, 0.7, 0.9, 0.6], [3, 2, 2.5, 4, 1]) == [True, True, False, False, True]
    assert front([0.9, 0.9], [1, 1]) == [True, True]
    assert front([], []) == []
