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

from suite import baseline, display, paths, study
from suite.study import Scale, Study

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
    """Run studies at a scale into folders of this night, so that nothing is taken from earlier records or caches; hold each
    against its baseline and its published tables, where it has any; build the site; write `summary.md`.
    """
    root = paths.results() / "nightly"
    folder = root / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{scale}"
    folder.mkdir(parents=True)
    environment = os.environ | {"SUITE_RUNS": str(folder / "runs"), "SUITE_CACHE": str(folder / "cache")}
    environment.pop("GITHUB_STEP_SUMMARY", None)  # written once, below
    steps: list[Step] = []

    def suite(name: str, where: str, *arguments: str) -> None:
        tell(f"{name}{f' {where}' if where else ''}")
        began = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "suite", *arguments], env=environment, check=False).returncode
        steps.append(Step(where, name, code, time.monotonic() - began))

    for name in wanted:
        found = study.load(name)
        found.edition(scale)
        suite("run", found.id, "run", name, "--scale", scale)
        for against in _comparisons(found, scale):
            files = [str(folder / f"{found.id}-{against}.{kind}") for kind in ("md", "xml")]
            suite(against, found.id, "regress", name, "--scale", scale, "--against", against,
                  "--markdown", files[0], "--junit", files[1])
    own = [name for name in wanted if name not in study.names()]
    for name in own:
        suite("report", "", "report", name, "--scale", scale)
    if len(own) < len(wanted):
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
    lines = [f"# Nightly, {scale}: {'green' if night.green else 'RED'}", "",
             "| study | runs | time | baseline | published |", "|---|---|---|---|---|"]
    named = list(dict.fromkeys(step.study for step in night.steps if step.study))
    for name in named:
        own = {step.name: step for step in night.steps if step.study == name}
        said = [_word(own[against]) if against in own else "none yet" for against in ("baseline", "published")]
        lines.append(f"| {name} | {_word(own['run'])} | {display.duration(own['run'].seconds)} | {' | '.join(said)} |")
    whole = display.duration(sum(step.seconds for step in night.steps))
    lines += ["", f"{whole} in all. The report {'is written' if night.steps[-1].code == 0 else 'could not be written'}.", ""]
    for name in named:
        for against in ("baseline", "published"):
            page = night.folder / f"{name}-{against}.md"
            if page.exists():
                lines += [page.read_text(encoding="utf-8"), ""]
    return "\n".join(lines)


def names(scale: Scale) -> list[str]:
    """The built-in studies that have the scale."""
    return [name for name in study.names() if scale in study.load(name).scales]


def _comparisons(of: Study, scale: Scale) -> list[str]:
    """What there is to hold a study against."""
    printed = any(table.published is not None for table in of.edition(scale).tables.values())
    return [*(["baseline"] if baseline.names(of.id, scale) else []), *(["published"] if printed else [])]


def _word(step: Step) -> str:
    """What a step's exit code says in a table."""
    return {0: "green", 1: "**red**", 2: "**not done**"}.get(step.code, f"**exit code {step.code}**")
