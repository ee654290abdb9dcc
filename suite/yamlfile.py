"""YAML files read strictly, and what is wrong with one in one sentence: the file, the key, what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from suite.errors import UserError, one_of
from suite.specs import Frozen

M = typing.TypeVar("M", bound=Frozen)


def load(path: Path, model: type[M]) -> M:
    """The file's content as a `model`.

    Raises `FileNotFoundError` when there is no such file, and `UserError` for anything else that is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{where}: not YAML: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: the file must be a mapping with the keys {', '.join(model.model_fields)}")
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, content, model)}") from None


def explain(error: ValidationError, content: Any, model: type[Frozen]) -> str:
    """The first problem of `content` as one sentence: the key's path, what is wrong, what is allowed."""
    problems = [(_path(problem, content), problem) for problem in error.errors()]
    begin = problems[0][0]
    # Of the alternatives of one value, the one that came furthest is the one that was meant.
    path, first = max((p for p in problems if p[0][:len(begin)] == begin), key=lambda p: len(p[0]))
    key = ".".join(str(part) for part in path)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        return f"{key}: unknown key" + (f"; use {one_of(fields)}" if fields else "")
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{key}{': ' if key else ''}{message[0].lower()}{message[1:]}{shown}"


def _path(problem: Any, content: Any) -> tuple[Any, ...]:
    """Where a problem stands in `content`: its location without the names that pydantic gives to alternatives, such
    as `constrained-int` or `tuple[str, ...]`."""
    path: list[Any] = []
    for part in problem["loc"]:
        inside = isinstance(content, list | tuple) and isinstance(part, int) and part < len(content)
        if inside or (isinstance(content, dict) and part in content):
            content = content[part]
        elif not str(part).isidentifier() or part in ("int", "float", "str", "bool"):
            continue
        path.append(part)
    return tuple(path)


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, of which PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _fields_at(model: Any, location: tuple[Any, ...]) -> list[str]:
    """Field names of the model that stands at a location inside another, or none if it cannot be told."""
    current: Any = model
    for part in location:
        fields = getattr(current, "model_fields", None)
        if fields is not None and part in fields:
            current = fields[part].annotation
        candidates = [current, *typing.get_args(current)]
        for candidate in candidates:
            candidates.extend(typing.get_args(candidate))
        models = [c for c in candidates if hasattr(c, "model_fields")]
        current = models[-1] if models else current
    return list(getattr(current, "model_fields", {}))
