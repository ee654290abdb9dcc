"""The environment that a record carries."""

from __future__ import annotations

import getpass
import json
import platform
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from suite import environment, paths


def test_snapshot_says_what_a_run_ran_on() -> None:
    found = environment.snapshot(threads=1)
    assert found["python"] == platform.python_version()
    assert found["threads"] == 1
    assert found["packages"]["torch"].startswith("2.")
    assert found["hardware"]["cores"] >= 1
    assert found["hardware"]["memory_bytes"] > 2**29
    assert found["hardware"]["gpu"] is None
    assert found["platform"] == f"{platform.system()}-{platform.machine()}"


def test_snapshot_is_json_without_user_host_or_folder() -> None:
    text = json.dumps(environment.snapshot())
    for secret in (str(paths.REPOSITORY), str(Path.home()), socket.gethostname()):
        assert f'"{secret}' not in text
    assert f'"{getpass.getuser()}"' not in text


def test_revision_tells_changed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
                       check=True, capture_output=True)

    monkeypatch.setattr(paths, "REPOSITORY", tmp_path.resolve())
    ask = environment.revision.__wrapped__
    assert ask() == (None, None)
    git("init")
    assert ask() == (None, False)
    git("commit", "--allow-empty", "-m", "first")
    commit, dirty = ask()
    assert len(commit) == 40
    assert dirty is False
    (tmp_path / "new.py").touch()
    assert ask() == (commit, True)


def test_code_in_anothers_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", str(tmp_path)], check=True, capture_output=True)
    inside = tmp_path / "packages"
    inside.mkdir()
    monkeypatch.setattr(paths, "REPOSITORY", inside.resolve())
    assert environment.revision.__wrapped__() == (None, None)


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_sees_what_was_freed(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sampled:
        monkeypatch.setattr(environment, "_reset_high_water", lambda: False)
    with environment.PeakMemory() as idle:
        pass
    with environment.PeakMemory() as busy:
        block = np.ones(25_000_000)
        block += 1
        del block
    assert busy.resident - idle.resident > 150e6
    assert busy.device is None


def test_peak_memory_forgets_what_was_before() -> None:
    with environment.PeakMemory() as busy:
        block = np.ones(25_000_000)
        del block
    with environment.PeakMemory() as idle:
        pass
    assert busy.resident - idle.resident > 150e6
