"""A study's scores against the papers' tables: for every number that a paper printed of a cell of ours, a verdict.

Equivalence is tested, not difference (two one-sided tests, Schuirmann 1987), with a margin that stands in the study file
before anything is run. `docs/verdicts.md` has the rule in formulas.
"""

from __future__ import annotations

import bisect
import math
import re
import statistics as plain
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from scipy import stats

from suite import published, registry
from suite.conventions import WORDS, Gap, gaps, told
from suite.published import AVERAGE, EVIDENCE_LABELS, Evidence, PublishedCell, PublishedRow
from suite.records import Record
from suite.statistics import equivalence
from suite.verdicts import Finding, Verdict

if TYPE_CHECKING:
    from suite.study import Cell, PublishedRef, Study, Table

ALPHA = 0.05
POWER = 0.8
#: Evidence that a number may fail a gate with: somebody has read it in a document.
GATING: frozenset[Evidence] = frozenset({"verbatim", "secondary"})
#: Seeds are counted up to here when it is said how many would do.
MOST_SEEDS = 100


class Spread(NamedTuple):
    """A standard deviation over seeds, in points, and its degrees of freedom."""

    sd: float
    dof: float


NO_SPREAD = Spread(0.0, math.inf)


@dataclass(frozen=True)
class Judgement:
    """What two means say: everything in points; `low` and `high` bound the difference at 1 - 2 `ALPHA`.

    Without any spread to go by there is no interval and no error.
    """

    verdict: Verdict
    difference: float
    margin: float
    low: float | None = None
    high: float | None = None
    error: float | None = None
    dof: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Sides:
    """How sure the two means of a comparison are: the spread of each, over how many seeds the paper's is a mean.

    `shared`: one estimate of the spread serves both, so that its freedom counts once. `sampling`: variance of our mean from
    scoring fewer items than the paper.
    """

    ours: Spread
    theirs: Spread
    printed: int
    shared: bool
    sampling: float

    @classmethod
    def of(cls, ours: Sequence[float], sd: float | None, seeds: int | None, pooled: Spread | None,
           sampling: float) -> Sides | None:
        """From our scores and what a paper prints; `pooled` stands in for a side without a spread of its own. None: nothing
        tells how much seeds matter."""
        count = seeds or 1
        own = Spread(plain.stdev(ours), len(ours) - 1) if len(ours) > 1 else pooled
        theirs = Spread(sd, max(1, count - 1)) if sd is not None else pooled or own
        if own is None or theirs is None:
            return None
        shared = sd is None and theirs.dof == own.dof  # pooled over no other rows than ours
        return cls(own, theirs, count, shared, sampling)

    def error(self, seeds: int, dof: float | None = None) -> tuple[float, float]:
        """Standard error of the difference with so many seeds of ours, and its degrees of freedom (Welch 1947, Satterthwaite
        1946). `dof`: of our own spread, when it is not that of the scores at hand."""
        parts = [(self.ours.sd**2 / seeds, dof or self.ours.dof), (self.theirs.sd**2 / self.printed, self.theirs.dof)]
        if self.shared:
            parts = [(parts[0][0] + parts[1][0], parts[0][1])]
        parts.append((self.sampling, math.inf))
        total = sum(part for part, _ in parts)
        weight = sum(part**2 / freedom for part, freedom in parts)
        return math.sqrt(total), total**2 / weight if weight > 0 else math.inf

    def needed(self, margin: float) -> int | None:
        """Seeds of ours that give "reproduced" with probability `POWER` if there is no difference; None: no number up to
        `MOST_SEEDS` does."""
        def chance(seeds: int) -> float:
            return power(*self.error(seeds, seeds - 1), margin)

        found = bisect.bisect_left(range(2, MOST_SEEDS + 1), POWER, key=chance) + 2
        return found if found <= MOST_SEEDS else None


