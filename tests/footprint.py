"""Memory of training a stack of linear layers, in a process of its own: `python -m tests.footprint METHOD RANK`.

Prints JSON. `counted`: bytes of all tensors that training holds beside the base, per trained scalar. `rest` and `peak`: what
the process gained, measured after the second step with gradients still there, and at the highest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from suite import budget, environment, registry
from suite.method import Layer, Shapes, Start
from suite.optimiser import PackedAdamW
from suite.packing import Packed
from suite.specs import Budget, Recipe

WIDTH, DEPTH, TOKENS = 2048, 2, 16


def anonymous() -> int:
    """Bytes of this process that are backed by no file."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


class Prepared:
    """What SpaRTA's `prepare` looks at."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes
        self.seed = 0


def measure(name: str, rank: int, width: int, depth: int) -> dict[str, float]:
    """Two steps of a run at LoRA's count of that rank."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(depth))).requires_grad_(False)
    shapes = Shapes(tuple(Layer(str(i), width, width) for i in range(depth)), depth * width * width)
    method: Any = registry.method(name)
    config = budget.fit(method, method.Config(), Budget(rank=rank), shapes)
    recipe = Recipe(learning_rate=1e-4)
    before = anonymous()
    with environment.PeakMemory() as during:
        bottom = environment.resident()
        start = Start(config, 0, method.prepare(config, Prepared(shapes)).data)  # type: ignore[arg-type]
        packed = Packed(model, method, shapes, [start])
        adamw = PackedAdamW(packed.parameters(), 1, [1e-4], recipe)
        for _ in range(2):
            adamw.drop_gradients()
            loss = model(torch.ones(1, TOKENS, width)).square().mean(dim=(1, 2))
            loss.sum().backward()
            adamw.step(loss.detach(), 1.0)
        rest = anonymous() - before
    trained = [p for p, _ in packed.parameters()]
    own = [] if method.trains == "base" else [*trained, *(b for a in packed.adapters.values() for b in a.buffers())]
    held = [*own, *(p.grad for p in trained if p.grad is not None), *adamw.m, *adamw.v]
    count = sum(p.numel() for p in trained)
    return {"trained": count, "counted": sum(t.numel() * t.element_size() for t in held) / count, "rest": rest,
            "peak": during.resident - bottom}


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(sys.argv[1], 1, 64, 1)  # code pages and the allocator's first pools are not what is asked
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), WIDTH, DEPTH)))
