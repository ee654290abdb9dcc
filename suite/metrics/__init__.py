"""Metrics of classification tasks: `evaluate` modules that stand in this folder, so that no hub is asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def compute(metric: str, predicted: Sequence[int], expected: Sequence[int]) -> float:
    """The metric of predicted against expected labels, as `evaluate` computes it with our module."""
    return float(_module(metric).compute(predictions=list(predicted), references=list(expected))[metric])


@cache
def _module(metric: str) -> Any:
    import evaluate

    return evaluate.load(str(FOLDER / metric))
