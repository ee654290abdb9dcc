"""Scores against published tables: every verdict on records and tables of the real form, and the rule on simulated data."""

from __future__ import annotations

import copy
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from edits import Edit, drop, put
from printed import NOISE, PRINTED, ROWS, TABLE

from suite import against_published, conventions, records, study
from suite.against_published import Spread, implied, judge, power
from suite.records import Record, Score
from suite.study import Cell, Study
from suite.verdicts import Finding

SEED, REPEATS = 20260207, 1500


class World:
    """A study, its published table and the records that a test gives it; what `change` edits is the published table."""

    def __init__(self, folder: Path, change: Edit | None = None, **table: Any) -> None:
        printed = copy.deepcopy(PRINTED)
        if change is not None:
            change(printed)
        path = folder / "printed.yaml"
        path.write_text(yaml.safe_dump(printed), encoding="utf-8")
        ours = copy.deepcopy(TABLE) | table
        ours["published"] = {"table": str(path), **ours["published"]}
        content = {"id": "ours", "title": "Ours", "paper": {"title": "A paper"}, "about": "For tests.", "rows": ROWS,
                   "scales": {"paper": {"about": "", "tables": {"glue": ours}}}}
        (folder / "ours.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        self.study: Study = study.load(str(folder / "ours.yaml"))
        self.cells: list[Cell] = study.cells(self.study, "paper")
        self.records: dict[str, Record] = {}

    def score(self, row: str, task: str, points: list[float] | tuple[float, ...], status: records.Status = "finished",
              rank: int | None = None) -> World:
        """Give the first seeds of a line these scores."""
        cells = [cell for cell in self.cells if (cell.row, cell.spec.task.id) == (row, task)
                 and (rank is None or cell.rank == rank)]
        for cell, point in zip(cells, points, strict=False):
            score = Score(metric="accuracy", value=point / 100, items=872, stderr=0.01)
            self.records[cell.spec.id] = Record(id=cell.spec.id, spec=cell.spec, status=status, scores=[score])
        return self

    def all(self, sst2: float = 94.0, qnli: float = 92.0) -> World:
        """Give every line five scores about these means."""
        for row in dict.fromkeys(cell.row for cell in self.cells):
            for task, mean in (("glue-sst2", sst2), ("glue-qnli", qnli)):
                self.score(row, task, [mean + noise for noise in NOISE])
        return self

    def findings(self) -> dict[tuple[str, str], Finding]:
        found = against_published.compare(self.study, "paper", self.cells, self.records)
        by_place = {(one.row, one.column): one for one in found}
        assert len(by_place) == len(found)
        assert {(one.gate, one.table) for one in found} == {("published", "glue")}
        return by_place


def test_every_number_that_a_cell_stands_for_gets_a_verdict(tmp_path: Path) -> None:
    found = World(tmp_path).all().findings()
    assert set(found) == {(row, column) for row in ("full", "lora", "gora") for column in PRINTED["columns"]}
    assert {one.verdict for one in found.values()} == {"reproduced"}
    assert not any(one.red for one in found.values())
    assert found["lora", "glue-sst2"].said == ("94.00 here (5 seeds, SD 0.25), 94.00 in the paper (5 seeds, SD 0.20): "
                                               "+0.00 [−0.27, +0.27] lies inside ±1.00 points.")
    numbers = found["lora", "glue-sst2"].numbers
    assert numbers["ours"] == pytest.approx(94)
    assert numbers["error"] == pytest.approx(math.sqrt(0.25**2 / 5 + 0.2**2 / 5))
    assert (numbers["published"], numbers["published_seeds"], numbers["ours_seeds"], numbers["margin"]) == (94.0, 5, 5, 1.0)


def test_a_fall_is_red_and_a_gain_asks_for_a_look(tmp_path: Path) -> None:
    world = World(tmp_path).all()
    world.score("lora", "glue-sst2", [91.0 + noise for noise in NOISE])
    world.score("gora", "glue-sst2", [97.0 + noise for noise in NOISE])
    found = world.findings()
    assert (found["lora", "glue-sst2"].verdict, found["lora", "glue-sst2"].red) == ("not reproduced", True)
    assert "−3.00 [−3.27, −2.73] lies below −1.00 points" in found["lora", "glue-sst2"].said
    assert (found["gora", "glue-sst2"].verdict, found["gora", "glue-sst2"].red) == ("better", False)
    assert "asks for a look" in found["gora", "glue-sst2"].said
    assert found["lora", "avg"].verdict == "not reproduced"  # -3 in one of two columns is -1.5 on average
    assert {key for key, one in found.items() if one.red} == {("lora", "glue-sst2"), ("lora", "avg")}


def test_two_seeds_are_underpowered_and_say_how_many_would_do(tmp_path: Path) -> None:
    found = World(tmp_path).all().score("lora", "glue-sst2", [93.5, 94.5]).findings()
    assert found["lora", "glue-sst2"].verdict == "reproduced"  # the three other seeds are still there
    few = World(tmp_path).score("lora", "glue-sst2", [93.5, 94.5]).findings()["lora", "glue-sst2"]
    assert (few.verdict, few.red) == ("underpowered", False)
    assert "Only 2 of 5 planned seeds have a score." in few.said
    needed = few.numbers["seeds_needed"]
    assert isinstance(needed, int)
    assert f"{needed} seeds would do." in few.said


def test_a_wide_printed_spread_widens_the_margin_and_may_leave_no_way_out(tmp_path: Path) -> None:
    world = World(tmp_path, put("rows", 1, "cells", "glue-sst2", "sd", 2.0)).all()
    one = world.findings()["lora", "glue-sst2"]
    assert one.numbers["margin"] == pytest.approx(implied(2.0, 5)) == pytest.approx(1.96 * 2 / math.sqrt(5), abs=1e-3)
    assert one.verdict == "underpowered"
    assert one.numbers["seeds_needed"] is None
    assert "not even 100 seeds of ours would do" in one.said


@pytest.mark.parametrize(("change", "table", "reason"), [
    (put("base", "google-t5/t5-large"), {}, "base: google-t5/t5-base here, google-t5/t5-large in the paper"),
    (put("conventions", "columns", "glue-sst2", "data", "nyu-mll/glue/sst2:test"), {},
     "data: nyu-mll/glue/sst2:validation here, nyu-mll/glue/sst2:test in the paper"),
    (put("conventions", "columns", "glue-sst2", "metric", "f1"), {}, "metric: accuracy here, f1 in the paper"),
    (put("protocol", "statistic", "median"), {}, "statistic over seeds: mean here, median in the paper"),
    (put("conventions", "selection", "best-on-test"), {}, "selection: last-step here, best-on-test in the paper"),
    (put("conventions", "columns", "glue-sst2", "trained_on", 60000), {},
     "training items: 66,349 here, 60,000 in the paper"),
    (None, {"train": 1000}, "training items: 1,000 here, 67,349 in the paper"),
    (put("conventions", "scoring", "head"), {}, "way of answering: label-words here, head in the paper"),
    (put("conventions", "loss", "everything"), {},
     "part of the text that carries loss: answer here, everything in the paper"),
    (None, {"evaluation": {"split": "validation"}},
     "data: no public split as a whole here, nyu-mll/glue/sst2:validation in the paper"),
    (drop("conventions", "selection"), {}, "not known of the paper: selection"),
    (drop("conventions"), {}, "not known of the paper: data, metric, selection, training items"),
])
def test_what_is_not_alike_is_not_compared_and_said(tmp_path: Path, change: Edit | None, table: dict[str, Any],
                                                    reason: str) -> None:
    world = World(tmp_path, change, **table).all(sst2=50.0)
    one = world.findings()["lora", "glue-sst2"]
    assert (one.verdict, one.red, one.said) == ("not comparable", False, reason)


def test_what_is_hardly_ever_stated_need_not_be_known(tmp_path: Path) -> None:
    assert World(tmp_path, drop("conventions", "loss")).all().findings()["lora", "glue-sst2"].verdict == "reproduced"


def test_a_desk_task_is_never_comparable(tmp_path: Path) -> None:
    world = World(tmp_path, None, base="minilm", tasks=["movie-sentiment"], train=100, test=100)
    one = world.score("lora", "movie-sentiment", [80.0]).findings()["lora", "movie-sentiment"]
    assert one.verdict == "not comparable"
    assert "base: minilm here, google-t5/t5-base in the paper" in one.said
    assert "no column of the paper's table is of movie-sentiment (it has glue-sst2, glue-qnli)" in one.said


def test_the_decoding_of_text_must_be_known(tmp_path: Path) -> None:
    spec = next(cell.spec for cell in study.cells(study.load("gora"), "paper", ["table=gsm8k", "method=lora"]))
    column = study.published.load("gora_llama31_8b").conventions.of("gsm8k")
    assert [gap.name for gap in conventions.gaps(spec, None, "meta-llama/Llama-3.1-8B", "mean", column)] == ["decoding"]
    greedy = column.model_copy(update={"decoding": "greedy"})
    assert conventions.gaps(spec, None, "meta-llama/Llama-3.1-8B", "mean", greedy) == []
    sampled = column.model_copy(update={"decoding": "sampling"})
    assert [gap.said for gap in conventions.gaps(spec, None, "meta-llama/Llama-3.1-8B", "mean", sampled)] == [
        "decoding: greedy here, sampling in the paper"]


def test_what_a_study_compares_in_spite_of_a_difference_never_fails(tmp_path: Path) -> None:
    published = {**TABLE["published"], "despite": ["loss"]}
    world = World(tmp_path, put("conventions", "loss", "everything"), published=published).all(sst2=80.0)
    one = world.findings()["lora", "glue-sst2"]
    assert (one.verdict, one.red) == ("not reproduced", False)
    assert "Never fails: part of the text that carries loss" in one.said
    other = World(tmp_path, put("conventions", "selection", "best-on-test"), published=published).all().findings()
    assert other["lora", "glue-sst2"].verdict == "not comparable"


@pytest.mark.parametrize(("evidence", "red"), [("verbatim", True), ("secondary", True), ("recalled", False),
                                               ("derived", False)])
def test_only_a_number_that_somebody_read_may_fail(tmp_path: Path, evidence: str, red: bool) -> None:
    one = World(tmp_path, put("rows", 1, "evidence", evidence)).all(sst2=80.0).findings()["lora", "glue-sst2"]
    assert (one.verdict, one.red) == ("not reproduced", red)
    assert ("Never fails" in one.said) is not red


def test_missing_numbers_and_missing_runs_are_shown(tmp_path: Path) -> None:
    world = World(tmp_path, put("rows", 1, "cells", "glue-sst2", {"mean": None})).all()
    world.records = {key: one for key, one in world.records.items()
                     if (one.spec.method.id, one.spec.task.id) != ("gora", "glue-qnli")}
    found = world.findings()
    assert (found["lora", "glue-sst2"].verdict, found["lora", "glue-sst2"].red) == ("missing", False)
    assert found["lora", "glue-sst2"].said == "the paper's number is not known to us"
    gone = found["gora", "glue-qnli"]  # a gate that has nothing to look at is not green
    assert (gone.verdict, gone.red, gone.said) == ("missing", True, "no score here (5 not run); 92.00 in the paper")
    assert found["gora", "avg"].red
    skipped = world.score("gora", "glue-qnli", [0.0] * 5, status="skipped").findings()["gora", "glue-qnli"]
    assert (skipped.verdict, skipped.red) == ("not comparable", False)


def test_a_table_without_numbers_is_one_finding(tmp_path: Path) -> None:
    def empty(table: dict[str, Any]) -> None:
        table |= {"rows": [], "missing": ["all of it"]}

    (one,) = World(tmp_path, empty, published={"rows": {}}).all().findings().values()
    assert (one.row, one.column, one.verdict, one.red) == ("all", "all", "missing", False)
    assert one.said == "printed (A paper): no number of it is transcribed"


def test_diverged_runs_count_and_are_told(tmp_path: Path) -> None:
    world = World(tmp_path).all().score("lora", "glue-sst2", [50.9], status="diverged")
    one = world.findings()["lora", "glue-sst2"]
    assert one.verdict == "underpowered"
    assert "1 runs diverged and count" in one.said
    assert one.numbers["diverged"] == 1


def test_without_a_printed_spread_that_of_our_other_rows_stands_for_it(tmp_path: Path) -> None:
    world = World(tmp_path, drop("rows", 1, "cells", "glue-sst2", "sd")).all()
    world.score("gora", "glue-sst2", [94 + 3 * noise for noise in NOISE])
    one = world.findings()["lora", "glue-sst2"]
    pooled = math.sqrt((0.25**2 + 0.75**2) / 2)  # of full and gora, not of lora itself
    assert one.numbers["pooled_sd"] == pytest.approx(pooled)
    assert one.numbers["error"] == pytest.approx(math.sqrt(0.25**2 / 5 + pooled**2 / 5))
    assert f"{pooled:.2f}, that of our other rows on this task, stands for it" in one.said
    unknown = World(tmp_path, put("protocol", "seeds", None)).all().findings()["lora", "glue-sst2"]
    assert unknown.numbers["error"] == pytest.approx(math.sqrt(0.25**2 / 5 + 0.2**2))
    assert "number of seeds is not known: counted as one" in unknown.said


def test_one_seed_and_no_spread_anywhere_decides_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, drop("rows", 1, "cells", "glue-sst2", "sd")).score("lora", "glue-sst2", [80.0])
    one = world.findings()["lora", "glue-sst2"]
    assert (one.verdict, one.red, one.numbers["low"]) == ("underpowered", False, None)
    assert "no spread over seeds to say how sure that is" in one.said


