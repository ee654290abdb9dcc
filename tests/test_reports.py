"""The report: it renders in every state, its formats agree, and nothing in it claims more than is known."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import synthetic
from markdown_it import MarkdownIt
from rich.console import Console
from scipy import stats
from synthetic import Fate, World, study, world

from reports import figures, findings, frame, numbers, publication, sheets, site, study_page, tables, views
from reports.frame import Frame
from reports.sheets import Sheet, entry
from suite.statistics import adjust
from suite.study import Cell

SMALL = {"tasks": ["movie-sentiment", "bigram-shift"], "rows": ["full", "head", "lora", "gora"], "test": 150,
         "train": 256}
ONE = {"rows": ["lora", "gora"], "tasks": ["movie-sentiment"], "seeds": [0], "test": 150, "train": 256}
EVIL = r"<script>alert(1)</script> | _x_ *y* & 100 % $a$ #1 {b} ~c^ \d `e` [f](javascript:g)"
VOID = {"meta", "br", "link", "img", "hr", "input"}


def ends(**by_row: Fate) -> Callable[[Cell], Fate]:
    """What becomes of the runs of seed 1, by row; all others finish."""
    return lambda cell: by_row.get(cell.row, "finished") if cell.spec.seed == 1 else "finished"


WORLDS: dict[str, dict[str, Any]] = {
    "finished": {"of": study(both=True, **SMALL)},
    "half": {"of": study(**{**SMALL, "seeds": [0, 1, 2]}), "fate": synthetic.half},
    "odd": {"of": study(**SMALL), "fate": ends(full="failed", head="skipped", gora="diverged")},
    "empty": {"of": study(**SMALL), "fate": lambda cell: "missing"},
    "failed": {"of": study(**SMALL), "fate": lambda cell: "failed"},
    "broken": {"of": study(**SMALL), "fate": ends(head="no-predictions", gora="broken")},
    "one": {"of": study(**{**ONE, "published": None})},
    "ranks": {"of": study(**{**SMALL, "budgets": [{"rank": 2}, {"rank": 8}], "seeds": [0]})},
    "parts": {"of": study(**{**SMALL, "tasks": ["asdiv"], "published": None}), "parts": ("yes", "no")},
    "budgets": {"of": study(**{**SMALL, "budgets": [{"params": "100k"}, {"like": "lora@8"}], "seeds": [0]})},
    "paper": {"of": study("paper", **{**SMALL, "tasks": ["glue-sst2", "glue-cola"]}), "scale": "paper"},
}


class Built:
    """A world and the report that was built of it."""

    def __init__(self, made: World, folder: Path) -> None:
        chapter = study_page.Chapter.of(made.study, made.scale, made.cells, made.records)
        self.world, self.folder, self.results = made, folder / chapter.name, os.environ["SUITE_RESULTS"]
        of = Frame(folder)
        page, _ = study_page.draw(chapter, self.folder)
        of.expect([page])
        of.assets()
        of.write(page)
        self.html = (self.folder / "index.html").read_text(encoding="utf-8")
        self.markdown = (self.folder / "report.md").read_text(encoding="utf-8")
        self.page = Page(self.html)
        self.table = tables.measure(made.study, made.scale, made.cells, made.records)[0]

    def csv(self, name: str) -> list[dict[str, str]]:
        with (self.folder / "tables" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    def latex(self, name: str) -> str:
        return (self.folder / "tables" / f"{name}.tex").read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page taken apart. Raises when a tag is closed that is not open, or left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.pieces: list[str] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.cells: list[tuple[dict[str, str], str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append(("", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
            self.cells.append((found, ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.pieces.append(data)
        if "caption" in self.open:
            self.tables[-1] = (self.tables[-1][0] + data, self.tables[-1][1])
        elif self.tables and ("td" in self.open or "th" in self.open):
            self.tables[-1][1][-1][-1] += data
            self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] + data)

    def table(self, caption: str) -> list[list[str]]:
        return next(rows for found, rows in self.tables if found.startswith(caption))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Built]]:
    """One report per state, built once."""
    with pytest.MonkeyPatch.context() as patch:
        made = {}
        for name, options in WORLDS.items():
            folder = tmp_path_factory.mktemp(name)
            patch.setenv("SUITE_RESULTS", str(folder / "results"))
            made[name] = Built(world(**options), folder / "out")
        yield made


@pytest.fixture
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))


# The page


@pytest.mark.parametrize("state", WORLDS)
def test_the_page_is_whole_and_stands_alone(reports: dict[str, Built], state: str) -> None:
    """Tags balance (`Page` checks), ids are unique, references lead somewhere, and nothing comes from outside the site."""
    built = reports[state]
    tags = built.page.tags
    ids = [found["id"] for _, found in tags if "id" in found]
    assert len(ids) == len(set(ids))
    for tag, found in tags:
        assert tag not in ("iframe", "object", "embed", "img")
        assert not [key for key in found if key.startswith("on")]
        assert set(found.get("aria-labelledby", "").split()) <= set(ids)
        for key in ("href", "src", "xlink:href"):
            target = found.get(key, "")
            if target.startswith("#"):
                assert target[1:] in ids
            elif target.startswith("https://"):
                assert tag == "a"
            elif target in ("../site.js", "../style.css", "data:,"):
                assert tag in ("script", "link")
                assert target == "data:," or (built.folder / target).exists()
            elif target and target != "../index.html":  # a study's page alone has no overview
                assert tag == "a"
                assert (built.folder / target).exists(), target
    assert set(re.findall(r"url\((.)", built.html)) <= {"#"}
    for name in frame.ASSETS:
        loaded = (built.folder.parent / name).read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(|https?:|fetch\(|import\(", loaded)


@pytest.mark.parametrize("state", WORLDS)
def test_headings_are_in_order_and_tables_have_names(reports: dict[str, Built], state: str) -> None:
    tags = reports[state].page.tags
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert all(caption for caption, _ in reports[state].page.tables)
    for _, rows in reports[state].page.tables:
        assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize("state", WORLDS)
def test_every_figure_has_a_text_and_files(reports: dict[str, Built], state: str) -> None:
    built = reports[state]
    drawings = [found for tag, found in built.page.tags if tag == "svg"]
    assert all(found["role"] == "img" and len(found["aria-label"]) > 20 for found in drawings)
    images = re.findall(r"!\[(.*?)\]\((figures/[^)]+)\)", built.markdown)
    assert len(images) == len(drawings)
    for text, file in images:
        assert len(text) > 20
        assert (built.folder / file).stat().st_size > 1000
    assert len(drawings) == {"empty": 0, "failed": 0, "finished": 12, "one": 5, "half": 5}.get(state, 7)
    for file in (built.folder / "figures").glob("*.svg"):
        with file.with_suffix(".csv").open(encoding="utf-8", newline="") as numbers_of_it:
            assert list(csv.DictReader(numbers_of_it)), file


@pytest.mark.parametrize("state", WORLDS)
def test_the_markdown_is_fit_for_a_page_of_a_repository(reports: dict[str, Built], state: str) -> None:
    text = reports[state].markdown
    assert "\n\n\n" not in text
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
    assert text.startswith("# ")
    assert text.endswith("\n")
    page = Page(MarkdownIt("commonmark").enable("table").render(text))
    assert len(page.tables) >= 4
    assert "|" not in page.text
    assert "**" not in page.text
    relative = [found["href"] for tag, found in page.tags if tag == "a" if "://" not in found["href"]]
    assert all((reports[state].folder / target).exists() for target in relative)


@pytest.mark.parametrize("state", WORLDS)
def test_no_path_of_this_machine_is_in_a_report(reports: dict[str, Built], state: str,
                                                tmp_path: Path) -> None:
    place = str(tmp_path.parent.parent)
    for file in reports[state].folder.rglob("*"):
        if file.is_file():
            assert place.encode() not in file.read_bytes(), file


def test_the_small_scales_say_that_they_are_no_reproduction(reports: dict[str, Built]) -> None:
    for state, built in reports.items():
        for text in (built.page.text, built.markdown):
            assert ("Not a reproduction of the paper's numbers." in text) == (state != "paper")
    text = reports["finished"].page.text
    assert text.index("Not a reproduction") < text.index("What was found")
    assert "all-MiniLM-L6-v2 (22.7 M), mean pooling instead of google-t5/t5-base" in text
    assert "instead of MNLI, SST-2, CoLA, QNLI and MRPC" in text
    assert "ASDiv instead of GSM8K" in text


def test_text_is_readable_in_light_and_dark() -> None:
    """WCAG contrast of at least 4.5 for every colour of text on every background that it stands on."""
    sheet = (frame.TEMPLATES / "style.css").read_text(encoding="utf-8")
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6})", part)) for part in sheet.split("@media")[:2])
    for colours in (light, {**light, **dark}):
        for ink in ("ink", "muted", "accent", "bad"):
            for back in ("page", "panel", "soft", "hatch"):
                assert contrast(colours[ink], colours[back]) >= 4.5, (ink, back)
        rows = [colours[f"row{place}"] for place in range(len(figures.PALETTE))]
        assert all(contrast(colour, colours["panel"]) >= 2.9 for colour in rows)
        assert nearest(rows) > 0.09
    assert tuple(light[f"row{place}"] for place in range(len(figures.PALETTE))) == figures.PALETTE


def test_rows_next_to_each_other_look_different_in_every_way() -> None:
    found = list(figures.looks([str(place) for place in range(20)]).values())
    for one, other in itertools.pairwise(found):
        assert one.colour != other.colour
        assert one.marker != other.marker
        assert one.dash != other.dash
    assert len({(one.colour, one.dash) for one in found}) == 20


def nearest(colours: list[str]) -> float:
    """The smallest distance of two colours in OKLab, to full sight, protanopia and deuteranopia (Machado and others, 2009).
    0.02 is about what can just be seen side by side."""
    rgb = np.array([[int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    sights = [np.eye(3),
              np.array([[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]]),
              np.array([[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.01182, .04294, .968881]])]
    cones = np.array([[.4122214708, .5363325363, .0514459929], [.2119034982, .6806995451, .1073969566],
                      [.0883024619, .2817188376, .6299787005]])
    lab = np.array([[.2104542553, .793617785, -.0040720468], [1.9779984951, -2.428592205, .4505937099],
                    [.0259040371, .7827717662, -.808675766]])
    found = []
    for sight in sights:
        seen = np.cbrt(np.clip(linear @ sight.T, 0, 1) @ cones.T) @ lab.T
        gaps = np.linalg.norm(seen[:, None] - seen[None], axis=2)
        found.append(gaps[~np.eye(len(colours), dtype=bool)].min())
    return float(min(found))


def contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


# What became of the runs


def test_a_missing_cell_is_drawn_as_missing(reports: dict[str, Built]) -> None:
    built = reports["half"]
    table = built.table
    rows = built.page.table("Measured")
    absent = 0
    for line, row in zip(table.lines, [row for row in rows if row[0] != views.MAJORITY][1:], strict=True):
        assert row[0] == line.label
        for cell, column in zip(row[2:], table.column_ids, strict=False):
            value = table.values[line.key, column]
            if value.summary is None:
                absent += 1
                assert not re.search(r"\d+\.\d", cell)
            elif not value.complete:
                assert f"of {value.planned}" in cell
    assert absent > 1
    drawn = [text for found, text in built.page.cells if "missing" in found.get("class", "").split()]
    assert drawn
    assert all(text == "not run" or (text.startswith(numbers.DASH) and len(text) > 5) for text in drawn)
    assert "Hatched: no result." in built.page.text
    missing = sum(cell.spec.id not in built.world.records for cell in built.world.cells)
    assert f"{missing} planned runs have not been run" in built.page.text
    assert f"{missing} planned runs not run yet" in built.markdown


def test_an_empty_report_says_so_and_draws_all_cells(reports: dict[str, Built]) -> None:
    built = reports["empty"]
    assert "None of the 16 planned runs has been made yet" in built.page.text
    names = [row[0] for row in built.page.table("Measured")]
    assert names == ["Row", "Full fine-tuning", "Head only", "LoRA", "GoRA"]
    assert "suite run synthetic --scale desk" in built.page.text
    assert not re.search(r"\b(highest|clearly)\b", built.page.text.split("Measured")[0])


def test_runs_that_went_wrong_are_rows_with_reasons(reports: dict[str, Built]) -> None:
    built = reports["odd"]
    state = "10 of 16 planned runs finished; 2 diverged, 2 failed and 2 skipped as not applicable."
    assert state in built.page.text
    rows = built.page.table("Failed, diverged or skipped")[1:]
    assert len(rows) == 6
    assert {row[5]: row[6].split("  ")[0] for row in rows} == {
        "failed": "out of memory: 3.1 GiB asked for, 1.2 GiB free MemoryError: 3.1 GiB",
        "skipped": "there is no task head to train", "diverged": "the loss is not finite from step 7 on"}
    measured = {row[0]: row for row in built.page.table("Measured")}
    assert "1 of 2 failed" in measured["Full fine-tuning"][2]
    assert "1 of 2 diverged" in measured["GoRA"][2]
    assert "±" in measured["GoRA"][2]
    assert "Diverged runs count with the score that they ended with." in built.page.text
    assert {row["status"] for row in built.csv("failures")} == {"failed", "skipped", "diverged"}


def test_damaged_predictions_cost_the_interval_and_nothing_else(reports: dict[str, Built]) -> None:
    built = reports["broken"]
    table = built.table
    assert len(table.broken) == 4
    assert "4 runs have a score but no readable predictions" in built.page.text
    for key in ("head", "gora@8"):
        delta = table.differences[key, "movie-sentiment"]
        rows = (key.removesuffix("@8"), "lora")
        scores = [built.world.record(row, "movie-sentiment").scores[0].value for row in rows]
        assert delta.per_seed == pytest.approx((scores[0] - scores[1],))
        assert delta.interval is not None
        assert not delta.clear


def test_without_predictions_there_is_a_difference_but_no_interval(own_results: None, tmp_path: Path) -> None:
    made = world(study(**{**ONE, "seeds": [0, 1]}), fate=lambda cell: "no-predictions")
    built = Built(made, tmp_path / "out")
    delta = built.table.differences["gora@8", "movie-sentiment"]
    ours, theirs = ([built.world.record(row, "movie-sentiment", seed).scores[0].value for seed in (0, 1)]
                    for row in ("gora", "lora"))
    assert delta.mean == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert delta.interval is None
    assert not delta.clear
    assert "no interval" in next(row for row in built.page.table("Measured") if row[0] == "GoRA")[3]


def test_runs_without_a_common_seed_have_no_difference(own_results: None) -> None:
    made = world(study(**ONE | {"seeds": [0, 1]}),
                 fate=lambda cell: "finished" if (cell.row == "lora") == (cell.spec.seed == 0) else "missing")
    (table,) = tables.measure(made.study, made.scale, made.cells, made.records)
    assert table.differences == {}
    assert all(value.summary is not None for value in table.values.values())


def test_one_seed_claims_nothing(reports: dict[str, Built]) -> None:
    built = reports["one"]
    assert "one seed, so the spread over seeds is unknown" in built.page.text
    assert "Clearly" not in built.page.text
    assert "±" not in built.page.table("Measured")[2][2]
    assert not any("clear" in found.get("class", "") for found, _ in built.page.cells)


def test_ranks_are_blocks_compared_with_the_same_rank(reports: dict[str, Built]) -> None:
    built = reports["ranks"]
    table = built.table
    assert [line.label for line in table.lines] == [
        "Full fine-tuning", "Head only", "LoRA, r = 2", "GoRA, r = 2", "LoRA, r = 8", "GoRA, r = 8"]
    assert table.reference["gora@2"].key == "lora@2"
    assert table.reference["full"].key == "lora@8"
    assert "At r = 2. " in built.page.text
    assert sum("block" in found.get("class", "") for _, found in built.page.tags) == 3


def test_budgets_of_any_kind_are_told_apart(reports: dict[str, Built]) -> None:
    built = reports["budgets"]
    assert [line.label for line in built.table.lines][2:] == [
        "LoRA, 100\u202fk", "GoRA, 100\u202fk", "LoRA, lora@8", "GoRA, lora@8"]
    assert "Budgets: 100\u202fk and lora@8." in built.html
    assert {row["budget"] for row in built.csv("runs")} == {"", "100\u202fk", "lora@8"}


def test_the_parts_of_a_task_are_columns_of_equal_weight(reports: dict[str, Built]) -> None:
    built = reports["parts"]
    table = built.table
    assert table.column_ids == ("asdiv/yes", "asdiv/no", tables.AVERAGE)
    assert built.page.table("Measured")[0][2:5] == ["yes", "no", "Average"]
    scores = [built.world.record("gora", "asdiv", seed).scores for seed in (0, 1)]
    assert [len(found) for found in scores] == [3, 3]
    summary = table.values["gora@8", tables.AVERAGE].summary
    assert summary is not None
    assert summary.mean == pytest.approx(np.mean([found[0].value for found in scores]))
    theirs = [built.world.record("lora", "asdiv", seed).scores for seed in (0, 1)]
    delta = table.differences["gora@8", tables.AVERAGE]
    by_seed = [a[0].value - b[0].value for a, b in zip(scores, theirs, strict=True)]
    assert delta.mean == pytest.approx(np.mean(by_seed))
    assert delta.interval is not None
    assert "average of 2 columns" in built.page.text


# Numbers


def test_the_difference_is_paired_by_item_and_seed(reports: dict[str, Built],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a calculation by hand: the mean, the error over seeds and items, and the adjustment for all of the table."""
    built = reports["finished"]
    monkeypatch.setenv("SUITE_RESULTS", built.results)
    deltas = []
    for seed in (0, 1):
        ours, theirs = (built.world.record(row, "movie-sentiment", seed).predictions()
                        for row in ("gora", "lora"))
        assert ours is not None
        assert theirs is not None
        both = ours.merge(theirs, on="item")
        deltas.append(both["correct_x"].astype(float) - both["correct_y"].astype(float))
    by_hand = 100 * np.mean([delta.mean() for delta in deltas])
    both = np.stack(deltas, axis=1)
    items, seeds = both.shape
    by_seeds = np.var(both.mean(axis=0), ddof=1) / seeds
    mean = both.mean()
    by_items = (((both.mean(axis=1) - mean) ** 2).sum() + (1 - mean) ** 2 + (1 + mean) ** 2) / (items + 2) ** 2
    rest = both - both.mean(axis=0) - both.mean(axis=1, keepdims=True) + both.mean()
    by_both = (rest**2).sum() / ((items - 1) * (seeds - 1) * items * seeds)
    error = 100 * max(by_items, by_items + by_seeds - by_both) ** 0.5

    rows = built.csv("classification-difference")
    (row,) = [row for row in rows if (row["row"], row["column"]) == ("gora", "movie-sentiment")]
    assert float(row["difference_points"]) == pytest.approx(by_hand, abs=1e-9)
    assert [float(x) for x in row["by_seed_points"].split()] == pytest.approx(
        [100 * delta.mean() for delta in deltas], abs=1e-4)
    assert float(row["error_points"]) == pytest.approx(error)
    half = float(row["error_points"]) * stats.t.ppf(0.975, float(row["dof"]))
    assert (float(row["low_points"]), float(row["high_points"])) == pytest.approx((by_hand - half, by_hand + half))
    assert float(row["p"]) == pytest.approx(2 * stats.t.sf(abs(by_hand) / float(row["error_points"]), float(row["dof"])))
    assert float(row["finds_points"]) > 2.7 * float(row["error_points"])
    assert float(row["won_percent"]) - float(row["lost_percent"]) == pytest.approx(by_hand)
    assert [float(x["q"]) for x in rows] == pytest.approx(adjust([float(x["p"]) for x in rows], "bh"))
    assert [x["clear"] == "True" for x in rows] == [float(x["q"]) <= 0.05 for x in rows]
    shown = next(row for row in built.page.table("Difference to LoRA") if row[0] == "GoRA")
    assert shown[1].split()[0] == numbers.signed(by_hand / 100)


