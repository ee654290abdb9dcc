"""Finds methods and tasks: built-ins by scanning `methods/` and `tasks/`, third parties by entry point.

A module registers a thing by defining a concrete subclass of `Method` or `Task` with an `id` of its own, or a list
`METHODS` or `TASKS` of objects, where there are many of one make.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar

from suite.errors import UserError, one_of
from suite.method import Method
from suite.task import Task

T = TypeVar("T")


@cache
def methods() -> dict[str, Method]:
    """Every registered method by id."""
    return _collect("methods", "peft_suite.methods", Method)  # type: ignore[type-abstract]


@cache
def tasks() -> dict[str, Task]:
    """Every registered task by id."""
    return _collect("tasks", "peft_suite.tasks", Task)  # type: ignore[type-abstract]


def method(name: str) -> Method:
    """The method called `name`. Raises `UserError` naming the known ones."""
    if name not in methods():
        raise UserError(f"unknown method {name!r}: use {one_of(sorted(methods()))}")
    return methods()[name]


def task(name: str) -> Task:
    """The task called `name`. Raises `UserError` naming the known ones."""
    if name not in tasks():
        raise UserError(f"unknown task {name!r}: use {one_of(sorted(tasks()))}")
    return tasks()[name]


def _collect(package: str, group: str, kind: type[T]) -> dict[str, T]:
    found: dict[str, T] = {}
    made: list[T] = []
    modules: list[ModuleType] = []
    root = importlib.import_module(package)
    for info in pkgutil.iter_modules(root.__path__):
        modules.append(importlib.import_module(f"{package}.{info.name}"))
    modules.extend(importlib.import_module(point.module) for point in entry_points(group=group))
    for module in modules:
        for _, cls in inspect.getmembers(module, inspect.isclass):
            own = cls.__module__ == module.__name__
            if own and issubclass(cls, kind) and not inspect.isabstract(cls) and "id" in vars(cls):
                made.append(cls())
        made.extend(getattr(module, package.upper(), ()))
    for thing in made:
        name = thing.id  # type: ignore[attr-defined]
        if name in found:
            raise UserError(f"{package}: two classes register the id {name!r}: "
                            f"{type(found[name]).__qualname__} and {type(thing).__qualname__}")
        found[name] = thing
    return found
