"""The difference of two methods that answered the same items with the same seeds, and how sure it is.

A claim about a *method* must hold for other seeds and for other items, so both kinds of noise go into its error. With d the
difference of one item under one seed (1: only the method is right, -1: only the reference), S seeds and n items,

    V_items = variance of the items' means over seeds / n        what other items would change
    V_seeds = variance of the seeds' means over items / S        what other seeds would change
    V_both  = variance of what neither explains / (n S)          luck of one item in one run, counted in both of the above

    error^2 = max(V_items, V_items + V_seeds - V_both)

This is the analysis of variance with crossed random seeds and items; the degrees of freedom are Satterthwaite's (Biometrics
Bulletin 1946). What is hard for both methods cancels in d before any of this. With one seed only V_items is known, and what
is said holds for this seed alone. docs/statistics.md has what simulations say about coverage and error rates.
"""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import special

from suite.statistics.cells import CONFIDENCE, Interval
from suite.statistics.decisions import Outcomes, detectable, sign_test


@dataclass(frozen=True)
class Difference:
    """Method minus reference, paired, in the units of the scores (0..1).

    `per_seed`: the difference of each common seed in order. `items`: those that both answered. `interval`, `error` and
    `dof` take seeds and items for noise; with one common seed (`over_seeds` false) items alone. They are None when there
    are no common items, and then only the scores of the seeds were compared.
    `p`: two-sided, that there is no difference; None unless `over_seeds`. `p_items`: the same for these seeds alone, exact
    where the outcomes are right or wrong (`mcnemar`). `q` and `q_items` are these adjusted for all comparisons of a
    table, by whoever makes the table.
    `won` and `lost`: shares of the answers in which only the method was right, and only the reference. `identical`: both
    gave the same outcome on every item.
    """

    mean: float
    interval: Interval | None
    per_seed: tuple[float, ...]
    items: int
    error: float | None = None
    dof: float | None = None
    p: float | None = None
    p_items: float | None = None
    q: float | None = None
    q_items: float | None = None
    won: float | None = None
    lost: float | None = None
    identical: bool = False

    @property
    def over_seeds(self) -> bool:
        """Whether the error knows the noise of seeds."""
        return self.error is not None and len(self.per_seed) > 1

    @property
    def clear(self) -> bool:
        """Beyond the noise of seeds and items at the stated level, after the adjustment where there was one."""
        p = self.p if self.q is None else self.q
        return p is not None and p <= 1 - CONFIDENCE

    @property
    def clear_on_items(self) -> bool:
        """Beyond the noise of items for these seeds: no claim about others."""
        p = self.p_items if self.q_items is None else self.q_items
        return p is not None and p <= 1 - CONFIDENCE

    @property
    def effect(self) -> float | None:
        """Of the answers in which only one of the two was right, the share that the method won (0.5: as many as it lost)."""
        if self.won is None or self.lost is None or self.won + self.lost == 0:
            return None
        return self.won / (self.won + self.lost)

    @property
    def detectable(self) -> float | None:
        """The true difference that an experiment with this noise finds in 80 of 100 cases, tested alone at 5 %."""
        if self.error is None or self.dof is None:
            return None
        return detectable(self.error, self.dof, alpha=1 - CONFIDENCE)

    @property
    def p_above(self) -> float | None:
        """One-sided: that the method is not above the reference."""
        if self.error is None or self.dof is None:
            return None
        return float(special.stdtr(self.dof, -self.mean / self.error))


def difference(method: Mapping[int, Outcomes], reference: Mapping[int, Outcomes]) -> Difference | None:
    """The paired difference of two methods on one task: outcomes (0..1) by item id, by seed.

    Only seeds and items that both have are used. Every seed keeps its weight. None when nothing is common.
    """
    return average_difference([(method, reference)])


