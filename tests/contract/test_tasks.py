"""What every registered task must keep to. Plug-in authors may run this file over their own tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from suite import assets, data, registry
from suite.errors import UserError
from suite.specs import TaskRef
from suite.splits import normalised
from suite.task import Item, Splits

SPLITS = ("train", "validation", "test")
PACKAGED = sorted(name for name, task in registry.tasks().items() if task.source.asset)


@cache
def loaded(task_id: str) -> Splits:
    task = registry.task(task_id)
    assert task.source.asset
    return task.load(assets.fetch(task.source.asset))


def parts(task_id: str) -> dict[str, list[Item]]:
    return {name: list(getattr(loaded(task_id), name)) for name in SPLITS}


def by_part(items: Sequence[Item]) -> dict[str | None, list[Item]]:
    """Items by the part of the task that they belong to (None: the task has no parts), in order."""
    found: dict[str | None, list[Item]] = {}
    for item in items:
        found.setdefault(item.part, []).append(item)
    return found


@pytest.fixture(params=sorted(registry.tasks()))
def any_task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=PACKAGED)
def packaged(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_declared_facts_are_complete(any_task: str) -> None:
    task = registry.task(any_task)
    assert task.id == any_task
    assert task.version >= 1
    assert task.title
    assert task.kind in ("classification", "generation", "choice")
    assert task.metric in ("accuracy", "exact_match")
    assert set(task.sizes) == set(SPLITS)
    assert all(size > 0 for size in task.sizes.values())
    assert 1 <= task.mean_tokens <= 2048


def test_the_source_is_one_packaged_asset_or_one_hub_data_set(any_task: str) -> None:
    source = registry.task(any_task).source
    assert (source.asset is None) != (source.hub is None)
    if source.asset:
        assets.get(source.asset)
    else:
        assert source.revision, "a hub data set is pinned to a revision"


def test_classes_have_distinct_names(any_task: str) -> None:
    task = registry.task(any_task)
    if task.kind == "classification":
        assert len(task.labels) >= 2
        assert len(set(task.labels)) == len(task.labels)
    else:
        assert task.labels == ()


def test_generation_and_choice_are_scored_by_a_local_lm_eval_configuration(any_task: str) -> None:
    task = registry.task(any_task)
    if task.kind != "classification":
        config = task.lm_eval_config(Path("test.jsonl"))
        assert config is not None
        assert config["dataset_kwargs"]


def test_declared_sizes_are_those_of_the_data(packaged: str) -> None:
    assert {name: len(part) for name, part in parts(packaged).items()} == dict(registry.task(packaged).sizes)


def test_declared_tokens_are_those_of_the_data(packaged: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.fetch("minilm"))
    means = []
    for items in by_part(parts(packaged)["test"]).values():
        texts = [f"{item.text} {item.pair or ''}{item.target or ''}" for item in items]
        means.append(sum(len(found) for found in tokenizer(texts)["input_ids"]) / len(texts))
    mean = sum(means) / len(means)
    tolerance = 1.5 if registry.task(packaged).kind == "classification" else 0.2 * mean
    assert registry.task(packaged).mean_tokens == pytest.approx(mean, abs=tolerance)


def test_ids_are_unique(packaged: str) -> None:
    ids = [item.id for part in parts(packaged).values() for item in part]
    assert len(set(ids)) == len(ids)


def test_no_text_stands_in_two_splits_or_twice_in_one(packaged: str) -> None:
    items = [item for part in parts(packaged).values() for item in part]
    texts = [normalised(f"{item.text} {item.pair or ''}") for item in items]
    assert len(set(texts)) == len(texts)


def test_no_text_is_empty(packaged: str) -> None:
    for part in parts(packaged).values():
        assert all(normalised(item.text) for item in part)
        assert all(item.pair is None or normalised(item.pair) for item in part)


def test_items_carry_what_their_kind_needs(packaged: str) -> None:
    task = registry.task(packaged)
    for part in parts(packaged).values():
        for item in part:
            if task.kind == "classification":
                assert item.label in range(len(task.labels))
                assert item.target is None
            elif task.kind == "choice":
                assert item.label in range(len(item.choices))
                assert item.target == item.choices[item.label]
                assert len(set(item.choices)) == len(item.choices) >= 2
            else:
                assert item.target
                assert item.label is None


def test_every_split_has_the_same_parts_but_for_those_that_are_unseen(packaged: str) -> None:
    found = [set(by_part(part)) for part in parts(packaged).values()]
    unseen = registry.task(packaged).unseen
    assert unseen <= found[2]
    assert found[0] == found[1] == found[2] - unseen
    assert found[2] == {None} or None not in found[2]


def test_every_class_is_common_enough_in_every_split(packaged: str) -> None:
    task = registry.task(packaged)
    if task.kind != "classification":
        return
    for part in parts(packaged).values():
        counts = Counter(item.label for item in part)
        assert min(counts[label] for label in range(len(task.labels))) >= 0.5 * len(part) / len(task.labels)


def test_classes_are_as_frequent_in_each_split_as_in_the_whole(packaged: str) -> None:
    if registry.task(packaged).kind != "classification":
        return
    found = [by_part(split) for split in parts(packaged).values()]
    for part in found[-1]:
        splits = [split[part] for split in found if part in split]
        everything = [item.label for items in splits for item in items]
        for items in splits:
            for label in set(everything):
                share = sum(item.label == label for item in items) / len(items)
                assert share == pytest.approx(everything.count(label) / len(everything), abs=0.025)


def test_reading_twice_gives_the_same_items_in_the_same_order(packaged: str) -> None:
    task = registry.task(packaged)
    again = task.load(assets.fetch(task.source.asset or ""))
    assert {name: list(getattr(again, name)) for name in SPLITS} == parts(packaged)


def test_a_smaller_run_sees_the_first_items_of_a_larger_one(packaged: str) -> None:
    version = registry.task(packaged).version
    small = data.load(TaskRef(id=packaged, version=version, train=50, test=20))
    large = data.load(TaskRef(id=packaged, version=version, train=200, test=100))
    whole = data.load(TaskRef(id=packaged, version=version))
    assert list(small.train) == list(large.train)[:50] == list(whole.train)[:50]
    for part, first in by_part(small.test).items():
        assert first == by_part(large.test)[part][:20] == by_part(whole.test)[part][:20]
    for part, first in by_part(small.validation).items():
        assert first == by_part(whole.validation)[part][:20]
    assert len({small.fingerprint, large.fingerprint, whole.fingerprint}) == 3


def test_the_order_is_not_the_order_of_the_labels(packaged: str) -> None:
    task = registry.task(packaged)
    if task.kind != "classification":
        return
    train = parts(packaged)["train"]
    first = [item.label for item in train[:300]]
    for label in range(len(task.labels)):
        share = sum(item.label == label for item in train) / len(train)
        assert first.count(label) / 300 == pytest.approx(share, abs=0.1)


def test_another_version_than_the_installed_one_is_refused(packaged: str) -> None:
    version = registry.task(packaged).version + 1
    with pytest.raises(UserError, match=rf"task {packaged}: version {version} is asked for"):
        data.load(TaskRef(id=packaged, version=version))


def test_a_hub_task_says_in_one_sentence_that_it_is_not_here(any_task: str) -> None:
    """With no network: the rule of every test (HF_HUB_OFFLINE=1)."""
    task = registry.task(any_task)
    if task.source.hub is None:
        return
    with pytest.raises(UserError) as caught:
        task.load(None)
    assert any(source.hub and source.hub in str(caught.value) for source in task.sources)
    assert "\n" not in str(caught.value)
