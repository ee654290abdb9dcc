"""Activation checkpointing: the blocks of a base keep their inputs alone and are computed again in the backward pass.

A third more arithmetic, for activations of one block in place of all (Chen et al. 2016, arXiv 1604.06174). The numbers are
the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While this lasts, every block of a transformers model that is built for it is computed twice, where `wanted`.

    Raises `ValueError` when the model has no such block.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    if wanted and not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks that can be computed again")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own is seen again
