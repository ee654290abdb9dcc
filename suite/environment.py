"""What a run ran on: versions, commit, hardware; and how much memory it took.

Nothing here tells who ran it or where: no user, host or folder names.
"""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
import threading
from functools import cache
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from suite import paths

#: Distributions whose versions can change a number.
PACKAGES = (
    "peft-suite", "torch", "transformers", "tokenizers", "peft", "accelerate", "datasets", "evaluate",
    "lm_eval", "mlflow", "numpy", "pandas", "pyarrow", "safetensors", "scikit-learn", "scipy", "statsmodels",
    "gguf", "bitsandbytes",
)

#: How to get Ray, which only `suite run --executor ray` needs.
INSTALL_RAY = "pip install 'ray==2.60.*'"


def snapshot(device: str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """Versions, commit and hardware as a JSON-like dictionary. The GPU is named when `device` is one."""
    commit, dirty = revision()
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "commit": commit,
        "dirty": dirty,
        "hardware": {"cpu": cpu_name(), "cores": cores(), "memory_bytes": memory_bytes(), **_gpu(device)},
        "threads": _threads() if threads is None else threads,
        "platform": f"{platform.system()}-{platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, without importing them."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@cache
def revision() -> tuple[str | None, bool | None]:
    """The commit of the suite's own code and whether files differ from it; (None, None) outside a repository.

    Asked once per process: the code that runs is the code that stood there when the process began.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != paths.REPOSITORY:
        return None, None
    commit, changes = _git("rev-parse", "--verify", "HEAD"), _git("status", "--porcelain")
    return commit, None if changes is None else bool(changes)


def cores() -> int:
    """Cores this process may use: its affinity, and the quota of its control group where there is one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        usable = min(usable, max(1, -(-int(quota[0]) // int(quota[1]))))
    return usable


def memory_bytes() -> int:
    """Memory this process may use: the machine's, or its control group's limit when that is less."""
    total = psutil.virtual_memory().total
    limit = _read("/sys/fs/cgroup/memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def memory_kills() -> int | None:
    """How many processes the kernel has killed for want of memory since the machine started; None where it does not
    tell."""
    found = [line.split()[1] for line in _read("/proc/vmstat").splitlines() if line.startswith("oom_kill ")]
    return int(found[0]) if found else None


def cpu_name() -> str:
    """The processor's model name, as well as the system tells it."""
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model"):
            return value.strip()
    if sys.platform == "darwin":
        told = _output("sysctl", "-n", "machdep.cpu.brand_string")
        if told:
            return told
    return platform.processor() or platform.machine()


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(psutil.Process().memory_info().rss)


def release() -> None:
    """Give freed memory back to the system where the C library can (glibc), so that what is resident is what is used."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def return_large_blocks() -> None:
    """From now on have blocks of 1 MiB and more go back to the system as soon as they are freed, where the C library can do
    that (glibc). Otherwise they are cut from a heap, whose holes fit no other block: the address space grows with each
    attempt, which matters once there is too little. Every large tensor is then mapped anew, which takes a little longer."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune is not None:
        tune(-3, 2**20)  # M_MMAP_THRESHOLD


class PeakMemory:
    """Peak memory while inside: `resident` bytes of this process, and `device` bytes when a GPU is used.

    Linux keeps a high-water mark and lets a process reset its own; elsewhere a thread samples the resident
    set. Peaks do not nest: an inner one resets the mark.
    """

    INTERVAL = 0.02  # seconds between samples, where sampling is needed

    def __init__(self, device: str = "cpu") -> None:
        self.resident = 0
        self.device: int | None = None
        self._device = device
        self._stop = threading.Event()
        self._sampler: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.resident = psutil.Process().memory_info().rss
        if not _reset_high_water():
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        if self._device.startswith("cuda"):
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self._sampler is None:
            self.resident = max(self.resident, _status_bytes("VmHWM") or 0)
        else:
            self._stop.set()
            self._sampler.join()
        if self._device.startswith("cuda"):
            import torch

            self.device = torch.cuda.max_memory_allocated(self._device)

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.resident = max(self.resident, process.memory_info().rss)
            if self._stop.wait(self.INTERVAL):
                self.resident = max(self.resident, process.memory_info().rss)
                return


def _reset_high_water() -> bool:
    """Reset the kernel's mark of this process; False where that cannot be done or has no effect."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    peak, now = _status_bytes("VmHWM"), _status_bytes("VmRSS")
    return peak is not None and now is not None and peak <= now + 64 * 2**20


def _status_bytes(key: str) -> int | None:
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None


def _gpu(device: str) -> dict[str, Any]:
    if not device.startswith("cuda"):
        return {"gpu": None, "gpu_memory_bytes": None}
    import torch

    properties = torch.cuda.get_device_properties(device)
    return {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}


def _threads() -> int:
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else cores()


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(paths.REPOSITORY), *arguments)


def _output(*command: str) -> str | None:
    """What a short command prints, or None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
