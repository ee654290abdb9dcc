"""Intervals against closed forms, and their coverage on data whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from suite.statistics import Interval, average, average_difference, difference, noise, summarise


def outcomes(*values: float, first: int = 0) -> pd.Series:
    return pd.Series(values, index=[f"item{n}" for n in range(first, first + len(values))], dtype=float)


def drawn(rng: np.random.Generator, chance: np.ndarray) -> pd.Series:
    return outcomes(*(rng.random(len(chance)) < chance))


def covers(interval: Interval | None, truth: float) -> bool:
    assert interval is not None
    return interval.low <= truth <= interval.high


def near(repeats: int) -> float:
    """Three Monte-Carlo standard errors of a coverage of 95 %."""
    return 3 * math.sqrt(0.95 * 0.05 / repeats)


# One cell


def test_several_seeds_give_the_t_interval() -> None:
    scores = [0.71, 0.74, 0.69, 0.73]
    found = summarise(scores, items=500)
    assert found is not None
    half = 3.182446305284263 * np.std(scores, ddof=1) / 2  # t(0.975, 3 degrees of freedom), sqrt(4) = 2
    assert found.interval is not None
    assert found.mean == pytest.approx(0.7175)
    assert found.sd == pytest.approx(np.std(scores, ddof=1))
    assert (found.interval.low, found.interval.high) == pytest.approx((0.7175 - half, 0.7175 + half))
    assert (found.seeds, found.items, found.basis) == (4, 500, "t over seeds")


@pytest.mark.parametrize(("right", "items"), [(0, 20), (1, 20), (13, 20), (500, 500), (321, 500)])
def test_one_seed_gives_the_wilson_interval(right: int, items: int) -> None:
    p, z = right / items, stats.norm.ppf(0.975)
    centre = (p + z * z / (2 * items)) / (1 + z * z / items)
    half = z / (1 + z * z / items) * math.sqrt(p * (1 - p) / items + z * z / (4 * items * items))
    found = summarise([p], items)
    assert found is not None
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (centre - half, centre + half), abs=1e-12
    )
    assert (found.sd, found.seeds, found.basis) == (None, 1, "wilson")


def test_one_seed_without_items_has_no_interval() -> None:
    found = summarise([0.5])
    assert found is not None
    assert (found.mean, found.interval, found.basis) == (0.5, None, "none")


def test_no_scores_have_no_summary() -> None:
    assert summarise([]) is None


def test_equal_scores_have_no_spread() -> None:
    found = summarise([0.5, 0.5, 0.5], items=10)
    assert found is not None
    assert (found.sd, found.interval) == (0.0, Interval(0.5, 0.5))


def test_intervals_do_not_leave_the_scale() -> None:
    for scores in ([0.99, 1.0], [0.0, 0.02]):
        found = summarise(scores)
        assert found is not None
        assert found.interval is not None
        assert found.interval.low >= 0.0
        assert found.interval.high <= 1.0


@pytest.mark.parametrize("score", [-0.01, 1.01, 71.0, math.nan, math.inf])
def test_a_score_off_the_scale_is_refused(score: float) -> None:
    with pytest.raises(ValueError, match=r"scores must lie in 0\.\.1"):
        summarise([0.5, score])


def test_the_t_interval_covers_the_mean_over_seeds() -> None:
    rng = np.random.default_rng(1)
    repeats = 1500
    hits = sum(covers(_interval(rng.normal(0.7, 0.02, 3)), 0.7) for _ in range(repeats))
    assert hits / repeats == pytest.approx(0.95, abs=near(repeats))


def test_the_wilson_interval_covers_the_chance_of_a_right_answer() -> None:
    """Exactly: the chance of every count of right answers, times whether its interval covers the truth."""
    items = 200
    intervals = [_interval([right / items], items) for right in range(items + 1)]
    coverage = []
    for chance in np.linspace(0.3, 0.95, 40):
        counts = stats.binom.pmf(np.arange(items + 1), items, chance)
        coverage.append(sum(counts[k] for k, interval in enumerate(intervals) if covers(interval, chance)))
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.005)
    assert min(coverage) > 0.92


def _interval(scores: np.ndarray | list[float], items: int = 0) -> Interval | None:
    found = summarise(list(scores), items)
    assert found is not None
    return found.interval


# Averages over tasks


def test_an_average_has_the_spread_of_the_averages_per_seed() -> None:
    found = average([[0.6, 0.7, 0.8], [0.9, 0.8, 0.7]])
    assert found is not None
    assert found.mean == pytest.approx(0.75)
    assert found.sd == pytest.approx(0.0, abs=1e-12)  # what one task gains with a seed the other loses
    other = average([[0.6, 0.7, 0.8], [0.7, 0.8, 0.9]])
    assert other is not None
    assert (other.mean, other.sd, other.basis) == (pytest.approx(0.75), pytest.approx(0.1), "t over seeds")


def test_an_average_over_unequal_seeds_is_a_mean_of_means_alone() -> None:
    found = average([[0.6, 0.8], [0.9]])
    assert found is not None
    assert found.mean == pytest.approx(0.8)
    assert (found.sd, found.seeds, found.interval, found.basis) == (None, 1, None, "none")


def test_an_average_with_one_seed_has_no_spread() -> None:
    found = average([[0.6], [0.8]])
    assert found is not None
    assert (found.mean, found.sd, found.interval) == (pytest.approx(0.7), None, None)


def test_an_average_that_lacks_a_column_does_not_exist() -> None:
    assert average([]) is None
    assert average([[0.5], []]) is None


# Paired differences


def test_a_difference_is_the_mean_over_seeds_of_paired_outcomes() -> None:
    method = {0: outcomes(1, 1, 1, 0), 1: outcomes(1, 1, 0, 0)}
    reference = {0: outcomes(1, 0, 0, 0), 1: outcomes(1, 0, 0, 0)}
    found = difference(method, reference)
    assert found is not None
    assert found.mean == pytest.approx(0.375)
    assert found.per_seed == pytest.approx((0.5, 0.25))
    assert (found.items, found.identical) == (4, False)
    assert difference(reference, method).mean == pytest.approx(-0.375)  # type: ignore[union-attr]


def test_items_are_paired_by_id_and_not_by_place() -> None:
    ordered, shuffled = outcomes(1, 0, 1, 0, 1), outcomes(1, 0, 1, 0, 1).sample(frac=1, random_state=3)
    found = difference({0: ordered}, {0: shuffled})
    assert found is not None
    assert found.identical


def test_with_one_seed_the_interval_is_that_of_resampled_items() -> None:
    """A mean of n items drawn with replacement from wins and losses: its spread is known."""
    found = difference({0: outcomes(*[1] * 60, *[0] * 40)}, {0: outcomes(*[0] * 30, *[1] * 40, *[0] * 30)})
    assert found is not None
    assert found.interval is not None
    assert found.mean == pytest.approx(0.2)
    deltas = [1] * 30 + [0] * 30 + [-1] * 10 + [0] * 30
    half = 1.96 * np.std(deltas) / 10
    assert (found.interval.low, found.interval.high) == pytest.approx((0.2 - half, 0.2 + half), abs=0.011)


def test_seeds_of_one_item_count_as_one_item() -> None:
    """Four seeds that all answer alike know no more than one does."""
    rng = np.random.default_rng(2)
    method, reference = drawn(rng, np.full(300, 0.8)), drawn(rng, np.full(300, 0.7))
    one = difference({0: method}, {0: reference})
    four = difference(dict.fromkeys(range(4), method), dict.fromkeys(range(4), reference))
    assert one is not None
    assert four is not None
    assert one.interval == four.interval


def test_the_same_records_give_the_same_interval() -> None:
    rng = np.random.default_rng(3)
    method = {seed: drawn(rng, np.full(100, 0.7)) for seed in range(3)}
    reference = {seed: drawn(rng, np.full(100, 0.6)) for seed in range(3)}
    assert difference(method, reference) == difference(dict(reversed(method.items())), reference)


def test_the_paired_interval_covers_what_other_items_would_give() -> None:
    """Items differ in difficulty and seeds in skill; the truth is the mean gain of these seeds."""
    rng = np.random.default_rng(4)
    repeats, hits, widths = 400, 0, []
    skill = {0: 0.05, 1: 0.09}
    for _ in range(repeats):
        base = rng.choice([0.1, 0.5, 0.85], size=200)  # chance of a right answer
        luck = rng.random((2, 200))
        method = {s: outcomes(*(luck[s] < base + gain)) for s, gain in skill.items()}
        reference = {s: outcomes(*(luck[s] < base)) for s in skill}
        found = difference(method, reference)
        assert found is not None
        assert found.interval is not None
        hits += covers(found.interval, 0.07)
        widths.append(found.interval.high - found.interval.low)
    assert hits / repeats == pytest.approx(
        0.95, abs=near(repeats) + 0.01
    )  # a percentile interval is a little short
    independent = 2 * 1.96 * math.sqrt(2 * 0.25 / 200 / 2)
    assert np.mean(widths) < 0.7 * independent  # what is hard for both cancels


def test_only_common_seeds_and_items_are_used() -> None:
    method = {0: outcomes(1, 1, 1), 1: outcomes(0, 0, 0), 7: outcomes(1, 1, 1)}
    reference = {0: outcomes(0, 1, 1, 1, first=1), 1: outcomes(0, 0), 8: outcomes(0, 0, 0)}
    found = difference(method, reference)
    assert found is not None
    assert found.per_seed == pytest.approx((0.5, 0.0))
    assert found.mean == pytest.approx(0.25)
    assert found.items == 3


def test_every_seed_keeps_its_weight_when_it_lacks_items() -> None:
    method = {0: outcomes(*[1] * 100), 1: outcomes(1, 1)}
    reference = {0: outcomes(*[0] * 100), 1: outcomes(1, 1)}
    found = difference(method, reference)
    assert found is not None
    assert found.mean == pytest.approx(0.5)


def test_unknown_outcomes_are_left_out() -> None:
    found = difference({0: outcomes(1, math.nan, 1)}, {0: outcomes(0, 1, math.nan)})
    assert found is not None
    assert (found.mean, found.items) == (1.0, 1)


def test_nothing_in_common_gives_no_difference() -> None:
    one, other = {0: outcomes(1, 0)}, {0: outcomes(1, 0, first=10)}
    assert difference(one, other) is None
    assert difference(one, {1: outcomes(1, 0)}) is None
    assert difference({}, {}) is None
    assert difference({0: outcomes()}, {0: outcomes()}) is None
    assert average_difference([]) is None
    assert average_difference([(one, one), (one, other)]) is None


def test_equal_outcomes_are_called_identical_and_never_clear() -> None:
    same = {0: outcomes(1, 0, 1), 1: outcomes(1, 1, 1)}
    found = difference(same, same)
    assert found is not None
    assert (found.mean, found.interval, found.identical, found.clear) == (0.0, Interval(0, 0), True, False)


def test_equal_scores_on_different_items_are_not_identical() -> None:
    found = difference({0: outcomes(1, 0)}, {0: outcomes(0, 1)})
    assert found is not None
    assert (found.mean, found.identical) == (0.0, False)


def test_a_difference_is_clear_only_when_every_seed_agrees() -> None:
    better, worse, same = (
        outcomes(*[1] * 60, *[0] * 40),
        outcomes(*[0] * 50, *[1] * 10, *[0] * 40),
        outcomes(*[0] * 100),
    )
    clear = difference({0: better, 1: better}, {0: worse, 1: worse})
    split = difference({0: better, 1: same, 2: better}, {0: same, 1: worse, 2: same})
    single = difference({0: better}, {0: worse})
    assert clear is not None
    assert split is not None
    assert single is not None
    assert clear.clear
    assert split.interval is not None
    assert split.interval.excludes_zero
    assert not split.clear
    assert single.interval is not None
    assert single.interval.excludes_zero
    assert not single.clear


def test_boolean_outcomes_are_taken_as_they_stand_in_records() -> None:
    right = pd.Series([True, False, True], index=["a", "b", "c"])
    found = difference({0: right}, {0: ~right})
    assert found is not None
    assert found.mean == pytest.approx(1 / 3)


def test_an_average_difference_weighs_tasks_alike() -> None:
    small = ({0: outcomes(1, 1)}, {0: outcomes(0, 0)})
    large = ({0: outcomes(*[1] * 50)}, {0: outcomes(*[1] * 50)})
    found = average_difference([small, large])
    assert found is not None
    assert found.mean == pytest.approx(0.5)
    assert found.per_seed == pytest.approx((0.5,))
    assert (found.items, found.identical) == (52, False)


def test_an_average_difference_names_the_seeds_that_every_task_has() -> None:
    both = ({0: outcomes(1, 1), 1: outcomes(1, 0)}, {0: outcomes(0, 0), 1: outcomes(0, 0)})
    second_only = ({1: outcomes(1, 1)}, {1: outcomes(0, 0)})
    found = average_difference([both, second_only])
    assert found is not None
    assert found.per_seed == pytest.approx((0.75,))
    assert found.mean == pytest.approx((0.75 + 1.0) / 2)


def test_averaging_tasks_narrows_the_interval() -> None:
    rng = np.random.default_rng(5)
    tasks = []
    for _ in range(4):
        base = rng.random(200) < 0.6
        tasks.append(({0: outcomes(*(base | (rng.random(200) < 0.1)))}, {0: outcomes(*base)}))
    one, four = average_difference(tasks[:1]), average_difference(tasks)
    assert one is not None
    assert four is not None
    assert one.interval is not None
    assert four.interval is not None
    assert four.interval.high - four.interval.low < 0.7 * (one.interval.high - one.interval.low)


def test_the_bootstrap_of_kinds_is_the_bootstrap_of_items() -> None:
    """The multinomial short cut against drawing items one by one."""
    rng = np.random.default_rng(6)
    deltas = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(150, 2))
    deltas[rng.random((150, 2)) < 0.2] = np.nan
    deltas = deltas[np.isfinite(deltas).any(axis=1)]
    short = noise._bootstrap(deltas, np.random.default_rng(7))
    rows = np.random.default_rng(8).integers(0, len(deltas), size=(4000, len(deltas)))
    plain = np.nanmean(np.nanmean(deltas[rows], axis=1), axis=1)
    assert short.mean() == pytest.approx(plain.mean(), abs=0.003)
    assert short.std() == pytest.approx(plain.std(), rel=0.05)