def test_fewer_scored_items_make_the_interval_wider(tmp_path: Path) -> None:
    one = World(tmp_path, None, test=100).all().findings()["lora", "glue-sst2"]
    sampling = 1e4 * 0.94 * 0.06 / 100 * (872 - 100) / 871
    assert one.numbers["error"] == pytest.approx(math.sqrt(0.25**2 / 5 + 0.2**2 / 5 + sampling))
    assert one.verdict == "underpowered"
    assert "Fewer items were scored" in one.said


def test_ranks_are_not_mixed(tmp_path: Path) -> None:
    lower = put("rows", 3, "cells", {"glue-sst2": {"mean": 60.0, "sd": 0.2}})
    world = World(tmp_path, lower, budgets=[{"rank": 8}, {"rank": 32}])
    for rank in (8, 32):
        world.score("gora", "glue-sst2", [94 + noise for noise in NOISE], rank=rank)
        world.score("lora", "glue-sst2", [94 + noise for noise in NOISE], rank=rank)
    found = world.findings()
    assert found["gora rank=8", "glue-sst2"].verdict == "reproduced"
    assert found["gora rank=32", "glue-sst2"].verdict == "better"
    assert ("lora rank=8", "glue-sst2") in found
    assert ("lora rank=32", "glue-sst2") not in found  # the paper has LoRA at rank 8 only


