"""The nightly check: every study of a scale measured anew, held against baselines and published tables, and reported.

Each step is a `suite` command of its own, as a user would type it. A study that fails stops nothing; the summary and the
exit code say so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite import display, paths, study, tracking
from suite.study import Scale

#: Nights whose records are kept, the last one included.
KEPT = 3


@dataclass(frozen=True)
class Step:
    """One command of the night: its exit code and wall seconds."""

    study: str
    name: str
    code: int
    seconds: float


@dataclass(frozen=True)
class Night:
    """All steps of a night, and the folder of its records, summaries and JUnit files."""

    folder: Path
    steps: tuple[Step, ...]

    @property
    def green(self) -> bool:
        return all(step.code == 0 for step in self.steps)


def run(scale: Scale, wanted: Sequence[str], tell: Callable[[str], None]) -> Night:
    """Run studies at a scale into a results folder of this night, so that nothing is taken from earlier records; hold each
    against its baseline and its published tables; build the site; write `summary.md`.

    The history of nights and the MLflow pages stay where they always are; even caches are made anew.
    """
    root = paths.results() / "nightly"
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{scale}"
    folder.mkdir(parents=True)
    environment = os.environ | {"SUITE_RESULTS": str(folder), "SUITE_HISTORY": str(paths.history()),
                                "MLFLOW_TRACKING_URI": tracking.store_uri()}
    environment.pop("GITHUB_STEP_SUMMARY", None)  # written once, below
    steps: list[Step] = []

    def suite(name: str, where: str, *arguments: str) -> None:
        tell(f"{name}{f' {where}' if where else ''}")
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "suite", *arguments], env=environment, check=False).returncode
        steps.append(Step(where, name, code, time.monotonic() - began))

    for name in wanted:
        suite("run", name, "run", name, "--scale", scale)
        for against in ("baseline", "published"):
            files = ("--markdown", str(folder / f"{name}-{against}.md"), "--junit", str(folder / f"{name}-{against}.xml"))
            suite(against, name, "regress", name, "--scale", scale, "--against", against, *files)
    suite("report", "", "report", "--all")
    made = Night(folder, tuple(steps))
    text = summary(made, scale)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(page, "a", encoding="utf-8") as file:
            file.write(text)
    for old in sorted(entry for entry in root.iterdir() if entry.is_dir())[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return made


def summary(night: Night, scale: str) -> str:
    """The night in Markdown: a line a study, then what each comparison found."""
    said = "green" if night.green else "RED"
    lines = [f"# Nightly, {scale}: {said}", "", "| study | runs | time | baseline | published |", "|---|---|---|---|---|"]
    named = list(dict.fromkeys(step.study for step in night.steps if step.study))
    for name in named:
        own = {step.name: step for step in night.steps if step.study == name}
        lines.append(f"| {name} | {_word(own['run'])} | {display.duration(own['run'].seconds)} "
                     f"| {_word(own['baseline'])} | {_word(own['published'])} |")
    whole = display.duration(sum(step.seconds for step in night.steps))
    lines += ["", f"{whole} in all. The report: {'written' if night.steps[-1].code == 0 else 'could not be written'}.", ""]
    for name in named:
        for against in ("baseline", "published"):
            page = night.folder / f"{name}-{against}.md"
            if page.exists():
                lines += [page.read_text(encoding="utf-8"), ""]
    return "\n".join(lines)


def names(scale: Scale) -> list[str]:
    """The built-in studies that have the scale."""
    return [name for name in study.names() if scale in study.load(name).scales]


def _word(step: Step) -> str:
    """What a step's exit code says in a table."""
    return {0: "good", 1: "**red**", 2: "**not done**"}.get(step.code, f"**exit code {step.code}**")
