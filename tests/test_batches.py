"""Tokenising, order, and collating."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from suite.batches import WINDOW, Encoded, EncodedSet, collate, encode, scoring_order, training_order
from suite.task import Item
from tests import tiny

WORDS = [f"w{i}" for i in range(20)]


def sized(lengths: list[int]) -> EncodedSet:
    """Items of these lengths; item i is made of the token i + 1."""
    return EncodedSet([Encoded([i + 1] * size, label=i % 3) for i, size in enumerate(lengths)], 0, 0)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=120)
small = st.integers(1, 9)


@given(lengths=lengths, batch_size=small, epochs=st.integers(1, 3), seed=st.integers(0, 2**40))
def test_every_epoch_visits_every_item_once(lengths: list[int], batch_size: int, epochs: int,
                                            seed: int) -> None:
    order = training_order(sized(lengths), batch_size, epochs, seed)
    steps = -(-len(lengths) // batch_size)
    assert len(order) == steps * epochs
    for epoch in range(epochs):
        batches = order[epoch * steps:(epoch + 1) * steps]
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))


@given(lengths=lengths, batch_size=small, epochs=st.integers(1, 3),
       seeds=st.lists(st.integers(0, 99), min_size=2, max_size=5))
def test_batches_of_all_seeds_have_equal_sizes_at_every_step(lengths: list[int], batch_size: int, epochs: int,
                                                             seeds: list[int]) -> None:
    orders = [training_order(sized(lengths), batch_size, epochs, seed) for seed in seeds]
    sizes = [[len(batch) for batch in order] for order in orders]
    assert all(found == sizes[0] for found in sizes)
    assert all(size <= batch_size for size in sizes[0])


@given(lengths=st.lists(st.integers(1, 40), min_size=30, max_size=60), seed=st.integers(0, 2**40))
def test_order_depends_on_seed_and_lengths_alone(lengths: list[int], seed: int) -> None:
    data = sized(lengths)
    others = EncodedSet([Encoded([7] * size, target=1) for size in lengths], pad=3, truncated=5)
    torch.manual_seed(seed % 1000)
    first = training_order(data, 4, 2, seed)
    torch.manual_seed(0)
    assert training_order(others, 4, 2, seed) == first
    assert training_order(data, 4, 2, seed + 1) != first
    assert training_order(data, 4, 1, seed) == first[:len(first) // 2]
    assert first[:len(first) // 2] != first[len(first) // 2:]


@given(lengths=lengths, batch_size=small, seed=st.integers(0, 99))
def test_a_batch_holds_items_of_like_length(lengths: list[int], batch_size: int, seed: int) -> None:
    """Inside one window, batches cut the sorted lengths: no two of them overlap."""
    lengths = lengths[:WINDOW * batch_size]
    order = training_order(sized(lengths), batch_size, 1, seed)
    spans = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in order)
    assert all(shorter[1] <= longer[0] for shorter, longer in itertools.pairwise(spans))


@given(lengths=lengths, batch_size=small)
def test_scoring_visits_every_item_once_longest_first(lengths: list[int], batch_size: int) -> None:
    order = scoring_order(sized(lengths), batch_size)
    flat = [i for batch in order for i in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in order[:-1])


@given(data=st.data(), runs=st.integers(1, 3), size=st.integers(1, 4), generation=st.booleans())
def test_collate_is_run_major_and_padded_on_the_right(data: st.DataObject, runs: int, size: int,
                                                      generation: bool) -> None:
    items = tiny.data(generation, items=20, seed=data.draw(st.integers(0, 50)))
    index = st.lists(st.integers(0, 19), min_size=size, max_size=size)
    indices = [data.draw(index) for _ in range(runs)]
    batch = collate(items, indices, tiny.CPU)
    chosen = [items.items[i] for run in indices for i in run]
    longest = max(len(item.tokens) for item in chosen)
    assert batch.tokens.shape == batch.mask.shape == (runs * size, longest)
    assert batch.positions == runs * size * longest
    assert batch.real == int(batch.mask.sum()) == sum(len(item.tokens) for item in chosen)
    for row, item in enumerate(chosen):
        padding = longest - len(item.tokens)
        assert batch.tokens[row].tolist() == item.tokens + [items.pad] * padding
        assert batch.mask[row].tolist() == [1] * len(item.tokens) + [0] * padding
        if generation:
            silent = len(item.tokens) - item.target
            expected = [-100] * silent + item.tokens[silent:] + [-100] * padding
            assert batch.labels[row].tolist() == expected
    if not generation:
        assert batch.labels.tolist() == [[items.items[i].label for i in run] for run in indices]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A real word tokenizer that frames texts as BERT does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "</s>", *WORDS]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="</s>",
                                   unk_token="[UNK]")


def words(tokenizer: Any, item: Encoded) -> str:
    return " ".join(tokenizer.convert_ids_to_tokens(item.tokens))


def texts(count: int) -> str:
    return " ".join(WORDS[:count])


def test_classification_keeps_the_tokenizers_frame_and_counts_what_was_cut(tokenizer: Any) -> None:
    items = [Item("a", texts(2), label=1), Item("b", texts(4), label=0), Item("c", texts(5), label=2),
             Item("d", texts(2), pair="w7 w8 w9", label=0)]
    found = encode(tokenizer, items, 6, form="label")
    assert [words(tokenizer, item) for item in found.items] == [
        "[CLS] w0 w1 [SEP]", "[CLS] w0 w1 w2 w3 [SEP]",
        "[CLS] w0 w1 w2 w3 [SEP]", "[CLS] w0 [SEP] w7 w8 [SEP]"]
    assert found.truncated == 2
    assert [item.label for item in found.items] == [1, 0, 2, 0]
    assert all(item.target == 0 for item in found.items)
    assert found.pad == tokenizer.pad_token_id
    assert len(found) == 4


def test_generation_cuts_the_beginning_of_a_long_prompt_and_keeps_the_target(tokenizer: Any) -> None:
    items = [Item("a", texts(2), target="w8 w9"), Item("b", texts(3), target="w8 w9"),
             Item("c", texts(9), target="w8 w9")]
    found = encode(tokenizer, items, 6, form="continuation")
    assert [words(tokenizer, item) for item in found.items] == [
        "w0 w1 w8 w9 </s>", "w0 w1 w2 w8 w9 </s>", "w6 w7 w8 w8 w9 </s>"]
    assert [item.target for item in found.items] == [3, 3, 3]
    assert found.truncated == 1


def test_a_target_that_is_too_long_by_itself_loses_its_end(tokenizer: Any) -> None:
    items = [Item("a", "w0", target="w1 w2 w3 w4"), Item("b", "", target="w1 w2 w3"),
             Item("c", "", target="w1 w2")]
    found = encode(tokenizer, items, 3, form="continuation")
    assert [words(tokenizer, item) for item in found.items] == ["w1 w2 w3", "w1 w2 w3", "w1 w2 </s>"]
    assert found.truncated == 2


@given(prompt=st.integers(0, 20), target=st.integers(0, 20), most=st.integers(1, 30))
def test_no_item_is_longer_than_the_maximum(tokenizer: Any, prompt: int, target: int, most: int) -> None:
    found = encode(tokenizer, [Item("a", texts(prompt), target=texts(target))], most, form="continuation")
    assert len(found.items[0].tokens) == min(most, prompt + target + 1)
    assert found.items[0].target == min(most, target + 1)
    assert found.truncated == (prompt + target + 1 > most)
