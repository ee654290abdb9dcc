"""YAML files read strictly, and what is wrong with one in one sentence: the file, the key, what is allowed."""

from __future__ import annotations

import typing
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from suite.errors import UserError, one_of
from suite.specs import Frozen

M = typing.TypeVar("M", bound=Frozen)


class Lines:
    """Where the keys of a YAML file stand."""

    def __init__(self, root: yaml.Node | None) -> None:
        self._root = root

    def at(self, path: Sequence[object]) -> int:
        """The line, from 1, of a key or list entry; of what it stands in, where the file has no such key."""
        node, line = self._root, 1
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = next(((k, v) for k, v in node.value if getattr(k, "value", None) == str(part)), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = (node.value[part], node.value[part])
            else:
                found = None
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        return line


def load(path: Path, model: type[M]) -> M:
    """The file's content as a `model`.

    Raises `FileNotFoundError` when there is no such file, and `UserError` for anything else that is wrong with it.
    """
    content, _ = _read(path, model)
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error, content, model)}") from None


def load_with_lines(path: Path, model: type[M]) -> tuple[M, Lines]:
    """The same as `load`, with the lines of the keys for whoever checks further; what is refused names its line."""
    content, lines = _read(path, model)
    try:
        return model.model_validate(content), lines
    except ValidationError as error:
        where = lines.at(_meant(error, content)[0])
        raise UserError(f"{path}, line {where}: {explain(error, content, model)}") from None


def _read(path: Path, model: type[Frozen]) -> tuple[dict[Any, Any], Lines]:
    """What stands in the file, and where."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        content = loader.construct_document(root) if root is not None else None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path}{where}: not YAML: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: the file must be a mapping with the keys {', '.join(model.model_fields)}")
    return content, Lines(root)


def explain(error: ValidationError, content: Any, model: type[Frozen]) -> str:
    """The first problem of `content` as one sentence: the key's path, what is wrong, what is allowed."""
    path, first = _meant(error, content)
    key = ".".join(str(part) for part in path)
    if first["type"] == "extra_forbidden":
        fields = _fields_at(model, path[:-1])
        return f"{key}: unknown key" + (f"; use {one_of(fields)}" if fields else "")
    message = first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{key}{': ' if key else ''}{message[0].lower()}{message[1:]}{shown}"


def _meant(error: ValidationError, content: Any) -> tuple[tuple[Any, ...], Any]:
    """The first problem and where it stands. Of the alternatives of one value, the one that came furthest is the one
    that was meant."""
    problems = [(_path(problem, content), problem) for problem in error.errors()]
    begin = problems[0][0]
    return max((p for p in problems if p[0][:len(begin)] == begin), key=lambda p: len(p[0]))


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
