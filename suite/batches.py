"""Tokenised items and the order in which a run sees them.

The order depends on the task, its items and the run's seed, never on the method or the pack: every method sees the
same batches, so comparisons are paired. Batches are made of items of like length, so little is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from suite.method import seeded
from suite.task import Item

#: Items are sorted by length inside windows of this many batches: enough to pad little, few enough to stay random.
WINDOW = 16


@dataclass(frozen=True)
class Encoded:
    """One tokenised item. `target` counts the tokens at the end that carry loss (generation); `label` otherwise."""

    tokens: list[int]
    target: int = 0
    label: int = -1


@dataclass(frozen=True)
class EncodedSet:
    """Tokenised items, the pad token, and how many items were cut to the maximum length."""

    items: list[Encoded]
    pad: int
    truncated: int

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class Batch:
    """`tokens`, `mask` `[runs · batch, length]`, run-major. `labels` is `[runs, batch]` for classification; for
    generation `[runs · batch, length]` with -100 where there is no loss. `real` counts unpadded tokens."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    real: int

    @property
    def positions(self) -> int:
        """Computed positions, padding included."""
        return self.tokens.numel()


def encode(tokenizer: Any, items: Sequence[Item], max_length: int, generation: bool) -> EncodedSet:
    """Tokenise items. Classification: the tokenizer's own special tokens. Generation: prompt, target, end token; a
    prompt that is too long loses its beginning, so that the question's end and the answer stay; a target that
    is too long by itself loses its end."""
    encoded: list[Encoded] = []
    truncated = 0
    for item in items:
        if generation:
            prompt = tokenizer(item.text, add_special_tokens=False).input_ids
            target = [*tokenizer(item.target, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            room = max(0, max_length - len(target))
            truncated += len(prompt) + len(target) > max_length
            target = target[:max_length]
            encoded.append(Encoded(prompt[max(0, len(prompt) - room):] + target, target=len(target)))
        else:
            tokens = tokenizer(item.text, item.pair, truncation=True, max_length=max_length + 1).input_ids
            if len(tokens) > max_length:
                truncated += 1
                tokens = tokenizer(item.text, item.pair, truncation=True, max_length=max_length).input_ids
            assert item.label is not None
            encoded.append(Encoded(tokens, label=item.label))
    return EncodedSet(encoded, tokenizer.pad_token_id or 0, truncated)


def training_order(data: EncodedSet, batch_size: int, epochs: int, seed: object) -> list[list[int]]:
    """Indices of each training batch. Every epoch visits every item once; a short last batch is kept."""
    batches: list[list[int]] = []
    for epoch in range(epochs):
        generator = seeded("order", seed, epoch)
        shuffled = torch.randperm(len(data), generator=generator).tolist()
        groups: list[list[int]] = []
        for start in range(0, len(shuffled), WINDOW * batch_size):
            window = sorted(shuffled[start:start + WINDOW * batch_size], key=lambda i: len(data.items[i].tokens))
            groups.extend(window[i:i + batch_size] for i in range(0, len(window), batch_size))
        # All runs of a pack need batches of equal size at every step: only full ones are shuffled.
        full = [group for group in groups if len(group) == batch_size]
        short = [group for group in groups if len(group) < batch_size]
        batches.extend(full[i] for i in torch.randperm(len(full), generator=generator).tolist())
        batches.extend(short)
    return batches


def scoring_order(data: EncodedSet, batch_size: int) -> list[list[int]]:
    """Indices of each scoring batch, longest first, so that too large a batch shows at once."""
    order = sorted(range(len(data)), key=lambda i: -len(data.items[i].tokens))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def collate(data: EncodedSet, indices: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """One batch from the items of each run, `indices [runs][batch]`, padded on the right to the longest."""
    chosen = [data.items[i] for run in indices for i in run]
    length = max(len(item.tokens) for item in chosen)
    tokens = torch.full((len(chosen), length), data.pad)
    mask = torch.zeros(len(chosen), length, dtype=torch.long)
    generation = chosen[0].target > 0
    labels = torch.full((len(chosen), length), -100) if generation else torch.tensor([i.label for i in chosen])
    real = 0
    for row, item in enumerate(chosen):
        size = len(item.tokens)
        tokens[row, :size] = torch.tensor(item.tokens)
        mask[row, :size] = 1
        real += size
        if generation:
            labels[row, size - item.target:size] = tokens[row, size - item.target:size]
    if not generation:
        labels = labels.view(len(indices), -1)
    return Batch(tokens.to(device), mask.to(device), labels.to(device), real)
