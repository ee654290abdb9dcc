"""Splits follow from hashes of names alone."""

from __future__ import annotations

from collections import Counter

import pytest

from suite.errors import UserError
from suite.splits import BALANCE, distinct, fraction, mixed, normalised, split
from suite.task import Item, Splits


def items(count: int, per_group: int = 1) -> list[tuple[Item, str]]:
    """`count` items with alternating labels, `per_group` of them in each group."""
    return [(Item(id=f"t/{n}", text=f"text {n}", label=n % 2), f"g{n // per_group}") for n in range(count)]


def ids(splits: Splits) -> dict[str, list[str]]:
    return {name: [item.id for item in part] for name, part in vars(splits).items()}


def test_normalised_forgets_case_punctuation_and_spaces() -> None:
    assert normalised("  It's GREAT -- really!\n") == normalised("it s great really")
    assert normalised("Café Zürich") == "café zürich"
    assert normalised("... !?") == ""


def test_fraction_is_fixed_for_ever() -> None:
    assert fraction("task", 0, "group") == pytest.approx(0.890110256680954, abs=1e-15)
    assert fraction("a", "b") != fraction("ab")


def test_fractions_are_uniform_and_below_one() -> None:
    found = [fraction("t", n) for n in range(20_000)]
    assert all(0 <= value < 1 for value in found)
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.01)
    assert sum(value < 0.1 for value in found) / len(found) == pytest.approx(0.1, abs=0.01)


def test_distinct_keeps_the_first_of_equal_texts_and_drops_empty_ones() -> None:
    rows = [(Item("1", "Good film."), "a"), (Item("2", "good  FILM"), "b"), (Item("3", " ... "), "c"),
            (Item("4", "Good film.", pair="Yes."), "d")]
    assert [item.id for item, _ in distinct(rows)] == ["1", "4"]


def test_every_item_stands_in_exactly_one_split_of_about_the_asked_size() -> None:
    found = ids(split(items(4000), "t"))
    assert sorted(name for part in found.values() for name in part) == sorted(i.id for i, _ in items(4000))
    assert len(found["validation"]) == pytest.approx(400, abs=60)
    assert len(found["test"]) == pytest.approx(1000, abs=90)


def test_no_group_stands_in_two_splits() -> None:
    rows = items(3000, per_group=7)
    group = {item.id: name for item, name in rows}
    homes = [{group[name] for name in part} for part in ids(split(rows, "t")).values()]
    assert not homes[0] & homes[1]
    assert not homes[0] & homes[2]
    assert not homes[1] & homes[2]


def test_labels_are_as_frequent_in_each_split_as_in_the_whole() -> None:
    rows = items(3000, per_group=10)
    mean = sum(item.label or 0 for item, _ in rows) / len(rows)
    for part in vars(split(rows, "t")).values():
        assert abs(sum(item.label for item in part) / len(part) - mean) < BALANCE


def test_neither_the_order_of_the_rows_nor_the_machine_matters() -> None:
    rows = items(500)
    assert ids(split(rows, "t")) == ids(split(rows[::-1], "t"))
    assert ids(split(rows, "t"))["validation"][:3] == ["t/322", "t/203", "t/258"]


def test_another_name_gives_another_split() -> None:
    assert ids(split(items(500), "t")) != ids(split(items(500), "u"))


def test_the_first_items_are_a_random_subset_of_their_split() -> None:
    first = split(items(4000), "t").train[:400]
    numbers = [int(item.id.removeprefix("t/")) for item in first]
    assert numbers != sorted(numbers)
    assert sum(numbers) / len(numbers) == pytest.approx(2000, abs=180)


def test_a_new_item_moves_no_other_one() -> None:
    unlabelled = [(Item(id=f"t/{n}", text=f"text {n}", target="x"), f"g{n}") for n in range(300)]
    before, after = ids(split(unlabelled[:-1], "t")), ids(split(unlabelled, "t"))
    assert {name: [i for i in part if i != "t/299"] for name, part in after.items()} == before


@pytest.mark.parametrize("rows", [items(3), items(100, per_group=100)])
def test_what_cannot_be_split_evenly_is_said(rows: list[tuple[Item, str]]) -> None:
    with pytest.raises(UserError, match=r"^t: \d+ items in \d groups cannot be split"):
        split(rows, "t")


def part(name: str, train: int, validation: int, test: int) -> Splits:
    def some(split: str, count: int) -> list[Item]:
        return [Item(f"{name}/{split}/{i}", f"{name} {split} {i}", label=i % 2) for i in range(count)]

    return Splits(some("train", train), some("validation", validation), some("test", test))


def test_a_mixture_takes_turns_and_keeps_each_parts_scored_items() -> None:
    found = mixed({"a": part("a", 5, 2, 3), "b": part("b", 9, 1, 4)}, "salt")
    assert Counter(item.part for item in found.train) == {"a": 5, "b": 5}
    assert all({one.part, other.part} == {"a", "b"} for one, other in zip(found.train[::2], found.train[1::2], strict=True))
    assert {item.part for item in found.train[::2]} == {"a", "b"}  # neither always goes first
    assert [item.id for item in found.test] == [*(f"a/test/{i}" for i in range(3)), *(f"b/test/{i}" for i in range(4))]


def test_a_mixture_trains_on_nothing_that_another_part_scores() -> None:
    one = Splits([Item("t", "Same text!", label=0), Item("u", "other", label=1)], [Item("v", "held", label=0)],
                 [Item("w", "far", label=1)])
    other = Splits([Item("x", "HELD", label=0), Item("y", "own", label=1)], [Item("z", "Far.", label=1)],
                   [Item("q", "same text", label=1), Item("r", "FAR", label=0)])
    found = mixed({"one": one, "other": other}, "salt")
    assert {item.id for item in found.train} == {"u", "y"}
    assert [item.id for item in found.validation] == ["v"]
    assert [item.id for item in found.test] == ["w", "q"]
