"""Where the pages of the site stand: paths from the site's folder."""

from __future__ import annotations

import re

METHODS, TASKS, PUBLISHED = "methods/index.html", "tasks/index.html", "published/index.html"


def study(study_id: str, scale: str) -> str:
    """The page of a study at a scale."""
    return f"{stem(study_id)}-{scale}/index.html"


def method(method_id: str) -> str:
    """The page of a method: `peft:ia3` stands in `methods/peft-ia3.html`."""
    return f"methods/{stem(method_id)}.html"


def task(task_id: str) -> str:
    """The page of a task."""
    return f"tasks/{stem(task_id)}.html"


def published(table_id: str) -> str:
    """The page of a published table."""
    return f"published/{stem(table_id)}.html"


def run(run_id: str) -> str:
    """The page of a run."""
    return f"runs/{stem(run_id)}.html"


def stem(identifier: str) -> str:
    """An id as a file's name."""
    return re.sub(r"[^\w.-]", "-", identifier)