def judge(ours: Sequence[float], printed: float, sd: float | None, seeds: int | None, pooled: Spread | None,
          margin: float, sampling: float = 0.0) -> Judgement:
    """Whether scores of ours, one per seed, reproduce a printed mean; all in points.

    Args:
        printed, sd, seeds: the paper's mean, its standard deviation over seeds and their number; None where not known.
        pooled: the spread over seeds of all our rows on this task, for a side that has none of its own.
        margin: the study's; the half-width that `sd` implies counts when it is wider.
        sampling: variance of our mean from scoring fewer items than the paper.

    Raises `ValueError` without scores.
    """
    if not ours:
        raise ValueError("there are no scores to judge")
    difference = plain.fmean(ours) - printed
    if sd is not None and seeds is not None and seeds > 1:
        margin = max(margin, implied(sd, seeds))
    sides = Sides.of(ours, sd, seeds, pooled, sampling)
    if sides is None:
        return Judgement("underpowered", difference, margin)
    error, dof = sides.error(len(ours))
    low, high, p = equivalence(difference, error, dof, margin, ALPHA)
    verdict: Verdict = "underpowered"
    if p <= ALPHA:
        verdict = "reproduced"
    elif high < -margin:
        verdict = "not reproduced"
    elif low > margin:
        verdict = "better"
    return Judgement(verdict, difference, margin, low, high, error, dof, p)


def implied(sd: float, seeds: int) -> float:
    """The half-width of a printed mean that its standard deviation implies: 1.96 standard errors.

    The normal quantile on purpose: with that of t, two or three printed seeds would make a margin that fits anything.
    """
    return float(stats.norm.ppf(0.975)) * sd / math.sqrt(seeds)


def power(error: float, dof: float, margin: float) -> float:
    """The chance of "reproduced" when there is no difference and the error is what it is estimated to be."""
    if error == 0:
        return 1.0
    return max(0.0, 2 * float(stats.t.cdf(margin / error - stats.t.ppf(1 - ALPHA, dof), dof)) - 1)


def compare(study: Study, scale: str, cells: Sequence[Cell], known: Mapping[str, Record]) -> list[Finding]:
    """A finding for every published number that a cell of ours stands for, table by table.

    Cells whose task no column has, or whose convention differs, get "not comparable" with what differs. Red are "not
    reproduced", and runs that are missing, of comparable cells whose number somebody has read (`GATING`).
    """
    found: list[Finding] = []
    for table_id, table in study.edition(scale).tables.items():
        mine = [cell for cell in cells if cell.table == table_id]
        if mine and table.published is not None:
            found += _Comparison(table_id, table, table.published, mine, known).findings()
    return found


@dataclass(frozen=True)
class _Place:
    """One line of ours in one column: its cells, and of what part of their task."""

    cells: tuple[Cell, ...]
    part: str | None
    column: str


