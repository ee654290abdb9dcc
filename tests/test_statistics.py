"""Cells and paired differences: against closed forms, and coverage and error rates on data whose truth is known.

`made` draws right and wrong answers: an item is right when skill, the luck of the run (seed) and the luck of the answer
together exceed its difficulty. Difficulties are shared by both methods, so that the true difference has a closed form.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from suite.statistics import Difference, Interval, average, average_difference, difference, mcnemar, summarise


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


def test_with_one_seed_the_error_is_that_of_the_mean_over_items() -> None:
    """With one item won and one lost added, as Bonett and Price do for paired shares."""
    found = difference({0: outcomes(*[1] * 60, *[0] * 40)}, {0: outcomes(*[0] * 30, *[1] * 40, *[0] * 30)})
    assert found is not None
    assert found.interval is not None
    won, lost = 31 / 102, 11 / 102
    half = stats.t.ppf(0.975, 99) * math.sqrt((won + lost - (won - lost) ** 2) / 102)
    assert found.mean == pytest.approx(0.2)
    assert (found.interval.low, found.interval.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-3)
    assert (found.won, found.lost, found.effect) == (0.3, 0.1, pytest.approx(0.75))
    assert (found.p, found.over_seeds, found.clear, found.clear_on_items) == (None, False, False, True)
    assert found.p_items == pytest.approx(stats.binomtest(10, 40).pvalue)


def test_with_several_seeds_the_error_is_that_of_the_crossed_analysis_of_variance() -> None:
    """Against mean squares taken from the text book's sums, seeds and items both random."""
    rng = np.random.default_rng(20)
    n, several = 400, 3
    deltas = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=(n, several))
    deltas[:, 0] = np.where(rng.random(n) < 0.15, 1.0, deltas[:, 0])  # a lucky seed
    found = difference({s: pd.Series(np.maximum(deltas[:, s], 0)) for s in range(several)},
                       {s: pd.Series(np.maximum(-deltas[:, s], 0)) for s in range(several)})
    assert found is not None
    mean, by_item, by_seed = deltas.mean(), deltas.mean(axis=1), deltas.mean(axis=0)
    square_items = several * ((by_item - mean) ** 2).sum() / (n - 1)
    square_seeds = n * ((by_seed - mean) ** 2).sum() / (several - 1)
    square_both = ((deltas - by_item[:, None] - by_seed + mean) ** 2).sum() / ((n - 1) * (several - 1))
    variance = (square_items + square_seeds - square_both) / (n * several)
    dof = (variance * n * several) ** 2 / (square_items**2 / (n - 1) + square_seeds**2 / (several - 1)
                                           + square_both**2 / ((n - 1) * (several - 1)))
    assert square_seeds > square_both
    assert found.error == pytest.approx(math.sqrt(variance), rel=0.01)  # an item won and one lost are added
    assert found.dof == pytest.approx(dof, rel=0.02)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(found.mean / found.error), found.dof))  # type: ignore[operator]


def test_seeds_that_agree_do_not_make_the_error_smaller_than_that_of_the_items() -> None:
    rng = np.random.default_rng(21)
    method = {0: drawn(rng, np.full(300, 0.8)), 1: drawn(rng, np.full(300, 0.8))}
    reference = {0: drawn(rng, np.full(300, 0.7)), 1: drawn(rng, np.full(300, 0.7))}
    items = method[0].index
    gap = round(300 * ((method[0] - reference[0]).mean() - (method[1] - reference[1]).mean()))
    turned = reference[1][(reference[1] == (0 if gap < 0 else 1)) & (method[1] == reference[1])].index[:abs(gap)]
    reference[1][turned] = 1 - reference[1][turned]  # now both seeds have the same difference
    found = difference(method, reference)
    assert found is not None
    assert found.per_seed[0] == pytest.approx(found.per_seed[1])
    mean = pd.concat([method[s] - reference[s] for s in (0, 1)], axis=1).loc[items].mean(axis=1)
    assert found.error is not None
    assert found.error >= 0.99 * mean.std() / math.sqrt(300)


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
    """The interval still has a width: that no item differed among few says little about others."""
    same = {0: outcomes(1, 0, 1), 1: outcomes(1, 1, 1)}
    found = difference(same, same)
    assert found is not None
    assert (found.mean, found.identical, found.clear, found.p, found.p_items) == (0.0, True, False, 1.0, 1.0)
    many = dict.fromkeys((0, 1), outcomes(*[1] * 300))
    more = difference(many, many)
    assert more is not None
    assert found.detectable is not None
    assert more.detectable is not None
    assert more.detectable == pytest.approx(2.8 * math.sqrt(2) / 302, rel=0.02)
    assert found.detectable > 0.5


def test_equal_scores_on_different_items_are_not_identical() -> None:
    found = difference({0: outcomes(1, 0)}, {0: outcomes(0, 1)})
    assert found is not None
    assert (found.mean, found.identical) == (0.0, False)


def test_a_difference_is_clear_only_beyond_the_noise_of_seeds() -> None:
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
    assert split.clear_on_items
    assert not split.clear
    assert single.clear_on_items
    assert not single.clear


def test_an_adjusted_value_decides_where_there_is_one() -> None:
    found = Difference(0.1, None, (0.1, 0.1), 10, p=0.01, p_items=0.01)
    assert found.clear
    assert not dataclasses.replace(found, q=0.2).clear
    assert not dataclasses.replace(found, q_items=0.2).clear_on_items


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


# Differences on data whose truth is known