def test_a_method_that_trains_nothing_needs_one_seed(tmp_path: Path) -> None:
    def with_base(table: dict[str, Any]) -> None:
        table["rows"].append({"method": "zero-shot", "label": "T5", "evidence": "verbatim", "source": "a table",
                              "cells": {"glue-sst2": {"mean": 90.0}}})

    rows = {"rows": ["base", "lora"], "published": {"rows": {"base": "zero-shot"}}}
    one = World(tmp_path, with_base, **rows).score("base", "glue-sst2", [90.4]).findings()["base", "glue-sst2"]
    assert one.verdict == "reproduced"
    assert "Nothing is trained" in one.said
    assert World(tmp_path, with_base, **rows).score("base", "glue-sst2", [88.0]).findings()["base", "glue-sst2"].red


def simulated(true: float, sd: float, seeds: int, printed: int, pooled_rows: int = 0) -> Counter[str]:
    """Verdicts over `REPEATS` papers and runs of ours whose true means differ by `true` points. With `pooled_rows` the
    paper prints no spread and so many other rows of ours stand in."""
    rng, counts = np.random.default_rng(SEED), Counter[str]()
    for _ in range(REPEATS):
        paper, ours = rng.normal(90, sd, printed), rng.normal(90 + true, sd, seeds)
        pooled = None
        if pooled_rows:
            others = rng.normal(0, sd, (pooled_rows, seeds)).var(axis=1, ddof=1).mean()
            pooled = Spread(float(np.sqrt(others)), pooled_rows * (seeds - 1))
        spread = None if pooled else float(paper.std(ddof=1))
        counts[judge(ours.tolist(), float(paper.mean()), spread, printed, pooled, margin=1.0).verdict] += 1
    return counts


