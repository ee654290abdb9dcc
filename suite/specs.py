"""What a run is: every choice that its result depends on, and nothing else.

A `RunSpec` is immutable and its id is a hash of its content, so the same run asked for by two studies, or by two
processes, is one run. Names, labels and study titles are not part of it.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: Raised whenever the engine's numbers change for the same spec; part of every run's id.
ENGINE_VERSION = 2

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]


class Frozen(BaseModel):
    """A strict value: unknown keys are refused, fields cannot be reassigned."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recipe(Frozen):
    """How the trained parameters are updated. AdamW (Loshchilov & Hutter 2019), one schedule, one clip.

    `learning_rate` is the peak; warm-up is linear over `warmup_ratio` of the steps; `cosine` and `linear` then fall
    to `final_lr_ratio` of the peak. `clip` bounds the global gradient norm of one run. `max_length` counts tokens.
    `precision` is that of the frozen base; `auto`, in a study file, stands for the quicker one on this machine.
    """

    learning_rate: PositiveFloat
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 32
    max_length: PositiveInt = 128
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    final_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: PositiveFloat = 1e-8
    clip: PositiveFloat | None = 1.0
    precision: Literal["float32", "bfloat16", "auto"] = "float32"


class Decode(Frozen):
    """How text is generated, in full, so that no checkpoint's own generation config can leak in."""

    do_sample: bool = False
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 50
    num_beams: PositiveInt = 1
    max_new_tokens: PositiveInt = 16

    @model_validator(mode="after")
    def _greedy_is_greedy(self) -> Decode:
        if not self.do_sample and (self.temperature != 1.0 or self.top_p != 1.0 or self.num_beams != 1):
            raise ValueError("greedy decoding takes temperature 1, top_p 1 and num_beams 1")
        return self


class Evaluation(Frozen):
    """Which split is scored and when. Nothing is ever selected on the scored split."""

    split: Literal["test", "validation"] = "test"
    batch_size: PositiveInt = 64
    selection: Literal["last-step"] = "last-step"
    decode: Decode | None = None


class BaseRef(Frozen):
    id: str
    revision: str


class TaskRef(Frozen):
    """A task at a version, cut to the first `train` and `test` items of its fixed shuffles (None: all)."""

    id: str
    version: int
    train: PositiveInt | None = None
    test: PositiveInt | None = None


class MethodRef(Frozen):
    id: str
    version: int
    config: dict[str, Any]


class Budget(Frozen):
    """How many scalars an adapter may train: a rank (of the method, or LoRA's where the method has none), a number
    (`300k`), a share of the base's parameters (`0.5%`), or as many as a method at a size (`lora@8`). One of them."""

    rank: PositiveInt | None = None
    params: PositiveInt | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    like: Annotated[str, Field(pattern=r"^[a-z0-9:_-]+@[1-9][0-9]*$")] | None = None

    @field_validator("params", mode="before")
    @classmethod
    def _thousands(cls, value: Any) -> Any:
        units = {"k": 1e3, "m": 1e6, "g": 1e9}
        if isinstance(value, str) and value[-1:].lower() in units:
            try:
                return round(float(value[:-1]) * units[value[-1].lower()])
            except ValueError:
                return value
        return value

    @field_validator("share", mode="before")
    @classmethod
    def _percent(cls, value: Any) -> Any:
        if isinstance(value, str) and value.endswith("%"):
            try:
                return float(value[:-1]) / 100
            except ValueError:
                return value
        return value

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget has exactly one of rank, params, share or like (got {', '.join(given) or 'none'})")
        return self

    @classmethod
    def read(cls, text: str) -> Budget:
        """A budget from a command line: `rank=8`, `300k`, `0.5%` or `lora@8`. Raises `ValueError` for anything else."""
        key, _, value = text.rpartition("=")
        kind = "like" if "@" in text else "share" if text.endswith("%") else "params"
        return cls.model_validate({key or kind: value})

    @property
    def text(self) -> str:
        """The budget as `read` takes it."""
        if self.rank is not None:
            return f"rank={self.rank}"
        if self.params is not None:
            return str(self.params)
        return f"{100 * self.share:g}%" if self.share is not None else str(self.like)

    @property
    def label(self) -> str:
        """The budget in words: `rank 8`, `300,000 parameters`, `0.5 %`, `lora@8`."""
        if self.rank is not None:
            return f"rank {self.rank}"
        if self.params is not None:
            return f"{self.params:,} parameters"
        return f"{100 * self.share:g} %" if self.share is not None else str(self.like)


class RunSpec(Frozen):
    """One fully resolved cell of a study.

    `unmet`: why the method cannot have its budget. Such a run is recorded as skipped and never trained.
    """

    base: BaseRef
    task: TaskRef
    method: MethodRef
    budget: Budget | None
    recipe: Recipe
    evaluation: Evaluation
    seed: Annotated[int, Field(ge=0)]
    engine: int = ENGINE_VERSION
    unmet: str | None = None

    @model_validator(mode="after")
    def _is_resolved(self) -> RunSpec:
        if self.recipe.precision == "auto":
            raise ValueError("a run has a precision; auto is for study files")
        return self

    @cached_property
    def id(self) -> str:
        """Twelve hex digits of the SHA-256 of the canonical JSON of this spec. How its budget was worded is left out: what
        the budget led to stands in the method's config."""
        without = {"budget"} if self.unmet is not None else {"budget", "unmet"}
        return digest(self.model_dump(mode="json", exclude=without))[:12]

    def __copy__(self) -> Self:
        """A copy that `model_copy` may change: it does not know its id yet."""
        copied = super().__copy__()
        copied.__dict__.pop("id", None)
        return copied

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        copied = super().__deepcopy__(memo)
        copied.__dict__.pop("id", None)
        return copied

    @property
    def packing_key(self) -> tuple[str, ...]:
        """Runs with equal keys, and equal `Method.structure`, may ride in one pack: they share base, task, method and
        steps. What may differ inside a pack: the method's config (rank, alpha ...), learning rate and seed.
        """
        recipe = self.recipe.model_copy(update={"learning_rate": 1.0})
        return (
            self.base.model_dump_json(),
            self.task.model_dump_json(),
            self.method.id,
            recipe.model_dump_json(),
            self.evaluation.model_dump_json(),
            self.unmet or "",
        )


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
