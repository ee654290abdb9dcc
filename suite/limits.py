"""How many runs of a kind fit into memory together, as learned from packs that did not.

One small file per kind in the results folder: the worker that ran out of memory writes it; every worker, the driver of
every executor and the planner read it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def most(spec: RunSpec) -> int | None:
    """How many runs of this one's kind may be in a pack; None when no pack has been too large yet."""
    try:
        return json.loads(_file(spec).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError):
        return None


def learn(spec: RunSpec, runs: int) -> None:
    """Keep that packs of this kind may have no more than `runs` runs, 1 or more. Raises `StorageError`."""
    known = most(spec)
    content = {**kind(spec), "runs": runs if known is None else min(runs, known)}
    try:
        paths.write_json(_file(spec), content)
    except OSError as error:
        raise storage(error, paths.results()) from error


def cut(pack: Sequence[RunSpec]) -> list[list[RunSpec]]:
    """A pack in parts that fit, as far as is known: as even as can be, in order."""
    parts = -(-len(pack) // (most(pack[0]) or len(pack))) if len(pack) > 1 else 1
    size = -(-len(pack) // parts)
    return [list(pack[first:first + size]) for first in range(0, len(pack), size)]


def _file(spec: RunSpec) -> Path:
    return folder() / f"{digest(kind(spec))[:16]}.json"
