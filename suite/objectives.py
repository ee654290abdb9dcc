"""From a batch to one loss per run, for the two kinds of base that train here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from suite.batches import Batch
from suite.packing import Head, wide


def classify(model: Any, head: Head, batch: Batch) -> Tensor:
    """Logits `[runs, batch, classes]`: encoder, mean over real tokens, head of each run."""
    hidden = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    hidden = hidden[:, -batch.tokens.shape[1]:]  # a tuner of peft may put virtual tokens in front
    hidden = hidden.to(wide(hidden.dtype))
    weights = batch.mask.unsqueeze(-1).to(hidden.dtype)
    return head((hidden * weights).sum(1) / weights.sum(1))


def classification_loss(model: Any, head: Head, batch: Batch) -> Tensor:
    """Mean cross-entropy of each run over its items, `[runs]`."""
    logits = classify(model, head, batch)
    logits = logits.to(wide(logits.dtype))
    runs, items, classes = logits.shape
    losses = functional.cross_entropy(logits.reshape(-1, classes), batch.labels.reshape(-1), reduction="none")
    return losses.view(runs, items).mean(1)


def language_loss(model: Any, runs: int, batch: Batch) -> Tensor:
    """Mean cross-entropy of each run over its target tokens, `[runs]`.

    The vocabulary is only ever visited at positions that carry loss.
    """
    hidden = _last_hidden(model, batch)
    targets = batch.labels[:, 1:]
    carries = targets != -100
    logits = model.get_output_embeddings()(hidden[:, :-1][carries])
    losses = functional.cross_entropy(logits.to(wide(logits.dtype)), targets[carries], reduction="none")
    run_of = torch.arange(runs, device=losses.device).repeat_interleave(targets.shape[0] // runs)
    owner = run_of[:, None].expand_as(targets)[carries]
    sums = losses.new_zeros(runs).index_add(0, owner, losses)
    counts = losses.new_zeros(runs).index_add(0, owner, torch.ones_like(losses))
    return sums / counts.clamp(min=1)


def _last_hidden(model: Any, batch: Batch) -> Tensor:
    """What the output head of a causal model reads at the batch's positions, `[rows, length, hidden]`.

    A tuner of peft acts in its own forward, so there the whole model is called, with a head that hands on what it gets;
    and it may put virtual tokens in front.
    """
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    if not hasattr(model, "peft_config"):
        return model.base_model(**inputs, use_cache=False).last_hidden_state
    with _handing_on(model.get_output_embeddings()):
        return model(**inputs, use_cache=False).logits[:, -batch.tokens.shape[1]:]


@contextmanager
def _handing_on(head: Any) -> Iterator[None]:
    head.forward = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward  # the class's own is seen again
