"""What must agree before two scores of one method may be held against one another, as values rather than prose.

A published table states them in its file, for all its columns or for one; ours follow from the run. Two scores are
comparable when all that must be known is known, and nothing that is known differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field

from suite import bases, registry
from suite.specs import Frozen, PositiveInt, RunSpec
from suite.task import Task

#: A paper trained on as many items as we did when the two numbers differ by no more than this share.
TRAINED_WITHIN = 0.02
Name = Literal["base", "data", "metric", "statistic", "selection", "trained_on", "decoding", "scoring", "loss"]
#: What an unknown value of ours or the paper's makes incomparable. `scoring` and `loss` are hardly ever stated: they
#: count when they are.
NEEDED: frozenset[Name] = frozenset({"base", "data", "metric", "statistic", "selection", "trained_on", "decoding"})
#: What a study may compare in spite of; the rest is what makes a number that number.
Excusable = Literal["statistic", "selection", "trained_on", "decoding", "scoring", "loss"]
WORDS: Mapping[Name, str] = {
    "base": "base", "data": "data", "metric": "metric", "statistic": "statistic over seeds", "selection": "selection",
    "trained_on": "training items", "decoding": "decoding", "scoring": "way of answering",
    "loss": "part of the text that carries loss",
}


class Convention(Frozen):
    """How a score came about. None: not known.

    `data`: the public split that was scored, whole: OWNER/NAME:SPLIT or OWNER/NAME/SUBSET:SPLIT of the model hub.
    `metric`: by the suite's name for it. `statistic`: what stands in the table, of the runs. `selection`: whose weights
    were scored. `trained_on`: training items. `decoding`: how text was generated. `scoring`: where an answer comes from.
    `loss`: which part of the text carries it.
    """

    data: str | None = Field(default=None, pattern=r"^[^/\s:]+/[^/\s:]+(/[^/\s:]+)?:\S+$")
    metric: str | None = None
    statistic: Literal["mean", "median", "best"] | None = None
    selection: Literal["last-step", "best-on-validation", "best-on-test"] | None = None
    trained_on: PositiveInt | None = None
    decoding: Literal["greedy", "beam-search", "sampling"] | None = None
    scoring: Literal["head", "label-words", "likelihood", "generated-text"] | None = None
    loss: Literal["answer", "answer-and-padding", "everything"] | None = None

    def over(self, other: Convention) -> Convention:
        """This one, with what `other` says in place of what is not known here."""
        return Convention.model_validate({**_known(other), **_known(self)})


class Conventions(Convention):
    """What holds for every column of a published table, and what holds for one (`columns`)."""

    columns: dict[str, Convention] = Field(default_factory=dict)

    def of(self, column: str) -> Convention:
        """The convention of a column."""
        return self.columns.get(column, Convention()).over(Convention.model_validate(_known(self)))


class Gap(Frozen):
    """One thing in which a published score and ours differ. `said` is empty when the paper's is not known."""

    name: Name
    said: str = ""

    @classmethod
    def between(cls, name: Name, ours: object, theirs: object) -> Self:
        """The gap between two values, of which None is not known."""
        if theirs is None:
            return cls(name=name)
        here = "no public split as a whole" if ours is None else f"{ours:,}" if isinstance(ours, int) else ours
        there = f"{theirs:,}" if isinstance(theirs, int) else theirs
        return cls(name=name, said=f"{WORDS[name]}: {here} here, {there} in the paper")


def told(found: Sequence[Gap]) -> str:
    """Gaps in words: what differs, then what is not known of the paper."""
    unknown = ", ".join(WORDS[gap.name] for gap in found if not gap.said)
    said = [gap.said for gap in found if gap.said]
    return "; ".join([*said, f"not known of the paper: {unknown}"] if unknown else said)


def ours(spec: RunSpec, part: str | None = None) -> Convention:
    """The convention of a run of ours, or of one part of its task. Raises `UserError` for an unknown task or base."""
    task, base = registry.task(spec.task.id), bases.get(spec.base.id)
    whole = part is None and spec.evaluation.split == "test"
    decode = spec.evaluation.decode
    trained = task.sizes["train"] if spec.task.train is None else min(spec.task.train, task.sizes["train"])
    return Convention(
        data=task.scored_on if whole else None, metric=task.metric, statistic="mean", selection=spec.evaluation.selection,
        trained_on=trained, scoring=_scoring(task, base.kind), loss="answer",
        decoding=("sampling" if decode.do_sample else "greedy") if decode and task.kind == "generation" else None)


def gaps(spec: RunSpec, part: str | None, base: str, theirs: Convention) -> list[Gap]:
    """Where a run of ours (or a part of its task) and a published score are not alike. Empty: comparable.

    `base`: the hub id of the published table's base.
    """
    here = ours(spec, part)
    hub = bases.get(spec.base.id).hub or spec.base.id
    pairs: dict[Name, tuple[object, object]] = {"base": (hub, base)}
    pairs |= {name: (getattr(here, name), getattr(theirs, name)) for name in Convention.model_fields}  # type: ignore[misc]
    if registry.task(spec.task.id).kind != "generation":
        del pairs["decoding"]
    return [Gap.between(name, mine, paper) for name, (mine, paper) in pairs.items()
            if (name in NEEDED or paper is not None) and not _alike(mine, paper)]


def _alike(mine: object, paper: object) -> bool:
    if isinstance(mine, int) and isinstance(paper, int):
        return abs(mine - paper) <= TRAINED_WITHIN * paper
    return mine is not None and mine == paper


def _scoring(task: Task, base: bases.Kind) -> Literal["head", "label-words", "likelihood", "generated-text"]:
    if task.kind == "classification":
        return "head" if base == "encoder" else "label-words"
    return "likelihood" if task.kind == "choice" else "generated-text"


def _known(convention: Convention) -> dict[str, object]:
    return {name: value for name in Convention.model_fields if (value := getattr(convention, name)) is not None}
