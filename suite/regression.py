"""One `suite regress`: what was compared with what, when, by which code, and what came of it. Kept as a history of files.

`results/regress/<study>-<scale>-<against>/` has one JSON file per call, named by its time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from suite import against_published, environment, paths
from suite.errors import UserError
from suite.faults import storage
from suite.records import Record
from suite.verdicts import Finding, Verdict

if TYPE_CHECKING:
    from suite.study import Cell, Study

Against = Literal["published", "baseline"]
#: Verdicts that fail when it is asked for.
OPTIONAL: tuple[Verdict, ...] = ("better", "underpowered")
#: Verdicts as they are shown: what asks for somebody's attention first.
ORDER: tuple[Verdict, ...] = ("not reproduced", "changed", "missing", "better", "underpowered", "reproduced", "unchanged",
                              "not comparable")


class Regression(BaseModel):
    """A call of `suite regress`. `time` is UTC in ISO form; `baseline` the name of the baseline (None: published tables);
    `only` the filters that cut the study."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    study: str
    scale: str
    against: Against
    baseline: str | None = None
    only: tuple[str, ...] = ()
    time: str
    commit: str | None = None
    dirty: bool | None = None
    findings: tuple[Finding, ...]

    @property
    def red(self) -> tuple[Finding, ...]:
        """The findings that fail the gate."""
        return tuple(finding for finding in self.findings if finding.red)

    @property
    def counts(self) -> dict[Verdict, int]:
        """Findings by verdict, in the order in which they are shown."""
        counted = Counter(finding.verdict for finding in self.findings)
        return {verdict: counted[verdict] for verdict in ORDER if counted[verdict]}

    @property
    def tables(self) -> dict[str, tuple[Finding, ...]]:
        """Findings by table of the study, those of one table by verdict in the order in which they are shown."""
        found: dict[str, list[Finding]] = {}
        for finding in self.findings:
            found.setdefault(finding.table, []).append(finding)
        return {table: tuple(sorted(of, key=lambda one: (not one.red, ORDER.index(one.verdict))))
                for table, of in found.items()}

    @property
    def sentence(self) -> str:
        """What came of it, in one sentence: red first, and what could not be told is not passed over."""
        told = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items()) or "nothing to compare"
        against = f"baseline {self.baseline}" if self.baseline else "published tables"
        head = f"{self.study} at {self.scale} against {against}: "
        head += f"RED, {len(self.red)} of {len(self.findings)} fail ({told})." if self.red else f"nothing red ({told})."
        if lacking := self.counts.get("underpowered"):
            head += f" {lacking} could not be decided: that is no pass."
        if self.counts.get("better"):
            head += f" {self.counts['better']} better than published: look at why."
        return head


def run(study: Study, scale: str, cells: Sequence[Cell], known: Mapping[str, Record], against: Against,
        only: Sequence[str] = (), fail_on: Sequence[str] = (), baseline: str | None = None) -> Regression:
    """Compare the study's records with the published tables, or with the baseline of that name, and keep what was found.

    Verdicts in `fail_on` are red as well, where the number may fail at all.
    Raises `UserError` when there is nothing to compare: no record, no published table, no such baseline; and when the
    result cannot be kept.
    """
    if not any(cell.spec.id in known for cell in cells):
        raise UserError(f"study {study.id} at {scale}: no run has a record; "
                        f"`suite run {study.id} --scale {scale}` makes them")
    if against == "published":
        if not any(study.edition(scale).tables[cell.table].published for cell in cells):
            raise UserError(f"study {study.id} at {scale}: no table names a published one (key published)")
        found = against_published.compare(study, scale, cells, known)
    else:
        raise UserError("--against baseline: not built yet")
    commit, dirty = environment.revision()
    made = Regression(
        study=study.id, scale=scale, against=against, baseline=baseline, only=tuple(only), commit=commit, dirty=dirty,
        time=datetime.now(UTC).isoformat(timespec="milliseconds"), findings=tuple(harden(found, fail_on)))
    keep(made)
    return made


def harden(findings: Sequence[Finding], verdicts: Sequence[str]) -> list[Finding]:
    """The findings, with those of these verdicts red. A number says by `gates` 0 that it never fails."""
    return [replace(one, red=True) if one.verdict in verdicts and one.numbers.get("gates", 1) else one for one in findings]


def folder(study: str, scale: str, against: Against) -> Path:
    """Where the results of these comparisons are kept."""
    return paths.results() / "regress" / f"{study}-{scale}-{against}"


def keep(made: Regression) -> Path:
    """Write a result beside the earlier ones. Raises `UserError` when it cannot be written."""
    stamp = datetime.fromisoformat(made.time).strftime("%Y%m%dT%H%M%S-%fZ")
    target = folder(made.study, made.scale, made.against) / f"{stamp}.json"
    content = json.loads(made.model_dump_json())  # by pydantic, which writes what is not finite as null
    try:
        paths.write_json(target, content)
    except OSError as error:
        raise UserError(str(storage(error, target.parent))) from None
    return target


def history(study: str, scale: str, against: Against, partial: bool = False) -> Iterator[Regression]:
    """Every result that is kept of a comparison, oldest first. `partial`: those of a study cut by `--only` too.

    Raises `UserError` for a file that is not such a result.
    """
    for path in sorted(folder(study, scale, against).glob("*.json")):
        made = load(path)
        if partial or not made.only:
            yield made


def latest(study: str, scale: str, against: Against) -> Regression | None:
    """The last result of the whole study, or None. Raises `UserError` for a file that is not such a result."""
    for path in sorted(folder(study, scale, against).glob("*.json"), reverse=True):
        made = load(path)
        if not made.only:
            return made
    return None


def load(path: Path) -> Regression:
    """A result from its file. Raises `UserError` naming the file when it is not one."""
    try:
        return Regression.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    raise UserError(f"{path} is not a result of `suite regress` of this version ({problem}); delete it")
