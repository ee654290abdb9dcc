"""The pages over all studies: methods, tasks, published tables and runs say what the records and the data say."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic
from synthetic import World

from reports import curves, links, run_pages, shared_pages
from reports.frame import Frame
from reports.study_page import Chapter
from reports.task_pages import Misses, short
from suite import data, published, registry

TABLE = {"tasks": ["movie-sentiment", "asdiv"], "rows": ["full", "head", "lora", "gora"], "test": 120, "train": 256}


def ends(cell: synthetic.Cell) -> synthetic.Fate:
    """Of seed 1 one row failed, one diverged and one was skipped."""
    wrong: dict[str, synthetic.Fate] = {"full": "failed", "gora": "diverged", "head": "skipped"}
    return wrong.get(cell.row, "finished") if cell.spec.seed else "finished"


class Written:
    """A world and the pages over it."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.folder = world, folder
        self.chapter = Chapter.of(world.study, world.scale, world.cells, world.records)
        frame = Frame(folder, "https://mlflow.example")
        frame.known.add(self.chapter.path)
        self.pages = shared_pages.pages([self.chapter], {world.record("lora", "asdiv").id: "/#/experiments/1/runs/abc"})
        frame.expect(self.pages)
        for page in self.pages:
            frame.write(page)
        self.known = frame.known

    def html(self, path: str) -> str:
        return (self.folder / path).read_text(encoding="utf-8")

    def text(self, path: str) -> str:
        """What a reader sees, tags left out and spaces collapsed."""
        return " ".join(unescape(re.sub(r"<[^>]+>", " ", self.html(path))).split())

    def rows(self, path: str) -> list[dict[str, str]]:
        with (self.folder / path).open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("pages")
        patch.setenv("SUITE_RESULTS", str(folder / "results"))
        yield Written(synthetic.world(synthetic.study(**TABLE), fate=ends), folder / "out")


def test_there_is_a_page_for_everything_and_every_link_leads_somewhere(written: Written) -> None:
    paths = {page.path for page in written.pages}
    assert paths >= {links.method(name) for name in registry.methods()} | {links.task(name) for name in registry.tasks()}
    assert paths >= {links.published(name) for name in published.names()} | {links.run(run) for run in written.world.records}
    for path in paths:
        here = (written.folder / path).parent
        for target in re.findall(r'href="([^"#:]+)(?:#[^"]*)?"', written.html(path)):
            place = (here / target).resolve().relative_to(written.folder.resolve()).as_posix()
            assert place in written.known or (here / target).exists() or place in ("index.html", "style.css"), (path, target)


def test_pages_link_both_ways(written: Written) -> None:
    run = written.world.record("gora", "movie-sentiment")
    ways = {
        links.run(run.id): (links.method("gora"), links.task("movie-sentiment"), written.chapter.path),
        links.method("gora"): (links.run(run.id), links.task("movie-sentiment"), written.chapter.path,
                               links.published("gora_glue_t5base")),
        links.task("movie-sentiment"): (links.run(run.id), links.method("gora"), written.chapter.path),
        links.published("gora_glue_t5base"): (links.method("gora"), ),
        links.task("glue-sst2"): (links.published("gora_glue_t5base"),),
    }
    for path, targets in ways.items():
        for target in targets:
            assert f'href="../{target}"' in written.html(path), (path, target)


def test_a_methods_page_has_its_results_its_card_and_what_papers_print(written: Written) -> None:
    text = written.text(links.method("gora"))
    value = written.chapter.tables[0].values["gora@8", "movie-sentiment"].summary
    assert value is not None
    found = [row for row in written.rows("methods/tables/gora-results.csv") if row["task"] == "movie-sentiment"]
    assert [float(row["mean_percent"]) for row in found] == [pytest.approx(100 * value.mean)]
    assert f"{100 * value.mean:.1f}" in text
    assert "importance I_i" in text
    assert "2502.12171" in text
    cell = published.load("gora_glue_t5base").cell("gora", "glue-sst2")
    assert cell is not None
    assert f"SST-2 {cell.mean:.2f}" in text
    assert "unverified" in text  # its recalled cells


def test_a_method_without_records_has_a_page_that_says_so(written: Written) -> None:
    text = written.text(links.method("peft:vera"))
    assert "No study on this machine has run it." in text
    assert "vera_glue_roberta_base" in text


def test_a_tasks_page_shows_its_items_labels_and_majority(written: Written) -> None:
    text = written.text(links.task("movie-sentiment"))
    splits = data.splits("movie-sentiment")
    assert " ".join(splits.train[0].text.split())[:60] in text
    counts = {row["split"]: row for row in written.rows("tasks/tables/movie-sentiment-answers.csv")}
    positive = sum(item.label == 1 for item in splits.test)
    assert counts["test"]["answer positive"] == str(positive)
    assert float(counts["test"]["majority"]) == pytest.approx(max(positive, len(splits.test) - positive) / len(splits.test))
    results = written.rows("tasks/tables/movie-sentiment-results.csv")
    assert {row["majority_percent"] for row in results} == {"51.2"}
    assert {row["method"] for row in results} == {"full", "head", "lora", "gora"}


def test_items_of_the_hub_are_not_shown_unless_they_are_here(written: Written) -> None:
    assert "no item is shown" in written.text(links.task("glue-mnli"))


