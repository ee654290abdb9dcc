"""What runs need before they start, bases and data sets: had on this machine, or said in one sentence what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from suite import assets, bases, hub, registry
from suite.specs import RunSpec


def names(specs: Iterable[RunSpec]) -> tuple[list[str], list[str]]:
    """Ids of the bases and of the tasks that runs use, each once."""
    base_ids, task_ids = zip(*((spec.base.id, spec.task.id) for spec in specs), strict=True)
    return list(dict.fromkeys(base_ids)), list(dict.fromkeys(task_ids))


def fetch(base_ids: Iterable[str], task_ids: Iterable[str], tell: Callable[[str], None] | None = None) -> None:
    """Fetch and check what is not there yet. `tell` is told what goes on, one sentence at a time.

    Raises `UserError` when a base or a data set cannot be had.
    """
    found = [bases.get(base) for base in base_ids]
    sources = [source for task in task_ids for source in registry.task(task).sources]
    hub.require(found, sources)
    for asset in dict.fromkeys((*(base.asset for base in found), *(source.asset for source in sources))):
        if asset:
            assets.fetch(asset, tell)
