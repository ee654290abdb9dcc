"""How sure a number is, and what may be concluded from it. docs/statistics.md says which question each part answers."""

from suite.statistics.decisions import adjust, detectable, equivalence, mcnemar
from suite.statistics.noise import (
    CONFIDENCE,
    Difference,
    Interval,
    Outcomes,
    Summary,
    average,
    average_difference,
    difference,
    summarise,
)

__all__ = ["CONFIDENCE", "Difference", "Interval", "Outcomes", "Summary", "adjust", "average", "average_difference",
           "detectable", "difference", "equivalence", "mcnemar", "summarise"]
