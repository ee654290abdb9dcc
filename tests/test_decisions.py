"""Tests of right and wrong, of many at once, of equivalence and of power: closed forms, and rates under known truth."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from suite.statistics import adjust, detectable, equivalence, mcnemar


def near(repeats: int, rate: float = 0.05) -> float:
    """Three Monte-Carlo standard errors of a rate."""
    return 3 * math.sqrt(rate * (1 - rate) / repeats)


def pair(won: int, lost: int, level: int = 20) -> tuple[pd.Series, pd.Series]:
    """A method and its reference with so many items won, lost and alike."""
    index = [f"item{n}" for n in range(won + lost + level)]
    return (pd.Series([1] * won + [0] * lost + [1] * level, index), pd.Series([0] * won + [1] * lost + [1] * level, index))


# McNemar


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (9, 3), (3, 9), (6, 0), (40, 41), (700, 600)])
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(won: int, lost: int) -> None:
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(*pair(won, lost)) == pytest.approx(expected)


def test_mcnemar_pairs_by_item_and_not_by_place() -> None:
    method, reference = pair(9, 1)
    assert mcnemar(method, reference.sample(frac=1, random_state=1)) == pytest.approx(stats.binomtest(9, 10).pvalue)
    assert mcnemar(method, method.sample(frac=1, random_state=1)) == 1.0


def test_items_that_one_side_lacks_do_not_count() -> None:
    method, reference = pair(9, 1)
    assert mcnemar(method, reference.iloc[4:]) == pytest.approx(stats.binomtest(5, 6).pvalue)


def test_seeds_of_one_item_swap_sides_together() -> None:
    """Four seeds that answer alike are one; their number must not make them more certain."""
    method, reference = pair(9, 3)
    assert mcnemar(dict.fromkeys(range(4), method), dict.fromkeys(range(4), reference)) == pytest.approx(
        mcnemar(method, reference))


def test_several_seeds_against_every_swap_of_sides() -> None:
    rng = np.random.default_rng(1)
    ours, theirs = (rng.random((2, 9, 3)) < [[[0.8]], [[0.4]]]).astype(float)
    sums = (ours - theirs).sum(axis=1)
    reached = [abs(np.dot(signs, sums)) >= abs(sums.sum()) - 1e-9 for signs in itertools.product((-1, 1), repeat=9)]
    found = mcnemar({s: pd.Series(ours[:, s]) for s in range(3)}, {s: pd.Series(theirs[:, s]) for s in range(3)})
    assert found == pytest.approx(np.mean(reached))


def test_outcomes_that_are_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="outcomes must be 0 or 1"):
        mcnemar(pd.Series([0.5, 1.0]), pd.Series([0.0, 1.0]))
    with pytest.raises(ValueError, match="no item in common"):
        mcnemar(pd.Series([1.0], ["a"]), pd.Series([1.0], ["b"]))
    with pytest.raises(ValueError, match="no item in common"):
        mcnemar({0: pd.Series([1.0])}, {1: pd.Series([1.0])})


# Many at once


def test_adjusted_values_are_those_of_the_books() -> None:
    found = [0.01, 0.04, 0.03, 0.005]
    assert adjust(found, "holm") == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjust(found, "bh") == pytest.approx([0.02, 0.04, 0.04, 0.02])
    several = np.random.default_rng(5).random(30) ** 3
    for how, theirs in (("holm", "holm"), ("bh", "fdr_bh")):
        assert adjust(several.tolist(), how) == pytest.approx(multipletests(several, method=theirs)[1])  # type: ignore[arg-type]
    assert adjust([], "bh") == []
    assert adjust([0.03], "holm") == [0.03]
    with pytest.raises(ValueError, match=r"p-values must lie in 0\.\.1"):
        adjust([0.5, math.nan], "holm")


def test_holm_keeps_the_chance_of_any_false_alarm_and_bh_the_share_of_false_ones() -> None:
    """Twenty comparisons with one reference, which makes them depend on each other; five are true differences."""
    rng = np.random.default_rng(2)
    repeats, true = 2000, np.array([True] * 5 + [False] * 15)
    shared = rng.standard_normal((repeats, 1))
    z = (rng.standard_normal((repeats, 20)) + shared) / math.sqrt(2) + 3.5 * true
    p = 2 * stats.norm.sf(abs(z))
    any_false = {"plain": 0.0, "holm": 0.0, "bh": 0.0}
    false_share, found = {"holm": 0.0, "bh": 0.0}, {"holm": 0.0, "bh": 0.0}
    for row in p:
        any_false["plain"] += bool((row[~true] <= 0.05).any())
        for how in ("holm", "bh"):
            alarms = np.array(adjust(row.tolist(), how)) <= 0.05
            any_false[how] += bool((alarms & ~true).any())
            false_share[how] += (alarms & ~true).sum() / max(1, alarms.sum())
            found[how] += (alarms & true).sum()
    assert any_false["plain"] / repeats > 0.3
    assert any_false["holm"] / repeats <= 0.05 + near(repeats)
    assert false_share["bh"] / repeats <= 0.05 * 15 / 20 + near(repeats)
    assert found["bh"] > found["holm"] > 0.5 * repeats * 5


# Equivalence and power


def test_equivalence_is_the_interval_inside_the_margin() -> None:
    low, high, p = equivalence(0.2, 0.3, 8, 1.0)
    half = 0.3 * stats.t.ppf(0.95, 8)
    assert (low, high) == pytest.approx((0.2 - half, 0.2 + half))
    assert p == pytest.approx(stats.t.sf(0.8 / 0.3, 8))
    for difference in np.linspace(-1.5, 1.5, 61):
        low, high, p = equivalence(float(difference), 0.3, 8, 1.0)
        assert (p <= 0.05) == (low >= -1.0 and high <= 1.0)
        assert p == pytest.approx(equivalence(-float(difference), 0.3, 8, 1.0)[2])
    assert equivalence(0.5, 0.0, 3, 1.0) == (0.5, 0.5, 0.0)
    assert equivalence(1.0, 0.0, 3, 1.0) == (1.0, 1.0, 1.0)
    assert equivalence(0.0, 0.5, math.inf, 1.0)[2] == pytest.approx(stats.norm.sf(2))


@pytest.mark.parametrize(("error", "dof", "margin"), [(-1, 3, 1), (math.nan, 3, 1), (1, 0, 1), (1, 3, 0)])
def test_numbers_that_make_no_sense_are_refused(error: float, dof: float, margin: float) -> None:
    with pytest.raises(ValueError, match="must be"):
        equivalence(0.0, error, dof, margin)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_equivalence_is_wrong_in_5_of_100_at_the_margin_and_rarer_beyond(seeds: int) -> None:
    rng = np.random.default_rng(3)
    repeats = 4000
    called = {}
    for truth in (0.0, 1.0, 1.4):
        scores = rng.normal(truth, 0.35, (repeats, seeds))
        errors = scores.std(axis=1, ddof=1) / math.sqrt(seeds)
        called[truth] = np.mean([equivalence(float(m), float(e), seeds - 1, 1.0)[2] <= 0.05
                                 for m, e in zip(scores.mean(axis=1), errors, strict=True)])
    assert called[1.0] <= 0.05 + near(repeats)
    assert called[1.4] <= called[1.0]
    assert called[0.0] > called[1.0]
    if seeds >= 5:
        assert called[1.0] >= 0.05 - near(repeats)
        assert called[0.0] > 0.9


@pytest.mark.parametrize("dof", [1, 2, 4, 30])
@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_the_detectable_difference_is_found_with_the_power_that_was_promised(dof: int, power: float) -> None:
    rng = np.random.default_rng(4)
    repeats = 20_000
    scores = rng.normal(detectable(1.0, dof, power=power), math.sqrt(dof + 1), (repeats, dof + 1))
    t = scores.mean(axis=1) / (scores.std(axis=1, ddof=1) / math.sqrt(dof + 1))
    found = 2 * stats.t.sf(abs(t), dof) <= 0.05
    assert found.mean() == pytest.approx(power, abs=near(repeats, power) + 0.002)


def test_the_detectable_difference_grows_with_the_error_and_with_ignorance() -> None:
    assert detectable(2.0, 5) == pytest.approx(2 * detectable(1.0, 5))
    assert detectable(1.0, math.inf) == pytest.approx(1.95996 + 0.84162, abs=1e-3)
    assert detectable(1.0, 1) > detectable(1.0, 3) > detectable(1.0, 100)
    assert detectable(0.0, 5) == 0.0
    with pytest.raises(ValueError, match="power must lie between"):
        detectable(1.0, 5, power=0.01)
