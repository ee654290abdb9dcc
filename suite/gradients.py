"""The mean loss gradient of every linear layer of a frozen base, without ever holding two layers' gradients.

A hook on each weight takes its gradient the moment it is complete, adds it to a file off the device, and
frees it. Only one layer of that file is mapped at a time. Beside the base, the pass needs the activations of
one batch, one layer's gradient and one layer's sum; the file itself lies in the page cache at most, which the
system may drop at any time.

The estimate depends on the base, the data and its own request only. It is made once per cell and kept on disk: a
folder with `gradients.f32` (raw float32, layer after layer) and `index.json`. Every rank, learning rate and run seed
reads the same file.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn

from suite import paths
from suite.method import Layer

FILE = "gradients.f32"


class StoredGradients(Mapping[str, Tensor]):
    """Gradients by layer name, `[out, in]` float32. A layer is mapped from disk, and costs memory, only while
    its tensor is held."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[str, Any] = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._start = _starts(self.index["shapes"])

    def __getitem__(self, name: str) -> Tensor:
        return _mapped(self.folder, self._start[name], self.index["shapes"][name], "c")

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
    starts = _starts(shapes)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / FILE, "wb") as file:
        size = 4 * sum(math.prod(shape) for shape in shapes.values())
        file.truncate(size)  # reads as zeros
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, and would kill the process later
    weights = {x.name: model.get_parameter(f"{x.name}.weight") for x in layers}
    transposed = {x.name: not isinstance(model.get_submodule(x.name), nn.Linear) for x in layers}  # GPT-2's Conv1D

    def keep(name: str) -> Callable[[Tensor], None]:
        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            gradient = weight.grad.mT if transposed[name] else weight.grad
            _mapped(folder, starts[name], shapes[name], "r+").add_(gradient.to("cpu", torch.float32))
            weight.grad = None

        return take

    handles = []
    try:
        for name, weight in weights.items():
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(keep(name)))
        values = []
        for loss in losses:
            loss.backward()
            values.append(loss.detach())
        for name, shape in shapes.items():
            _mapped(folder, starts[name], shape, "r+").div_(len(values))
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
            weight.grad = None
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
                paths.settle(*scratch.iterdir(), scratch)
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return StoredGradients(folder)


def _starts(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Where each layer begins in the file, in scalars."""
    sizes = [math.prod(shape) for shape in shapes.values()]
    return dict(zip(shapes, itertools.accumulate(sizes, initial=0), strict=False))


def _mapped(folder: Path, start: int, shape: Sequence[int], mode: Literal["r+", "c"]) -> Tensor:
    """One layer of the file, written through (`r+`) or not (`c`); unmapped when the tensor goes."""
    return torch.from_numpy(np.memmap(folder / FILE, np.float32, mode, offset=4 * start, shape=tuple(shape)))
