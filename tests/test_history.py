"""The history of nights: what is kept, and steps in series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.gate import imagined
from suite import history, paths
from suite.errors import UserError


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))


def nights(count: int, move: float = 0.0) -> list[history.Night]:
    made = history.night(imagined(rows=2, tasks=1).values(), lambda run: run.cell.row, [], "two-cores")
    rng = np.random.default_rng(0)
    return [made.model_copy(update={"points": [
        point.model_copy(update={"loss": (point.loss or 0) + move * rng.normal()}) for point in made.points]})
        for _ in range(count)]


def test_nights_are_read_as_they_were_written() -> None:
    assert history.load("gora", "desk") == []
    written = nights(3, 1e-4)
    for one in written:
        history.add("gora", "desk", one)
    assert history.load("gora", "desk") == written
    assert len((paths.history() / "gora-desk.jsonl").read_text().splitlines()) == 3


def test_a_line_that_is_wrong_is_named() -> None:
    history.add("gora", "desk", nights(1)[0])
    with (paths.history() / "gora-desk.jsonl").open("a") as file:
        file.write('{"time": 3}\n')
    with pytest.raises(UserError, match=r"gora-desk.jsonl, line 2: "):
        history.load("gora", "desk")


def test_a_row_that_was_not_run_is_a_gap_in_its_series() -> None:
    some = nights(3)
    some[1] = some[1].model_copy(update={"points": some[1].points[1:]})
    found = history.series(some, "score")
    gone, kept = found["table", "row-0", "task-0"], found["table", "row-1", "task-0"]
    assert gone[1] is None
    assert gone[0] == gone[2] is not None
    assert None not in kept


def test_the_spread_of_clean_nights_counts_this_machine_and_baseline_alone() -> None:
    some = nights(6, 1e-3)
    on, losses = some[0].machine, [one.points[0].loss for one in some]
    assert history.spreads(some, on, "two-cores")["table", "row-0", "task-0"] == pytest.approx(np.std(losses, ddof=1))
    assert history.spreads(some[:4], on, "two-cores") == {}
    assert history.spreads(some, "other", "two-cores") == {}
    assert history.spreads(some, on, "h100") == {}
    dirty = [one.model_copy(update={"red": 1}) for one in some[:2]] + some[2:]
    assert history.spreads(dirty, on, "two-cores") == {}


def test_a_step_is_found_where_it_is_through_noise_and_gaps() -> None:
    rng = np.random.default_rng(1)
    values: list[float | None] = [*(0.8 + 0.002 * rng.normal(size=20)), None, *(0.78 + 0.002 * rng.normal(size=15))]
    (step,) = history.steps(values)
    assert step.at == 21
    assert step.before == pytest.approx(0.8, abs=0.002)
    assert step.after == pytest.approx(0.78, abs=0.002)
    assert step.p <= history.ALPHA


def test_two_steps_are_found_and_one_odd_night_is_none() -> None:
    assert [step.at for step in history.steps([1.0] * 10 + [2.0] * 10 + [1.0] * 10)] == [10, 20]
    assert history.steps([1.0] * 15 + [9.0] + [1.0] * 15) == []
    assert history.steps([0.7] * 30) == []
    assert history.steps([0.7, 0.8]) == []
    assert history.steps([]) == []


def test_false_steps_are_as_rare_as_stated_and_true_ones_are_found() -> None:
    """Level .01, so that a hundred series suffice; more than 5 false ones have a chance below .001."""
    rng = np.random.default_rng(2)
    false = sum(bool(history.steps(list(rng.normal(size=40)), alpha=0.01)) for _ in range(100))
    assert false <= 5
    found = [history.steps([*rng.normal(size=20), *(2 + rng.normal(size=20))], alpha=0.01) for _ in range(40)]
    assert sum(len(one) == 1 and abs(one[0].at - 20) <= 3 for one in found) >= 34  # 95 % in 1,000 series
