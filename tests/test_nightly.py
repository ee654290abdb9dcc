"""The nightly check, for real: two runs, a comparison with a baseline, the site, and a night that is red."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from suite import assets, baseline, nightly, paths
from suite import study as studies
from suite.nightly import Night, Step

STUDY: Any = {
    "id": "short", "title": "Two runs", "paper": {"title": "None"}, "about": "Two runs.",
    "rows": {"lora": {"method": "lora", "label": "LoRA"}, "head": {"method": "head", "label": "Head only"}},
    "scales": {"desk": {"about": "Seconds.", "tables": {"only": {
        "title": "Two runs", "base": "minilm", "tasks": ["movie-sentiment"], "rows": ["lora", "head"], "reference": "lora",
        "budgets": [{"rank": 2}], "seeds": [0], "train": 32, "test": 20,
        "recipe": {"learning_rate": 1e-3, "batch_size": 16, "max_length": 32}}}}},
}


def test_a_summary_says_what_is_red_and_what_there_is_not(tmp_path: Path) -> None:
    (tmp_path / "gora-published.md").write_text("20 cells are not comparable.", encoding="utf-8")
    steps = (Step("gora", "run", 0, 60.0), Step("gora", "baseline", 1, 2.0), Step("gora", "published", 0, 1.0),
             Step("tour", "run", 130, 30.0), Step("", "report", 0, 5.0))
    night = Night(tmp_path, steps)
    assert not night.green
    text = nightly.summary(night, "desk")
    assert "# Nightly, desk: RED" in text
    assert "| gora | green | 1 min 00 s | **red** | green |" in text
    assert "| tour | **exit code 130** | 30 s | none yet | none yet |" in text
    assert text.rstrip().endswith("20 cells are not comparable.")
    assert Night(tmp_path, tuple(step for step in steps if step.code == 0)).green


def test_every_study_of_a_scale_is_checked() -> None:
    assert {"gora", "malora", "lorasc", "sparta", "dota", "tour"} <= set(nightly.names("desk"))
    assert "tour" not in nightly.names("paper")


@pytest.mark.slow
def test_a_night_measures_anew_and_is_green_until_something_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asset in ("minilm", "hutto-2014"):
        assets.fetch(asset)
    for name in ("RESULTS", "REPORTS", "MEASURED"):
        monkeypatch.setenv(f"SUITE_{name}", str(tmp_path / name.lower()))
    monkeypatch.setenv("PYTHONPATH", str(paths.REPOSITORY))
    file = tmp_path / "short.yaml"
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    page = tmp_path / "job.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(page))

    first = nightly.run("desk", [str(file)], lambda text: None)
    assert first.green, first.steps
    assert [step.name for step in first.steps] == ["run", "report"]
    assert len(list((first.folder / "runs").glob("*/record.json"))) == 2
    assert not paths.runs().exists()
    assert (paths.reports() / "index.html").exists()
    assert "none yet" in page.read_text(encoding="utf-8")

    monkeypatch.setenv("SUITE_RUNS", str(first.folder / "runs"))
    baseline.accept(studies.load(str(file)), "desk", "here", "first night")
    monkeypatch.delenv("SUITE_RUNS")
    STUDY["scales"]["desk"]["tables"]["only"]["recipe"]["learning_rate"] = 3e-3
    file.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    second = nightly.run("desk", [str(file)], lambda text: None)
    assert [(step.name, step.code) for step in second.steps] == [("run", 0), ("baseline", 1), ("report", 0)]
    assert not second.green
    assert "**red**" in (second.folder / "summary.md").read_text(encoding="utf-8")
