"""A published table and a study that is held against it, both of the form of T5-base's on GLUE; nothing in them is real."""

from __future__ import annotations

import math
from typing import Any

#: A published table of the form of T5-base's on GLUE, with all of its conventions met by runs of the suite.
PRINTED: dict[str, Any] = {
    "id": "printed", "paper": {"title": "A paper", "table": "Table 1"}, "base": "google-t5/t5-base",
    "protocol": {"train": "one epoch", "metric": "accuracy", "split": "validation", "seeds": 5, "selection": "last"},
    "columns": ["glue-sst2", "glue-qnli", "avg"],
    "measures": {"accuracy": ["glue-sst2", "glue-qnli"], "mean": ["avg"]},
    "rows": [
        {"method": method, "label": method, "rank": rank, "evidence": "secondary", "source": "a table", "cells": {
            "glue-sst2": {"mean": 94.0, "sd": 0.2}, "glue-qnli": {"mean": 92.0, "sd": 0.2}, "avg": {"mean": 93.0}}}
        for method, rank in (("full", None), ("lora", 8), ("gora", 8), ("gora", 32))],
    "conventions": {
        "metric": "accuracy", "selection": "last-step", "loss": "answer",
        "columns": {"glue-sst2": {"data": "nyu-mll/glue/sst2:validation", "trained_on": 67349},
                    "glue-qnli": {"data": "nyu-mll/glue/qnli:validation", "trained_on": 104743}}},
}
ROWS = {"full": {"method": "full", "label": "Full"}, "lora": {"method": "lora", "label": "LoRA"},
        "gora": {"method": "gora", "label": "GoRA"}, "base": {"method": "untouched", "label": "Base"}}
TABLE: dict[str, Any] = {
    "title": "GLUE", "base": "t5-base", "tasks": ["glue-sst2", "glue-qnli"], "rows": ["full", "lora", "gora"],
    "reference": "lora", "budgets": [{"rank": 8}], "seeds": [0, 1, 2, 3, 4], "recipe": {"learning_rate": 1.0e-4},
    "published": {"rows": {"full": "full", "lora": "lora", "gora": "gora"}},
}
#: Five scores with a mean of exactly zero and a standard deviation of 0.25.
NOISE = tuple(0.25 * z / math.sqrt(1.25) for z in (-1.5, -0.5, 0.0, 0.5, 1.5))
