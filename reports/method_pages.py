"""A page for every method: its card, everything that was measured of it, what papers print of it, and what it can do."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from reports import links, numbers, publication, published_pages, results
from reports.frame import Page
from reports.results import Made, Result
from reports.sheets import Entry, Number, Sheet, entry
from reports.study_page import Chapter
from suite import capabilities, cards, registry
from suite.method import Method
from suite.published import PublishedTable

#: Its index, and its entry of the navigation.
AREA = "methods/index.html"
#: Runs that a page lists; its file has all of them.
MOST_RUNS = 200


def pages(chapters: Sequence[Chapter], made: Sequence[Made], tables: Sequence[PublishedTable]) -> list[Page]:
    """The index of methods, and a page for every registered one."""
    found: dict[str, list[Result]] = {}
    for result in results.results(chapters):
        found.setdefault(result.method, []).append(result)
    runs: dict[str, list[Made]] = {}
    for run in made:
        runs.setdefault(run.record.spec.method.id, []).append(run)
    methods = sorted(registry.methods().values(), key=lambda method: (":" in method.id, method.label.lower()))
    index = _index(methods, found, runs, tables)
    intro = ("Every registered method. Those of Hugging Face peft are reached as peft:<type>. A method that no study here "
             "has run has a page too, with its card and what papers print of it.")
    return [Page(AREA, "Methods", "index_page.html.j2", {"lead": intro, "sheet": index}, AREA, (index,)),
            *(_page(method, found.get(method.id, []), runs.get(method.id, []), tables) for method in methods)]


def prose(text: str) -> Markup:
    """Plain text for a page; what stands between backticks is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def about(method: Method[Any]) -> str:
    """What a method is, in a sentence or two."""
    if ":" in method.id:
        return f"A tuner of Hugging Face peft, reached as `{method.id}`: peft builds the model, the suite trains it."
    return cards.facts(method).about


def _page(method: Method[Any], found: Sequence[Result], runs: Sequence[Made], tables: Sequence[PublishedTable]) -> Page:
    name = method.id.replace(":", "-")
    measured = results.method_sheet(f"{name}-results", found) if found else None
    every = results.run_sheet(f"{name}-runs", runs) if runs else None
    printed = published_pages.method_sheet(f"{name}-published", method.id, tables)
    card = cards.facts(method)
    context: dict[str, Any] = {
        "method": method, "card": card, "about": prose(about(method)), "options": prose(card.options), "measured": measured,
        "every": every and every.shortened(MOST_RUNS), "printed": printed, "own": ":" not in method.id,
        "can": _capabilities(f"{name}-capabilities", method.id), "defaults": _defaults(f"{name}-options", card.defaults),
        "studies": {result.of.path: f"{result.of.study.title} ({result.of.scale})" for result in found},
    }
    sheets = tuple(sheet for sheet in (measured, printed, every, context["can"], context["defaults"]) if sheet is not None)
    return Page(links.method(method.id), method.label, "method.html.j2", context, AREA, sheets)


def _index(methods: Iterable[Method[Any]], found: Mapping[str, Sequence[Result]], runs: Mapping[str, Sequence[Made]],
           tables: Sequence[PublishedTable]) -> Sheet:
    rows, data = [], []
    for method in methods:
        studies = list(dict.fromkeys(f"{result.of.study.id}, {result.of.scale}" for result in found.get(method.id, ())))
        printed = sum(any(publication.method_of(row.method) == method.id for row in table.rows) for table in tables)
        said, paper = cards.first(about(method)), method.paper
        where = capabilities.summary(method.id)["trains"]
        rows.append((
            entry(method.label, link=links.method(method.id), note=method.id if ":" in method.id else ""), Entry(said),
            Entry(f"arXiv {paper.arxiv}" if paper.arxiv else numbers.DASH, title=paper.title),
            Entry(where), Entry("; ".join(studies) or numbers.DASH),
            _count(len(runs.get(method.id, ()))), _count(printed)))
        data.append({"method": method.id, "label": method.label, "about": said, "paper": paper.title, "arxiv": paper.arxiv,
                     "trains_on": where, "studies": "; ".join(studies), "runs": len(runs.get(method.id, ())),
                     "published_tables": printed})
    header = ("Method", "What it is", "Paper", "Trains on", "Measured in", "Runs", "Published tables")
    return Sheet("methods", "Methods", header, tuple(rows), tuple(data), words=frozenset({0, 1, 2, 3, 4}))


def _count(number: int) -> Entry:
    return Entry(str(number)) if number else entry(numbers.DASH, "faded")


def _capabilities(name: str, method_id: str) -> Sheet | None:
    """What was tried on small models of four architectures, and why something does not work."""
    known = capabilities.known().get(method_id)
    if known is None:
        return None
    rows, data = [], []
    for architecture, answers in known.items():
        said: dict[str, Number] = {"architecture": architecture}
        cells = []
        for question in capabilities.QUESTIONS:
            answer = answers.get(question)
            cells.append(entry("yes") if answer is True else entry("no", "faded", note=str(answer or "not tried")))
            said[question] = answer if isinstance(answer, bool) else str(answer or "not tried")
        rows.append((Entry(architecture), *cells))
        data.append(said)
    notes = ("Tried on small random models: it trains and moves; a plain model gives its outputs; stock peft loads it as a "
             "LoRA with the same outputs; it trains on a base in four bits.",)
    return Sheet(name, "What it can do", ("Architecture", *(x[:1].upper() + x[1:] for x in capabilities.QUESTIONS.values())),
                 tuple(rows), tuple(data), notes, frozenset(range(len(capabilities.QUESTIONS) + 1)))


def _defaults(name: str, defaults: Mapping[str, str]) -> Sheet | None:
    if not defaults:
        return None
    rows = tuple((entry(option, code=True), entry(value, code=True)) for option, value in defaults.items())
    data = tuple({"option": option, "default": value} for option, value in defaults.items())
    return Sheet(name, "Hyper-parameters", ("Option", "Default"), rows, data, words=frozenset({0, 1}))
