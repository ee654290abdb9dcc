"""What this machine can run, and what to do about what it cannot. Quick, and harmless to call at any time."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from suite import assets, environment, paths, tracking

GIB = 2**30
#: What each scale needs: memory, free disk and GPU memory in GiB, and whether it needs the model hub.
NEEDS = {"desk": (8, 3, 0, False), "bench": (16, 10, 20, False), "paper": (64, 120, 70, True)}
HUB_SECONDS = 1.5


@dataclass(frozen=True)
class Check:
    """One finding. `ok` is None where nothing is wrong but something is not there; `remedy` may be empty."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


def check() -> list[Check]:
    """All findings, the scales last. Takes a few seconds at most; changes nothing."""
    hub = _Hub()
    gpu_name, gpu_bytes = _gpu()
    found = [_python(), _packages(), _cores(), _memory(), *_folders(), _gpu_check(gpu_name, gpu_bytes)]
    found += [*_assets(), _store(), _ray(), _commit(), hub.check()]
    reachable = bool(found[-1].ok)
    return found + [_scale(scale, gpu_bytes, reachable) for scale in NEEDS]


def _python() -> Check:
    version = platform.python_version()
    if tuple(map(int, platform.python_version_tuple()[:2])) >= (3, 11):
        return Check("python", True, f"Python {version}.")
    return Check("python", False, f"Python {version} is too old.",
                 "Install Python 3.11 or newer, then `make setup`.")


def _packages() -> Check:
    pins = paths.REPOSITORY / "constraints.txt"
    if not pins.exists():
        return Check("packages", None, "No constraints.txt here, so versions are not compared.")
    wanted = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", pins.read_text(encoding="utf-8"), re.MULTILINE))
    differ, missing = [], []
    for name, version in wanted.items():
        try:
            have = metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if have != version:
            differ.append(f"{name} {have} (tested with {version})")
    remedy = "Run `make setup` for the tested versions."
    needed = [name for name in missing if name in _required()]
    if needed:
        return Check("packages", False, f"Not installed: {_some(needed)}.", remedy)
    if differ:
        return Check("packages", None, f"Other versions than tested: {_some(differ)}.", remedy)
    return Check("packages", True, f"{len(wanted) - len(missing)} packages at their tested versions.")


def _required() -> set[str]:
    """Names of the packages that the suite itself asks for."""
    import tomllib

    project = tomllib.loads((paths.REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {re.split(r"[^A-Za-z0-9-]", line, maxsplit=1)[0].lower() for line in project["dependencies"]}


def _cores() -> Check:
    count = environment.cores()
    return Check("cores", True, f"{count} {'core' if count == 1 else 'cores'}, {environment.cpu_name()}.")


def _memory() -> Check:
    have, need = environment.memory_bytes() / GIB, NEEDS["desk"][0]
    if have < 0.95 * need:
        return Check("memory", False, f"{have:.0f} GiB of memory; desk needs {need} GiB.",
                     "Use a machine with more memory.")
    return Check("memory", True, f"{have:.0f} GiB of memory.")


def _folders() -> Iterator[Check]:
    folders = (("assets", paths.assets(), 1.5), ("results", paths.results(), 1.0))
    for kind, folder, need in folders:
        name, variable = f"{kind} folder", f"SUITE_{kind.upper()}"
        remedy = f"Free some space, or set {variable} to a folder elsewhere."
        place = _standing(folder)
        free = shutil.disk_usage(place).free / GIB
        if not _writable(place):
            yield Check(name, False, f"{folder} cannot be written.", remedy)
        elif free < need:
            yield Check(name, False, f"{folder} has {free:.1f} GiB free; desk needs {need} GiB.", remedy)
        else:
            yield Check(name, True, f"{folder} can be written and has {free:.0f} GiB free.")


def _gpu_check(name: str | None, size: int) -> Check:
    if name is None:
        return Check("gpu", None, "No GPU; scale desk does not need one.")
    if size == 0:
        return Check("gpu", False, f"{name} is there, but the installed PyTorch cannot use it.",
                     "Install a PyTorch build for this GPU and its driver.")
    return Check("gpu", True, f"{name}, {size / GIB:.0f} GiB.")


def _assets() -> Iterator[Check]:
    for asset in assets.status():
        name = f"asset {asset.asset}"
        if asset.state == "ready":
            yield Check(name, True, f"{asset.title}: fetched, checked and complete.")
        elif asset.state == "absent":
            yield Check(name, None, f"{asset.title}: not fetched yet ({asset.bytes / 1e6:.0f} MB).",
                        "The first `suite run` fetches it.")
        else:
            yield Check(name, False, f"{asset.title}: damaged ({asset.detail}).",
                        "The next `suite run` makes it again.")


def _store() -> Check:
    uri = tracking.store_uri()
    if not uri.startswith("sqlite:///"):
        return Check("mlflow", None, f"Runs go to {tracking.public(uri)}, which is not asked now.")
    path = Path(uri.removeprefix("sqlite:///"))
    if not path.exists():
        return Check("mlflow", None, "No MLflow store yet.", "The first `suite run` makes it.")
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=1)) as store:
            count = store.execute("SELECT count(*) FROM runs WHERE lifecycle_stage = 'active'").fetchone()[0]
    except sqlite3.Error as error:
        return Check("mlflow", False, f"{path} cannot be read: {error}.",
                     "Delete it; `suite sync STUDY` fills it again.")
    return Check("mlflow", True, f"The MLflow store holds {count} runs.")


