"""A task's items as one run uses them: fetched, cut to the run's sizes, and fingerprinted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from suite import assets, hub, registry
from suite.errors import UserError
from suite.specs import TaskRef, digest
from suite.task import Item, Splits, Task, TaskData


@lru_cache(maxsize=32)
def load(ref: TaskRef) -> TaskData:
    """The items of a task, cut to the first `ref.train` of its training order and the first `ref.test` of each scored
    split (validation and test); of a task with parts, the first `ref.test` of each part.

    Raises `UserError` when the data cannot be had, or when the task is registered in another version than asked for.
    """
    task = registry.task(ref.id)
    if task.version != ref.version:
        raise UserError(f"task {ref.id}: version {ref.version} is asked for, version {task.version} is installed")
    found = splits(ref.id)
    train, validation, test = found.train[:ref.train], _first(found.validation, ref.test), _first(found.test, ref.test)
    content = [[[i.id, i.text, i.pair, i.label, i.target, *i.choices] for i in part]
               for part in (train, validation, test)]
    return TaskData(task, train, validation, test, digest(content)[:16])


def _first(items: Sequence[Item], count: int | None) -> list[Item]:
    """The first items of every part, parts in the order in which they appear."""
    parts: dict[str | None, list[Item]] = {}
    for item in items:
        parts.setdefault(item.part, []).append(item)
    return [item for part in parts.values() for item in part[:count]]


@lru_cache(maxsize=8)
def splits(task_id: str) -> Splits:
    """All items of a task; its asset is fetched when it is not here. Raises `UserError` when the data cannot be had."""
    task = registry.task(task_id)
    return task.load(assets.fetch(task.source.asset) if task.source.asset else None)


def is_here(task: Task) -> bool:
    """Whether all that a task reads is on this machine, so that `splits` needs no network."""
    ready = {one.asset for one in assets.status() if one.state == "ready"}
    return all(source.asset in ready if source.asset else hub.has_data(source) for source in task.sources)
