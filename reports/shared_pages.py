"""The pages over all studies: methods, tasks, published tables and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reports import method_pages, published_pages, results, run_pages, task_pages
from reports.frame import Page
from reports.study_page import Chapter
from suite import published


def pages(chapters: Sequence[Chapter], mlflow: Mapping[str, str] | None = None) -> list[Page]:
    """Every page that is made from all studies together, to be written once links may lead to them.

    `mlflow`: by run, where the MLflow pages show it. Raises `UserError` when a published table cannot be read.
    """
    tables = [published.load(name) for name in published.names()]
    made = results.runs(chapters)
    own = run_pages.chosen(made)
    answers, misses = run_pages.answers(own)
    return [*method_pages.pages(chapters, made, tables), *task_pages.pages(chapters, made, misses, tables),
            *published_pages.pages(chapters, tables), *run_pages.pages(own, answers, mlflow)]
