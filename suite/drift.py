"""The gates between two sets of runs of one study: those of a baseline, and those of now.

Training and evaluation are judged apart. The loss of a run repeats far more closely than its score does, so a small
move of the loss is a change of training code, and a move of the score without one is a change of evaluation code.
All thresholds are here or in the study's `margins`; docs/baseline.md says where each comes from.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy import stats

from suite.records import Record
from suite.statistics import mcnemar
from suite.study import Cell
from suite.verdicts import Finding, Gate, Margins, Verdict

#: Level of every test of a gate. At 200 cells about one false first alarm in five nights, were the tests not exact.
ALPHA = 0.001
#: A loss may also move by this many standard deviations of clean nights, where the history knows at least NIGHTS.
DEVIATIONS, NIGHTS = 6.0, 5
#: Share by which a gradient norm may move, and the steps at which it is looked at.
NORM, NORM_STEPS = 0.1, (1, 10, 100)
#: Share of generated answers that may read otherwise: rounding alone changes few, another decoding most.
ANSWERS = 0.2
#: How near the first loss of a run is to that of the base when its adapter starts at zero.
SAME_START = 1e-4
#: Runs that a table needs before its speed or memory can be red, and rows before its common shift can be.
FEW_RUNS, FEW_ROWS = 5, 3
#: Parts of a run, equal in steps, over which the training loss is averaged.
WINDOWS = 4

#: What a run is the same by, whatever its id: table, row, task, budget, learning rate, seed.
Key = tuple[str, str, str, str, float, int]
MADE = ("finished", "diverged")
Bits = NDArray[np.bool_]


class Items(BaseModel):
    """The scored items of a task: ids and expected answers, in one order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: tuple[str, ...]
    expected: tuple[str, ...]

    @cached_property
    def digest(self) -> str:
        """Sixteen hex digits."""
        return hashlib.sha256("\n".join([*self.ids, "", *self.expected]).encode()).hexdigest()[:16]


