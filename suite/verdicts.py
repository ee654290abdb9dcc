"""What a comparison with a published or stored number says, and the margins that it is made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from suite.specs import Frozen, PositiveFloat

#: Against a published number, then against a baseline of our own. `missing`: what should be compared is not there.
Verdict = Literal["reproduced", "not reproduced", "better", "underpowered", "not comparable",
                  "unchanged", "changed", "missing"]
#: What a finding is about: a published cell; the training curve; the scores; all methods of a task at once; tokens per
#: second; peak memory; whether all that was run before was run again; whether it is the same that was run (data, decoding,
#: sizes).
Gate = Literal["published", "training", "evaluation", "pooled", "speed", "memory", "presence", "setup"]


class Margins(Frozen):
    """What counts as a difference, fixed in the study file before anything is run.

    `score`: percentage points. `loss`: mean training loss over a window, in nats. `speed`, `memory`: shares of the
    baseline's tokens per second and peak bytes.
    """

    score: PositiveFloat = 1.0
    loss: PositiveFloat = 0.002
    speed: PositiveFloat = 0.1
    memory: PositiveFloat = 0.1


@dataclass(frozen=True)
class Finding:
    """One comparison. `red`: it fails the gate. `said` is a sentence with the numbers; `numbers` has them by name."""

    gate: Gate
    table: str
    row: str
    column: str
    verdict: Verdict
    red: bool
    said: str
    numbers: Mapping[str, float | int | str | None] = field(default_factory=dict)