def made(rng: np.random.Generator, seeds: int, items: int, gain: float = 0.0, runs: float = 0.0, luck: float = 0.8,
         hard: float = 1.6) -> tuple[dict[int, pd.Series], dict[int, pd.Series]]:
    """Outcomes of a method and its reference; `runs` is the spread of the luck of a run."""
    difficulty, index = rng.normal(0, hard, items), pd.RangeIndex(items)
    skill = rng.normal(0, runs, (2, seeds)) + np.array([[1 + gain], [1.0]])
    right = skill[:, :, None] + luck * rng.standard_normal((2, seeds, items)) > difficulty
    method, reference = ({s: pd.Series(of[s], index=index) for s in range(seeds)} for of in right)
    return method, reference


def truth(gain: float, runs: float, luck: float = 0.8, hard: float = 1.6) -> float:
    """The difference over all seeds and items."""
    spread = math.sqrt(hard**2 + luck**2 + runs**2)
    return float(stats.norm.cdf((1 + gain) / spread) - stats.norm.cdf(1 / spread))


def repeated(seeds: int, items: int, gain: float = 0.0, runs: float = 0.0, repeats: int = 1000) -> list[Difference]:
    rng = np.random.default_rng(22)
    found = [difference(*made(rng, seeds, items, gain, runs)) for _ in range(repeats)]
    return [delta for delta in found if delta is not None]


def share(of: list[bool]) -> float:
    return sum(of) / len(of)


def test_with_one_seed_the_interval_covers_what_other_items_would_give() -> None:
    found = repeated(1, 300, gain=0.2)
    assert share([covers(delta.interval, truth(0.2, 0.0)) for delta in found]) == pytest.approx(0.95, abs=near(1000))
    unpaired = 2 * 1.96 * math.sqrt(2 * 0.7 * 0.3 / 300)
    assert np.mean([delta.interval.high - delta.interval.low for delta in found if delta.interval]) < 0.8 * unpaired


@pytest.mark.parametrize(("seeds", "least"), [(2, 0.89), (3, 0.925), (5, 0.94)])
@pytest.mark.parametrize("runs", [0.0, 0.05, 0.2])
def test_the_interval_covers_other_seeds_and_other_items(seeds: int, least: float, runs: float) -> None:
    """Without noise of seeds, with as much as that of items, and with seeds that drown the items."""
    found = repeated(seeds, 300, gain=0.2, runs=runs)
    coverage = share([covers(delta.interval, truth(0.2, runs)) for delta in found])
    assert coverage >= (0.95 if runs < 0.1 else least) - near(1000)
    if seeds > 2:  # nor may it be wide for nothing
        assert coverage <= 0.985 + near(1000)


@pytest.mark.parametrize(("seeds", "most"), [(2, 0.11), (3, 0.075), (5, 0.06)])
def test_false_alarms_about_a_method_are_as_rare_as_stated(seeds: int, most: float) -> None:
    """Two methods that are alike, whose runs are not: the test over items alone cries out, the one over both does not."""
    found = repeated(seeds, 300, runs=0.2)
    assert share([delta.clear for delta in found]) <= most + near(1000)
    assert share([delta.clear_on_items for delta in found]) > 0.3


def test_false_alarms_about_these_seeds_are_as_rare_as_stated() -> None:
    for seeds in (1, 3):
        alarms = share([delta.clear_on_items for delta in repeated(seeds, 300)])
        assert alarms <= 0.05 + near(1000)
        assert alarms > 0.02  # an exact test is a little shy, and no more


def test_forgetting_the_pairs_would_show() -> None:
    """The same outcomes with the items of one side mixed up: the paired interval is much too wide then."""
    rng = np.random.default_rng(23)
    ours, theirs = made(rng, 3, 500, luck=0.3)
    mixed = {seed: pd.Series(rng.permutation(right.to_numpy()), right.index) for seed, right in theirs.items()}
    paired, unpaired = difference(ours, theirs), difference(ours, mixed)
    assert paired is not None
    assert unpaired is not None
    assert paired.error is not None
    assert unpaired.error is not None
    assert unpaired.error > 1.5 * paired.error


@pytest.mark.parametrize("seeds", [1, 5])
def test_what_is_said_to_be_found_is_found_in_80_of_100(seeds: int) -> None:
    """The true difference is set to what the experiment says that it finds; then new experiments are made."""
    runs = 0.05 if seeds > 1 else 0.0
    finds = float(np.mean([delta.detectable for delta in repeated(seeds, 500, runs=runs, repeats=300) if delta.detectable]))
    spread = math.sqrt(1.6**2 + 0.8**2 + runs**2)
    gain = spread * float(stats.norm.ppf(stats.norm.cdf(1 / spread) + finds)) - 1
    assert truth(gain, runs) == pytest.approx(finds)
    found = repeated(seeds, 500, gain, runs)
    power = share([(delta.p if seeds > 1 else delta.p_items or 1.0) <= 0.05 for delta in found])  # type: ignore[operator]
    assert power == pytest.approx(0.8, abs=0.06)


def test_p_values_of_items_are_those_of_mcnemar() -> None:
    rng = np.random.default_rng(24)
    for seeds in (1, 3):
        ours, theirs = made(rng, seeds, 200, gain=0.1)
        found = difference(ours, theirs)
        assert found is not None
        assert found.p_items == pytest.approx(mcnemar(ours, theirs))


def test_the_average_over_tasks_covers_too() -> None:
    rng = np.random.default_rng(25)
    hits = []
    for _ in range(600):
        found = average_difference([made(rng, 3, items, gain, 0.05) for items, gain in ((200, 0.1), (400, 0.3))])
        assert found is not None
        hits.append(covers(found.interval, (truth(0.1, 0.05) + truth(0.3, 0.05)) / 2))
    assert share(hits) >= 0.95 - near(600)
    assert share(hits) <= 0.99