class Trail(BaseModel):
    """What the gates need of a run beside its record.

    `losses`: mean training loss of each window, in nats; `first`: loss of the first step; `norms`: gradient norm at
    steps 1, 10 and 100. None where it was not finite. `right`: one bit for each item of `items` (hex, first item first);
    `answers`: of generated text, one hex digit of each answer's hash.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    places: tuple[tuple[str, str], ...]
    first: float | None = None
    losses: tuple[float | None, ...] = ()
    norms: dict[int, float | None] = {}
    items: str = ""
    right: str = ""
    answers: str = ""

    def bits(self, count: int) -> Bits:
        """Right or wrong of the first `count` items."""
        return np.unpackbits(np.frombuffer(bytes.fromhex(self.right), np.uint8), count=count).astype(bool)


@dataclass(frozen=True)
class Run:
    """A run in its place in the study, with what its record and its tables say."""

    cell: Cell
    record: Record
    trail: Trail
    items: Items | None

    @property
    def key(self) -> Key:
        spec = self.cell.spec
        return (self.cell.table, self.cell.row, spec.task.id, spec.budget.text if spec.budget else "",
                spec.recipe.learning_rate, spec.seed)

    @property
    def diverged(self) -> bool:
        return self.record.status == "diverged"


def runs(cells: Iterable[Cell], known: Mapping[str, Record]) -> dict[Key, Run]:
    """The runs that have a record, with their curves and predictions as far as they can be read."""
    found: dict[Key, Run] = {}
    trails: dict[str, tuple[Trail, Items | None]] = {}
    held: dict[str, Items] = {}  # runs of a task share one set of items
    for cell in cells:
        record = known.get(cell.spec.id)
        if record is None:
            continue
        if record.id not in trails:
            trail, items = _trail(record)
            trails[record.id] = trail, held.setdefault(items.digest, items) if items else None
        run = Run(cell, record, *trails[record.id])
        found[run.key] = run
    return found


def _trail(record: Record) -> tuple[Trail, Items | None]:
    facts: dict[str, Any] = {"run": record.id, "places": ()}
    try:
        curves, answers = record.curves(("step", "loss", "gradient_norm")), record.predictions(
            ("item", "expected", "predicted", "correct"))
    except (OSError, ValueError):  # damaged: what is compared then says that it is missing
        curves = answers = None
    if curves is not None and len(curves):
        losses = curves["loss"].to_numpy(float)
        norms = dict(zip(curves["step"].tolist(), curves["gradient_norm"].tolist(), strict=True))
        facts |= {"first": _finite(losses[0]),
                  "losses": tuple(_finite(part.mean()) for part in np.array_split(losses, WINDOWS) if len(part)),
                  "norms": {step: _finite(norms[step]) for step in NORM_STEPS if step in norms}}
    if answers is None:
        return Trail(**facts), None
    items = Items(ids=tuple(map(str, answers["item"])), expected=tuple(map(str, answers["expected"])))
    facts |= {"items": items.digest, "right": np.packbits(answers["correct"].to_numpy(bool)).tobytes().hex()}
    if not pd.api.types.is_integer_dtype(answers["predicted"]):
        facts["answers"] = "".join(hashlib.sha256(str(one).encode()).hexdigest()[0] for one in answers["predicted"])
    return Trail(**facts), items


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Pair:
    """The same run, then and now."""

    old: Run
    new: Run

    @property
    def column(self) -> str:
        return self.new.cell.spec.task.id


Named = Callable[[Cell], str]
#: Pairs by row (as it is called) and task.
Groups = Mapping[tuple[str, str], Sequence[Pair]]


def judge(before: Mapping[Key, Run], now: Mapping[Key, Run], margins: Mapping[str, Margins],
          name: Named = lambda cell: cell.row, spreads: Mapping[tuple[str, str, str], float] | None = None,
          confirmed: bool = False) -> list[Finding]:
    """Every gate's findings, in the order of the baseline.

    Args:
        margins: of each table.
        name: what a row is called in front of people; runs of equal name and task are judged together, over their seeds.
        spreads: standard deviation of the mean training loss over clean nights, by table, row (as called) and task.
        confirmed: the runs hold fresh seeds beside those that failed: a loss counts as moved when its median over seeds
            has, not the largest.
    """
    matched = _match(before, now)
    found: list[Finding] = []
    for table in dict.fromkeys(key[0] for key in before):
        margin = margins.get(table, Margins())
        olds = [run for key, run in before.items() if key[0] == table]
        both = [Pair(run, matched[run.key]) for run in olds if run.key in matched]
        pairs = [pair for pair in both if pair.old.record.status in MADE and pair.new.record.status in MADE]
        groups: dict[tuple[str, str], list[Pair]] = defaultdict(list)
        for pair in pairs:
            groups[name(pair.new.cell), pair.column].append(pair)
        found += _presence(table, olds, matched, name)
        new = len([key for key in now if key[0] == table]) - len(both)
        if new:
            found.append(Finding("presence", table, "all", "all", "not comparable", False,
                                 f"{_runs(new)} of now {_has(new)} no counterpart in the baseline", {"runs": new}))
        found += _setup(table, both, name)
        starts = _starts(pairs)
        training = {place: _training(table, place, group, pairs, starts, margin,
                                     (spreads or {}).get((table, *place), 0.0), confirmed)
                    for place, group in groups.items()}
        found += [finding for finding in training.values() if finding is not None]
        found += [_evaluation(table, place, group, training[place]) for place, group in groups.items()]
        for column in dict.fromkeys(pair.column for pair in pairs):
            found += _pooled(table, column, [pair for pair in pairs if pair.column == column], margin)
        found += _cost("speed", table, pairs, margin.speed, name)
        found += _cost("memory", table, pairs, margin.memory, name)
    return found


def _match(before: Mapping[Key, Run], now: Mapping[Key, Run]) -> dict[Key, Run]:
    """The run of now for each key of the baseline: that of the same key, else the only one that differs by its learning
    rate alone (the study was changed; the setup says so)."""
    found = {key: now[key] for key in before if key in now}

    def rest(side: Mapping[Key, Run]) -> dict[tuple[object, ...], list[Key]]:
        left: dict[tuple[object, ...], list[Key]] = defaultdict(list)
        for key in side:
            if key not in found:
                left[key[:4] + key[5:]].append(key)
        return left

    spare = rest(now)
    for place, keys in rest(before).items():
        if len(keys) == 1 and len(spare.get(place, ())) == 1:
            found[keys[0]] = now[spare[place][0]]
    return found


def _presence(table: str, olds: Sequence[Run], matched: Mapping[Key, Run], name: Named) -> list[Finding]:
    """What the baseline has and the present lacks; runs that failed or are skipped now are lacking too."""
    lost: dict[tuple[str, str], list[tuple[Run, str]]] = defaultdict(list)
    for run in olds:
        new = matched.get(run.key)
        if new is None:
            lost[run.cell.spec.task.id, name(run.cell)].append((run, "there is no record of them"))
        elif run.record.status in MADE and new.record.status not in MADE:
            lost[run.cell.spec.task.id, name(run.cell)].append(
                (run, f"they are recorded as {new.record.status}: {new.record.reason or 'no reason given'}"))
    if not lost:
        own = sum(matched[run.key].record.started == run.record.started != "" for run in olds)
        said = f"{_runs(len(olds))} of the baseline, none is lacking"
        if own:
            said += f"; {own} of them {'is' if own == 1 else 'are'} the baseline's own, not made again"
        return [Finding("presence", table, "all", "all", "not comparable" if own == len(olds) else "unchanged", False, said,
                        {"runs": len(olds), "own": own})]
    found = []
    for column in dict.fromkeys(task for task, _ in lost):
        rows = {row: missing for (task, row), missing in lost.items() if task == column}
        planned = [run for run in olds if run.cell.spec.task.id == column]
        if sum(map(len, rows.values())) == len(planned):
            rows = {"all": [one for missing in rows.values() for one in missing]}
        for row, missing in rows.items():
            of = len(planned) if row == "all" else sum(name(run.cell) == row for run in planned)
            what = f"{column}, all rows" if row == "all" else f"{row} on {column}"
            found.append(Finding("presence", table, row, column, "missing", True,
                                 f"{what}: {len(missing)} of {_runs(of)} that the baseline has are lacking; {missing[0][1]}",
                                 {"missing": len(missing), "runs": of}))
    return found


def _setup(table: str, pairs: Sequence[Pair], name: Named) -> list[Finding]:
    """What was run: a change of spec, data, items, decoding or size makes the rest a comparison of two things."""
    told: dict[tuple[str, str], list[str]] = defaultdict(list)
    rows: dict[str, set[str]] = defaultdict(set)
    remarks: dict[str, None] = {}
    for pair in pairs:
        row = name(pair.new.cell)
        rows[pair.column].add(row)
        for text in _changes(pair):
            if row not in told[pair.column, text]:
                told[pair.column, text].append(row)
        remarks |= dict.fromkeys(_circumstances(pair))
    found = []
    for (column, text), which in told.items():
        row = "all" if len(which) == len(rows[column]) else ", ".join(which)
        found.append(Finding("setup", table, row, column, "changed", True, text, {"rows": len(which)}))
    if pairs and not found:
        found.append(Finding("setup", table, "all", "all", "unchanged", False,
                             "specs, data, items, decoding and sizes are those of the baseline"))
    if remarks:
        found.append(Finding("setup", table, "all", "all", "changed", False,
                             "made otherwise than the baseline, which need not matter: " + "; ".join(remarks)))
    return found


def _changes(pair: Pair) -> list[str]:
    """What differs in what was asked for and in what it was done on."""
    old, new = pair.old.record, pair.new.record
    before, after = pair.old.cell.spec.model_dump(mode="json"), pair.new.cell.spec.model_dump(mode="json")
    for spec in (before, after):
        for field in ("engine", "seed", "budget"):
            del spec[field]
    changes = _differences("", before, after)
    if old.status not in MADE or new.status not in MADE:
        return changes
    if old.data and new.data:
        changes += _differences("data.", *(data.model_dump(exclude={"majority"}) for data in (old.data, new.data)))
    if old.decode and new.decode:  # what one of the two versions did not record says nothing
        common = old.decode.keys() & new.decode.keys()
        changes += _differences("decode.", {key: old.decode[key] for key in sorted(common)},
                                {key: new.decode[key] for key in sorted(common)})
    if old.trainable and new.trainable:
        changes += _differences("trained parameters", old.trainable.total, new.trainable.total)
    if old.throughput and new.throughput and not pair.old.diverged and not pair.new.diverged:
        changes += _differences("training ", {"steps": old.throughput.steps, "tokens": old.throughput.tokens},
                                {"steps": new.throughput.steps, "tokens": new.throughput.tokens})
    if pair.old.items and pair.new.items and pair.old.items.digest != pair.new.items.digest:
        here = dict(zip(pair.new.items.ids, pair.new.items.expected, strict=True))
        gone = sum(item not in here for item in pair.old.items.ids)
        other = sum(here.get(item, answer) != answer
                    for item, answer in zip(pair.old.items.ids, pair.old.items.expected, strict=True))
        count = len(pair.old.items.ids)
        if gone or len(here) != count:
            changes.append(f"scored items: {gone} of {count} are gone, {len(here) - count + gone} are new")
        if other:
            changes.append(f"expected answers: {other} of {count} are others")
    return changes


def _differences(where: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [text for key in sorted(old.keys() | new.keys()) for text in _differences(
            f"{where}{key}." if isinstance(old.get(key), dict) and isinstance(new.get(key), dict) else f"{where}{key}",
            old.get(key), new.get(key))]
    return [] if old == new else [f"{where}: {_shown(new)} where the baseline has {_shown(old)}"]


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _circumstances(pair: Pair) -> list[str]:
    """What differs in what made it: engine, packages, machine."""
    old, new = pair.old.record, pair.new.record
    before = {"engine": pair.old.cell.spec.engine} | _environment(old)
    after = {"engine": pair.new.cell.spec.engine} | _environment(new)
    return _differences("", before, after)


def _environment(record: Record) -> dict[str, Any]:
    told = record.environment
    return {"python": told.get("python"), **told.get("packages", {}), **machine(record)}


def machine(record: Record) -> dict[str, Any]:
    """What must be equal for speed and memory to be compared."""
    hardware = record.environment.get("hardware", {})
    return {"cpu": hardware.get("cpu"), "cores": hardware.get("cores"), "gpu": hardware.get("gpu"),
            "threads": record.environment.get("threads"), "platform": record.environment.get("platform")}


def _training(table: str, place: tuple[str, str], group: Sequence[Pair], pairs: Sequence[Pair], starts: Starts,
              margins: Margins, spread: float, confirmed: bool) -> Finding | None:
    """Whether the curve of a row on a task is where it was. None for what is not trained."""
    row, column = place
    diverged = [pair for pair in group if pair.new.diverged and not pair.old.diverged]
    if diverged:
        same = [pair for pair in pairs if pair.new.cell.row == group[0].new.cell.row]
        then, today = sum(pair.old.diverged for pair in same), sum(pair.new.diverged for pair in same)
        p = float(stats.fisher_exact([[today, len(same) - today], [then, len(same) - then]], alternative="greater").pvalue)
        red = then == 0 or p < ALPHA
        return Finding("training", table, row, column, "changed", red,
                       f"{row} on {column}: {len(diverged)} of {_runs(len(group))} {_diverge(len(diverged))} now; of all "
                       f"runs of the row {today} of {len(same)} do, in the baseline {then} (Fisher p = {p:.2g})",
                       {"diverged": today, "baseline": then, "runs": len(same), "p": p})
    trained = [pair for pair in group if pair.old.trail.losses and not pair.old.diverged and not pair.new.diverged]
    if not trained:
        return None
    if any(len(pair.new.trail.losses) != len(pair.old.trail.losses) for pair in trained):
        return Finding("training", table, row, column, "missing", True,
                       f"{row} on {column}: the training curve is not there")
    allowed = max(margins.loss, DEVIATIONS * spread)
    moves: dict[str, list[float]] = {"first step": [_delta(pair.old.trail.first, pair.new.trail.first) for pair in trained]}
    for window in range(min(len(pair.old.trail.losses) for pair in trained)):
        moves[f"window {window + 1} of {WINDOWS}"] = [
            _delta(pair.old.trail.losses[window], pair.new.trail.losses[window]) for pair in trained]
    size = {where: float(np.median(np.abs(values)) if confirmed else np.max(np.abs(values)))
            for where, values in moves.items()}
    where = max(size, key=lambda one: size[one])
    worst = max(moves[where], key=abs)
    norms = {step: float(np.max([abs(_share(pair.old.trail.norms.get(step), pair.new.trail.norms.get(step)))
                                 for pair in trained])) for step in NORM_STEPS if step in trained[0].old.trail.norms}
    step = max(norms, key=lambda one: norms[one], default=1)
    start = _off_base(trained, starts, margins)
    moved, steered = size[where] > allowed, norms.get(step, 0.0) > NORM
    said = f"{row} on {column}: the loss moved by at most {worst:+.4f} ({where}; {allowed:g} is allowed)"
    if steered:
        said += f", the gradient norm at step {step} by {100 * norms[step]:.0f} % ({100 * NORM:.0f} % is allowed)"
    if start is not None:
        said += f", and the first loss is {start:+.4f} from that of the base, which it was in the baseline"
    red = moved or steered or start is not None
    if red:
        said += "; look at what trains: the method's file, suite/training.py, suite/optimiser.py, suite/batches.py"
    return Finding("training", table, row, column, "changed" if red else "unchanged", red, said,
                   {"moved": worst, "where": where, "allowed": allowed, "norm": norms.get(step, 0.0), "norm_step": step,
                    "seeds": len(trained)})


def _delta(old: float | None, new: float | None) -> float:
    return math.inf if new is None or old is None else new - old


def _share(old: float | None, new: float | None) -> float:
    if old is None or new is None:
        return math.inf
    return (new - old) / old if old else (0.0 if new == old else math.inf)


#: First loss of the untouched base then and now, by task and seed: every run of a seed begins with the same batch.
Starts = Mapping[tuple[str, int], tuple[float | None, float | None]]


def _starts(pairs: Sequence[Pair]) -> Starts:
    beside: dict[tuple[str, int], list[Pair]] = defaultdict(list)
    for pair in pairs:
        beside[pair.column, pair.new.cell.spec.seed].append(pair)
    return {place: (_common([pair.old for pair in some]), _common([pair.new for pair in some]))
            for place, some in beside.items()}


def _common(some: Sequence[Run]) -> float | None:
    """The first loss that most of the runs share: that of the rows that begin as the base. None when no two share one."""
    values = sorted(run.trail.first for run in some if run.trail.first is not None)
    best, most, low = None, 1, 0
    for high, value in enumerate(values):
        while value - values[low] > SAME_START:
            low += 1
        if high - low + 1 > most:
            best, most = value, high - low + 1
    return best


def _off_base(group: Sequence[Pair], starts: Starts, margins: Margins) -> float | None:
    """How far the first loss now lies from the base's, of a row that began exactly at the base in the baseline. None when
    it does still."""
    worst = 0.0
    for pair in group:
        old, new = starts[pair.column, pair.new.cell.spec.seed]
        mine, today = pair.old.trail.first, pair.new.trail.first
        if None not in (old, new, mine, today) and abs(mine - old) <= SAME_START:  # type: ignore[operator]
            worst = max(worst, today - new, key=abs)  # type: ignore[operator]
    return worst if abs(worst) > margins.loss else None


@dataclass(frozen=True)
class Flips:
    """Answers of one run then and now, right or wrong, over the items that both have."""

    ids: Sequence[str]
    before: Bits
    after: Bits
    changed: int | None  # generated answers that read otherwise

    @property
    def lost(self) -> int:
        return int((self.before & ~self.after).sum())

    @property
    def gained(self) -> int:
        return int((~self.before & self.after).sum())


def _flips(pair: Pair) -> Flips | None:
    old, new = pair.old.items, pair.new.items
    if old is None or new is None:
        return None
    before, after = pair.old.trail.bits(len(old.ids)), pair.new.trail.bits(len(new.ids))
    texts = pair.old.trail.answers, pair.new.trail.answers
    if old.ids == new.ids:
        changed = sum(one != other for one, other in zip(*texts, strict=True)) if all(texts) else None
        return Flips(old.ids, before, after, changed)
    place = {item: i for i, item in enumerate(new.ids)}
    common = [(i, place[item]) for i, item in enumerate(old.ids) if item in place]
    changed = sum(texts[0][i] != texts[1][j] for i, j in common) if all(texts) else None
    return Flips([old.ids[i] for i, _ in common], before[[i for i, _ in common]], after[[j for _, j in common]], changed)


def _evaluation(table: str, place: tuple[str, str], group: Sequence[Pair], training: Finding | None) -> Finding:
    """Whether the answers of a row on a task are what they were: exact McNemar over items and seeds."""
    row, column = place
    sound = [pair for pair in group if not pair.old.diverged and not pair.new.diverged]
    if not sound:
        return Finding("evaluation", table, row, column, "not comparable", False, f"{row} on {column}: the runs diverged")
    flips = [_flips(pair) for pair in sound]
    if any(one is None for one in flips):
        return Finding("evaluation", table, row, column, "missing", True,
                       f"{row} on {column}: the answers to single items are not there")
    known = [one for one in flips if one is not None]
    lost, gained = sum(one.lost for one in known), sum(one.gained for one in known)
    answers = sum(len(one.before) for one in known)
    p = 1.0
    if lost + gained:
        p = mcnemar(*({seed: pd.Series(getattr(one, side).astype(float), index=list(one.ids))
                       for seed, one in enumerate(known)} for side in ("after", "before")))
    said = f"{row} on {column}: of {answers:,} answers {lost} became wrong and {gained} right (McNemar p = {p:.2g})"
    red = p < ALPHA
    changed = [one.changed for one in known if one.changed is not None]
    if changed:
        read = float(stats.binomtest(sum(changed), max(1, answers), ANSWERS, alternative="greater").pvalue)
        said += f", {sum(changed)} read otherwise"
        if read < ALPHA:
            red, said = True, said + f" (more than {100 * ANSWERS:.0f} %, p = {read:.2g})"
    moved = training is not None and training.red
    if red:
        said += "; the loss moved too: look at training first" if moved else (
            "; the loss did not move: look at what evaluates, suite/generation.py, suite/worker.py, suite/metrics, the task")
    old, new = (float(np.mean([run.record.scores[0].value for run in side if run.record.scores] or [math.nan]))
                for side in ([pair.old for pair in sound], [pair.new for pair in sound]))
    return Finding("evaluation", table, row, column, "changed" if red else "unchanged", red, said,
                   {"baseline": old, "now": new, "lost": lost, "gained": gained, "answers": answers, "p": p,
                    "read_otherwise": sum(changed) if changed else None, "seeds": len(sound)})


def _pooled(table: str, column: str, pairs: Sequence[Pair], margins: Margins) -> list[Finding]:
    """Whether all rows of a task moved together: score and loss, each by a t test over rows."""
    sound = [pair for pair in pairs if not pair.old.diverged and not pair.new.diverged]
    scores: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)
    lost = gained = 0
    for pair in sound:
        flips = _flips(pair)
        if flips is not None and len(flips.before):
            scores[pair.new.cell.row].append((flips.gained - flips.lost) / len(flips.before))
            lost, gained = lost + flips.lost, gained + flips.gained
        old, new = pair.old.trail.losses, pair.new.trail.losses
        if old and len(old) == len(new) and None not in (*old, *new):
            losses[pair.new.cell.row].append(float(np.mean(new)) - float(np.mean(old)))  # type: ignore[arg-type]
    found = []
    for measure, values in (("score", scores), ("loss", losses)):
        if len(values) < FEW_ROWS:
            continue
        rows = [float(np.mean(one)) for one in values.values()]
        mean, p = float(np.mean(rows)), _against_zero(rows)
        amount = f"{100 * mean:+.2f} points" if measure == "score" else f"{mean:+.5f}"
        numbers: dict[str, float | int | str | None] = {"measure": measure, "rows": len(rows), "moved": mean, "p": p}
        said = f"{column}, all rows: the {measure} moved by {amount} on average over {len(rows)} rows (t test p = {p:.2g}"
        if measure == "score":
            # Few flips make a spread over rows look smaller than it is: they must be one-sided as flips too.
            q = float(stats.binomtest(gained, lost + gained).pvalue) if lost + gained else 1.0
            numbers |= {"lost": lost, "gained": gained, "p_flips": q}
            said += f"; {lost} answers became wrong and {gained} right, sign test p = {q:.2g})"
            red = p < ALPHA and q < ALPHA
        else:
            # What a mean of so many rows may move by, when one may move by the margin.
            allowed = margins.loss / math.sqrt(len(rows))
            numbers["allowed"] = allowed
            said += f"; {allowed:.2g} is allowed)"
            red = p < ALPHA and abs(mean) > allowed
        if red:
            said += "; something that all rows share has changed: " + (
                "data, prompt, decoding or metric" if measure == "score" else "data order, base, optimiser or precision")
        found.append(Finding("pooled", table, "all", column, "changed" if red else "unchanged", red, said, numbers))
    return found


def _against_zero(values: Sequence[float]) -> float:
    """Two-sided one-sample t test; values that are all alike are zero (1) or not (0)."""
    if len(values) < 2 or float(np.std(values)) <= 1e-12 * max(1.0, float(np.max(np.abs(values)))):
        return 1.0 if len(values) < 2 or abs(values[0]) < 1e-12 else 0.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def _cost(gate: Gate, table: str, pairs: Sequence[Pair], margin: float, name: Named) -> list[Finding]:
    """Tokens per second or peak memory against the baseline's: of the table as a whole, and of rows that stand out."""
    what = "tokens per second" if gate == "speed" else "peak memory"
    measured = [(pair, _amounts(gate, pair)) for pair in pairs]
    have = [(pair, amounts) for pair, amounts in measured if amounts is not None]
    if not have:
        return []
    like = {(name(pair.new.cell), *amounts): math.log(amounts[1] / amounts[0]) for pair, amounts in have
            if machine(pair.old.record) == machine(pair.new.record)
            and (pair.old.record.pack and pair.old.record.pack.size) == (pair.new.record.pack and pair.new.record.pack.size)}
    if not like:
        why = "another machine" if all(machine(pair.old.record) != machine(pair.new.record) for pair, _ in have) \
            else "packs of another size"
        return [Finding(gate, table, "all", "all", "not comparable", False, f"{what}: the baseline was made on {why}"
                        if why == "another machine" else f"{what}: the baseline's runs trained in {why}")]
    by_row: dict[str, list[float]] = defaultdict(list)
    for (row, *_), ratio in like.items():
        by_row[row].append(ratio)
    every = list(like.values())
    found = [_cost_finding(gate, what, table, "all", every, [], margin)]
    if len(by_row) > 2:
        for row, own in by_row.items():
            others = [ratio for other, ratios in by_row.items() if other != row for ratio in ratios]
            finding = _cost_finding(gate, what, table, row, own, others, margin)
            if finding.verdict == "changed":
                found.append(finding)
    return found


