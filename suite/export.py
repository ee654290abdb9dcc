"""A run's trained weights in forms that others read: a peft adapter, a merged checkpoint, a sparse or tensor-train change
of the base with its loader, the method's own tensors.

None of them needs this project to be loaded again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from suite import bases, paths, records, registry, sparse_form, tensor_form
from suite.errors import UserError, one_of
from suite.method import Method
from suite.packing import Packed
from suite.records import Record

#: What stock peft calls a low-rank adapter's tensors.
_PEFT_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def find(run: str) -> Record:
    """The record of a run by id or by an unambiguous beginning of it. Raises `UserError` when there is none."""
    found = sorted(path.name for path in paths.runs().glob(f"{run}*") if (path / "record.json").exists()) if run else []
    if len(found) != 1:
        what = f"{len(found)} runs begin with it" if found else "no such run has a record"
        raise UserError(f"run {run!r}: {what} in {paths.runs()}; `suite status STUDY --json` lists ids")
    record = records.load(found[0])
    assert record is not None
    return record


def export(run: str, form: str, folder: Path | None = None) -> tuple[Record, Path]:
    """Write a run in a form (`FORMS`) into a folder (None: `RUN-FORM` here); returns its record and the folder.

    A classification run's task head (mean pooling, then a linear layer) has no place in these forms: it is written
    beside them as `head.safetensors`, with `head.json` saying how to use it.

    Raises `UserError` for an unknown form or run, when the run kept nothing, and when the form does not fit its method.
    """
    from suite.worker import Worker

    if form not in FORMS:
        raise UserError(f"--format {form}: use {one_of(FORMS)}")
    record = find(run)
    folder = folder or Path(f"{record.id}-{form}")
    packed, loaded = Worker().revive(record)
    try:
        with torch.no_grad():
            FORMS[form](record, packed, loaded, folder)
            _head(record, packed, folder)
    finally:
        packed.detach()
    return record, folder


def _peft(record: Record, packed: Packed, loaded: bases.LoadedBase, folder: Path) -> None:
    """`adapter_config.json` and `adapter_model.safetensors`, which stock peft loads on the run's base."""
    from safetensors.torch import save_file

    method = packed.method
    if method.trains == "foreign":
        foreign: Any = packed.model
        foreign.save_pretrained(str(folder))
        return
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for layer, adapter in packed.adapters.items():
        pair = adapter.factors(0)
        state = adapter.state(0) if pair is None else {"A": pair[0], "B": pair[1]}
        if set(state) - set(_PEFT_NAMES) or "A" not in state:
            raise _unfit(record, method, "a LoRA", "merged or own")
        ranks[layer] = state["A"].shape[0]
        if ranks[layer]:
            tensors |= {f"base_model.model.{layer}.{_PEFT_NAMES[name]}": tensor.cpu().float().contiguous()
                        for name, tensor in state.items()}
    if not tensors:
        raise _unfit(record, method, "a LoRA", "merged or own")
    fields = method.peft_config(packed.starts[0].config, packed.shapes, packed.starts[0].prepared)
    if fields is None:  # `factors` have the scale in B: alpha is each layer's rank
        kept = {layer: rank for layer, rank in ranks.items() if rank}
        fields = {"r": max(kept.values()), "lora_alpha": max(kept.values()), "use_rslora": False,
                  "target_modules": list(kept), "rank_pattern": kept, "alpha_pattern": kept}
    folder.mkdir(parents=True, exist_ok=True)
    _lora_config(fields, loaded.base, conv1d=any(_is_conv1d(packed, layer) for layer in ranks)).save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _merged(record: Record, packed: Packed, loaded: bases.LoadedBase, folder: Path) -> None:
    """A Hugging Face checkpoint with the run's change added to the base's weights, and the tokenizer."""
    if packed.method.trains == "foreign":
        foreign: Any = packed.model
        _checkpoint(foreign.merge_and_unload(), loaded, folder)
    elif packed.method.trains == "adapter" and not packed.mergeable:
        raise _unfit(record, packed.method, "a change of W", "own")
    else:
        with packed.merged(0) as model:
            _checkpoint(model, loaded, folder)


