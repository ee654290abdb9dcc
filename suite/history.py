"""What every nightly comparison found, one line each, and where a series of nights has a step.

`results/history/<study>-<scale>.jsonl` is appended, never rewritten. It holds means, not records: a line of a study
with a hundred rows and tasks takes about ten kilobytes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from statistics import fmean, stdev
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from suite import environment, jsonlines, paths
from suite.drift import NIGHTS, Run, machine
from suite.records import Record
from suite.specs import digest
from suite.verdicts import Finding

#: Level of the test for one step, drawings of its permutation test, and nights on each side of a step.
ALPHA, DRAWINGS, SIDE = 0.001, 4999, 3
#: A statistic below this, in standard deviations of the series, is never significant: orders need not be drawn.
SMALL = 2.5
#: Seed of the permutations: the same history has the same steps.
SEED = 20260101

Measure = Literal["score", "loss", "speed", "memory"]
MEASURES: tuple[Measure, ...] = ("score", "loss", "speed", "memory")


class Point(BaseModel):
    """Means over the runs of a row on a task: score in 0..1, training loss in nats, tokens per second, peak bytes."""

    model_config = ConfigDict(extra="forbid")

    table: str
    row: str
    column: str
    runs: int
    score: float | None = None
    loss: float | None = None
    speed: float | None = None
    memory: float | None = None


class Night(BaseModel):
    """One comparison. `machine` is a digest of processor, cores, GPU, threads and platform: equal for equal machines."""

    model_config = ConfigDict(extra="forbid")

    time: str
    commit: str | None = None
    machine: str
    against: str
    red: int
    points: list[Point]


def night(runs: Iterable[Run], name: Callable[[Run], str], findings: Sequence[Finding], against: str) -> Night:
    """What to keep of a comparison. `name` says what the row of a run is called; `against` is the baseline's name."""
    groups: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.record.scores:
            groups[run.cell.table, name(run), run.cell.spec.task.id].append(run)
    points = []
    for (table, row, column), some in groups.items():
        records = [run.record for run in some]
        losses = [math.nan if loss is None else loss for run in some for loss in run.trail.losses]
        points.append(Point(
            table=table, row=row, column=column, runs=len(some), score=fmean(record.scores[0].value for record in records),
            loss=fmean(losses) if losses and not any(map(math.isnan, losses)) else None,
            speed=_mean([record.throughput.tokens_per_second for record in records if record.throughput]),
            memory=_mean([float(record.memory.device or record.memory.resident) for record in records if record.memory])))
    first = next((run.record for some in groups.values() for run in some), None)
    return Night(time=datetime.now(UTC).isoformat(timespec="seconds"), commit=environment.revision()[0],
                 machine=kind(first) if first else "", against=against,
                 red=sum(finding.red for finding in findings), points=points)


def kind(record: Record) -> str:
    """The digest by which a night names the machine of a record."""
    return digest(machine(record))[:8]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def add(study: str, scale: str, one: Night) -> None:
    """Append a night."""
    file = paths.history() / f"{study}-{scale}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(one.model_dump_json(exclude_none=True) + "\n")


def load(study: str, scale: str) -> list[Night]:
    """The nights of a study, oldest first; none when there is no file. Raises `UserError` naming the line that is wrong."""
    file = paths.history() / f"{study}-{scale}.jsonl"
    if not file.exists():
        return []
    return jsonlines.parse(file.read_text(encoding="utf-8"), Night, file, "take the line out")


def series(nights: Sequence[Night], measure: Measure) -> dict[tuple[str, str, str], list[float | None]]:
    """One value per night (None where there is none) by table, row and task, in the order in which they appeared."""
    found: dict[tuple[str, str, str], list[float | None]] = {}
    for position, one in enumerate(nights):
        for point in one.points:
            values = found.setdefault((point.table, point.row, point.column), [None] * len(nights))
            values[position] = getattr(point, measure)
    return found