def _amounts(gate: Gate, pair: Pair) -> tuple[float, float] | None:
    sides = []
    for record in (pair.old.record, pair.new.record):
        if gate == "speed":
            amount = record.throughput.tokens_per_second if record.throughput else None
        elif record.memory is None:
            amount = None
        elif record.memory.device is not None:
            amount = record.memory.device
        elif record.memory.training is not None and record.memory.idle is not None:
            amount = record.memory.training - record.memory.idle  # what the process held before depends on earlier packs
        else:
            amount = record.memory.resident
        sides.append(amount)
    old, new = sides
    return (float(old), float(new)) if old and new and old > 0 and new > 0 else None


def _cost_finding(gate: Gate, what: str, table: str, row: str, ratios: Sequence[float], others: Sequence[float],
                  margin: float) -> Finding:
    """The mean log ratio against zero, or against that of other rows; red when it is worse, by more than the margin and
    not by chance."""
    reference = float(np.mean(others)) if others else 0.0
    mean = float(np.mean(ratios)) - reference
    if others:
        error = float(np.std(others, ddof=1)) * math.sqrt(1 / len(ratios) + 1 / len(others)) if len(others) > 1 else 0.0
        p = 2 * float(stats.t.sf(abs(mean) / error, len(others) - 1)) if error else _against_zero([mean, mean])
    else:
        p = _against_zero(ratios)
    enough = len(others or ratios) >= FEW_RUNS
    change = math.exp(mean) - 1
    beyond = abs(change) > margin
    worse = change < 0 if gate == "speed" else change > 0
    changed = beyond and p < ALPHA and enough
    verdict: Verdict = "changed" if changed else "underpowered" if beyond and not enough else "unchanged"
    against = "the other rows" if others else "the baseline"
    said = f"{what}, {row if others else 'all rows'}: {100 * change:+.0f} % against {against} ({_runs(len(ratios))}, " \
           f"p = {p:.2g}; {100 * margin:.0f} % is allowed)"
    if verdict == "underpowered":
        said += f"; {FEW_RUNS} runs are needed to tell"
    return Finding(gate, table, row, "all", verdict, changed and worse, said,
                   {"change": change, "runs": len(ratios), "p": p, "allowed": margin})


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _has(count: int) -> str:
    return "has" if count == 1 else "have"


def _diverge(count: int) -> str:
    return "diverges" if count == 1 else "diverge"
