"""From an estimate to a decision: exact tests of right and wrong answers, many tests at once, equivalence, power.

Errors are standard errors, `dof` their degrees of freedom (`math.inf` where the error is known). Scipy has the
distributions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special, stats

#: Right or wrong of one run, by item id.
Outcomes = pd.Series
Adjustment = Literal["holm", "bh"]
#: From here on a t distribution is the normal one.
_MANY = 1e6


def mcnemar(method: Outcomes | Mapping[int, Outcomes], reference: Outcomes | Mapping[int, Outcomes]) -> float:
    """Two-sided exact p-value that both are right equally often: McNemar's test (Psychometrika 1947), by item id.

    Of the items that only one of the two answered right, each is as likely to be one's as the other's if they are alike: a
    fair coin. With several seeds (outcomes by seed) an item's answers swap sides together, so its seeds count as one item:
    the weights are how often the item was won more than lost, and the sum of coins of these weights is counted out. That
    says what other items would give *for these seeds*; it knows nothing of other seeds.
    Only items (and seeds) that both have count. 1.0 when nothing tells them apart. Raises `ValueError` for outcomes that
    are neither 0 nor 1, and when they have no item in common.
    """
    ours, theirs = (x if isinstance(x, Mapping) else {0: x} for x in (method, reference))
    deltas = [(ours[seed].astype(float) - theirs[seed].astype(float)).dropna() for seed in ours if seed in theirs]
    if not any(len(delta) for delta in deltas):
        raise ValueError("the two have no item in common")
    found = pd.concat(deltas)
    if not found.isin([-1.0, 0.0, 1.0]).all():
        raise ValueError("outcomes must be 0 or 1")
    return sign_test(np.asarray(found.groupby(level=0).sum(), dtype=np.float64))


def adjust(p_values: Sequence[float], how: Adjustment) -> list[float]:
    """P-values adjusted for being many, in the same order; compare them with the level as if there was one.

    `holm` keeps the chance of *any* false alarm at the level (Holm, Scand. J. Stat. 1979). `bh` keeps the expected share
    of false alarms *among the alarms* at the level (Benjamini and Hochberg, JRSS B 1995), which finds more.
    Raises `ValueError` for p-values outside 0..1.
    """
    if not all(0.0 <= p <= 1.0 for p in p_values):
        raise ValueError(f"p-values must lie in 0..1, got {list(p_values)}")
    if not p_values:
        return []
    found = np.asarray(p_values, dtype=float)
    if how == "bh":
        return stats.false_discovery_control(found).tolist()
    # As statsmodels' multipletests, which collects garbage at every call: 50 ms and more where many records are held.
    order = np.argsort(found)
    adjusted = np.empty(len(found))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(found[order] * np.arange(len(found), 0, -1)))
    return adjusted.tolist()


def equivalence(difference: float, error: float, dof: float, margin: float,
                alpha: float = 0.05) -> tuple[float, float, float]:
    """Whether a difference lies within +-`margin`: low and high of the 1 - 2 alpha interval, and the p-value of TOST.

    Two one-sided t tests (Schuirmann 1987), of difference <= -margin and of difference >= margin; the larger p counts.
    p <= alpha exactly when the interval lies inside the margin. Without error p is 0 inside the margin and 1 outside.
    All in the units of `difference`. Raises `ValueError` for a negative error and for a margin or dof not above zero.
    """
    _check(error, dof)
    if not margin > 0:
        raise ValueError(f"margin must be above zero, got {margin}")
    if error == 0:
        return difference, difference, 0.0 if abs(difference) < margin else 1.0
    half = error * float(stats.t.ppf(1 - alpha, dof))
    p = float(stats.t.sf((margin - abs(difference)) / error, dof))
    return difference - half, difference + half, p


def detectable(error: float, dof: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided t test at `alpha` finds with probability `power`.

    In the units of `error`, exact by the noncentral t distribution: 2.80 errors with many degrees of freedom, 16.3 with
    one. Raises `ValueError` for a negative error, a dof not above zero, or a power outside alpha..1.
    """
    _check(error, dof)
    if not 0 < alpha < power < 1:
        raise ValueError(f"power must lie between alpha and 1, got {power}")
    dof = min(dof, _MANY)
    return error * float(special.nctdtrinc(dof, 1 - power, stats.t.ppf(1 - alpha / 2, dof)))


def _check(error: float, dof: float) -> None:
    if not (error >= 0 and math.isfinite(error)):
        raise ValueError(f"error must be finite and not negative, got {error}")
    if not dof > 0:
        raise ValueError(f"dof must be above zero, got {dof}")


def sign_test(sums: NDArray[np.float64]) -> float:
    """Two-sided p of a sum of whole-numbered weights whose signs are fair coins, by counting out all of them."""
    weights, counts = np.unique(np.abs(sums[sums != 0]).round().astype(int), return_counts=True)
    if len(weights) == 0:
        return 1.0
    chances = np.ones(1)  # of the number of weight units that fall to the method
    for weight, count in zip(weights, counts, strict=True):
        coins = np.zeros(weight * count + 1)
        coins[::weight] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, coins)
    total = len(chances) - 1
    distance = abs(round(float(sums.sum())))  # twice the distance of the units won from their half
    far = np.abs(2 * np.arange(total + 1) - total) >= distance
    return min(1.0, float(chances[far].sum()))