@pytest.mark.parametrize(("sd", "seeds", "printed"), [(0.5, 10, 5), (0.3, 5, 5), (0.5, 8, 10)])
def test_without_a_difference_it_is_reproduced_at_the_stated_power(sd: float, seeds: int, printed: int) -> None:
    sides = against_published.Sides(Spread(sd, seeds - 1), Spread(sd, printed - 1), printed, False, 0.0)
    stated = power(*sides.error(seeds), 1.0)
    assert stated > 0.8
    assert (needed := sides.needed(1.0)) is not None
    assert 2 < needed <= seeds
    counts = simulated(0.0, sd, seeds, printed)
    assert counts["reproduced"] / REPEATS == pytest.approx(stated, abs=0.05)  # stated as if the spread was known
    assert counts["not reproduced"] + counts["better"] == 0


@pytest.mark.parametrize(("sd", "seeds", "printed", "rows"), [
    (0.2, 3, 3, 0), (0.3, 5, 3, 0), (0.3, 3, 10, 0), (0.1, 2, 3, 0), (0.2, 3, 1, 3), (0.1, 2, 1, 3), (0.3, 5, 3, 3)])
def test_at_the_margin_no_more_than_alpha_are_called_reproduced(sd: float, seeds: int, printed: int, rows: int) -> None:
    counts = simulated(-1.0, sd, seeds, printed, rows)
    error = math.sqrt(0.05 * 0.95 / REPEATS)
    assert counts["reproduced"] / REPEATS < 0.05 + 0.008 + 3 * error  # Welch's degrees of freedom are an approximation
    assert counts["not reproduced"] / REPEATS < 0.05 + 0.008 + 3 * error


def test_a_fall_of_three_points_is_found() -> None:
    assert simulated(-3.0, 0.5, 5, 5)["not reproduced"] > 0.98 * REPEATS
    assert simulated(3.0, 0.5, 5, 5)["better"] > 0.98 * REPEATS


def test_two_seeds_with_ordinary_spread_decide_little() -> None:
    assert simulated(0.0, 0.5, 2, 3)["underpowered"] > 0.7 * REPEATS
    assert simulated(-1.5, 0.5, 2, 3)["underpowered"] > 0.75 * REPEATS


def test_the_built_in_studies_fix_margins_for_every_table() -> None:
    for name in study.names():
        for edition in study.load(name).scales.values():
            assert all("margins" in table.model_fields_set for table in edition.tables.values())
