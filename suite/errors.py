"""The one exception that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """A wrong input, said in one sentence that names the file, the key and the allowed values.

    The command line prints the sentence and exits with code 2; it never shows a traceback for it.
    """


def one_of(allowed: object) -> str:
    """Format allowed values for a sentence: `a, b or c`."""
    names = [str(a) for a in allowed]  # type: ignore[attr-defined]
    if not names:
        return "nothing (none is registered)"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