def _own(record: Record, packed: Packed, loaded: bases.LoadedBase, folder: Path) -> None:
    """The method's own tensors by layer (`adapter.safetensors`) and what made them (`run.json`)."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = packed.state(0) | packed.constants(0)
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items() if not name.startswith("head.")},
              folder / "adapter.safetensors")
    (folder / "run.json").write_text(record.spec.model_dump_json(indent=1), encoding="utf-8")


def _sparse(record: Record, packed: Packed, loaded: bases.LoadedBase, folder: Path) -> None:
    """`sparse.safetensors`, the changed entries of the base's weights, and `sparse_form.py`, which applies it."""
    shapes = {layer.name: (layer.out_features, layer.in_features) for layer in packed.shapes.layers}
    deltas = sparse_form.of_state(packed.state(0) | packed.constants(0), shapes)
    if not deltas:
        raise _unfit(record, packed.method, "a change of few entries", "peft, merged or own")
    folder.mkdir(parents=True, exist_ok=True)
    sparse_form.save(deltas, folder / "sparse.safetensors")
    shutil.copy(sparse_form.__file__, folder)


def _tensor(record: Record, packed: Packed, loaded: bases.LoadedBase, folder: Path) -> None:
    """`tensor.safetensors`, trained cores and those they started from, and `tensor_form.py`, which applies it."""
    state = packed.state(0) | packed.constants(0)
    if not all(f"{layer}.core1" in state for layer in packed.adapters) or not packed.adapters:
        raise _unfit(record, packed.method, "a tensor train", "peft, merged or own")
    config = packed.starts[0].config
    nf4 = {"block": config.block, "double": config.double_quantisation} if packed.method.frees_weights else None
    folder.mkdir(parents=True, exist_ok=True)
    tensor_form.save(state, list(packed.adapters), folder / "tensor.safetensors", nf4)
    shutil.copy(tensor_form.__file__, folder)


FORMS: dict[str, Callable[[Record, Packed, bases.LoadedBase, Path], None]] = {
    "peft": _peft, "merged": _merged, "sparse": _sparse, "tensor": _tensor, "own": _own,
}


def _checkpoint(model: Any, loaded: bases.LoadedBase, folder: Path) -> None:
    model.save_pretrained(str(folder))
    loaded.tokenizer.save_pretrained(str(folder))


def _head(record: Record, packed: Packed, folder: Path) -> None:
    from safetensors.torch import save_file

    if packed.head is None:
        return
    task = registry.task(record.spec.task.id)
    save_file({name: tensor.cpu().contiguous() for name, tensor in packed.head.state(0).items()},
              folder / "head.safetensors")
    said = {"labels": task.labels, "pooling": "mean over real tokens of the last hidden state",
            "logits": "weight @ pooled + bias", "task": task.id}
    (folder / "head.json").write_text(json.dumps(said, indent=1), encoding="utf-8")


def _lora_config(fields: dict[str, Any], base: bases.Base, conv1d: bool) -> Any:
    from peft import LoraConfig

    place: dict[str, Any] = {"base_model_name_or_path": base.hub or base.path or base.id,
                             "revision": base.revision if base.hub else None}
    kind = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(base.kind)
    return LoraConfig(**fields, **place, task_type=kind, inference_mode=True, fan_in_fan_out=conv1d)


def _is_conv1d(packed: Packed, layer: str) -> bool:
    return not isinstance(packed.model.get_submodule(layer).base, torch.nn.Linear)


def _unfit(record: Record, method: Method[Any], what: str, instead: str) -> UserError:
    return UserError(f"run {record.id}: {method.label} is not {what}, so it cannot be written like that; "
                     f"use --format {instead}")
