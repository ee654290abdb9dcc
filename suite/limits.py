"""How many runs of a kind fit into memory together, and how much of a batch of one, as learned from those that did not.

One small file per kind in the results folder: the worker that ran out of memory writes it; every worker, the driver of
every executor and the planner read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from suite import environment, paths
from suite.faults import storage
from suite.specs import RunSpec, digest


def folder() -> Path:
    """Where the limits stand. Deleting it forgets them."""
    return paths.results() / "limits"


def kind(spec: RunSpec) -> dict[str, Any]:
    """What the memory of a run depends on, roughly: runs of one kind share a limit. Machines are told apart by memory."""
    recipe = spec.recipe
    return {
        "base": spec.base.id, "precision": recipe.precision, "method": spec.method.id, "task": spec.task.id,
        "max_length": recipe.max_length, "batch_size": recipe.batch_size,
        "machine_gib": round(environment.memory_bytes() / 2**30),
    }


@dataclass(frozen=True)
class Limits:
    """What is known to fit: `runs` in a pack, `items` of a run computed at once (None: no limit is known), and whether
    activations have to be computed again in the backward pass."""

    runs: int | None = None
    items: int | None = None
    recompute: bool = False


def known(spec: RunSpec) -> Limits:
    """What has been learned of this one's kind."""
    try:
        found = json.loads(_file(spec).read_text(encoding="utf-8"))
        return Limits(found["runs"], found.get("items"), found.get("recompute", False))
    except (OSError, ValueError, KeyError):
        return Limits()


def most(spec: RunSpec) -> int | None:
    """How many runs of this one's kind may be in a pack; None when no pack has been too large yet."""
    return known(spec).runs


def learn(spec: RunSpec, runs: int) -> None:
    """Keep that packs of this kind may have no more than `runs` runs, 1 or more. Raises `StorageError`."""
    before = known(spec)
    _keep(spec, replace(before, runs=runs if before.runs is None else min(runs, before.runs)))


def tighten(spec: RunSpec) -> Limits | None:
    """A run of this kind did not fit alone: halve what of its batch is computed at once, and when that is one item, compute
    activations again. Returns what holds from now on; None when there is nothing left to do. Raises `StorageError`."""
    before = known(spec)
    items = before.items or spec.recipe.batch_size
    if items > 1:
        after = replace(before, items=-(-items // 2))
    elif not before.recompute:
        after = replace(before, recompute=True)
    else:
        return None
    _keep(spec, after)
    return after


def _keep(spec: RunSpec, limits: Limits) -> None:
    try:
        paths.write_json(_file(spec), {**kind(spec), **asdict(limits)})
    except OSError as error:
        raise storage(error, paths.results()) from error


def cut(pack: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """A pack in parts that fit, as far as is known: as even as can be, in order."""
    parts = -(-len(pack) // (most(pack[0]) or len(pack))) if len(pack) > 1 else 1
    size = -(-len(pack) // parts)
    return [list(pack[first:first + size]) for first in range(0, len(pack), size)]


def _file(spec: RunSpec) -> Path:
    return folder() / f"{digest(kind(spec))[:16]}.json"
