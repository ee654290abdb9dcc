"""How sure a number is, and what may be concluded from it. docs/statistics.md says which question each part answers."""

from suite.statistics.across import Ranking, front, profile, rank
from suite.statistics.cells import CONFIDENCE, Interval, Summary, average, summarise
from suite.statistics.decisions import Outcomes, adjust, detectable, equivalence, mcnemar
from suite.statistics.paired import Difference, average_difference, difference

__all__ = ["CONFIDENCE", "Difference", "Interval", "Outcomes", "Ranking", "Summary", "adjust", "average",
           "average_difference", "detectable", "difference", "equivalence", "front", "mcnemar", "profile", "rank",
           "summarise"]
