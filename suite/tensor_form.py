"""Trained tensor trains of a model's weights, as a file that `torch` and `safetensors` alone can read and apply.

    apply_to(AutoModel.from_pretrained(...), "tensor.safetensors")

For every changed layer the file holds the cores `LAYER.core1` ... `LAYER.coreN`, each `[r_(k-1), o_k, i_k, r_k]` with
r_0 = r_N = 1, and, where training started from a decomposition of the weight itself, the cores it started from,
`LAYER.initial1` ... . The weight becomes

    W + MPO(core) - MPO(initial)         MPO(T)[o_1 .. o_N, i_1 .. i_N] = Σ over r  Π_k T_k[r_(k-1), o_k, i_k, r_k]

A file of a run whose frozen part was held in four bits says so in its metadata (`nf4`: the block size, and whether its
magnitudes were quantised too). The weight then becomes NF4(W - MPO(initial)) + MPO(core), dense, which takes bitsandbytes.
This module needs nothing of the suite: it can be copied beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "tensor-train-1"
KINDS = ("core", "initial")


def save(state: Mapping[str, Tensor], layers: Sequence[str], file: str | PathLike[str],
         nf4: Mapping[str, Any] | None = None) -> None:
    """Write the cores of layers, by module path, among a run's saved tensors.

    `nf4`: `{"block": 64, "double": true}` when the frozen part was quantised. Raises `ValueError` for a layer without
    cores, or whose cores do not fit each other.
    """
    tensors: dict[str, Tensor] = {}
    for name in layers:
        found = _of_layer(name, state)
        for kind, cores in found.items():
            _check(name, cores)
            tensors |= {f"{name}.{kind}{k + 1}": core.detach().cpu().contiguous() for k, core in enumerate(cores)}
    save_file(tensors, file, metadata={"format": FORMAT, "layers": json.dumps(list(layers)), "nf4": json.dumps(nf4)})


@torch.no_grad()
def apply_to(model: nn.Module, file: str | PathLike[str]) -> list[str]:
    """Put the changes in a file into a model's weights, in place, and return the names of the changed layers.

    Computes in float32 or wider and casts to the weight's type once. Works on `nn.Linear` and on GPT-2's `Conv1D`, which
    stores its weight as `[in, out]`. Applied twice, changes count twice. Raises `ValueError`, with the model as it was,
    when the file is of another format, or a layer is missing, of another shape or of another kind.
    """
    with safe_open(file, framework="pt") as content:
        told = content.metadata() or {}
        if told.get("format") != FORMAT:
            raise ValueError(f"{file}: is no {FORMAT} file (format {told.get('format')!r})")
        state = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (no mapping)
    layers = {name: _of_layer(name, state) for name in json.loads(told["layers"])}
    nf4 = json.loads(told["nf4"])
    weights = {name: _weight(model, name, shape_of(found["core"])) for name, found in layers.items()}
    for name, found in layers.items():
        weight = weights[name]
        now, then = (matrix(found[kind]).to(weight.device) if found.get(kind) else None for kind in KINDS)
        assert now is not None  # `_of_layer`
        W = weight.to(torch.promote_types(weight.dtype, now.dtype))
        frozen = W if then is None else W - then
        weight.copy_((_through_nf4(frozen, **nf4) if nf4 else frozen) + now)
    return list(layers)


def matrix(cores: Sequence[Tensor]) -> Tensor:
    """MPO(T) `[out, in]` of cores `[r_(k-1), o_k, i_k, r_k]`, contracted from left to right."""
    left = cores[0][0]  # [rows so far, columns so far, bond]
    for core in cores[1:]:
        product = torch.einsum("abr,rois->aobis", left, core)
        left = product.reshape(left.shape[0] * core.shape[1], left.shape[1] * core.shape[2], core.shape[3])
    return left[..., 0]


def shape_of(cores: Sequence[Tensor]) -> tuple[int, int]:
    """`(out, in)` of the matrix that cores stand for."""
    out = inside = 1
    for core in cores:
        out, inside = out * core.shape[1], inside * core.shape[2]
    return out, inside


def _of_layer(name: str, state: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for kind, cores in found.items():
        while f"{name}.{kind}{len(cores) + 1}" in state:
            cores.append(state[f"{name}.{kind}{len(cores) + 1}"])
    if not found["core"]:
        raise ValueError(f"layer {name}: has no cores")
    return {kind: cores for kind, cores in found.items() if cores}


def _check(name: str, cores: Sequence[Tensor]) -> None:
    left, right = [core.shape[0] for core in cores], [core.shape[-1] for core in cores]
    if any(core.ndim != 4 for core in cores) or [1, *right] != [*left, 1]:
        raise ValueError(f"layer {name}: cores {[tuple(core.shape) for core in cores]} do not make a matrix")


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


def _through_nf4(W: Tensor, block: int, double: bool) -> Tensor:
    """What is left of W after NF4 and back. One row is quantised: bitsandbytes' blocks then never meet a row's end."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    row = W.float().reshape(1, -1)
    codes, statistics = quantize_4bit(row, blocksize=block, quant_type="nf4", compress_statistics=double)
    return dequantize_4bit(codes, statistics).view(W.shape).to(W.dtype)