def test_the_hardest_items_are_those_that_most_runs_missed(written: Written) -> None:
    wrong: dict[str, int] = {}
    asked: dict[str, int] = {}
    for record in written.world.records.values():
        frame = record.predictions() if record.spec.task.id == "movie-sentiment" else None
        for item, right in zip(frame["item"], frame["correct"], strict=True) if frame is not None else ():
            asked[item] = asked.get(item, 0) + 1
            wrong[item] = wrong.get(item, 0) + (not right)
    always = sum(wrong[item] == asked[item] for item in asked)
    never = sum(not wrong[item] for item in asked)
    assert f"missed {always} of them, and none missed {never}." in written.text(links.task("movie-sentiment"))
    hardest = written.rows("tasks/tables/movie-sentiment-hardest.csv")
    assert [int(row["wrong"]) / int(row["asked"]) for row in hardest] == sorted(
        (wrong[item] / asked[item] for item in asked), reverse=True)[:len(hardest)]


def test_a_runs_page_has_spec_curves_mistakes_and_the_command(written: Written) -> None:
    record = written.world.record("gora", "movie-sentiment")
    html, text = written.html(links.run(record.id)), written.text(links.run(record.id))
    assert html.count("<svg") == 3
    frame = record.predictions()
    assert frame is not None
    assert record.score is not None
    assert f"{int((~frame['correct']).sum())} of {len(frame)} items were answered wrongly" in text
    first = frame[~frame["correct"]].iloc[0]
    assert first["item"] in text
    assert f"{100 * record.score.value:.1f} %" in text
    assert "--only table=classification --only task=movie-sentiment --only method=gora --only seed=0" in text
    assert str(sum(record.prepare["ranks"].values())) in text
    assert f'"seed": {record.spec.seed}' in text


def test_a_runs_page_says_what_went_wrong(written: Written) -> None:
    failed = written.text(links.run(written.world.record("full", "asdiv", 1).id))
    assert "The run failed: out of memory" in failed
    assert "MemoryError: 3.1 GiB" in failed
    assert "was skipped: there is no task head" in written.text(links.run(written.world.record("head", "asdiv", 1).id))
    diverged = written.html(links.run(written.world.record("gora", "asdiv", 1).id))
    assert "The run diverged" in diverged
    assert "not finite at" in diverged


def test_mlflow_is_linked_by_run_where_it_is_known(written: Written) -> None:
    assert 'href="https://mlflow.example/#/experiments/1/runs/abc"' in written.html(
        links.run(written.world.record("lora", "asdiv").id))
    assert "the run whose tag is" in written.text(links.run(written.world.record("lora", "movie-sentiment").id))


def test_a_published_page_shows_evidence_and_what_is_missing(written: Written) -> None:
    for name in published.names():
        table, text = published.load(name), written.text(links.published(name))
        assert table.paper.title in text
        for missing in table.missing:
            assert " ".join(missing.split()) in text
        for caveat in table.caveats:
            assert " ".join(caveat.split()) in text
        if table.evidence.get("recalled"):
            assert "such a number proves nothing" in text
    index = {row["table"]: row for row in written.rows("published/tables/published.csv")}
    assert set(index) == set(published.names())
    assert "gora, desk" in index["gora_glue_t5base"]["studies"]


def test_many_runs_get_pages_for_those_that_went_wrong_first(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    from reports import results

    made = results.runs([written.chapter])
    monkeypatch.setattr(run_pages, "MOST_PAGES", 7)
    chosen = run_pages.chosen(made)
    assert len(chosen) == 7
    wrong = {run.record.id for run in made if run.record.status != "finished"}
    assert wrong <= {run.record.id for run in chosen}
    assert wrong


def test_a_curve_keeps_its_spikes_and_its_gaps() -> None:
    values = np.full(5000, 1.0)
    values[1234], values[4000:4010] = 9.0, np.nan
    svg = curves.drawing("Loss", np.arange(5000.0), values)
    assert svg.count("<path") == 3  # the frame, and a line on each side of the gap
    assert f" {curves.TOP:.1f}L" in svg  # the spike reaches the top
    assert len(svg) < 12_000
    assert "not finite at 10 of 5000 steps" in svg
    assert "between 1 and 9" in svg
    assert curves.drawing("Loss", np.arange(3.0), np.full(3, np.nan)) == ""
    assert ">1<" in curves.drawing("Loss", np.arange(1.0), np.ones(1))


def test_misses_count_runs_that_answered_different_items() -> None:
    misses = Misses()
    for items, right in ((["a", "b"], [True, False]), (["b", "c"], [False, False])):
        misses.add(pd.DataFrame({"item": items, "correct": right, "expected": 1, "predicted": 0}))
    assert (misses.runs, misses.always, misses.never) == (2, 2, 1)
    assert misses.wrong == {"b": 2, "c": 1}
    assert misses.asked == {"a": 1, "b": 2, "c": 1}


def test_long_texts_lose_their_middle() -> None:
    text = "beginning " + "word " * 200 + "end"
    cut = short(text, 60)
    assert cut.startswith("beginning")
    assert cut.endswith("end")
    assert "…" in cut
    assert len(cut) <= 63
    assert short("short") == "short"
