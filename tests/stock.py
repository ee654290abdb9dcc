"""The same adapters in stock `peft`, on a fresh copy of the same tiny model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import Tensor

from tests import tiny

NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector.weight"}


def attach(arch: str, fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> tiny.Tiny:
    """A tiny base that carries peft's LoRA of these config fields, with the factors of one of our runs."""
    base = tiny.build(arch)
    wrapped = get_peft_model(base.model, LoraConfig(**fields, lora_dropout=0.0, bias="none", fan_in_fan_out=arch == "gpt2"))
    theirs = {f"base_model.model.{stock_name(name)}": tensor for name, tensor in state.items()
              if not name.startswith("head.") and tensor.numel()}
    loaded = set_peft_model_state_dict(wrapped, theirs)
    assert not loaded.unexpected_keys
    assert not any("lora" in key for key in loaded.missing_keys)
    assert wrapped.get_nb_trainable_parameters()[0] == sum(tensor.numel() for tensor in theirs.values())
    return base


def parameters(base: tiny.Tiny) -> dict[str, Tensor]:
    """peft's factors by our names."""
    ours = {theirs: name for name, theirs in NAMES.items()}
    found = {}
    for name, parameter in base.model.named_parameters():
        if "lora_" in name:
            layer, _, kind = name.replace(".default.", ".").rpartition(".lora_")
            found[f"{layer}.{ours['lora_' + kind]}"] = parameter
    return found


def stock_name(name: str) -> str:
    layer, _, short = name.rpartition(".")
    return f"{layer}.{NAMES[short]}"
