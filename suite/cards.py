"""A card for every method: what it is, its equations, hyper-parameters, cost, what is our choice, whom to cite.

Made from the method's own file, so that it cannot say anything else: the module's docstring, the class's, the config's
fields and the counts that `trainable` gives. `make docs` writes them to `docs/methods/`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from suite import bases, paths, registry
from suite.method import Method, Paper

FOLDER = paths.REPOSITORY / "docs" / "methods"
#: Bases and sizes on which a card tells what a method trains.
EXAMPLES = (("minilm", 8), ("llama-3.1-8b", 8))


def write() -> list[Path]:
    """Write the card of every method that has a file of its own, and their index; returns the files."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    cards = {method.id: card(method) for method in own()}
    for stale in FOLDER.glob("*.md"):
        if stale.stem not in cards and stale.stem != "README":
            stale.unlink()
    written = []
    for name, text in {**cards, "README": index()}.items():
        path = FOLDER / f"{name}.md"
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def own() -> list[Method[Any]]:
    """Methods that this project writes itself, by id; tuners of peft have their own documentation."""
    return [method for name, method in sorted(registry.methods().items()) if ":" not in name]


def index() -> str:
    """A page that lists the cards."""
    lines = ["# Methods", "", "Made by `make docs` from the methods' own files. Tuners of Hugging Face peft are reached as",
             "`peft:<type>`; [capabilities](../capabilities.md) says what each can do.", "",
             "| method | what it is | paper |", "|---|---|---|"]
    for method in own():
        lines.append(f"| [{method.label}]({method.id}.md) | {first(_doc(type(method)))} | {_cite(method)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Card:
    """What there is to say of a method, in plain text with names of code between backticks.

    `equations`: the docstring of its file; `options`: what its config says of them; `defaults`: by option; `cost`: a
    sentence each.
    """

    label: str
    id: str
    file: str
    about: str
    equations: str
    options: str
    defaults: Mapping[str, str]
    cost: tuple[str, ...]
    paper: Paper


@cache
def facts(method: Method[Any]) -> Card:
    """The facts of a method's card. Those of a tuner of peft leave out its cost: peft would have to build it."""
    module = sys.modules[type(method).__module__]
    fields = method.Config.model_fields
    return Card(method.label, method.id, _file(method), _doc(type(method)), inspect.getdoc(module) or "",
                _doc(method.Config) if fields else "", {name: _default(field) for name, field in fields.items()},
                tuple(_cost(method)) if ":" not in method.id else (), method.paper)


def card(method: Method[Any]) -> str:
    """The card of one method, in Markdown."""
    found = facts(method)
    lines = [f"# {found.label}", "", f"`{found.id}`, in [{found.file}](../../{found.file}).", "", found.about, "",
             "## Equations and choices", "", "```text", found.equations, "```", "", "## Hyper-parameters", ""]
    if found.defaults:
        lines += [found.options, "", "| name | default |", "|---|---|"]
        lines += [f"| `{name}` | `{default}` |" for name, default in found.defaults.items()]
    else:
        lines.append("None of its own.")
    lines += ["", "## Cost", "", *(f"- {sentence}" for sentence in found.cost), "", "## Whom to cite", "",
              f"{_cite(method)}", ""]
    return "\n".join(lines)


def _cost(method: Method[Any]) -> list[str]:
    found = []
    for base_id, size in EXAMPLES:
        base = bases.get(base_id)
        shapes = bases.shapes(base, registry.task("movie-sentiment"))
        config = method.resized(method.Config(), size) if method.size else method.Config()
        try:
            method.check(config, shapes)
            count = method.trainable(config, shapes)
        except ValueError:
            continue
        at = f" at {method.size} {size}" if method.size else ""
        found.append(f"{base.title}{at}: {count:,} trained scalars ({100 * count / shapes.parameters:.3g} % of the base).")
    found.append("Runs of one study share a pack." if method.packs else "Runs alone: its model differs from run to run.")
    return found


def _doc(thing: Any) -> str:
    return re.sub(r"\s*\n\s*", " ", inspect.getdoc(thing) or "").strip()


def first(text: str) -> str:
    """The first sentence of a text, or what stands before its first colon."""
    return re.sub(r":$", ".", re.split(r"(?<=[.:])\s", text, maxsplit=1)[0])


def _cite(method: Method[Any]) -> str:
    paper = method.paper
    year = f" ({paper.year})" if paper.year else ""
    return f"{paper.title}{year}" + (f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else "")


def _file(method: Method[Any]) -> str:
    return type(method).__module__.replace(".", "/") + ".py"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "required" if field.is_required() else str(value)


if __name__ == "__main__":
    for path in write():
        print(path.relative_to(paths.REPOSITORY))
