"""Changes of few entries of a model's weights, as a file that `torch` and `safetensors` alone can read and apply.

    apply_to(AutoModel.from_pretrained(...), "sparse.safetensors")

For every changed layer the file holds `LAYER.indices`, int32, sorted, flat into the layer's weight as `[out, in]`, and
`LAYER.values`, what is added there. The metadata has the format's name and, under `shapes`, each layer's `[out, in]` as
JSON. This module needs nothing of the suite: it can be copied beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "sparse-delta-1"


@dataclass(frozen=True)
class SparseDelta:
    """What is added to one weight `[out, in]`: `values [n]` at the flat `indices [n]`."""

    shape: tuple[int, int]
    indices: Tensor
    values: Tensor


def save(deltas: Mapping[str, SparseDelta], file: str | PathLike[str]) -> None:
    """Write the changes of layers, by module path.

    Raises `ValueError` for indices that stand twice or outside their weight, or are not as many as the values.
    """
    tensors: dict[str, Tensor] = {}
    for name, delta in deltas.items():
        indices, order = delta.indices.cpu().long().sort()
        _check(name, delta, indices)
        tensors[f"{name}.indices"] = indices.to(torch.int32)
        tensors[f"{name}.values"] = delta.values.detach().cpu()[order].contiguous()
    shapes = json.dumps({name: list(delta.shape) for name, delta in deltas.items()})
    save_file(tensors, file, metadata={"format": FORMAT, "shapes": shapes})


def load(file: str | PathLike[str]) -> dict[str, SparseDelta]:
    """What `save` wrote, on the CPU. Raises `ValueError` when the file is of another format."""
    with safe_open(file, framework="pt") as content:
        told = content.metadata() or {}
        if told.get("format") != FORMAT:
            raise ValueError(f"{file}: is no {FORMAT} file (format {told.get('format')!r})")
        shapes = {name: (rows, columns) for name, (rows, columns) in json.loads(told["shapes"]).items()}
        return of_state({key: content.get_tensor(key) for key in content.keys()}, shapes)  # noqa: SIM118 (no mapping)


def of_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]]) -> dict[str, SparseDelta]:
    """The changes among a run's saved tensors: of every layer in `shapes` that has both `indices` and `values`."""
    return {name: SparseDelta(shape, state[f"{name}.indices"], state[f"{name}.values"])
            for name, shape in shapes.items() if {f"{name}.indices", f"{name}.values"} <= state.keys()}


@torch.no_grad()
def apply_to(model: nn.Module, file: str | PathLike[str]) -> list[str]:
    """Add the changes in a file to a model's weights, in place, and return the names of the changed layers.

    Sums are formed in float32 or wider and cast to the weight's type once. Works on `nn.Linear` and on GPT-2's `Conv1D`,
    which stores its weight as `[in, out]`. Applied twice, changes count twice. Raises `ValueError`, with the model as it
    was, when a layer is missing, of another shape or of another kind.
    """
    deltas = load(file)
    weights = {name: _weight(model, name, delta.shape) for name, delta in deltas.items()}
    for name, delta in deltas.items():
        _check(name, delta, delta.indices)
    for name, delta in deltas.items():
        weight, flat = weights[name], delta.indices.long()
        where = tuple(part.to(weight.device) for part in (flat // delta.shape[1], flat % delta.shape[1]))
        old = weight[where]
        wide = torch.promote_types(old.dtype, delta.values.dtype)
        weight[where] = (old.to(wide) + delta.values.to(weight.device, wide)).to(old.dtype)
    return list(deltas)


def _weight(model: nn.Module, name: str, shape: tuple[int, int]) -> Tensor:
    """The weight of a layer as `[out, in]`, a view of the model's own."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no layer {name}") from None
    if isinstance(module, nn.Linear):
        weight: Tensor = module.weight
    elif type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
        weight = module.weight.mT
    else:
        raise ValueError(f"layer {name} is a {type(module).__name__}, not a linear layer")
    if tuple(weight.shape) != shape:
        raise ValueError(f"layer {name} is {' x '.join(map(str, weight.shape))}, the file's is {shape[0]} x {shape[1]}")
    return weight


def _check(name: str, delta: SparseDelta, indices: Tensor) -> None:
    """`indices`: the delta's, sorted."""
    if indices.shape != delta.values.shape or indices.ndim != 1:
        raise ValueError(f"layer {name}: {tuple(indices.shape)} indices for {tuple(delta.values.shape)} values")
    if len(indices) and (indices[0] < 0 or indices[-1] >= delta.shape[0] * delta.shape[1] or (indices.diff() <= 0).any()):
        raise ValueError(f"layer {name}: indices must lie inside {delta.shape[0]} x {delta.shape[1]}, each once")
