"""What `suite doctor` finds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from suite import doctor


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.setenv("SUITE_ASSETS", str(tmp_path / "assets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def findings() -> dict[str, doctor.Check]:
    return {found.name: found for found in doctor.check()}


def test_every_finding_is_one_sentence_and_nothing_is_changed(tmp_path: Path) -> None:
    found = findings()
    names = {"python", "packages", "cores", "memory", "assets folder", "results folder", "gpu", "mlflow",
             "commit", "hub", "scale desk", "scale bench", "scale paper"}
    assert names <= set(found)
    for check in found.values():
        assert check.detail.endswith(".")
        assert "\n" not in check.detail
    assert list(tmp_path.iterdir()) == []


def test_it_is_quick() -> None:
    begin = time.monotonic()
    doctor.check()
    assert time.monotonic() - begin < 5


def test_absent_assets_are_no_fault() -> None:
    found = [check for check in doctor.check() if check.name.startswith("asset ")]
    assert found
    assert all(check.ok is None and check.remedy for check in found)


def test_a_broken_store_is_named_with_a_remedy(tmp_path: Path) -> None:
    store = tmp_path / "results" / "mlflow.db"
    store.parent.mkdir()
    store.write_bytes(b"this is no database" * 100)
    found = findings()["mlflow"]
    assert found.ok is False
    assert "mlflow.db" in found.detail
    assert found.remedy


def test_too_little_memory_stops_desk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.environment, "memory_bytes", lambda: 2 * doctor.GIB)
    found = findings()
    assert found["memory"].ok is False
    assert found["scale desk"].ok is False
    assert "8 GiB of memory" in found["scale desk"].detail


def test_other_versions_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.1" if name == "peft" else real(name))
    found = findings()["packages"]
    assert found.ok is None
    assert "peft 0.0.1" in found.detail


def test_without_gpu_only_desk_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: (None, 0))
    found = findings()
    assert found["scale bench"].ok is None
    assert "GPU" in found["scale bench"].detail
    assert found["gpu"].ok is None


def test_a_large_gpu_runs_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_gpu", lambda: ("Some GPU", 80 * doctor.GIB))
    monkeypatch.setattr(doctor.environment, "memory_bytes", lambda: 128 * doctor.GIB)
    monkeypatch.setitem(doctor.NEEDS, "bench", (16, 0, 20, False))
    found = findings()
    assert found["scale bench"].ok is True
    assert "the model hub" in found["scale paper"].detail
