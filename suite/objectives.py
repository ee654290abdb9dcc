"""From a batch to one loss per run, for the two kinds of base that train here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from suite.batches import Batch
from suite.packing import Head, wide

#: Logits that exist at once, tokens times vocabulary: 128 MiB in float32.
CHUNK = 2**25


def classify(model: Any, head: Head, batch: Batch) -> Tensor:
    """Logits `[runs, batch, classes]`: encoder, mean over real tokens, head of each run."""
    hidden = model(input_ids=batch.tokens, attention_mask=batch.mask).last_hidden_state
    hidden = hidden[:, -batch.tokens.shape[1]:]  # a tuner of peft may put virtual tokens in front
    hidden = hidden.to(wide(hidden.dtype))
    weights = batch.mask.unsqueeze(-1).to(hidden.dtype)
    return head((hidden * weights).sum(1) / weights.sum(1))


def classification_loss(model: Any, head: Head, batch: Batch) -> Tensor:
    """Mean cross-entropy of each run over its items, `[runs]`."""
    return item_losses(classify(model, head, batch), batch.labels).mean(1)


def item_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of every item, `[runs, items]`, from logits `[runs, items, classes]` and labels `[runs, items]`."""
    logits = logits.to(wide(logits.dtype))
    losses = functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="none")
    return losses.view(labels.shape)


def language_loss(model: Any, runs: int, batch: Batch) -> Tensor:
    """Mean cross-entropy of each run over its target tokens, `[runs]`.

    The vocabulary is only ever visited at positions that carry loss, and at `CHUNK` logits at a time.
    """
    hidden = _last_hidden(model, batch)
    targets = batch.labels[:, 1:]
    carries = targets != -100
    losses = token_losses(model.get_output_embeddings(), hidden[:, :-1][carries], targets[carries])
    run_of = torch.arange(runs, device=losses.device).repeat_interleave(targets.shape[0] // runs)
    owner = run_of[:, None].expand_as(targets)[carries]
    sums = losses.new_zeros(runs).index_add(0, owner, losses)
    counts = losses.new_zeros(runs).index_add(0, owner, torch.ones_like(losses))
    return sums / counts.clamp(min=1)


def token_losses(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every token under the output head, `[tokens]`, for `hidden [tokens, hidden]`, `targets [tokens]`.

    Where all logits are more than `CHUNK`, they are made and dropped chunk by chunk. A frozen head's gradient is taken
    right there; a trained head's logits are made a second time in the backward pass.
    """
    weight = head.weight
    assert isinstance(weight, Tensor)
    rows = max(1, CHUNK // weight.shape[0])
    if len(targets) <= rows:
        return _at_once(head, hidden, targets)
    if torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in head.parameters()):
        losses: Tensor = _Chunked.apply(hidden, targets, head, rows)
        return losses
    pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(_at_once, head, *piece, use_reentrant=False) for piece in pieces])


def _at_once(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden)
    return functional.cross_entropy(logits.to(wide(logits.dtype)), targets, reduction="none")


class _Chunked(torch.autograd.Function):
    """Losses of tokens under a frozen head. A token's loss hangs on its own hidden state alone, so what is kept for the
    backward pass is one gradient per token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: nn.Module, rows: int) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for piece, wanted in zip(hidden.split(rows), targets.split(rows), strict=True):
            with torch.enable_grad():
                own = piece.detach().requires_grad_()
                loss = _at_once(head, own, wanted)
                gradients.append(*torch.autograd.grad(loss.sum(), own))
            losses.append(loss.detach())
        ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * upstream[0].to(gradients.dtype)[:, None], None, None, None


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
