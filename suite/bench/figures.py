"""The arithmetic of a bench: rates, utilisation, ratios, and whether two ways did the same work.

MFU by the 4N + 6P convention: a training step of an adapter costs 4 operations per real token and parameter of the
base's matrices (2 forward, 2 for the gradient of the activations) and 6 per adapter parameter (2 more for its own
gradient). N counts the linear layers and the output head; attention's own products and padding count nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from suite.bench.workload import Run, Tolerance


@dataclass(frozen=True)
class RunResult:
    """One run as one way made it. `losses` has the training loss of every step (or the mean of the logged window that
    the step stands in); `score` in 0..1 and `test_loss`, the mean cross-entropy (None where the task has none), over
    `items`; seconds are of wall clock, of its own process or of its share of a pack. `adapter` and `trained` count
    scalars."""

    run: Run
    train: float
    evaluate: float
    score: float
    items: int
    losses: tuple[float, ...]
    tokens: int
    adapter: int
    trained: int
    test_loss: float | None = None

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        """The final loss: that on the test items, which are the same for every way; the mean training loss over the last
        quarter of the steps, which hangs on the order of the data, where there is none."""
        if self.test_loss is not None:
            return self.test_loss
        tail = self.losses[-max(1, len(self.losses) // 4):]
        return sum(tail) / len(tail)


@dataclass(frozen=True)
class Measured:
    """One way in one repeat: wall seconds for the runs it made, of a sweep of `total`; peak bytes of all its processes
    together (`resident`) and of one of them on the GPU (`device`); `start_up` seconds until training began, per process;
    `lanes` processes at work at a time."""

    wall: float
    total: int
    results: tuple[RunResult, ...]
    start_up: tuple[float, ...]
    resident: int
    device: int | None
    lanes: float

    @property
    def sweep(self) -> float:
        """Wall seconds of the whole sweep: processes that know nothing of each other take as long each."""
        return self.wall * self.total / len(self.results)


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest of some repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Way:
    """One way of running the sweep, with what its repeats gave."""

    id: str
    label: str
    precision: str
    at_once: int
    measured: list[Measured] = field(default_factory=list)

    @property
    def wall(self) -> Spread:
        """Wall seconds of the whole sweep."""
        return Spread.of([one.sweep for one in self.measured])

    @property
    def per_run(self) -> float:
        """Median wall seconds of the sweep over the number of its runs."""
        return self.wall.median / self.measured[0].total

    @property
    def start_up(self) -> float:
        """Median seconds from the start of a process to its first training step."""
        return statistics.median(s for one in self.measured for s in one.start_up)

    @property
    def resident(self) -> int:
        return max(one.resident for one in self.measured)

    @property
    def device(self) -> int | None:
        return max((one.device for one in self.measured if one.device is not None), default=None)

    def tokens_per_second(self) -> Spread:
        """Real training tokens over the wall time of the whole way: start-up, evaluation and tracking included."""
        return Spread.of([sum(r.tokens for r in one.results) / one.wall for one in self.measured])

    def training_tokens_per_second(self) -> Spread:
        """Real training tokens over the seconds in which training went on, in all lanes together."""
        return Spread.of([sum(r.tokens for r in one.results) * one.lanes / sum(r.train for r in one.results)
                          for one in self.measured])

    @property
    def adapter(self) -> float:
        """Mean P, adapter scalars, over the runs made."""
        return statistics.fmean(r.adapter for r in self.measured[0].results)


def operations_per_token(matrices: int, adapter: float) -> float:
    """4N + 6P for N parameters in the base's matrices and P in the adapter's."""
    return 4 * matrices + 6 * adapter


def utilisation(tokens_per_second: float, matrices: int, adapter: float, peak: float) -> float:
    """Model FLOP utilisation: what the tokens need by 4N + 6P, as a share of `peak` operations per second."""
    return tokens_per_second * operations_per_token(matrices, adapter) / peak


def ratio(way: Way, ours: Way) -> Spread:
    """How many times longer `way` took than `ours`, repeat by repeat."""
    return Spread.of([theirs.sweep / own.sweep for theirs, own in zip(way.measured, ours.measured, strict=True)])


def differences(ways: Sequence[Way], ours: Way, tolerance: Tolerance) -> list[str]:
    """Why `ways` and `ours` did not do the same work, one sentence each; none when they did.

    Updates, real tokens, trained scalars and scored items must be equal in every run; final losses and scores must agree
    within the tolerance in the mean over the runs that both made (single runs see the data in another order).
    """
    found: list[str] = []
    known = {result.run: result for result in ours.measured[0].results}
    for way in ways:
        made = way.measured[0].results
        missing = [result.run.name for result in made if result.run not in known]
        if missing:
            found.append(f"{way.id}: run {missing[0]} has no counterpart in {ours.id}")
            continue
        pairs = [(result, known[result.run]) for result in made]
        for what in ("steps", "tokens", "adapter", "trained", "items"):
            apart = [(one, other) for one, other in pairs if getattr(one, what) != getattr(other, what)]
            if apart:
                one, other = apart[0]
                found.append(f"{way.id}: {_WORDS[what]} of run {one.run.name} are {getattr(one, what):,}, "
                             f"in {ours.id} {getattr(other, what):,}")
        theirs, own = _means([one for one, _ in pairs]), _means([other for _, other in pairs])
        if not all(math.isfinite(value) for mean in (theirs, own) for value in mean.values()):
            found.append(f"{way.id}: a loss or score is not finite")
            continue
        if abs(theirs["loss"] - own["loss"]) > tolerance.loss * own["loss"]:
            found.append(f"{way.id}: mean final loss {theirs['loss']:.3f}, in {ours.id} {own['loss']:.3f} over the same "
                         f"{len(pairs)} runs; more than {tolerance.loss:.0%} apart")
        if abs(theirs["score"] - own["score"]) > tolerance.score / 100:
            found.append(f"{way.id}: mean score {theirs['score']:.1%}, in {ours.id} {own['score']:.1%} over the same "
                         f"{len(pairs)} runs; more than {tolerance.score:g} points apart")
    return found


def same_runs(way: Way, ours: Way) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Mean final loss and score of the runs that `way` made, by it and by `ours`."""
    wanted = {result.run for result in way.measured[0].results}
    return (_means(way.measured[0].results),
            _means([result for result in ours.measured[0].results if result.run in wanted]))


_WORDS = {"steps": "updates", "tokens": "training tokens", "adapter": "adapter scalars", "trained": "trained scalars",
          "items": "scored items"}


def _means(results: Sequence[RunResult]) -> dict[str, float]:
    if not results:
        return {"loss": math.nan, "score": math.nan}
    return {"loss": statistics.fmean(r.loss for r in results), "score": statistics.fmean(r.score for r in results)}