def spreads(nights: Sequence[Night], on: str, against: str) -> dict[tuple[str, str, str], float]:
    """Standard deviation of the mean training loss over clean nights of a machine (its digest) against one baseline, by
    table, row and task; only where there are at least five."""
    clean = [one for one in nights if not one.red and one.machine == on and one.against == against]
    known = {place: [value for value in values if value is not None] for place, values in series(clean, "loss").items()}
    return {place: stdev(values) for place, values in known.items() if len(values) >= NIGHTS}


@dataclass(frozen=True)
class Step:
    """The series changes its level before position `at`, from the mean `before` to the mean `after`, each over the part
    between this step and the next; `p` is that of the permutation test."""

    at: int
    before: float
    after: float
    p: float


def steps(values: Sequence[float | None], alpha: float = ALPHA) -> list[Step]:
    """Where a series steps, in order: binary segmentation with the CUSUM statistic and a permutation test.

    Of a stretch of n values the place k is sought where the mean of the first k and that of the rest differ most, in
    units of sqrt(k (n - k) / n). The largest value over all places is held against those of random orders of the same
    values, which needs no distribution but asks that without a step every order is equally likely (Antoch and Huskova,
    Statistics & Probability Letters 2001). The first and the last two thirds of the stretch are looked at too, since a
    level that comes back hides in the whole; the three p-values are multiplied by three. Each part is then searched in turn
    (Scott and Knott, Biometrics 1974). A step has at least three nights on each side, so one odd night is none; with fewer
    than sixteen nights nothing can be significant at .001.

    Gaps (None) are left out; positions are those of the whole series.
    """
    present = [position for position, value in enumerate(values) if value is not None]
    kept = np.array([values[position] for position in present], dtype=float)
    cuts = sorted(_cuts(kept, 0, np.random.default_rng(SEED), alpha))
    ends = [0, *(cut for cut, _ in cuts), len(kept)]
    levels = [float(kept[start:end].mean()) for start, end in pairwise(ends)] if len(kept) else []
    return [Step(present[cut], levels[i], levels[i + 1], p) for i, (cut, p) in enumerate(cuts)]


def _cuts(values: np.ndarray, offset: int, rng: np.random.Generator, alpha: float) -> list[tuple[int, float]]:
    n = len(values)
    part = 2 * n // 3
    found = [(p * 3, start + at) for start, end in ((0, n), (0, part), (n - part, n))
             for p, at in _tested(values[start:end], rng)]
    if not found or min(found)[0] > alpha:
        return []
    p, cut = min(found)
    return [*_cuts(values[:cut], offset, rng, alpha), (offset + cut, p), *_cuts(values[cut:], offset + cut, rng, alpha)]


def _tested(values: np.ndarray, rng: np.random.Generator) -> list[tuple[float, int]]:
    """The p-value of the likeliest step of a stretch, and its place; nothing where there cannot be one."""
    if len(values) < 2 * SIDE or np.ptp(values) <= 1e-12 * max(1.0, float(np.abs(values).max())):
        return []
    observed = _cusum(values[None])[0]
    if observed.max() < SMALL * values.std():
        return []
    largest = _cusum(rng.permuted(np.broadcast_to(values, (DRAWINGS, len(values))), axis=1)).max(axis=1)
    at = int(observed.argmax())
    return [(float((1 + (largest >= observed[at] * (1 - 1e-9)).sum()) / (1 + DRAWINGS)), at + SIDE)]


def _cusum(rows: np.ndarray) -> np.ndarray:
    """|mean of the first k - mean of the rest| · sqrt(k (n - k) / n) for k = SIDE ... n - SIDE, `[rows, places]`."""
    n = rows.shape[1]
    k = np.arange(SIDE, n - SIDE + 1)
    sums = rows.cumsum(axis=1)
    first = sums[:, k - 1]
    return np.abs(first / k - (sums[:, -1:] - first) / (n - k)) * np.sqrt(k * (n - k) / n)

