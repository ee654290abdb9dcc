"""Data sets of the Hugging Face hub, at a pinned revision; and whether what runs need can be had at all.

A data set is read from the folder `$SUITE_DATASETS/OWNER/NAME` where there is one: a copy of the repository
as it stands on the hub, its README.md included (that says which files make which subset). Otherwise
`datasets` looks in its cache and on the hub.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from suite import paths
from suite.bases import Base
from suite.errors import UserError
from suite.task import Source

SECONDS = 5.0  # how long the hub may take to answer
UNREACHABLE = "the Hugging Face hub cannot be reached"

Rows = list[dict[str, Any]]


def read(source: Source, split: str, texts: Sequence[str], rows: int, others: Sequence[str] = ()) -> Rows:
    """All rows of a split of a data set, as dictionaries of the named columns, in the hub's order.

    Args:
        texts: columns that must hold text.
        rows: how many rows the split has at the pinned revision.
        others: further columns, of any type.

    Raises `UserError` when the data set cannot be had, a column is missing or holds something else than text,
    or the number of rows is another.
    """
    import datasets

    name = f"data set {source.hub} ({f'{source.subset}, ' if source.subset else ''}{split})"
    copy = _copy(source)
    advice = f"go online, or set SUITE_DATASETS to a folder with a copy of the repository as {source.hub}"
    if copy is None and not has_data(source):  # asked here because `datasets` would try for half a minute
        reason = _refusal(str(source.hub), str(source.revision), "dataset")
        if reason is not None:
            raise UserError(f"{name}: not on this machine, and {reason}; {advice}")
    where = {"path": source.hub, "revision": source.revision} if copy is None else {"path": str(copy)}
    try:
        with quiet():
            found = datasets.load_dataset(name=source.subset, split=split, **where)
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError):
        raise UserError(f"{name}: not on the hub at revision {source.revision}; {advice}") from None
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        place = copy or "what the hub gave"
        raise UserError(f"{name}: {place} cannot be read ({_first_line(error)})") from None
    for column in (*texts, *others):
        if column not in found.column_names:
            there = ", ".join(found.column_names)
            raise UserError(f"{name}: there is no column {column!r}; there are {there}")
    for column in texts:
        if getattr(found.features[column], "dtype", None) not in ("string", "large_string"):
            raise UserError(f"{name}: column {column!r} does not hold text")
    if len(found) != rows:
        raise UserError(f"{name}: {len(found):,} rows instead of {rows:,}")
    content: Rows = found.select_columns([*texts, *others]).to_list()
    for number, row in enumerate(content):
        for column in texts:
            if row[column] is None:
                raise UserError(f"{name}: row {number} has no {column}")
    return content


def require(bases: Iterable[Base], sources: Iterable[Source]) -> None:
    """Make sure, in seconds, that every base and data set of the hub is on this machine or can be had.

    Nothing is downloaded. Raises `UserError`, one sentence that names all that cannot be had and says why.
    """
    models = [(base.hub, base.revision, "model", _has_weights(base)) for base in bases if base.hub]
    data = [(one.hub, str(one.revision), "dataset", has_data(one)) for one in sources if one.hub]
    lacking: list[str] = []
    reasons: dict[str, None] = {}
    for repository, revision, kind, here in dict.fromkeys([*models, *data]):
        if here:
            continue
        reason = UNREACHABLE if UNREACHABLE in reasons else _refusal(repository, revision, kind)
        if reason is not None:
            lacking.append(repository)
            reasons[reason] = None
    if lacking:
        raise UserError(
            f"{', '.join(dict.fromkeys(lacking))}: not on this machine, and {' and '.join(reasons)}; go "
            "online, or bring bases in the Hugging Face cache and data sets as copies in SUITE_DATASETS"
        )


def _refusal(repository: str, revision: str, kind: str) -> str | None:
    """Why a repository cannot be had from the hub, or None. One small request."""
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    file = "config.json" if kind == "model" else "README.md"
    try:
        get_hf_file_metadata(
            hf_hub_url(repository, file, repo_type=kind, revision=revision), timeout=SECONDS
        )
    except errors.GatedRepoError:
        return f"the licence of {repository} must be accepted on the hub and HF_TOKEN set"
    except errors.RevisionNotFoundError:
        return f"{repository} has no revision {revision[:12]}"
    except errors.RepositoryNotFoundError:
        return f"the hub shows no {repository} to this user"
    except Exception:  # whatever the HTTP library in use calls a connection that fails
        return UNREACHABLE
    return None


def _has_weights(base: Base) -> bool:
    from huggingface_hub import try_to_load_from_cache

    def cached(file: str) -> bool:
        return isinstance(try_to_load_from_cache(str(base.hub), file, revision=base.revision), str)

    return cached("model.safetensors") or cached("model.safetensors.index.json")


def has_data(source: Source) -> bool:
    """Whether a data set of the hub is on this machine. The hub is not asked."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    if _copy(source) is not None:
        return True
    owner, _, name = str(source.hub).partition("/")
    cache = Path(config.HF_DATASETS_CACHE) / f"{owner}___{camelcase_to_snakecase(name)}"
    return any((cache / (source.subset or "default")).glob(f"*/{source.revision}/dataset_info.json"))


def _copy(source: Source) -> Path | None:
    """The local copy of a repository, if there is one."""
    root = paths.datasets()
    folder = root / str(source.hub) if root is not None else None
    return folder if folder is not None and folder.is_dir() else None


def _first_line(error: BaseException) -> str:
    """The first line of what an error goes back to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet() -> Iterator[None]:
    """`datasets` without progress bars and chatter."""
    import datasets

    silent, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if not silent:
            datasets.enable_progress_bars()
