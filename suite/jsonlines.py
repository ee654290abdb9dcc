"""Files of one JSON value a line, read strictly."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from suite.errors import UserError

M = TypeVar("M", bound=BaseModel)


def parse(text: str, model: type[M], file: Path, remedy: str) -> list[M]:
    """Every line of a file's text as a model. Raises `UserError` naming file and line and ending in `remedy` at the first
    that is wrong."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            found.append(model.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{file}, line {number}: {where}: {first['msg']}; {remedy}") from None
    return found
