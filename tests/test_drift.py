"""The gates on made-up runs: what each one sees, what it does not, and how often it is wrong when nothing has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.gate import NOISES, Noise, answered, false_alarms, imagined, night, red, right
from suite import drift
from suite.drift import Items, Key, Run
from suite.specs import ENGINE_VERSION
from suite.study import Cell
from suite.verdicts import Finding, Margins

BEFORE = imagined()
MARGINS = {"table": Margins()}


def judged(now: Mapping[Key, Run], before: Mapping[Key, Run] = BEFORE, **options: Any) -> list[Finding]:
    return drift.judge(before, now, MARGINS, **options)


def change(how: Callable[[Run], Run], *, row: str | None = None, task: str | None = None,
           before: Mapping[Key, Run] = BEFORE) -> dict[Key, Run]:
    """The baseline's runs, some of them changed. Nights begin with a little noise, so that nothing is equal by chance."""
    drawn = night(before, Noise(loss=5e-5, speed=0.01, memory=0.01), np.random.default_rng(5))
    return {key: how(run) if row in (None, key[1]) and task in (None, key[2]) else run for key, run in drawn.items()}


def of_record(**fields: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, record=run.record.model_copy(update=fields))


def of_trail(**fields: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, trail=run.trail.model_copy(update=fields))


def flip(to_wrong: int, to_right: int) -> Callable[[Run], Run]:
    def act(run: Run) -> Run:
        bits = right(run).copy()
        wrong, becoming = np.flatnonzero(bits)[:to_wrong], np.flatnonzero(~bits)[:to_right]
        bits[wrong], bits[becoming] = False, True
        return answered(run, bits)

    return act


def reds(findings: list[Finding], gate: str) -> list[Finding]:
    return [finding for finding in findings if finding.red and finding.gate == gate]


# ---- nothing changed -------------------------------------------------------------------------------------------------


def test_equal_runs_are_green_in_every_gate() -> None:
    found = judged(BEFORE)
    assert not red(found)
    assert {finding.gate for finding in found} == {"presence", "setup", "training", "evaluation", "pooled", "speed",
                                                   "memory"}
    assert sum(finding.gate == "evaluation" for finding in found) == 27


@pytest.mark.parametrize("noise", ["equal machine", "another processor"])
def test_two_hundred_nights_of_nothing_stay_green(noise: str) -> None:
    assert false_alarms(NOISES[noise], 200)["any"] == 0


def test_the_noise_of_a_gpu_gives_no_more_alarms_than_stated() -> None:
    """27 exact tests at .001 and 6 common ones: at most 3.3 alarms in 100 nights; more than 9 has a chance below .005."""
    counts = false_alarms(NOISES["GPU that adds in no fixed order"], 100)
    assert counts["any"] <= 9
    assert counts["training"] == counts["presence"] == counts["setup"] == 0


# ---- presence --------------------------------------------------------------------------------------------------------


def test_a_task_that_is_not_there_is_red() -> None:
    now = {key: run for key, run in BEFORE.items() if key[2] != "task-1"}
    (finding,) = reds(judged(now), "presence")
    assert (finding.row, finding.column, finding.verdict) == ("all", "task-1", "missing")
    assert "18 of 18 runs that the baseline has are lacking" in finding.said


@pytest.mark.parametrize(("fields", "said"), [
    ({"status": "skipped", "reason": "not today"}, "recorded as skipped: not today"),
    ({"status": "failed", "reason": "MemoryError: "}, "recorded as failed: MemoryError"),
])
def test_a_row_that_is_skipped_or_fails_now_is_red(fields: dict[str, Any], said: str) -> None:
    found = judged(change(of_record(**fields), row="row-3", task="task-0"))
    (finding,) = reds(found, "presence")
    assert (finding.row, finding.column) == ("row-3", "task-0")
    assert said in finding.said
    assert red(found) == {"presence"}


def test_runs_that_the_baseline_does_not_have_are_told_and_not_red() -> None:
    before = {key: run for key, run in BEFORE.items() if key[1] != "row-8"}
    found = judged(BEFORE, before)
    assert not red(found)
    assert any("6 runs of now have no counterpart" in finding.said for finding in found)


