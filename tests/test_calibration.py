"""Packs sized by what was measured, by memory and by workers; and planning of large studies."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import scale
from suite import calibration, paths, plan, study, sweep
from suite.calibration import Calibration, Workload
from suite.plan import Plan
from suite.specs import RunSpec

HERE = plan.local("desk", workers=2, run=True)
LARGE = scale.made(2000)


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))


def cells(*only: str) -> list[study.Cell]:
    return study.cells(LARGE, "desk", only)


def planned(*only: str, workers: int = 2, **change: Any) -> Plan:
    return plan.make(LARGE, "desk", cells(*only), None, machine=replace(HERE, workers=workers, **change))


def measured(spec: RunSpec, speeds: dict[int, float], flops: float = 1e11) -> Calibration:
    found = Calibration(calibration.workload(spec), speeds, flops, "2026-01-02", calibration.machine(HERE.device or "cpu"))
    calibration.save(found)
    return found


@pytest.mark.parametrize(("speeds", "knee"), [
    ({1: 1000.0}, 1),
    ({1: 1000.0, 2: 1040.0}, 1),
    ({1: 1000.0, 2: 1900.0, 4: 3000.0, 8: 3100.0}, 4),
    ({1: 1000.0, 2: 1900.0, 4: 3000.0, 8: 5000.0}, 8),
])
def test_the_knee_is_the_size_from_which_doubling_gains_too_little(speeds: dict[int, float], knee: int) -> None:
    assert Calibration(Workload("minilm", "float32", 1024), speeds, 1e11, "", {}).knee == knee


@pytest.mark.parametrize(("ratios", "knee"), [
    ([1.1, 1.2, 1.1], 2),
    ([0.99, 1.2, 1.1], 1),  # one of three rounds lost: the gain is within the spread
    ([1.01, 1.02, 1.3], 1),
    ([0.99, 1.2, 1.1, 1.1, 1.2, 1.1], 2),
    ([0.99, 0.9, 1.1, 1.1, 1.2, 1.1], 1),
])
def test_a_gain_within_the_spread_of_the_rounds_makes_no_knee(ratios: list[float], knee: int) -> None:
    found = Calibration(Workload("minilm", "float32", 1024), {1: 1000.0, 2: 1500.0}, 1e11, "", {}, {2: ratios})
    assert found.knee == knee


def searched(speed: dict[int, float], slow: range = range(0), seconds: float = 1e9,
             most: int = 64) -> tuple[dict[int, float], dict[int, list[float]], bool, list[int]]:
    """What a search finds on a machine with these speeds, whose tries `slow` come out three times slower; with the order of
    the tries. A try takes as many seconds as its size."""
    asked: list[int] = []

    def once(size: int) -> float:
        if size > most:
            raise MemoryError
        asked.append(size)
        return speed.get(size, max(speed.values())) / (3 if len(asked) in slow else 1)

    return *calibration.search(once, lambda: seconds - sum(asked)), asked


def test_sizes_are_timed_in_turns_until_doubling_does_not_pay() -> None:
    speeds, ratios, cut, asked = searched({1: 1000.0, 2: 1500.0, 4: 1550.0})
    assert asked == [1, 2, 2, 1, 1, 2, 1, 2, 4, 4, 2, 1, 1, 2, 4]
    assert speeds == {1: 1000.0, 2: 1500.0, 4: 1550.0}
    assert ratios == {2: [1.5] * 6, 4: [1550 / 1500] * 3}
    assert not cut


def test_a_slow_spell_moves_neither_the_speeds_nor_the_knee() -> None:
    for first in range(1, 16):
        speeds, ratios, _, _ = searched({1: 1000.0, 2: 1500.0, 4: 1520.0}, slow=range(first, first + 1))
        found = Calibration(Workload("minilm", "float32", 1024), speeds, 1e11, "", {}, ratios)
        assert speeds[1] == 1000.0
        assert found.knee == 2


def test_a_search_that_time_or_memory_ends_says_which() -> None:
    speed = {size: 1000.0 * size for size in (1, 2, 4, 8, 16, 32, 64)}
    speeds, ratios, cut, asked = searched(speed, seconds=29)
    assert (list(speeds), list(ratios), cut) == ([1, 2], [2], True)
    assert sum(asked) <= 29
    assert searched(speed, seconds=30)[2] is True
    assert list(searched(speed, seconds=30)[0]) == [1, 2, 4]
    assert searched(speed)[2] is False
    assert list(searched(speed)[0]) == list(speed)
    speeds, ratios, cut, _ = searched(speed, most=2)
    assert (list(speeds), list(ratios), cut) == ([1, 2], [2], False)
    assert (list(searched(speed, most=1)[0]), searched(speed, most=1)[1]) == ([1], {})
    with pytest.raises(MemoryError):
        searched(speed, most=0)


def test_what_was_kept_is_read_again_and_what_is_damaged_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    spec = cells()[0].spec
    workload, device = calibration.workload(spec), calibration.machine(HERE.device or "cpu")["device"]
    assert calibration.load(workload, device) is None
    kept = measured(spec, {1: 1000.0, 2: 1900.0})
    assert calibration.load(workload, device) == kept
    assert calibration.load(replace(workload, tokens=2 * workload.tokens), device) is None
    (file,) = (tmp_path / "cache" / "calibration").iterdir()
    file.write_text('{"speeds": {"2": 5}}', encoding="utf-8")
    assert calibration.load(workload, device) is None


def test_without_a_measurement_runs_of_a_cpu_ride_alone_and_the_plan_says_so() -> None:
    made = planned("method=lora", "rank=8", device="cpu", layer_seconds=0.0)
    assert {len(pack) for pack in made.packs} == {1}
    assert made.rates == "assumed"
    assert "rates and knees: assumed" in plan.sentence(made)


def test_a_measured_knee_sizes_packs_and_a_measured_rate_their_seconds() -> None:
    spec = cells("method=lora")[0].spec
    alone = planned("method=lora")
    measured(spec, {1: 1000.0, 2: 1900.0, 4: 3000.0, 8: 3050.0}, flops=2 * HERE.flops["float32"])
    made = planned("method=lora")
    assert {len(pack) for pack in made.packs} == {4}
    assert {(kind.limit, kind.knee) for kind in made.kinds} == {("measured", 4)}
    assert made.rates == "measured here on 2026-01-02"
    computing = [run.seconds - HERE.start_seconds for run in alone.runs]
    assert [run.seconds - HERE.start_seconds for run in made.runs] == pytest.approx([x / 2 for x in computing])
    pack = max(made.kinds, key=lambda kind: kind.seconds)
    assert pack.seconds == pytest.approx(4 * HERE.start_seconds + 4 * max(computing) / 2 / 3)
    header, rows = plan.pack_table(made)
    assert rows[0][header.index("limited by")] == "knee measured here"
    assert json.loads(json.dumps(made.as_json()))["kinds"][0]["limit"] == "measured"


def test_memory_keeps_packs_small() -> None:
    spec = cells("method=lora")[0].spec
    measured(spec, {1: 1000.0, 2: 1900.0, 4: 3700.0, 8: 7000.0})
    (run, *_), common = planned("method=lora", "rank=16").runs, HERE.overhead
    free = planned("method=lora", "rank=16", capacity=None)
    assert {len(pack) for pack in free.packs} == {8}
    base = plan.estimate(spec, HERE).common
    assert base > common
    tight = planned("method=lora", "rank=16", capacity=(base + 3.5 * (run.memory - base)) / plan.FILLED)
    assert max(len(pack) for pack in tight.packs) == 3
    assert {kind.limit for kind in tight.kinds} == {"memory"}
    assert all(kind.memory <= base + 3.5 * (run.memory - base) for kind in tight.kinds)


def test_no_worker_idles_while_another_has_one_huge_pack() -> None:
    only = ("method=lora", "rank=8", "rate=3.16e-05")
    measured(cells(*only)[0].spec, {1: 1000.0, 2: 1900.0, 4: 3700.0, 8: 7000.0, 16: 13000.0})
    runs = len(cells(*only))
    assert runs == 4
    assert [len(pack) for pack in planned(*only, workers=1).packs] == [4]
    assert [len(pack) for pack in planned(*only, workers=2).packs] == [2, 2]
    assert [len(pack) for pack in planned(*only, workers=8).packs] == [1, 1, 1, 1]
    assert planned(*only, workers=2).kinds[0].limit == "workers"


def test_packs_mix_ranks_rates_and_seeds_but_neither_methods_nor_tasks() -> None:
    for spec in {cell.spec.method.id: cell.spec for cell in cells()}.values():
        measured(spec, {size: 1000.0 * size for size in (1, 2, 4, 8, 16, 32, 64)})
    made = planned()
    by_id = {cell.spec.id: cell.spec for cell in cells()}
    packs = [[by_id[run] for run in pack] for pack in made.packs]
    assert sum(map(len, packs)) == len(by_id)
    assert all(len({spec.packing_key for spec in pack}) == 1 for pack in packs)
    assert any(len({spec.method.config["rank"] for spec in pack}) > 1 for pack in packs)
    assert any(len({spec.recipe.learning_rate for spec in pack}) > 1 for pack in packs)
    assert any(len({spec.seed for spec in pack}) > 1 for pack in packs)


def test_several_rates_of_a_row_are_runs_of_their_own_and_are_named() -> None:
    found = cells("method=lora", "rank=8", "seed=0")
    rates = [cell.spec.recipe.learning_rate for cell in found]
    assert len(set(rates)) == len(rates) == scale.RATES
    assert [cell.spec.id for cell in cells("method=lora", "rank=8", "seed=0", f"rate={rates[3]:g}")] == [found[3].spec.id]
    assert sweep.name(LARGE, found[3]) == f"lora r=8 on movie-sentiment, rate {rates[3]:g}, seed 0"
    header, rows = plan.summary(planned("method=lora", "rank=8").runs)
    assert rows[0][header.index("learning rate")] == ", ".join(f"{rate:g}" for rate in rates)


def test_a_changed_copy_of_a_run_has_an_id_of_its_own() -> None:
    spec = cells()[0].spec
    first = spec.id
    other = spec.model_copy(update={"seed": 99})
    deep = spec.model_copy(update={"seed": 99}, deep=True)
    assert other.id == deep.id != first == spec.id
    assert other == deep
    assert RunSpec.model_validate_json(other.model_dump_json()).id == other.id


def test_ten_thousand_runs_are_planned_quickly() -> None:
    large = scale.made(10_000)
    began = time.process_time()  # of this process: other work on the machine does not count
    made = plan.make(large, "desk", study.cells(large, "desk"), None, machine=HERE)
    assert len(made.runs) == 10_000
    assert time.process_time() - began < 5


@pytest.mark.slow
def test_a_real_calibration_measures_growing_packs_and_leaves_the_plan_with_its_date() -> None:
    (spec,) = calibration.representatives([cell.spec for cell in cells("method=lora", "rank=8", "seed=0")])
    found = calibration.measure(spec, "cpu", seconds=60)
    assert {1, 2} <= set(found.speeds)
    assert 100 < found.speeds[1] < 1e6
    assert min(len(own) for own in found.ratios.values()) >= calibration.REPEATS
    assert sorted(found.ratios) == sorted(found.speeds)[1:]
    assert 1e9 < found.flops < 1e13
    calibration.save(found)
    made = planned("method=lora", device="cpu")
    assert made.rates == f"measured here on {found.date}"
    assert max(len(pack) for pack in made.packs) <= found.knee


@pytest.mark.slow
def test_status_and_report_of_many_records_stay_quick_and_the_page_readable(tmp_path: Path) -> None:
    from reports import site, study_page

    count = scale.write(LARGE)
    found = cells()
    began = time.process_time()
    assert sum(one.status == "finished" for one in sweep.status(LARGE, found)) == count == 2000
    assert time.process_time() - began < 4
    began = time.process_time()
    written = site.build([study_page.chapter(LARGE, "desk")], tmp_path / "report")
    assert time.process_time() - began < 45  # 23 here; most of it is the pages over all studies, whatever the number
    page = written.page.read_text(encoding="utf-8")
    assert len(page) < 3e6
    assert "The first 200 of 2,000 rows; tables/runs.csv has them all." in page
    assert len((written.page.parent / "tables" / "runs.csv").read_text(encoding="utf-8").splitlines()) == 2001


def test_a_run_never_has_an_open_precision() -> None:
    one = cells()[0].spec
    with pytest.raises(ValueError, match="auto is for study files"):
        RunSpec.model_validate(one.model_dump() | {"recipe": one.recipe.model_dump() | {"precision": "auto"}})


def test_an_open_precision_becomes_the_quicker_one_that_was_measured(tmp_path: Path) -> None:
    content = yaml.safe_load((paths.studies() / "lorasc.yaml").read_text(encoding="utf-8"))
    content["scales"]["desk"]["tables"]["transfer"]["recipe"]["precision"] = "auto"
    file = tmp_path / "open.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")

    def found() -> set[str]:
        return {cell.spec.recipe.precision for cell in study.cells(study.load(str(file)), "desk")}

    assert found() == {"float32"}  # nothing was measured on this CPU
    paths.write_json(calibration._precision_file("minilm"), {"speeds": {"float32": 100.0, "bfloat16": 120.0}})
    assert found() == {"bfloat16"}
    paths.write_json(calibration._precision_file("minilm"), {"speeds": {"float32": 100.0, "bfloat16": 104.0}})
    assert found() == {"float32"}  # not worth it


@pytest.mark.slow
def test_both_precisions_are_timed_once() -> None:
    spec = cells()[0].spec
    speeds = calibration.compare(spec)
    assert min(speeds.values()) > 0
    assert calibration.compare(spec) == speeds
