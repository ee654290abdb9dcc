"""Where the pages of the site stand, as paths from the site's folder."""

from __future__ import annotations


def study(name: str, scale: str) -> str:
    """The page of a study at a scale; its tables and figures stand in the same folder."""
    return f"{name}-{scale}/index.html"


def method(method_id: str) -> str:
    """The page of a method: `methods/peft-vera.html` for `peft:vera`."""
    return f"methods/{method_id.replace(':', '-')}.html"


def task(task_id: str) -> str:
    """The page of a task."""
    return f"tasks/{task_id}.html"


def published(table: str) -> str:
    """The page of a published table, by the name of its file."""
    return f"published/{table}.html"


def run(run_id: str) -> str:
    """The page of a run."""
    return f"runs/{run_id}.html"
