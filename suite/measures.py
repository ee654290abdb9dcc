"""What a column of a published table counts: its unit, which way is better, and what values it can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: `score`: how well a model does; `gain`: a score minus, or over, another row's; `loss`: a loss or another distance, less
#: is better; `cost`: time or memory; `size`: how much is trained or stored; `setting`: chosen by hand, not measured.
Kind = Literal["score", "gain", "loss", "cost", "size", "setting"]


@dataclass(frozen=True)
class Measure:
    """`better` is None where neither way is better; `low` and `high` are what a value may be at most."""

    kind: Kind
    unit: str
    better: Literal["higher", "lower"] | None = None
    low: float | None = 0.0
    high: float | None = None


def _score(unit: str, low: float = 0.0, high: float | None = 100.0) -> Measure:
    return Measure("score", unit, "higher", low, high)


def _less(kind: Kind, unit: str, low: float | None = 0.0, high: float | None = None) -> Measure:
    return Measure(kind, unit, "lower", low, high)


#: By the name that a table's `measures` use.
MEASURES: dict[str, Measure] = {
    "accuracy": _score("percent of right answers"),
    "exact-match": _score("percent of answers that equal the reference"),
    "pass-rate": _score("percent of problems solved"),
    "f1": _score("F1 in percent"),
    "f1-and-exact-match": _score("mean of F1 and exact match in percent"),
    "matthews": _score("Matthews correlation times 100", low=-100),
    "correlation": _score("correlation times 100", low=-100),
    "bleu": _score("BLEU in percent"),
    "rouge": _score("ROUGE in percent"),
    "meteor": _score("METEOR in percent"),
    "nist": _score("NIST points", high=None),
    "cider": _score("CIDEr points", high=None),
    "judge": _score("points of a judge from 0 to 10", high=10),
    "similarity": _score("cosine similarity", low=-1, high=1),
    "other-score": _score("percent; the protocol says of what, as far as it is known"),
    "mean": _score("mean of other columns", low=-100),
    "translation-error": _less("loss", "edits as a share of the words (TER)"),
    "drift": _less("loss", "distance from what the base gives, from 0 to 1", high=1),
    "loss": _less("loss", "nats"),
    "loss-change": _less("loss", "nats, after minus before", low=None),
    "gain": Measure("gain", "percentage points over another row", "higher", -100, 100),
    "relative-gain": Measure("gain", "percent of another row's score", "higher", -100),
    "seconds": _less("cost", "seconds"),
    "minutes": _less("cost", "minutes"),
    "hours": _less("cost", "hours"),
    "microseconds-per-token": _less("cost", "microseconds per token"),
    "relative-time": _less("cost", "times another row's time"),
    "steps-per-second": Measure("cost", "steps per second", "higher"),
    "tokens-per-second": Measure("cost", "tokens per second", "higher"),
    "gigabytes": _less("cost", "GB of memory"),
    "gibibytes": _less("cost", "GiB of memory"),
    "mebibytes": _less("cost", "MiB of memory"),
    "file-mebibytes": _less("size", "MiB on disk"),
    "parameters": Measure("size", "parameters"),
    "million-parameters": Measure("size", "millions of parameters"),
    "percent-trained": Measure("size", "percent of the base's parameters that are trained", high=100),
    "percent-changed": Measure("size", "percent of the base's parameters that change", high=100),
    "setting": Measure("setting", "as set", low=None),
}

__all__ = ["MEASURES", "Kind", "Measure"]
