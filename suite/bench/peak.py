"""What the device reaches in a large matrix product: the peak that utilisation is told against.

    python -m suite.bench.peak cpu|cuda
"""

from __future__ import annotations

import json
import sys
import time

import torch

from suite.environment import cores

ROUNDS = 7


def measure(device: str) -> dict[str, float]:
    """Operations per second of the best of some products of two square matrices, by precision, on all cores or the GPU."""
    torch.set_num_threads(cores())
    size = 8192 if device == "cuda" else 2048
    found = {}
    for name in ("float32", "bfloat16"):
        left, right = (torch.randn(size, size).to(device, getattr(torch, name)) for _ in range(2))
        seconds = []
        for _ in range(ROUNDS):
            _wait(device)
            start = time.perf_counter()
            torch.mm(left, right)
            _wait(device)
            seconds.append(time.perf_counter() - start)
        found[name] = 2 * size**3 / min(seconds)
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
