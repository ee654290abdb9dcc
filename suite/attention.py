"""Attention in float32 inside a bfloat16 model on a CPU.

torch's attention kernel for CPUs takes five times as long backward in bfloat16 as in float32 (docs/performance.md),
so queries, keys and values are widened for it and the result is rounded back.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

NAME = "sdpa_in_float32"


def widen(model: Any) -> None:
    """Make a model of transformers attend in float32. One that has attention of its own kind is left as it is."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
            position_bias: Tensor | None = None, **options: Any) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def wide(tensor: Tensor | None) -> Tensor | None:
        return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor

    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), wide(attention_mask),
                                       position_bias=wide(position_bias), **options)
    return output.to(query.dtype), None
