"""What a bench runs: a small sweep of LoRA over ranks, learning rates and seeds, as a file and as a study."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from suite import yamlfile
from suite.errors import UserError, one_of
from suite.specs import Evaluation, Frozen, NonNegativeFloat, PositiveFloat, PositiveInt, Recipe
from suite.study import Cell, Study

FOLDER = Path(__file__).resolve().parent / "workloads"


class Tolerance(Frozen):
    """How far the means over the same runs may lie apart: `score` in points of 100, `loss` as a share."""

    score: NonNegativeFloat = 3.0
    loss: NonNegativeFloat = 0.15


class Workload(Frozen):
    """A sweep: every rank with every learning rate and every seed. `recipe` has no learning rate of its own.

    `sample`: how many of the runs the two baselines make when not all are asked for; `at_once`: numbers of processes
    that the tuned baseline is tried with (`cores`: one per core).
    """

    id: str
    title: str
    device: Literal["cpu", "gpu"]
    base: str
    task: str
    train: PositiveInt
    test: PositiveInt
    ranks: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    learning_rates: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    alpha: PositiveFloat = 16.0
    recipe: dict[str, Any]
    evaluation: Evaluation = Evaluation()
    sample: PositiveInt = 3
    at_once: Annotated[tuple[PositiveInt | Literal["cores"], ...], Field(min_length=1)] = (1, "cores")
    tolerance: Tolerance = Tolerance()

    @property
    def runs(self) -> list[Run]:
        """Every run of the sweep, in order."""
        return [Run(*one) for one in product(self.ranks, self.learning_rates, self.seeds)]

    def spread(self, count: int) -> list[Run]:
        """`count` of the runs, each with the rank, rate and seed taken least so far; all when there are no more."""
        left, taken = list(self.runs), Counter[tuple[str, float]]()
        chosen: list[Run] = []
        while left and len(chosen) < count:
            run = min(left, key=lambda one: sum(taken[value] for value in vars(one).items()))
            left.remove(run)
            chosen.append(run)
            taken.update(vars(run).items())
        return chosen

    def study(self) -> Study:
        """The sweep as a study of this suite, at the scale that fits the device. Raises `UserError` for a wrong recipe."""
        rows = {_row(rate): {"method": "lora", "label": f"LoRA, rate {rate:g}", "options": {"alpha": self.alpha}}
                for rate in self.learning_rates}
        table = {
            "title": self.title, "base": self.base, "tasks": [self.task], "rows": list(rows),
            "reference": next(iter(rows)), "budgets": [{"rank": rank} for rank in self.ranks], "seeds": list(self.seeds),
            "train": self.train, "test": self.test,
            "recipe": {**self.recipe, "learning_rate": self.learning_rates[0]},
            "learning_rates": {_row(rate): rate for rate in self.learning_rates},
            "evaluation": self.evaluation.model_dump(mode="json"),
        }
        content = {"id": f"bench-{self.id}", "title": self.title, "paper": {"title": "None"}, "about": self.title,
                   "rows": rows, "scales": {self.scale: {"about": self.title, "tables": {"sweep": table}}}}
        return Study.model_validate(content)

    @property
    def scale(self) -> Literal["desk", "bench"]:
        """The scale of the study."""
        return "desk" if self.device == "cpu" else "bench"


@dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    rank: int
    learning_rate: float
    seed: int

    @classmethod
    def of(cls, cell: Cell) -> Run:
        """The run that a cell of the study stands for."""
        return cls(int(cell.spec.method.config["rank"]), cell.spec.recipe.learning_rate, cell.spec.seed)

    @property
    def name(self) -> str:
        return f"r{self.rank}-lr{self.learning_rate:g}-seed{self.seed}"


def names() -> list[str]:
    """Ids of the built-in workloads."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Workload:
    """A built-in workload by id, or any file by path. Raises `UserError` when it is not there or wrong."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        found = yamlfile.load(path, Workload)
    except FileNotFoundError:
        raise UserError(f"unknown workload {name!r}: use {one_of(names())}, or the path of a .yaml file") from None
    wrong = sorted(set(found.recipe) - (set(Recipe.model_fields) - {"learning_rate"}))
    if wrong:
        raise UserError(f"{path}: recipe.{wrong[0]}: unknown key; the learning rates stand in learning_rates")
    fixed = {"schedule": "cosine", "weight_decay": 0.0, "clip": 1.0, "final_lr_ratio": 0.0}
    for key, value in fixed.items():
        if found.recipe.get(key, value) != value:
            raise UserError(f"{path}: recipe.{key}: the baselines know {value} only; leave the key out")
    return found


def _row(rate: float) -> str:
    return f"lora-{rate:g}"