def test_the_baselines_own_records_are_told_from_runs_made_again() -> None:
    before = {key: of_record(started="2026-01-01T00:00:00+00:00")(run) for key, run in BEFORE.items()}
    own, again = judged(before, before)[0], judged(BEFORE, before)[0]
    assert "54 of them are the baseline's own" in own.said
    assert own.verdict == "not comparable"
    assert again.verdict == "unchanged"


# ---- setup -----------------------------------------------------------------------------------------------------------


def spec_of(**fields: Any) -> Callable[[Run], Run]:
    def act(run: Run) -> Run:
        spec = run.cell.spec.model_copy(update=fields)
        return replace(run, cell=Cell(run.cell.table, run.cell.row, spec))

    return act


@pytest.mark.parametrize(("how", "said"), [
    (lambda run: of_record(data=run.record.data.model_copy(update={"fingerprint": "0" * 16}))(run),
     "data.fingerprint: 0000000000000000 where the baseline has ffffffffffffffff"),
    (lambda run: of_record(data=run.record.data.model_copy(update={"truncated": 7}))(run),
     "data.truncated: 7 where the baseline has 0"),
    (lambda run: spec_of(recipe=run.cell.spec.recipe.model_copy(update={"batch_size": 8}))(run),
     "recipe.batch_size: 8 where the baseline has 32"),
    (lambda run: of_record(throughput=run.record.throughput.model_copy(update={"tokens": 19_000}))(run),
     "training tokens: 19,000 where the baseline has 20,000"),
])
def test_a_change_of_what_is_run_is_said_once_for_all_rows(how: Callable[[Run], Run], said: str) -> None:
    found = judged(change(how, task="task-2"))
    (finding,) = reds(found, "setup")
    assert (finding.row, finding.column, finding.said) == ("all", "task-2", said)
    assert red(found) == {"setup"}


def test_a_decode_policy_that_differs_is_named_and_one_not_recorded_is_not() -> None:
    greedy = {"do_sample": False, "max_new_tokens": 8}
    before = {key: of_record(decode=greedy)(run) for key, run in BEFORE.items()}
    more = judged({key: of_record(decode=greedy | {"padding": "left"})(run) for key, run in BEFORE.items()}, before)
    assert not red(more)
    sampled = judged({key: of_record(decode=greedy | {"do_sample": True})(run) for key, run in BEFORE.items()}, before)
    assert {finding.said for finding in reds(sampled, "setup")} == {"decode.do_sample: True where the baseline has False"}


def test_changed_answers_of_a_test_set_are_counted() -> None:
    def relabelled(run: Run) -> Run:
        assert run.items is not None
        expected = ("0",) * 5 + run.items.expected[5:]
        return flip(4, 1)(replace(run, items=Items(ids=run.items.ids, expected=expected)))

    found = judged(change(relabelled, task="task-0"))
    assert [finding.said for finding in reds(found, "setup")] == ["expected answers: 5 of 500 are others"]


def test_an_engine_of_another_version_is_told_and_not_red() -> None:
    found = judged(change(spec_of(engine=ENGINE_VERSION + 1)))
    assert not red(found)
    assert any(f"engine: {ENGINE_VERSION + 1} where the baseline has {ENGINE_VERSION}" in finding.said for finding in found)


def test_a_learning_rate_changed_in_the_study_is_a_change_and_no_gap() -> None:
    def faster(run: Run) -> Run:
        return spec_of(recipe=run.cell.spec.recipe.model_copy(update={"learning_rate": 3e-3}))(run)

    now = {run.key: run for run in change(faster, row="row-1").values()}
    found = judged(now)
    assert red(found) == {"setup"}
    assert {finding.said for finding in reds(found, "setup")} == {
        "recipe.learning_rate: 0.003 where the baseline has 0.001"}


# ---- training --------------------------------------------------------------------------------------------------------


def test_a_loss_that_moved_is_training_drift_of_that_row_alone() -> None:
    def moved(run: Run) -> Run:
        losses = [loss or 0.0 for loss in run.trail.losses]
        return of_trail(losses=(*losses[:2], losses[2] + 0.004, losses[3]))(run)

    found = judged(change(moved, row="row-2", task="task-1"))
    (finding,) = reds(found, "training")
    assert (finding.row, finding.column) == ("row-2", "task-1")
    assert "window 3 of 4; 0.002 is allowed" in finding.said
    assert red(found) == {"training"}
    wide = judged(change(moved, row="row-2", task="task-1"), spreads={("table", "row-2", "task-1"): 0.001})
    assert not red(wide)  # six standard deviations of clean nights are .006


