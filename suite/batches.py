"""Tokenised items and the order in which a run sees them.

The order depends on the task, its items and the run's seed, never on the method or the pack: every method sees the
same batches, so comparisons are paired. Batches are made of items of like length, so little is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from suite.bases import Kind
from suite.method import seeded
from suite.task import Item, Task

#: What carries the loss of an item: its label, the end of its tokens, or an answer of its own.
Form = Literal["label", "continuation", "answer"]

#: Items are sorted by length inside windows of this many batches: enough to pad little, few enough to stay random.
WINDOW = 16


@dataclass(frozen=True)
class Encoded:
    """One tokenised item. What carries loss: the last `target` tokens, the tokens of `answer`, or else the `label`."""

    tokens: list[int]
    target: int = 0
    label: int = -1
    answer: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Tokens that are read or written."""
        return len(self.tokens) + len(self.answer)

    @property
    def losses(self) -> int:
        """Losses whose mean is the loss of a batch: a label has one, a text one for each target token with one before it."""
        if self.target:
            return min(self.target, len(self.tokens) - 1)
        return len(self.answer) or 1


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
    """`tokens`, `mask` `[runs · batch, length]`, run-major. `labels` is `[runs, batch]` for a task head, and -100 where
    there is no loss otherwise: `[runs · batch, length]` for a continuation, `[runs · batch, longest answer]` for an answer.
    `real` counts unpadded tokens, `positions` computed ones, padding included."""

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    real: int
    positions: int


def form_of(base: Kind) -> Form:
    """How items are put to a kind of base: an encoder labels them, a causal base continues them, a sequence-to-sequence
    base answers them."""
    forms: dict[Kind, Form] = {"encoder": "label", "causal": "continuation", "seq2seq": "answer"}
    return forms[base]


def spelled(base: Kind, task: Task, items: Sequence[Item]) -> Sequence[Item]:
    """Items as a kind of base reads them: where a base of text meets a classification task, the prompt of the task and the
    word of the label in place of text and label."""
    if base == "encoder" or task.kind != "classification":
        return items
    return [replace(item, text=task.prompt(item), pair=None, target=task.answer(item)) for item in items]


def encode(tokenizer: Any, items: Sequence[Item], max_length: int, form: Form) -> EncodedSet:
    """Tokenise items.

    Label: text and pair with the tokenizer's own special tokens. Continuation: prompt, target, end token; a prompt that is
    too long loses its beginning, so that the question's end and the answer stay; a target that is too long by itself loses
    its end. Answer: prompt, and target, each with the tokenizer's own end, each cut to `max_length`, the prompt at its
    beginning.
    """
    encoded: list[Encoded] = []
    truncated = 0
    for item in items:
        if form == "answer":
            prompt, answer = tokenizer(item.text).input_ids, tokenizer(text_target=item.target).input_ids
            truncated += max(len(prompt), len(answer)) > max_length
            encoded.append(Encoded(prompt[max(0, len(prompt) - max_length):], answer=tuple(answer[:max_length])))
        elif form == "continuation":
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
            window = sorted(shuffled[start:start + WINDOW * batch_size], key=lambda i: data.items[i].size)
            groups.extend(window[i:i + batch_size] for i in range(0, len(window), batch_size))
        # All runs of a pack need batches of equal size at every step: only full ones are shuffled.
        full = [group for group in groups if len(group) == batch_size]
        short = [group for group in groups if len(group) < batch_size]
        batches.extend(full[i] for i in torch.randperm(len(full), generator=generator).tolist())
        batches.extend(short)
    return batches


def scoring_order(data: EncodedSet, batch_size: int) -> list[list[int]]:
    """Indices of each scoring batch, longest first, so that too large a batch shows at once."""
    order = sorted(range(len(data)), key=lambda i: -data.items[i].size)
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def collate(data: EncodedSet, indices: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """One batch from the items of each run, `indices [runs][batch]`, padded on the right to the longest."""
    chosen = [data.items[i] for run in indices for i in run]
    length = max(len(item.tokens) for item in chosen)
    written = max(len(item.answer) for item in chosen)
    tokens = torch.full((len(chosen), length), data.pad)
    mask = torch.zeros(len(chosen), length, dtype=torch.long)
    continues = chosen[0].target > 0
    labels = torch.full((len(chosen), written or length), -100)
    if not continues and not written:
        labels = torch.tensor([item.label for item in chosen]).view(len(indices), -1)
    real = 0
    for row, item in enumerate(chosen):
        size = len(item.tokens)
        tokens[row, :size] = torch.tensor(item.tokens)
        mask[row, :size] = 1
        real += item.size
        if written:
            labels[row, :len(item.answer)] = torch.tensor(item.answer)
        elif continues:
            labels[row, size - item.target:size] = tokens[row, size - item.target:size]
    positions = len(chosen) * (length + written)
    return Batch(tokens.to(device), mask.to(device), labels.to(device), real, positions)
