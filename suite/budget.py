"""One currency for every method: how many scalars a run may train. Each method solves for its own size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from suite import registry
from suite.errors import UserError
from suite.method import Method, Shapes
from suite.specs import Budget

#: How far a method may end from a budget, as a share of it.
TOLERANCE = 0.10


def target(budget: Budget, shapes: Shapes) -> int:
    """The number of adapter scalars that a budget stands for on these shapes (the task head is not counted).

    A rank stands for what LoRA of that rank trains on every linear layer. Raises `UserError` for an unknown method.
    """
    if budget.params is not None:
        return budget.params
    if budget.share is not None:
        return round(budget.share * shapes.parameters)
    name, _, rank = (budget.like or f"lora@{budget.rank}").partition("@")
    method = registry.method(name)
    if method.size is None:
        raise UserError(f"budget like {budget.like!r}: {method.label} has no size; name a method that has, as in lora@8")
    return method.trainable(method.resized(method.Config(), int(rank)), shapes)


def fit(method: Method[Any], config: Any, budget: Budget, shapes: Shapes) -> Any:
    """The config at a budget; methods without a size keep theirs.

    A rank sets the rank of a method that has one. Anything else is a number of scalars, and the method comes as near as
    it can. Raises `UserError` when that is not within a tenth.
    """
    if method.size is None:
        return config
    if budget.rank is not None and method.size == "rank":
        return method.resized(config, budget.rank)
    wanted = target(budget, shapes)
    found = method.solve(config, shapes, wanted)
    got = method.trainable(found, shapes)
    if abs(got - wanted) > TOLERANCE * wanted:
        raise UserError(f"budget {budget.label}: {method.label} cannot train about {wanted:,} scalars here; the nearest "
                        f"it can do is {got:,} ({method.size} {getattr(found, method.size)})")
    return found


def nearest(count: Callable[[int], int], wanted: int) -> int:
    """The size, from 1, whose count is nearest to `wanted`, for a count that does not fall as the size grows.

    A size that cannot be built (`ValueError`) is too large.
    """

    def at(size: int) -> float:
        try:
            return count(size)
        except ValueError:
            return float("inf")

    low, high = 1, 2
    while at(high) < wanted and at(high) > at(low):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle) < wanted else (low, middle)
    return low if wanted - at(low) <= at(high) - wanted else high