def test_bold_marks_the_highest_and_what_is_level_with_it(reports: dict[str, Built]) -> None:
    table = reports["finished"].table
    for column in table.column_ids:
        means = {line.key: summary.mean for line in table.lines
                 if (summary := table.values[line.key, column].summary) is not None}
        assert table.values[max(means, key=lambda key: means[key]), column].top
        assert not table.values["head", column].top
    assert table.differences["head", tables.AVERAGE].clear_on_items


def test_lines_that_may_be_as_good_as_the_highest_are_marked(reports: dict[str, Built]) -> None:
    """Left unmarked is what Holm sets apart from the highest, one-sided."""
    table = reports["finished"].table
    highest = max(table.lines, key=lambda line: table.values[line.key, tables.AVERAGE].summary.mean)  # type: ignore[union-attr]
    reference = table.reference[highest.key]
    if highest.key != reference.key:
        above = table.differences[highest.key, tables.AVERAGE].p_above
        assert above is not None
        if above > 0.05:  # before any adjustment
            assert table.values[reference.key, tables.AVERAGE].top


def test_the_standing_ranks_every_line_that_is_whole(reports: dict[str, Built]) -> None:
    built = reports["finished"]
    standing = built.table.standing
    assert standing is not None
    assert [line.key for line in standing.lines] == ["full", "head", "lora@8", "gora@8"]
    scores = [[built.table.values[line.key, column.id].summary.mean for line in standing.lines]  # type: ignore[union-attr]
              for column in built.table.columns]
    by_hand = np.mean([stats.rankdata([-score for score in of]) for of in scores], axis=0)
    assert standing.ranking.means == pytest.approx(by_hand)
    with (built.folder / "figures" / "classification-standing.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["row"]: float(row["mean_rank"]) for row in csv.DictReader(file)}
    assert [rows[line.row] for line in standing.lines] == pytest.approx(by_hand)
    assert "critical difference" in built.page.text


def test_the_fronts_hold_what_no_row_beats_for_less(reports: dict[str, Built]) -> None:
    built = reports["finished"]
    with (built.folder / "figures" / "classification-fronts.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["cost"] for row in rows} == {"trained parameters", "run time, s", "peak memory, GiB"}
    for row in rows:
        others = [x for x in rows if x["cost"] == row["cost"] and x is not row]
        beaten = any(float(x["mean_percent"]) >= float(row["mean_percent"]) and float(x["value"]) <= float(row["value"])
                     and (x["mean_percent"], x["value"]) != (row["mean_percent"], row["value"]) for x in others)
        assert (row["on_front"] == "True") == (not beaten)


@pytest.mark.parametrize("state", ["finished", "half", "odd", "paper"])
def test_all_formats_tell_the_same_numbers(reports: dict[str, Built], state: str) -> None:
    """HTML, Markdown and LaTeX, read back, hold the sheet's numbers cell by cell."""
    built = reports[state]
    table = built.table
    beside = publication.publication(built.world.study, built.world.scale, table)
    assert beside is not None
    found = [views.measured(table), views.differences(table), views.costs(table), beside.matched,
             beside.gains, beside.cells]
    markdown = Page(MarkdownIt("commonmark").enable("table").render(built.markdown))
    for sheet in [sheet for sheet in found if sheet is not None]:
        expected = [[digits(f"{item.text} {item.note} {item.aside}") for item in row] for row in sheet.rows]
        for page in (built.page, markdown):
            like = [rows for _, rows in page.tables if rows[0] == list(sheet.header)]
            assert expected in [[[digits(cell) for cell in row] for row in rows[1:]] for rows in like]
        shown = [i for i in range(len(sheet.header)) if i not in sheet.aside]
        in_latex = [[digits(plain(cell)) for cell in row] for row in latex_rows(built.latex(sheet.name))]
        assert in_latex == [[digits(f"{row[i].text} {row[i].note}") for i in shown] for row in sheet.rows]


def digits(text: str) -> list[str]:
    """The numbers of a text in order, thin spaces dropped; nothing of what stands behind a dash."""
    return re.findall(r"[−+]?\d+(?:\.\d+)?", text.split(numbers.DASH)[0].replace("\u202f", ""))


def latex_rows(text: str) -> list[list[str]]:
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0].replace("\\addlinespace\n", "")
    return [re.split(r"(?<!\\) & ", line.removesuffix(" \\\\")) for line in body.strip().split("\n")]


def plain(text: str) -> str:
    """LaTeX as the text that it prints."""
    text = text.replace("---", numbers.DASH).replace("$-$", "−").replace(r"\,", "").replace(r"$\pm$", "±")
    return re.sub(r"\\(?:textbf|textit|texttt|textsuperscript|scriptsize)|[{}]", " ", text)


def test_csv_has_the_numbers_behind_the_words(reports: dict[str, Built]) -> None:
    built = reports["finished"]
    table = built.table
    sheet = views.measured(table)
    shown = {row[0].text: row for row in sheet.rows}
    for row in built.csv("classification-measured"):
        column = 2 + table.column_ids.index(row["column"])
        assert shown[row["label"]][column].text.split(" ± ")[0] == f"{float(row['mean_percent']):.1f}"
        if row["row"] != "majority" and row["column"] != tables.AVERAGE:
            scores = [built.world.record(row["row"], row["column"], seed).scores[0].value for seed in (0, 1)]
            assert float(row["mean_percent"]) == pytest.approx(100 * np.mean(scores))
            assert float(row["sd_percent"]) == pytest.approx(100 * np.std(scores, ddof=1))
    runs = built.csv("runs")
    assert len(runs) == len(built.world.cells)
    assert {row["run"] for row in runs} == set(built.world.records)
    assert runs[0]["command"] == ("suite run synthetic --scale desk --only table=classification "
                                  "--only task=movie-sentiment --only method=full --only seed=0")


def test_the_published_table_stands_beside_with_its_evidence(reports: dict[str, Built]) -> None:
    built = reports["finished"]
    rows = {row[0]: row for row in built.page.table("Published")}
    assert rows["GoRA"] == ["GoRA", "8", "85.91 ± 0.22S", "94.68 ± 0.43S", "79.86 ± 0.35S", "93.27 ± 0.08S",
                            "86.10 ± 0.20S", "87.96S"]
    assert "S: read in a document that repeats it" in built.page.text
    assert "85.91 ± 0.22<sup>S</sup>" in built.markdown
    assert r"85.91{\scriptsize\,$\pm$\,0.22}\textsuperscript{S}" in built.latex("classification-published")
    gains = {row[0]: row for row in built.page.table("Gain over LoRA")}
    assert gains["GoRA"][2] == "+5.88"
    assert "Bases and data differ: compare directions, not sizes." in built.page.text
    assert "official scripts run GoRA with LoRA+" in built.page.text.replace("Official", "official")


def test_remembered_numbers_are_shown_unverified(own_results: None, tmp_path: Path) -> None:
    rows = {"lora": "lora", "rslora": "rslora"}
    beside = {"table": "gora_llama31_8b", "columns": ["mt-bench"], "rows": rows}
    built = Built(world(study(**{**ONE, "rows": ["lora", "rslora"], "published": beside})), tmp_path / "out")
    row = next(row for row in built.page.table("Published") if row[0] == "rsLoRA")
    assert row[2] == "6.18 ± 0.09unverified"
    assert [text for found, text in built.page.cells if "unverified" in found.get("class", "").split()]
    assert "*6.18 ± 0.09*<sup>unverified</sup>" in built.markdown
    assert r"\textit{6.18}" in built.latex("classification-published")
    assert r"\textsuperscript{unverified}" in built.latex("classification-published")
    assert built.page.table("Gain over LoRA")[1][2].startswith("+0.03unverified")
    assert "remembered, read in no document" in built.page.text


def test_at_the_papers_scale_every_score_is_held_against_the_printed_one(reports: dict[str, Built]) -> None:
    built = reports["paper"]
    rows = {row["row"]: row for row in built.csv("classification-here-minus-paper")
            if row["column"] == "glue-sst2"}
    mean = 100 * np.mean([built.world.record("gora", "glue-sst2", seed).scores[0].value for seed in (0, 1)])
    assert float(rows["gora"]["gap_points"]) == pytest.approx(mean - 94.68, abs=1e-3)
    names = [row[0] for row in built.page.table("Here minus the paper")]
    assert names == ["Row", "Full fine-tuning", "LoRA", "GoRA"]
    assert "average" not in {row["column"] for row in built.csv("classification-here-minus-paper")}


def test_the_findings_follow_the_numbers(reports: dict[str, Built]) -> None:
    built = reports["finished"]
    table = built.table
    found = built.page.text.split("What was found")[1].split("Measured")[0]
    means = {line.label: summary.mean for line in table.lines
             if (summary := table.values[line.key, tables.AVERAGE].summary) is not None}
    best = max(means, key=lambda label: means[label])
    assert f"Highest (average of 2 tasks): {best}, {numbers.percent(means[best])} %" in found
    head = table.differences["head", tables.AVERAGE]
    said = "Clearly below LoRA" if head.clear else "Different for these seeds, not clear for others"
    assert head.clear_on_items
    assert f"Head only ({numbers.signed(head.mean)})" in found.split(f"{said}: ")[1].split(").")[0] + ")"
    assert "All 20 planned runs finished." in found
    assert "Different for this one seed, which says nothing of others" in found  # the word problems
    level = [text for of in reports.values() for text in of.page.text.split("Not told apart from LoRA: ")[1:]]
    assert level
    assert all("would be found in 80 of 100 such experiments" in text[:400] for text in level)


def test_five_seeds_that_agree_make_a_claim(own_results: None) -> None:
    made = world(study(**{**ONE, "rows": ["lora", "head", "gora"], "seeds": [0, 1, 2, 3, 4]}))
    (table,) = tables.measure(made.study, made.scale, made.cells, made.records)
    head = table.differences["head", table.headline]
    assert head.clear
    assert not table.values["head", table.headline].top
    found = findings.table_sentences(table)
    assert f"Clearly below LoRA: Head only ({numbers.signed(head.mean)})." in found
    shown = {row[0].text: row[1] for row in views.differences(table).rows}
    assert "clear" in shown["Head only"].marks
    assert shown["Head only"].note.endswith(f"finds\u00a0{numbers.percent(head.detectable)}")  # type: ignore[arg-type]


# Escaping, sameness, speed


def test_text_from_outside_stays_text(own_results: None, tmp_path: Path,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """A title, label, note or reason like HTML, Markdown, LaTeX or mathtext is shown as it is."""
    known = {"movie-sentiment": SimpleNamespace(title=EVIL)}
    monkeypatch.setattr(tables.registry, "tasks", lambda: known)
    monkeypatch.setattr(tables, "LONGEST_TITLE", 200)
    of = study(**{**ONE, "rows": ["lora", "gora", "full"], "notes": [EVIL], "title": EVIL})
    row = of.rows["gora"].model_copy(update={"label": EVIL})
    of = of.model_copy(update={"title": EVIL, "about": EVIL, "rows": {**of.rows, "gora": row}})
    made = world(of, fate=lambda cell: "failed" if cell.row == "full" else "finished", reason=EVIL)
    built = Built(made, tmp_path / "out")
    assert [found for tag, found in built.page.tags if tag == "script"] == [{"src": "../site.js", "defer": ""}]
    assert built.page.text.count(EVIL) >= 8
    assert any(EVIL in found.get("aria-label", "") for tag, found in built.page.tags if tag == "svg")

    page = Page(MarkdownIt("commonmark").enable("table").render(built.markdown))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [found for tag, found in page.tags if tag == "a" and "javascript" in found["href"]]
    assert page.text.count(EVIL) >= 8
    assert any(cell == EVIL for _, rows in page.tables for cells in rows for cell in cells)

    text = built.latex("classification-measured")
    for sign, written in {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "{": r"\{", "$": r"\$"}.items():
        assert written in text
        bare = text.split("\\caption{")[1].split("\\label{")[0]
        if sign not in "{$":
            assert not re.search(rf"(?<!\\){re.escape(sign)}", bare), sign
    assert sheets.latex(EVIL).startswith(r"$<$script$>$alert(1)")

    console = Console(width=200, record=True, file=(tmp_path / "terminal").open("w"))
    for found in study_page.terminal_tables(tables.measure(made.study, made.scale, made.cells, made.records)):
        console.print(found)
    assert "[f](javascript:g)" in console.export_text()


def test_markdown_shows_what_it_is_given() -> None:
    for text in (EVIL, "# no heading", "- no list", "1. no list", "> no quote", "a & b &amp; c",
                 "two\nlines", "x_1 and _y_", "![a](b)", "trailing \\", "+ plus", "https://example.org/a_b"):
        page = Page(MarkdownIt("commonmark").render(f"{sheets.markdown(text)}\n"))
        assert page.text == " ".join(text.split())
        assert {tag for tag, _ in page.tags} == {"p"}
        code = Page(MarkdownIt("commonmark").render(sheets.markdown_code(text.replace("\n", " "))))
        assert code.text == " ".join(text.split())


def test_the_same_records_give_the_same_bytes(reports: dict[str, Built], tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    first = reports["odd"]
    monkeypatch.setenv("SUITE_RESULTS", first.results)
    again = Built(first.world, tmp_path / "again")
    before, after = ({file.relative_to(built.folder): file.read_bytes()
                      for file in built.folder.rglob("*") if file.is_file()} for built in (first, again))
    assert len(before) > 20
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


def test_a_new_build_replaces_the_old_tables(own_results: None, tmp_path: Path) -> None:
    for name in ("synthetic-desk/tables/old.csv", "synthetic-desk/figures/old.png", "methods/old.html", "figures/old.svg"):
        (tmp_path / "out" / name).parent.mkdir(parents=True)
        (tmp_path / "out" / name).write_text("old", encoding="utf-8")
    made = world(study(**{**ONE, "published": None}), fate=lambda cell: "missing")
    chapter = study_page.Chapter.of(made.study, made.scale, made.cells, made.records)
    result = site.build([chapter], tmp_path / "out")
    assert result.page == tmp_path / "out" / "synthetic-desk" / "index.html"
    assert all(path.exists() for path in result.paths)
    assert not list((tmp_path / "out").rglob("old.*"))


def test_json_and_the_terminal_tell_what_the_page_tells(reports: dict[str, Built],
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    made = reports["finished"].world
    monkeypatch.setenv("SUITE_RESULTS", reports["finished"].results)
    chapter = study_page.Chapter.of(made.study, made.scale, made.cells, made.records)
    content = json.loads(json.dumps(study_page.as_json(chapter)))
    assert content["runs"] == {"planned": 20, "finished": 20}
    assert content["tables"][0]["findings"][0] in reports["finished"].page.text
    rows = content["tables"][0]["sheets"]["classification-measured"]["rows"]
    by_csv = reports["finished"].csv("classification-measured")
    assert [row["mean_percent"] for row in rows] == [float(row["mean_percent"]) for row in by_csv]
    shown = study_page.terminal_tables(chapter.tables)
    assert [str(column.header) for column in shown[0].columns][-1] == "Δ LoRA"


def test_tick_labels_keep_their_decimals() -> None:
    source = '<?xml?><svg viewBox="0 0 1 1"><path d="M 1.23456 2"/><text>0.0025</text></svg>'
    drawn = figures.inline(source, "a", "b")
    assert "M 1.23 2" in drawn
    assert "0.0025" in drawn


def test_a_sheet_of_any_marks_is_written() -> None:
    rows = ((entry("a", "best"), entry("1.0 ± 0.2", "clear", note="[0, 2]")),
            (entry("b"), entry("", "missing")))
    sheet = Sheet("x", "A title", ("Row", "Score"), rows, ({"row": "a"},))
    assert sheet.markdown().splitlines()[2] == "| **a** | **1.0 ± 0.2** [0, 2] |"
    assert r"\textbf{1.0}{\scriptsize\,$\pm$\,0.2} {\scriptsize [0, 2]} \\" in sheet.latex("x")
    assert sheet.csv() == "row\na\n"


@pytest.mark.parametrize(("value", "text"), [(0.0, "0.0"), (-0.0004, "0.0"), (0.0126, "+1.3"),
                                             (-0.118, "−11.8")])
def test_a_difference_of_nothing_has_no_sign(value: float, text: str) -> None:
    assert numbers.signed(value) == text


def test_two_hundred_records_take_seconds(own_results: None, tmp_path: Path) -> None:
    budgets = [{"rank": 2}, {"rank": 8}, {"rank": 32}]
    made = world(study(budgets=budgets, seeds=[0, 1, 2], test=100, train=256))
    assert len(made.records) > 200
    begin = time.process_time()
    site.build([study_page.Chapter.of(made.study, made.scale, made.cells, made.records)], tmp_path / "out")
    assert time.process_time() - begin < 15