class _Comparison:
    """One table of the study with the published one."""

    def __init__(self, name: str, table: Table, reference: PublishedRef, cells: Sequence[Cell],
                 known: Mapping[str, Record]) -> None:
        self.name, self.table, self.reference, self.known = name, table, reference, known
        self.source = published.load(reference.table)
        self.columns = tuple(c for c in self.source.columns if not reference.columns or c in reference.columns)
        self.lines: dict[str, list[Cell]] = {}
        for cell in cells:
            self.lines.setdefault(line(table, cell), []).append(cell)
        self.tasks = list(dict.fromkeys(cell.spec.task.id for cell in cells))
        self.parts = {task: self._parts(task, cells) for task in self.tasks}

    def findings(self) -> list[Finding]:
        pairs = {key: row for key, cells in self.lines.items() if (row := self._row(cells[0])) is not None}
        if not pairs:
            why = ("no number of it is transcribed" if not self.source.rows else
                   "none of its rows stands for a row of ours")
            return [Finding("published", self.name, "", "", "missing", False,
                            f"{self.source.id} ({self.source.paper.title}): {why}", {"published_table": self.source.id})]
        return [finding for key, row in pairs.items() for finding in self._line(key, row)]

    def _line(self, key: str, row: PublishedRow) -> list[Finding]:
        found = []
        places = self._places(key)
        for place in places:
            if place.column in self.columns:
                found.append(self._finding(key, row, place))
            else:
                spec = place.cells[0].spec
                differing = [gap for gap in gaps(spec, place.part, self.source.base, self.source.conventions)
                             if gap.name == "base"]
                data = f"data: no column of the paper's table is of {place.column} (it has {_listed(self.columns)})"
                found.append(self._incomparable(key, place.column, [*differing, Gap(name="data", said=data)], None))
        whole = {place.column for place in places} == set(self.columns) - {AVERAGE}
        if AVERAGE in self.columns and whole and len(places) > 1:
            found.append(self._average(key, row, places))
        return found

    def _finding(self, key: str, row: PublishedRow, place: _Place) -> Finding:
        cell = row.cells.get(place.column)
        differing = gaps(place.cells[0].spec, place.part, self.source.base, self.source.conventions.of(place.column))
        scores = self._scores(place)
        return self._verdict(key, place.column, cell, differing, [place], scores, cell.sd if cell else None,
                             self._pooled(place), self._sampling(place, scores))

    def _average(self, key: str, row: PublishedRow, places: Sequence[_Place]) -> Finding:
        """The mean over the columns. A paper prints no spread of it: that of its cells, which are runs apart, makes one."""
        cell = row.cells.get(AVERAGE)
        each = [self._scores(place) for place in places]
        seeds = [seed for seed in each[0] if all(seed in scores for scores in each)]
        scores = {seed: plain.fmean(one[seed] for one in each) for seed in seeds}
        differing = {gap.name: gap for place in places for gap in
                     gaps(place.cells[0].spec, place.part, self.source.base, self.source.conventions.of(place.column))}
        spreads = [printed.sd for place in places
                   if (printed := row.cells.get(place.column)) is not None and printed.sd is not None]
        sd = cell.sd if cell else None
        if sd is None and len(spreads) == len(places):
            sd = math.hypot(*spreads) / len(spreads)
        pools = [self._pooled(place) for place in places]
        pooled = None
        if all(pools):
            pooled = Spread(math.hypot(*(p.sd for p in pools if p)) / len(pools), min(p.dof for p in pools if p))
        sampling = sum(self._sampling(place, one) for place, one in zip(places, each, strict=True)) / len(places)**2
        return self._verdict(key, AVERAGE, cell, list(differing.values()), places, scores, sd, pooled, sampling)

    def _verdict(self, key: str, column: str, cell: PublishedCell | None, differing: Sequence[Gap],
                 places: Sequence[_Place], scores: Mapping[int, float], sd: float | None, pooled: Spread | None,
                 sampling: float) -> Finding:
        excused = [gap for gap in differing if gap.name in self.reference.despite]
        if len(excused) < len(differing):
            return self._incomparable(key, column, differing, cell)
        if cell is None or cell.mean is None:
            why = "the paper has no such cell" if cell is None else "the paper's number is not known to us"
            return Finding("published", self.name, key, column, "missing", False, why,
                           {"published_table": self.source.id})
        gates = cell.evidence in GATING and not excused
        planned = {c.spec.seed for place in places for c in place.cells}
        if not scores and all(record.status == "skipped" for record in self._records(places)) and self._records(places):
            return Finding("published", self.name, key, column, "not comparable", False,
                           f"skipped here: {self._records(places)[0].reason}", {"published_table": self.source.id})
        if not scores:
            return Finding("published", self.name, key, column, "missing", gates,
                           f"{self._fates(places)}; {cell.mean:.2f} in the paper",
                           {"published_table": self.source.id, "gates": int(gates), "published": cell.mean})
        seeds = seed_count(self.source.protocol.seeds)
        values = [scores[seed] for seed in sorted(scores)]
        made = judge(values, cell.mean, sd, seeds, pooled, self.table.margins.score, sampling)
        sides = Sides.of(values, sd, seeds, pooled, sampling)
        needed = sides.needed(made.margin) if sides else None
        said = [_sentence(made, values, cell.mean, sd, seeds, needed)]
        if len(values) < len(planned):
            said.append(f"Only {len(values)} of {len(planned)} planned seeds have a score.")
        diverged = sum(record.status == "diverged" for record in self._records(places))
        if diverged:
            said.append(f"{diverged} runs diverged and count with the score that they got.")
        if pooled == NO_SPREAD:
            said.append("Nothing is trained, so seeds make no difference.")
        elif sd is None:
            said.append("The paper prints no spread" + (f": {pooled.sd:.2f}, our rows' on this task, stands for it."
                                                        if pooled else "."))
        elif cell.sd is None:
            said.append("The spread of the average follows from those of its cells.")
        if seeds is None:
            said.append("The paper's number of seeds is not known: counted as one.")
        if sampling:
            said.append("Fewer items were scored than in the paper.")
        if cell.evidence not in GATING:
            said.append(f"Never fails: the printed number is {EVIDENCE_LABELS[cell.evidence]}.")
        if excused:
            said.append(f"Never fails: {told(excused)}.")
        numbers: dict[str, float | int | str | None] = {
            "published_table": self.source.id, "evidence": cell.evidence, "gates": int(gates), "ours": plain.fmean(values),
            "ours_sd": plain.stdev(values) if len(values) > 1 else None, "ours_seeds": len(values), "published": cell.mean,
            "published_sd": sd, "published_seeds": seeds, "pooled_sd": pooled.sd if pooled else None,
            "difference": made.difference, "low": made.low, "high": made.high, "margin": made.margin, "error": made.error,
            "dof": made.dof if made.dof is not None and math.isfinite(made.dof) else None, "p": made.p,
            "seeds_needed": needed, "diverged": diverged,
        }
        return Finding("published", self.name, key, column, made.verdict, gates and made.verdict == "not reproduced",
                       " ".join(said), numbers)

    def _incomparable(self, key: str, column: str, differing: Sequence[Gap], cell: PublishedCell | None) -> Finding:
        return Finding("published", self.name, key, column, "not comparable", False, told(differing),
                       {"published_table": self.source.id, "differs": ", ".join(WORDS[g.name] for g in differing),
                        "published": cell.mean if cell else None})

    def _row(self, cell: Cell) -> PublishedRow | None:
        """The published row of a line: of the same rank, where the line has a rank or the table several budgets."""
        method = self.reference.rows.get(cell.row)
        row = self.source.row(method, cell.rank) if method is not None else None
        free = cell.spec.budget is None or (cell.rank is None and len(self.table.budgets) == 1)
        return row if row is not None and (free or row.rank in (None, cell.rank)) else None

    def _places(self, key: str) -> list[_Place]:
        found = []
        for task in self.tasks:
            cells = tuple(cell for cell in self.lines[key] if cell.spec.task.id == task)
            if cells:
                found += [_Place(cells, part, self.reference.column(task, part)) for part in self.parts[task]]
        return found

    def _parts(self, task: str, cells: Sequence[Cell]) -> list[str | None]:
        """The parts of a task as its records have them; [None]: it is one whole."""
        for cell in cells:
            record = self.known.get(cell.spec.id)
            if cell.spec.task.id == task and record is not None and record.scores:
                return [score.part for score in record.scores if score.part is not None] or [None]
        return [None]

    def _records(self, places: Sequence[_Place]) -> list[Record]:
        return [self.known[c.spec.id] for place in places for c in place.cells if c.spec.id in self.known]

    def _scores(self, place: _Place) -> dict[int, float]:
        """Points by seed. Diverged runs count with the score that they got."""
        return {record.spec.seed: 100 * score.value for record in self._records([place])
                if record.status in ("finished", "diverged") for score in record.scores
                if score.part == place.part and (place.part is not None or score is record.score)}

    def _pooled(self, place: _Place) -> Spread | None:
        """The spread over seeds of a column; none at all of a method that trains nothing."""
        trains = registry.method(place.cells[0].spec.method.id).trains
        return NO_SPREAD if trains == "nothing" else self._spreads.get(place.column)

    @cached_property
    def _spreads(self) -> dict[str, Spread]:
        """The spread over seeds of every column, pooled over all lines of our table."""
        sums: dict[str, list[tuple[float, int]]] = {}
        for key in self.lines:
            for place in self._places(key):
                values = list(self._scores(place).values())
                if len(values) > 1:
                    sums.setdefault(place.column, []).append((plain.variance(values), len(values) - 1))
        return {column: Spread(math.sqrt(sum(v * dof for v, dof in found) / sum(dof for _, dof in found)),
                               sum(dof for _, dof in found)) for column, found in sums.items()}

    def _sampling(self, place: _Place, scores: Mapping[int, float]) -> float:
        """Variance of the mean, in points squared, from scoring a random part of the paper's items: all seeds have the same
        items, so it does not shrink with seeds."""
        spec = place.cells[0].spec
        whole = registry.task(spec.task.id).sizes["test"]
        some = spec.task.test
        if not scores or place.part is not None or some is None or some >= whole:
            return 0.0
        share = plain.fmean(scores.values()) / 100
        return 1e4 * share * (1 - share) / some * (whole - some) / (whole - 1)

    def _fates(self, places: Sequence[_Place]) -> str:
        """Why there is no score: what became of the runs."""
        found = self._records(places)
        counts = {status: sum(r.status == status for r in found) for status in ("failed", "skipped", "diverged")}
        counts["not run"] = sum(len(place.cells) for place in places) - len(found)
        fates = ", ".join(f"{count} {fate}" for fate, count in counts.items() if count)
        return f"no score here ({fates or 'no seed has all tasks'})"