def test_a_gradient_norm_that_moved_is_training_drift() -> None:
    found = judged(change(of_trail(norms={1: 0.7, 10: 1.1}), row="row-2", task="task-1"))
    assert "gradient norm at step 10 by 22 %" in reds(found, "training")[0].said
    assert red(found) == {"training"}


def test_a_row_that_began_at_the_base_must_begin_there_still() -> None:
    """Another data order moves every first loss, and that alone says nothing of a start that is not zero."""
    def shifted(by: float) -> Callable[[Run], Run]:
        return lambda run: of_trail(first=0.6931 + by)(run)

    order = change(shifted(0.05))
    order.update({key: shifted(0.06)(run) for key, run in order.items() if key[1:3] == ("row-4", "task-0")})
    found = {(finding.row, finding.column): finding.said for finding in reds(judged(order), "training")}
    assert "the first loss is +0.0100 from that of the base" in found["row-4", "task-0"]
    assert "from that of the base" not in found["row-5", "task-0"]


def test_all_losses_a_little_higher_show_in_the_pooled_gate_alone() -> None:
    found = judged(change(lambda run: of_trail(losses=tuple((loss or 0.0) + 0.0012 for loss in run.trail.losses))(run)))
    assert red(found) == {"pooled"}
    assert {finding.numbers["measure"] for finding in reds(found, "pooled")} == {"loss"}


def test_a_row_that_diverges_now_is_red_and_one_that_always_did_at_times_is_not() -> None:
    lost = of_record(status="diverged")
    found = judged(change(lost, row="row-0", task="task-0"))
    (finding,) = reds(found, "training")
    assert "2 of 2 runs diverge now; of all runs of the row 2 of 6 do, in the baseline 0" in finding.said
    before = {key: lost(run) if key[1:3] == ("row-0", "task-1") else run for key, run in BEFORE.items()}
    assert not red(judged(change(lost, row="row-0", task="task-0", before=before), before))


def test_a_curve_that_is_not_there_is_red() -> None:
    found = judged(change(of_trail(losses=()), row="row-0", task="task-0"))
    assert [finding.verdict for finding in reds(found, "training")] == ["missing"]


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_answers_that_flipped_are_evaluation_drift_and_the_sentence_says_where_to_look() -> None:
    found = judged(change(flip(12, 1), row="row-6", task="task-0"))
    (finding,) = reds(found, "evaluation")
    assert "24 became wrong and 2 right" in finding.said  # two seeds
    assert "the loss did not move: look at what evaluates" in finding.said
    assert red(found) == {"evaluation"}
    both = change(lambda run: of_trail(losses=(0.9,) * 4)(flip(12, 1)(run)), row="row-6", task="task-0")
    assert "the loss moved too: look at training first" in reds(judged(both), "evaluation")[0].said


def test_as_many_flips_both_ways_are_no_drift_of_the_score() -> None:
    assert not red(judged(change(flip(15, 15), row="row-6", task="task-0")))


def test_seeds_that_lose_the_same_items_count_as_one_look_at_them() -> None:
    """Eight items lost in both seeds are eight coins, of which all fall alike once in 128; sixteen would be red."""
    both = np.all([right(run) for key, run in BEFORE.items() if key[1:3] == ("row-6", "task-0")], axis=0)

    def lose(run: Run) -> Run:
        bits = right(run).copy()
        bits[np.flatnonzero(both)[:8]] = False
        return answered(run, bits)

    found = judged(change(lose, row="row-6", task="task-0"))
    assert not red(found)
    told = next(finding for finding in found if finding.gate == "evaluation" and (finding.row, finding.column) == (
        "row-6", "task-0"))
    assert told.numbers["lost"] == 16
    assert told.numbers["p"] == pytest.approx(2**-7)


