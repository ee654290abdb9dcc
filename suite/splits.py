"""Fixed splits: where an item goes, and in which order it stands, follows from hashes of names alone."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from suite.errors import UserError
from suite.task import Item, Splits

BALANCE = 0.02  # how far the mean label of a split may lie from the whole's
DEALS = 1000  # how often groups are dealt out before giving up


def normalised(text: str) -> str:
    """Lower-case words without punctuation: what must not stand in two splits."""
    return " ".join(re.findall(r"\w+", text.lower()))


def fraction(*parts: Any) -> float:
    """A number in [0, 1) from the hash of `parts`: the same on every machine, for ever."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def distinct(rows: Iterable[tuple[Item, str]]) -> list[tuple[Item, str]]:
    """The rows whose normalised text (with its pair) is not empty and has not been seen before."""
    seen: dict[str, tuple[Item, str]] = {}
    for item, group in rows:
        key = _key(item)
        if key:
            seen.setdefault(key, (item, group))
    return list(seen.values())


def split(rows: Iterable[tuple[Item, str]], name: str, validation: float = 0.10, test: float = 0.25) -> Splits:
    """Split items by their group, so that no group stands in two splits, and shuffle each split.

    Args:
        rows: items, each with the group (review, article, passage) it belongs to.
        name: salt of the hashes, usually the task's id.
        validation: expected share of groups in the validation split.
        test: expected share of groups in the test split.

    Groups are dealt out anew until the mean label of every split is within `BALANCE` of the whole's (long reviews
    would otherwise tilt a small split); items without labels take the first deal. The order inside a split is by a
    hash of the item's id: its first N items are a fixed random subset. Raises `UserError` when no deal will do (too
    few groups, or groups of one label each).
    """
    rows = list(rows)
    labels = [item.label for item, _ in rows if item.label is not None]
    for deal in range(DEALS):
        found: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
        for item, group in rows:
            place = fraction(name, deal, group)
            found["test" if place < test else "validation" if place < test + validation else "train"].append(item)
        if not labels or all(_near(items, sum(labels) / len(labels)) for items in found.values()):
            break
    else:
        groups = len({group for _, group in rows})
        raise UserError(f"{name}: {len(rows)} items in {groups} groups cannot be split with balanced labels")
    for items in found.values():
        items.sort(key=lambda item: fraction(name, "order", item.id))
    return Splits(train=found["train"], validation=found["validation"], test=found["test"])


def hold_out(rows: Iterable[tuple[Item, str]], test: Iterable[Item], name: str, validation: int) -> Splits:
    """Cut a validation split from the end of a data set's own training split; its own test split stays whole.

    Args:
        rows: training items, each with the group that must stay in one split.
        test: the items that are reported on.
        name: salt of the hashes, usually the task's id.
        validation: how many items to cut; the group that reaches the number is cut whole.

    Groups are put in the order of a hash of their names, and the last ones are cut. A training item whose
    text stands in the test split is left out. The order inside a split is by a hash of the item's id.
    """
    test = list(test)
    scored = {_key(item) for item in test}
    groups: dict[str, list[Item]] = {}
    for item, group in rows:
        if _key(item) not in scored:
            groups.setdefault(group, []).append(item)
    held: list[Item] = []
    for group in sorted(groups, key=lambda group: -fraction(name, "held out", group)):
        if len(held) >= validation:
            break
        held.extend(groups.pop(group))
    rest = [item for items in groups.values() for item in items]
    parts = (sorted(part, key=lambda item: fraction(name, "order", item.id)) for part in (rest, held, test))
    return Splits(*parts)


def mixed(parts: Mapping[str, Splits], name: str) -> Splits:
    """One task of several, each item marked with its part.

    Training takes one item of each part in turn, in an order that a hash of `name` gives, as many of each as the smallest
    part has. Validation and test have the items of every part, one part after the other. A text stands in one place only: in
    the first part that tests it, else the first that validates it, else the first that trains on it.
    """
    seen: set[str] = set()

    def fresh(part: str, items: Iterable[Item]) -> list[Item]:
        kept = []
        for item in items:
            if _key(item) not in seen:
                seen.add(_key(item))
                kept.append(replace(item, part=part))
        return kept

    test = [item for part, splits in parts.items() for item in fresh(part, splits.test)]
    validation = [item for part, splits in parts.items() for item in fresh(part, splits.validation)]
    train = {part: fresh(part, splits.train) for part, splits in parts.items()}
    turns = [(turn, part) for turn in range(min(map(len, train.values())))
             for part in sorted(parts, key=lambda part, turn=turn: fraction(name, turn, part))]  # type: ignore[misc]
    return Splits([train[part][turn] for turn, part in turns], validation, test)


def _key(item: Item) -> str:
    return normalised(f"{item.text} {item.pair or ''}")


def _near(items: list[Item], mean: float) -> bool:
    return bool(items) and abs(sum(item.label or 0 for item in items) / len(items) - mean) < BALANCE
