"""What an error means for a sweep: too little memory, or results that cannot be kept."""

from __future__ import annotations

import errno
from pathlib import Path

#: Words by which torch, its libraries and the system say that memory ran out.
_MEMORY_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "alloc_failed", "bad_alloc")
#: The disk, the user's quota or a file's largest size is used up. Libraries in Rust say it as `os error N`.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(Exception):
    """Results cannot be kept; says what is wrong with the folder, in a sentence. It ends the sweep: no run can do better."""


class LostLeaseError(Exception):
    """Another process has taken a run over, because this one gave no sign of life."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, on the device or on the host."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in _MEMORY_WORDS)


def full(error: BaseException) -> bool:
    """Whether an error says that there is no room left where something was written."""
    return getattr(error, "errno", None) in _FULL or any(f"os error {code})" in str(error) for code in _FULL)


def storage(error: BaseException, folder: Path) -> StorageError:
    """What to tell of an error that came up while something was written into `folder`."""
    if full(error):
        return StorageError(f"there is no room left for {folder}; make room, or set SUITE_RESULTS to another disk")
    if isinstance(error, FileNotFoundError) and not folder.is_dir():
        return StorageError(f"{folder} has gone; bring it back, or set SUITE_RESULTS to another folder")
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return StorageError(f"{folder} cannot be written ({reason}); make it writable, or set SUITE_RESULTS to another folder")
