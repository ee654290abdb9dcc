"""Turn a run's trained adapter into an ordinary peft adapter that stock `peft` loads on the run's base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from suite import bases, records, registry
from suite.errors import UserError
from suite.records import Record

FORMATS = ("peft",)


def find(run: str) -> Record:
    """The record of a run by id or by an unambiguous beginning of it. Raises `UserError` when there is none."""
    from suite import paths

    found = sorted(path.name for path in paths.runs().glob(f"{run}*") if (path / "record.json").exists()) if run else []
    if len(found) != 1:
        what = f"{len(found)} runs begin with it" if found else "no such run has a record"
        raise UserError(f"run {run!r}: {what} in {paths.runs()}; `suite plan STUDY` and `suite status STUDY` list ids")
    record = records.load(found[0])
    assert record is not None
    return record


def to_peft(record: Record, folder: Path) -> Path:
    """Write `adapter_config.json` and `adapter_model.safetensors` into `folder`; returns it.

    A classification run's task head (mean pooling, then a linear layer) has no place in a peft LoRA: it is written
    beside the adapter as `head.safetensors`, with `head.json` saying how to use it.

    Raises `UserError` when the run left no adapter, or its method is no LoRA.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    spec = record.spec
    method, task, base = registry.method(spec.method.id), registry.task(spec.task.id), bases.get(spec.base.id)
    source = record.folder / "adapter.safetensors"
    if not source.exists():
        raise UserError(f"run {record.id}: it left no adapter (status {record.status}, method {method.label})")
    shapes = bases.shapes(base, task)
    config = method.Config.model_validate(spec.method.config)
    fields = method.peft_config(config, shapes, method.restore(record.prepare))
    if fields is None:
        raise UserError(f"run {record.id}: {method.label} is no LoRA, so it cannot be written as a peft adapter")
    state = load_file(source)
    named = {"A": "lora_A", "B": "lora_B"}
    adapter, head = {}, {}
    for name, tensor in state.items():
        layer, _, short = name.rpartition(".")
        if layer == "head":
            head[short] = tensor
        elif tensor.numel():
            adapter[f"base_model.model.{layer}.{named[short]}.weight"] = tensor.contiguous()
    place: dict[str, Any] = {"base_model_name_or_path": base.hub or base.path or base.id,
                             "revision": base.revision if base.hub else None}
    kind = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(base.kind)
    folder.mkdir(parents=True, exist_ok=True)
    LoraConfig(**fields, **place, task_type=kind, inference_mode=True).save_pretrained(str(folder))
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if head:
        save_file(head, folder / "head.safetensors")
        said = {"labels": task.labels, "pooling": "mean over real tokens of the last hidden state",
                "logits": "weight @ pooled + bias", "task": spec.task.id}
        (folder / "head.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return folder
