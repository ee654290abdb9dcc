"""The mean loss gradient of every linear layer of a frozen base, without ever holding two layers' gradients.

A hook on each weight takes its gradient the moment it is complete, adds it to a file-backed accumulator off the
device, and frees it. Beside the base, the pass needs the activations of one batch and one layer's gradient.

The estimate depends on the base, the data and its own request only. It is made once per cell and kept on disk: a
folder with `gradients.f32` (raw float32, layer after layer) and `index.json`. Every rank, learning rate and run seed
reads the same file.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from suite import paths
from suite.method import Layer


class StoredGradients(Mapping[str, Tensor]):
    """Gradients by layer name, `[out, in]` float32, mapped from disk: a layer costs memory while it is looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        total = sum(math.prod(shape) for shape in self.index["shapes"].values())
        self._flat = torch.from_file(str(folder / "gradients.f32"), shared=False, size=total, dtype=torch.float32)
        self._start: dict[str, int] = {}
        position = 0
        for name, shape in self.index["shapes"].items():
            self._start[name] = position
            position += math.prod(shape)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.index["shapes"][name]
        start = self._start[name]
        return self._flat[start:start + math.prod(shape)].view(*shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)

    @property
    def loss(self) -> float:
        """Mean loss over the batches."""
        return self.index["loss"]


def estimate(model: nn.Module, layers: Sequence[Layer], losses: Iterator[Tensor], folder: Path) -> None:
    """Accumulate the mean gradient of `losses` (one scalar per batch, made lazily) over `layers` into `folder`.

    The model must be frozen; it is frozen again on return and its weights are never written.
    """
    shapes = {x.name: (x.out_features, x.in_features) for x in layers}
    total = sum(math.prod(shape) for shape in shapes.values())
    folder.mkdir(parents=True, exist_ok=True)
    flat = torch.from_file(str(folder / "gradients.f32"), shared=True, size=total, dtype=torch.float32)
    handles = []
    position = 0
    weights: list[nn.Parameter] = []
    for x in layers:
        weight = model.get_submodule(x.name).weight
        size = math.prod(shapes[x.name])
        accumulator = flat[position:position + size].view(shapes[x.name])
        position += size

        def take(parameter: Tensor, accumulator: Tensor = accumulator) -> None:
            assert parameter.grad is not None
            accumulator.add_(parameter.grad.to("cpu", torch.float32))
            parameter.grad = None

        weights.append(weight)
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(take))
    try:
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.detach())
        flat.div_(len(values))
    finally:
        for handle, weight in zip(handles, weights, strict=True):
            handle.remove()
            weight.requires_grad_(False)
    index = {"shapes": shapes, "batches": len(values), "loss": float(torch.stack(values).double().mean())}
    (folder / "index.json").write_text(json.dumps(index), encoding="utf-8")


def cached(key: str, make: Callable[[Path], None]) -> StoredGradients:
    """The estimate stored under `key`, made by `make(folder)` if it is not there; made once even when several
    processes ask at the same time."""
    root = paths.cache() / "gradients"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / key
    with FileLock(root / f".{key}.lock"):
        if not (folder / "index.json").exists():
            scratch = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=root))
            try:
                make(scratch)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return StoredGradients(folder)