def test_generated_answers_that_read_otherwise_are_seen_where_all_were_wrong_before() -> None:
    before = imagined(rows=1, tasks=1, seeds=1, items=100)
    before = {key: of_trail(answers="a" * 100)(answered(run, np.zeros(100, bool))) for key, run in before.items()}
    few = {key: of_trail(answers="b" * 20 + "a" * 80)(run) for key, run in before.items()}
    most = {key: of_trail(answers="b" * 60 + "a" * 40)(run) for key, run in before.items()}
    assert not red(judged(few, before))
    (finding,) = reds(judged(most, before), "evaluation")
    assert "60 read otherwise (more than 20 %" in finding.said


def test_answers_are_paired_by_item_whatever_their_order() -> None:
    turn = np.random.default_rng(0).permutation(500)

    def turned(run: Run) -> Run:
        assert run.items is not None
        items = Items(ids=tuple(run.items.ids[i] for i in turn), expected=tuple(run.items.expected[i] for i in turn))
        return answered(replace(run, items=items), right(run)[turn])

    found = judged({key: turned(run) for key, run in BEFORE.items()})
    assert all(finding.numbers["lost"] == 0 for finding in found if finding.gate == "evaluation")
    assert not red(found)


def test_a_small_shift_of_all_rows_shows_in_the_pooled_gate_alone() -> None:
    """Two to three of 500 answers lost in each of nine rows: half a point, which no row shows."""
    rng = np.random.default_rng(3)
    found = judged(change(lambda run: flip(int(rng.integers(3, 6)), int(rng.integers(0, 2)))(run), task="task-1"))
    assert red(found) == {"pooled"}
    (finding,) = reds(found, "pooled")
    assert (finding.column, finding.numbers["measure"]) == ("task-1", "score")
    assert "data, prompt, decoding or metric" in finding.said


def test_one_answer_lost_in_every_row_is_not_enough() -> None:
    """Equal moves have no spread, so the t test alone would cry out."""
    found = judged(change(flip(1, 0), before=imagined(rows=4)), imagined(rows=4))
    assert not red(found)


def test_a_second_look_takes_the_middle_seed_where_the_first_takes_the_worst() -> None:
    before = imagined(rows=3, tasks=1, seeds=5)

    def one_seed(run: Run) -> Run:
        return of_trail(losses=tuple((loss or 0.0) + 0.01 for loss in run.trail.losses))(run) if run.key[5] == 0 else run

    now = change(one_seed, row="row-1", before=before)
    assert "training" in red(judged(now, before))
    assert not red(judged(now, before, confirmed=True))


# ---- speed and memory ------------------------------------------------------------------------------------------------


def slower(factor: float) -> Callable[[Run], Run]:
    def act(run: Run) -> Run:
        assert run.record.throughput is not None
        speed = run.record.throughput.tokens_per_second * factor
        return of_record(throughput=run.record.throughput.model_copy(update={"tokens_per_second": speed}))(run)

    return act


@pytest.mark.parametrize(("factor", "gates"), [(0.8, {"speed"}), (0.95, set()), (1.3, set())])
def test_slower_by_more_than_the_margin_is_red_and_faster_is_told(factor: float, gates: set[str]) -> None:
    found = judged(change(slower(factor)))
    assert red(found) == gates
    assert any(finding.gate == "speed" and finding.verdict == "changed" for finding in found) == (factor != 0.95)


def test_one_row_that_became_slow_is_named() -> None:
    found = judged(change(slower(0.5), row="row-7"))
    assert [finding.row for finding in reds(found, "speed")] == ["row-7"]


def test_more_memory_is_red() -> None:
    def fatter(run: Run) -> Run:
        assert run.record.memory is not None
        return of_record(memory=run.record.memory.model_copy(update={"training": 1_100_000_000}))(run)

    assert red(judged(change(fatter))) == {"memory"}


def test_speed_on_another_machine_is_not_compared() -> None:
    def other(run: Run) -> Run:
        return of_record(environment={"hardware": {"cpu": "Another"}})(slower(0.2)(run))

    found = judged(change(other))
    assert not red(found)
    assert {finding.verdict for finding in found if finding.gate in ("speed", "memory")} == {"not comparable"}


def test_losses_that_are_not_finite_never_pass() -> None:
    found = judged(change(of_trail(losses=(None, 0.6, 0.5, 0.4)), row="row-0", task="task-0"))
    assert red(found) == {"training"}
    assert math.isinf(float(reds(found, "training")[0].numbers["moved"] or 0))
