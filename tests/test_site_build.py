"""The site over several studies: what stays from earlier builds, what the overview says, verdicts and history."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic import study, world

from reports import overview, site
from reports.study_page import Chapter
from suite import cli, regression, verdicts
from suite.errors import UserError
from suite.regression import Regression

SMALL = {"tasks": ["movie-sentiment"], "rows": ["full", "head", "lora", "gora"], "test": 150, "train": 256,
         "published": None}


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "out"


def chapter(name: str = "synthetic", **table: object) -> Chapter:
    """A study of this name with all its records."""
    made = world(study(**{**SMALL, **table}).model_copy(update={"id": name, "title": f"Study {name}"}))
    return Chapter.of(made.study, made.scale, made.cells, made.records)


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_a_later_build_keeps_the_studies_of_earlier_ones(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = chapter("one"), chapter("two", seeds=[2, 3])
    site.build([first], out)
    before = text(out / "one-desk" / "index.html")
    kept = site.others(out, [second])
    assert [(one.study, one.scale) for one in kept] == [(first.study, "desk")]
    result = site.build([second], out, [first])
    assert result.page == out / "two-desk" / "index.html"
    assert text(out / "one-desk" / "index.html") == before
    page = text(out / "index.html")
    assert 'href="one-desk/index.html"' in page
    assert 'href="two-desk/index.html"' in page
    assert site.build([first, second], out).page == out / "index.html"


def test_a_folder_that_is_no_study_any_more_is_left_out(out: Path) -> None:
    site.build([chapter("one")], out)
    (out / "one-desk" / site.KEPT).write_text('{"study": {}}', encoding="utf-8")
    assert site.others(out) == []


def test_the_overview_counts_every_comparison_by_what_can_be_claimed(out: Path) -> None:
    groups = overview.gather([chapter("one", seeds=[0, 1, 2]), chapter("two", seeds=[0])])
    by_name = {group.name: group for group in groups}
    assert set(by_name) == {"Full fine-tuning", "Head only", "GoRA"}
    for group in groups:
        assert len(group.found) == 2
        assert group.count("above") + group.count("level") + group.count("below") == 2
    head = by_name["Head only"]
    assert head.count("below") >= 1
    assert head.multiple("trained") == pytest.approx(head.found[0].table.sizes["head"].middle
                                                     / head.found[0].table.sizes["lora@8"].middle)
    assert groups == sorted(groups, key=lambda group: -group.middle)


def test_one_seed_stands_last_and_is_claimed_nothing_of(out: Path) -> None:
    only = chapter("one", rows=["lora", "gora"], seeds=[0])
    several = chapter("two", rows=["lora", "head"], seeds=[0, 1])
    groups = overview.gather([only, several])
    assert [group.name for group in groups] == ["Head only", "GoRA"]
    site.build([only, several], out)
    page = text(out / "index.html")
    assert "1 row ran with one seed only: nothing is claimed of it." in page
    assert "GoRA (" not in page.split("State of every study")[0]


def test_verdicts_stand_on_the_study_page_and_in_the_history(out: Path) -> None:
    made = chapter("one")
    bad = verdicts.Finding("published", "classification", "gora", "movie-sentiment", "not reproduced", True,
                           "Three points below <the> paper.", {"difference": -3.0})
    fine = verdicts.Finding("published", "classification", "lora", "movie-sentiment", "reproduced", False, "Equal.")
    for minute, findings in ((1, (fine,)), (2, (fine, bad))):
        regression.keep(Regression(study="one", scale="desk", against="published", commit="0123456789abcdef", dirty=False,
                                   time=f"2026-02-03T04:0{minute}:00.000+00:00", findings=findings))
    site.build([made], out)
    page = text(out / "one-desk" / "index.html")
    assert "RED, 1 of 2 fail" in page
    assert "Three points below &lt;the&gt; paper." in page
    assert page.index("not reproduced</th>") < page.index("reproduced</th>", page.index("not reproduced</th>") + 20)
    assert "RED, 1 of 2 fail" in text(out / "one-desk" / "report.md")
    rows = text(out / "tables" / "history-one-desk.csv").splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["2026-02-03T04:02:00.000+00:00", "2026-02-03T04:01:00.000+00:00"]
    assert "nothing red" in text(out / "history.html")


def test_a_kept_result_that_cannot_be_read_is_named_and_costs_nothing_else(out: Path) -> None:
    folder = regression.folder("one", "desk", "published")
    folder.mkdir(parents=True)
    (folder / "20260101T000000-000000Z.json").write_text("{}", encoding="utf-8")
    site.build([chapter("one")], out)
    for page in (out / "one-desk" / "index.html", out / "history.html"):
        assert "20260101T000000-000000Z.json is not a result of" in text(page)


def test_a_report_is_of_a_study_or_of_all(out: Path) -> None:
    with pytest.raises(UserError, match="name a study, or use --all alone"):
        cli.report(study=None)
    with pytest.raises(UserError, match="name a study, or use --all alone"):
        cli.report(study="gora", every=True)
    with pytest.raises(UserError, match="there are no records yet"):
        cli.report(every=True)