def line(table: Table, cell: Cell) -> str:
    """What a line of a table is called in findings: its row, `@` its rank or budget, and `@` its rate where there are
    several."""
    key = cell.row if cell.spec.budget is None else f"{cell.row}@{cell.rank or cell.spec.budget.text}"
    return f"{key}@{cell.spec.recipe.learning_rate:g}" if len(table.rates(cell.row)) > 1 else key


def seed_count(told: int | str | None) -> int | None:
    """The number of seeds that a protocol states: a number, or the one that its words begin with."""
    if isinstance(told, str):
        begins = re.match(r"\d+", told)
        return int(begins[0]) if begins else None
    return told


def _sentence(made: Judgement, values: Sequence[float], printed: float, sd: float | None, seeds: int | None,
              needed: int | None) -> str:
    spread = f", SD {plain.stdev(values):.2f}" if len(values) > 1 else ""
    paper = [f"{seeds} seed{'s' * (seeds != 1)}"] if seeds is not None else []
    paper += [f"SD {sd:.2f}"] if sd is not None else []
    here = f"{plain.fmean(values):.2f} here ({len(values)} seed{'s' * (len(values) != 1)}{spread})"
    there = f"{printed:.2f} in the paper" + (f" ({', '.join(paper)})" if paper else "")
    if made.low is None or made.high is None:
        return f"{here}, {there}: {made.difference:+.2f}, and no spread over seeds to say how sure that is."
    gap = f"{made.difference:+.2f} [{made.low:+.2f}, {made.high:+.2f}]".replace("-", "−")
    limit = f"±{made.margin:.2f} points"
    ends = {
        "reproduced": f"inside {limit}.",
        "not reproduced": f"below what {limit} allow.",
        "better": f"above what {limit} allow: better than printed asks for a look as well (leakage, another metric, more "
                  "training).",
        "underpowered": f"reaches over ±{made.margin:.2f} points; " + (
            f"{needed} seeds would do." if needed and needed > len(values) else "more seeds may tell." if needed else
            f"not even {MOST_SEEDS} seeds of ours would do."),
    }
    return f"{here}, {there}: {gap} {ends[made.verdict]}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(name for name in names if name != AVERAGE) or "none"
