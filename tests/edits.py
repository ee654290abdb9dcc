"""Changes of nested data, as values: `put("rows", 0, "rank", 8)(table)` sets `table["rows"][0]["rank"]`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Edit = Callable[[Any], None]


def put(*keys: Any) -> Edit:
    """Set the value at a place: the last of `keys` is the value."""
    *way, last, value = keys

    def edit(data: Any) -> None:
        for key in way:
            data = data[key]
        data[last] = value

    return edit


def drop(*keys: Any) -> Edit:
    """Remove what stands at a place."""
    *way, last = keys

    def edit(data: Any) -> None:
        for key in way:
            data = data[key]
        del data[last]

    return edit