def average_difference(
    tasks: Sequence[tuple[Mapping[int, Outcomes], Mapping[int, Outcomes]]],
) -> Difference | None:
    """The mean over tasks of the paired differences: for other items of these tasks, not for other tasks.

    The noise of seeds is that of the averages per seed, so nothing is assumed about how a seed's luck on one task goes with
    its luck on another. `per_seed` covers the seeds that every task has. None when a task has nothing in common.
    """
    parts = [_paired(method, reference) for method, reference in tasks]
    if not parts or any(part is None for part in parts):
        return None
    known = [_Noise.of(*part) for part in parts if part is not None]
    count = len(known)
    mean = plain.fmean(part.mean for part in known)
    common = [seed for seed in known[0].per_seed if all(seed in part.per_seed for part in known)]
    per_seed = tuple(plain.fmean(part.per_seed[seed] for part in known) for seed in common)
    by_items = sum(part.by_items for part in known) / count**2
    freedom = by_items**2 / sum((part.by_items / count**2) ** 2 / part.freedom for part in known)
    variance, dof = by_items, freedom
    if len(common) > 1:
        by_seeds = float(np.var(per_seed, ddof=1)) / len(common)
        same = all(len(part.per_seed) == len(common) for part in known)
        by_both = sum(part.by_both for part in known) / count**2 if same else 0.0
        # Seeds that agree by luck must not make the error smaller than that of the items.
        variance = max(by_items, by_items + by_seeds - by_both)
        dof = variance**2 / (by_items**2 / freedom
                             + (by_seeds**2 + by_both**2 / freedom) / (len(common) - 1))
    error = variance**0.5
    half = error * float(special.stdtrit(dof, (1 + CONFIDENCE) / 2))
    identical = all(part.identical for part in known)
    exact = known[0].exact if count == 1 else None
    return Difference(
        mean=mean, interval=Interval(max(-1.0, mean - half), min(1.0, mean + half)), per_seed=per_seed,
        items=sum(part.items for part in known), error=error, dof=dof,
        p=_two_sided(mean, error, dof) if len(common) > 1 else None,
        p_items=_two_sided(mean, by_items**0.5, freedom) if exact is None else exact,
        won=plain.fmean(part.won for part in known), lost=plain.fmean(part.lost for part in known), identical=identical)


@dataclass(frozen=True)
class _Noise:
    """What one task says: see the top of this file. `freedom` is that of `by_items`."""

    mean: float
    per_seed: dict[int, float]
    items: int
    by_items: float
    by_both: float
    freedom: float
    exact: float | None
    won: float
    lost: float
    identical: bool

    @classmethod
    def of(cls, deltas: NDArray[np.float64], seeds: Sequence[int]) -> _Noise:
        """`deltas [items, seeds]`, NaN where a seed lacks an item that another has."""
        items, several = deltas.shape
        present = np.isfinite(deltas)
        whole = bool(present.all())
        if not whole:
            deltas = np.where(present, deltas, 0.0)
        answered = present.sum(axis=0)
        by_seed = deltas.sum(axis=0) / answered
        mean = float(by_seed.mean())
        # Every item's part in the mean. One item won and one lost are added, which keeps the error honest where few
        # items differ or none does (Bonett and Price, J. Educ. Behav. Stat. 2012).
        parts = ((deltas - by_seed) * present / answered).mean(axis=1)
        added = ((1 - mean) ** 2 + (1 + mean) ** 2) / items**2
        by_items = float(parts @ parts + added) * (items / (items + 2)) ** 2
        by_both = 0.0
        if whole and several > 1 and items > 1:
            rest = deltas - deltas.mean(axis=1, keepdims=True) - by_seed + mean
            by_both = float((rest * rest).sum()) / ((items - 1) * (several - 1) * items * several)
        counted = np.abs(deltas)
        right_or_wrong = whole and bool(((counted == 0) | (counted == 1)).all())
        return cls(mean, dict(zip(seeds, by_seed.tolist(), strict=True)), items, by_items, by_both, max(1.0, items - 1.0),
                   sign_test(deltas.sum(axis=1)) if right_or_wrong else None,
                   float(((deltas > 0).sum(axis=0) / answered).mean()),
                   float(((deltas < 0).sum(axis=0) / answered).mean()), not counted.any())


def _two_sided(mean: float, error: float, dof: float) -> float:
    return float(2 * special.stdtr(dof, -abs(mean) / error))


def _paired(method: Mapping[int, Outcomes],
            reference: Mapping[int, Outcomes]) -> tuple[NDArray[np.float64], list[int]] | None:
    """Differences of outcomes, items x seeds, with NaN where a seed lacks an item that another has; None: nothing."""
    seeds = sorted(set(method) & set(reference))
    if not seeds:
        return None
    index = method[seeds[0]].index
    if len(index) and all(x.index is index for of in (method, reference) for x in (of[seed] for seed in seeds)):
        values = np.stack([method[seed].to_numpy(dtype=float) - reference[seed].to_numpy(dtype=float)
                           for seed in seeds], axis=1)
        if np.isfinite(values).all():  # the same items throughout: nothing to align
            return values, seeds
    columns: dict[int, Outcomes] = {}
    for seed in seeds:
        delta = (method[seed].astype(float) - reference[seed].astype(float)).dropna()
        if not delta.empty:
            columns[seed] = delta
    return (pd.DataFrame(columns).to_numpy(dtype=float), list(columns)) if columns else None
