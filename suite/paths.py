"""Where the suite reads and writes. Everything hangs on two folders that the environment may move."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def results() -> Path:
    """Folder of records, caches and the MLflow store: `$SUITE_RESULTS`, else `results/` of the repository."""
    return Path(os.environ.get("SUITE_RESULTS", REPOSITORY / "results"))


def runs() -> Path:
    """One folder per run, named by the run's id: `$SUITE_RUNS`, else in the results folder."""
    return Path(os.environ.get("SUITE_RUNS", results() / "runs"))


def cache() -> Path:
    """Things that can be made again, gradient estimates and calibrations: `$SUITE_CACHE`, else in the results folder."""
    return Path(os.environ.get("SUITE_CACHE", results() / "cache"))


def assets() -> Path:
    """Checked archives and what was unpacked from them: `$SUITE_ASSETS`, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "peft-suite"
    return Path(os.environ.get("SUITE_ASSETS", default))


def datasets() -> Path | None:
    """Copies of data sets' hub repositories, as OWNER/NAME: `$SUITE_DATASETS`, or none."""
    given = os.environ.get("SUITE_DATASETS")
    return Path(given) if given else None


def published() -> Path:
    """The papers' tables as data; part of the repository."""
    return REPOSITORY / "results" / "published"


def measured() -> Path:
    """Baselines, to be committed: `$SUITE_MEASURED`, else `results/measured/` of the repository."""
    return Path(os.environ.get("SUITE_MEASURED", REPOSITORY / "results" / "measured"))


def history() -> Path:
    """What each comparison with a baseline found, one file per study."""
    return results() / "history"


def studies() -> Path:
    """The built-in study files."""
    return Path(__file__).resolve().parent / "studies"


def reports() -> Path:
    """Where reports are written: `$SUITE_REPORTS`, else `reports/out/` of the repository."""
    return Path(os.environ.get("SUITE_REPORTS", REPOSITORY / "reports" / "out"))


def settle(*written: Path) -> None:
    """Wait until files and folders are on the disk itself, so that a power cut takes nothing from them. Raises `OSError`.

    What is written aside and renamed into place is settled before that, or the new name may be found with an empty file; its
    folder is settled after it, or the renaming may be forgotten.
    """
    for path in written:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot
                raise
        finally:
            os.close(handle)


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all, and for good; folders are made. Raises `OSError`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=target.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
        settle(Path(draft))
        os.replace(draft, target)
        settle(target.parent)
    except OSError:
        Path(draft).unlink(missing_ok=True)
        raise
