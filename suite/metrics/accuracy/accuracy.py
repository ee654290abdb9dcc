"""Accuracy as an `evaluate` module: the share of items whose predicted label is the expected one."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate


class Accuracy(evaluate.Metric):
    """`compute(predictions=[...], references=[...])` gives `{"accuracy": share in 0..1}`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of items whose predicted label is the expected one.",
            citation="",
            inputs_description="predictions and references: one integer label per item.",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        pairs = list(zip(predictions, references, strict=True))
        return {"accuracy": sum(p == r for p, r in pairs) / len(pairs)}
