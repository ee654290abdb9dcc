"""What training costs in memory, by accounting and as the operating system counts it: SpaRTA, LoRA, full fine-tuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from suite import paths
from tests.footprint import DEPTH, WIDTH

#: Of SpaRTA's note: index, value, gradient and two moments; LoRA has no index. A whole base brings its values along.
BYTES = {"sparta": 4 + 4 + 4 + 8, "lora": 4 + 4 + 8, "full": 4 + 8}
RANK = 256
COUNT = DEPTH * RANK * 2 * WIDTH  # a quarter of all entries


@cache
def measured(method: str) -> dict[str, float]:
    """In a process of its own that gives memory back as soon as it is free."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.footprint", method, str(RANK)], cwd=paths.REPOSITORY,
                          env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("method", BYTES)
def test_bytes_per_trained_scalar_are_the_notes(method: str) -> None:
    found = measured(method)
    assert found["trained"] == (DEPTH * WIDTH**2 if method == "full" else COUNT)
    assert found["counted"] == pytest.approx(BYTES[method], rel=1e-4)
    assert found["rest"] / found["trained"] == pytest.approx(BYTES[method], rel=0.1)


def test_at_equal_counts_sparta_peaks_above_lora_and_below_full_fine_tuning() -> None:
    """Above its 20 bytes an entry come, for one layer at a time, W_eff, the dense gradient and 64-bit indices."""
    peaks = {method: measured(method)["peak"] for method in BYTES}
    assert peaks["lora"] < peaks["sparta"] < peaks["full"]
    layer = 2 * 4 * WIDTH**2 + 8 * COUNT / DEPTH
    assert 20 * COUNT < peaks["sparta"] < 1.1 * (20 * COUNT + layer)