def _ray() -> Check:
    try:
        return Check("ray", True, f"Ray {metadata.version('ray')} for `suite run --executor ray`.")
    except metadata.PackageNotFoundError:
        return Check("ray", None, "Ray is not installed; only `suite run --executor ray` needs it.",
                     f"Run `{environment.INSTALL_RAY}` if you want it.")


def _commit() -> Check:
    commit, dirty = environment.revision()
    if commit is None:
        return Check("commit", None, "No git commit: records will not say which code made them.")
    state = "with changed files, which records will say" if dirty else "with no changed files"
    return Check("commit", True, f"Commit {commit[:12]} {state}.")


def _scale(scale: str, gpu_bytes: int, hub: bool) -> Check:
    memory, disk, gpu, needs_hub = NEEDS[scale]
    free = min(shutil.disk_usage(_standing(folder)).free for folder in (paths.assets(), paths.results()))
    lacks = []
    if gpu and gpu_bytes < gpu * GIB:
        lacks.append(f"a GPU with {gpu} GiB" + (f" (there are {gpu_bytes / GIB:.0f})" if gpu_bytes else ""))
    if environment.memory_bytes() < 0.95 * memory * GIB:
        lacks.append(f"{memory} GiB of memory (there are {environment.memory_bytes() / GIB:.0f})")
    if free < disk * GIB:
        lacks.append(f"{disk} GiB of free disk (there are {free / GIB:.1f})")
    if needs_hub and not hub:
        lacks.append("the model hub or its models in the local cache")
    if lacks:
        ok = False if scale == "desk" else None
        return Check(f"scale {scale}", ok, f"Cannot run here: needs {', '.join(lacks)}.")
    return Check(f"scale {scale}", True, "Can run here.")


class _Hub:
    """Asks whether the model hub can be reached, in the background, while the other checks go on."""

    def __init__(self) -> None:
        self._reached = False
        self._offline = any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
                            for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
        self._thread = threading.Thread(target=self._knock, daemon=True)
        if not self._offline:
            self._thread.start()

    def check(self) -> Check:
        if self._offline:
            return Check("hub", None, "The model hub is switched off; desk and bench do not need it.")
        self._thread.join(HUB_SECONDS)
        if self._reached:
            return Check("hub", True, "The model hub can be reached.")
        return Check("hub", None, "The model hub cannot be reached; desk and bench do not need it.")

    def _knock(self) -> None:
        try:
            from huggingface_hub.constants import ENDPOINT

            address = urlsplit(ENDPOINT)
            port = address.port or (80 if address.scheme == "http" else 443)
            with socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS):
                self._reached = True
        except (OSError, ImportError):
            self._reached = False


def _gpu() -> tuple[str | None, int]:
    """Name and memory of the first GPU. PyTorch, slow to load, is asked only when the driver shows one."""
    driver = shutil.which("nvidia-smi")
    if driver is None:
        return None, 0
    try:
        done = subprocess.run([driver, "--query-gpu=name", "--format=csv,noheader"], capture_output=True,
                              text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None, 0
    told = done.stdout.strip()
    if not told:
        return None, 0
    import torch

    if not torch.cuda.is_available():
        return told.splitlines()[0], 0
    properties = torch.cuda.get_device_properties(0)
    return str(properties.name), int(properties.total_memory)


def _standing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())


def _writable(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
