"""Checkpoints: when they are written, what makes one unfit, and a real run that is killed in the middle of training."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from safetensors import SafetensorError, safe_open

from suite import assets, checkpoint, paths, records, registry
from suite.batches import Batch
from suite.checkpoint import Checkpoint
from suite.errors import UserError
from suite.method import Start
from suite.records import Record
from suite.specs import RunSpec
from suite.training import Trained, train
from tests import tiny

ALWAYS = 1e-9  # minutes: a checkpoint after every step
DIES = 1e30  # a learning rate after whose first steps no loss is finite


class KilledError(Exception):
    """Instead of a signal: the process and all its objects are done with."""


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))


def attempt(seeds: Sequence[int] = (0, 1), minutes: float = ALWAYS, steps: int | None = None, method: str = "lora",
            change: Callable[[tiny.Tiny], None] = lambda base: None, rates: Sequence[float] = (1e-3, 1e-3),
            epochs: int = 2) -> tuple[Trained, list[RunSpec]]:
    """Train runs of these seeds with fresh objects; raises `KilledError` after so many steps."""
    base, made = tiny.build("bert", torch.float32), registry.method(method)
    change(base)
    config = made.Config()
    packed = base.pack(made, [Start(config, seed) for seed in seeds])
    specs = [base.spec(made, config, seed, rate, epochs=epochs) for seed, rate in zip(seeds, rates, strict=False)]
    loss_of, count = base.loss_of(packed), 0

    def watched(batch: Batch) -> torch.Tensor:
        nonlocal count
        if count == steps:
            raise KilledError
        count += 1
        return loss_of(batch)

    return train(packed, specs, base.data, watched, lambda done, total: None, Checkpoint(specs, {}, minutes)), specs


def kill(**facts: object) -> Path:
    """Kill a training after three steps; gives its checkpoint."""
    with pytest.raises(KilledError):
        attempt(steps=3, **facts)  # type: ignore[arg-type]
    (found,) = (paths.results() / "checkpoints").iterdir()
    return found


def begins_anew(caplog: pytest.LogCaptureFixture, problem: str, **facts: object) -> None:
    """The checkpoint at hand is refused in one sentence, and training gives what it gives without."""
    with caplog.at_level(logging.WARNING):
        found, _ = attempt(**facts)  # type: ignore[arg-type]
    (record,) = caplog.records
    assert problem in record.getMessage()
    assert "\n" not in record.getMessage()
    assert found.resumed == []
    without, _ = attempt(minutes=0, **facts)  # type: ignore[arg-type]
    assert torch.equal(found.losses, without.losses)


@pytest.mark.parametrize("harm", ["cut", "emptied", "flipped", "of text", "facts"])
def test_a_damaged_checkpoint_is_not_used(harm: str, caplog: pytest.LogCaptureFixture) -> None:
    path = kill()
    content = path.read_bytes()
    if harm == "flipped":  # one bit among the tensors
        content = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    elif harm == "facts":
        content = content.replace(b'done\\": 3', b'done\\": 4')
        assert content != path.read_bytes()
    else:
        content = {"cut": content[:-7], "emptied": b"", "of text": b"this is no checkpoint"}[harm]
    path.write_bytes(content)
    begins_anew(caplog, "is damaged and not used")


@pytest.mark.parametrize("seeds", [(0,), (0, 2), (0, 1, 2)])
def test_a_checkpoint_serves_its_own_pack_only(seeds: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    kill()
    begins_anew(caplog, "(runs, start differ)" if len(seeds) != 2 else "(runs differ)", seeds=seeds, rates=[1e-3] * 3)


def test_a_checkpoint_of_another_version_is_not_used(caplog: pytest.LogCaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    kill()
    monkeypatch.setattr(checkpoint, "ENGINE_VERSION", checkpoint.ENGINE_VERSION + 1)
    begins_anew(caplog, "(engine differ)")


def test_a_base_that_comes_out_otherwise_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """Of a base that a method changes, only what is trained is kept; here it was made again with one other scalar."""
    kill(method="full", seeds=(0,))

    def change(base: tiny.Tiny) -> None:
        next(base.model.parameters()).data[0, 0] += 1e-6

    begins_anew(caplog, "(start differ)", method="full", seeds=(0,), change=change)


def test_it_goes_on_where_it_was_and_counts_the_time_before() -> None:
    whole, _ = attempt(minutes=0)
    kill()
    with safe_open(next((paths.results() / "checkpoints").iterdir()), framework="pt") as file:
        assert '"done": 3' in file.metadata()["facts"]
    base_seconds = whole.seconds
    parts, specs = attempt()
    assert parts.resumed == [3]
    assert torch.equal(parts.losses, whole.losses)
    assert 0 < parts.seconds < 100 * base_seconds
    checkpoint.remove([specs[1].id])  # not the first of its pack
    assert checkpoint.path(specs[0].id).exists()
    checkpoint.remove(spec.id for spec in specs)
    assert not list((paths.results() / "checkpoints").iterdir())


def test_a_run_that_has_stopped_stays_stopped() -> None:
    """One of two, and both: then the pack ends early, at the same step as without an interruption."""
    for rates in ([1e-3, DIES], [DIES, DIES]):
        whole, _ = attempt(rates=rates, minutes=0, epochs=6)
        with pytest.raises(KilledError):
            attempt(rates=rates, steps=6, epochs=6)
        parts, specs = attempt(rates=rates, epochs=6)
        assert parts.resumed == [6]
        assert parts.alive == whole.alive == [rate != DIES for rate in rates]
        assert torch.equal(parts.losses.nan_to_num(nan=-1), whole.losses.nan_to_num(nan=-1))
        assert (parts.tokens, parts.padding) == (whole.tokens, whole.padding)
        checkpoint.remove(spec.id for spec in specs)


@pytest.mark.parametrize("minutes", [0.0, 60.0])
def test_nothing_is_written_before_it_is_time_or_where_it_is_off(minutes: float) -> None:
    with pytest.raises(KilledError):
        attempt(minutes=minutes, steps=3)
    assert not (paths.results() / "checkpoints").exists()


def test_a_folder_that_cannot_be_written_costs_the_checkpoint_and_not_the_run(caplog: pytest.LogCaptureFixture) -> None:
    paths.results().mkdir(parents=True)
    (paths.results() / "checkpoints").write_text("a file where the folder should be")
    found, _ = attempt()
    assert found.alive == [True, True]
    assert {record.getMessage().partition(" to ")[0] for record in caplog.records} == {"No checkpoint could be written"}


def test_the_environment_says_how_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SUITE_CHECKPOINT_MINUTES", raising=False)
    assert checkpoint.every() == 5
    monkeypatch.setenv("SUITE_CHECKPOINT_MINUTES", "0.5")
    assert checkpoint.every() == 0.5
    for wrong in ("often", "-1", "nan"):
        monkeypatch.setenv("SUITE_CHECKPOINT_MINUTES", wrong)
        with pytest.raises(UserError, match=f"SUITE_CHECKPOINT_MINUTES={wrong}: give the minutes"):
            checkpoint.every()


STUDY = {
    "id": "small", "title": "A small study", "about": "For tests.", "paper": {"title": "None"},
    "rows": {"lora": {"method": "lora", "label": "LoRA"}},
    "scales": {"desk": {"about": "Tiny.", "tables": {"main": {
        "title": "Main table", "base": "minilm", "tasks": ["movie-sentiment"], "rows": ["lora"], "reference": "lora",
        "budgets": [{"rank": 8}], "seeds": [0], "train": 256, "test": 64,
        "recipe": {"learning_rate": 2e-3, "batch_size": 8, "max_length": 48}}}}},
}


def suite_run(folder: Path, minutes: float) -> subprocess.Popen[str]:
    """`suite run` as a group of processes, with results in this folder."""
    environment = {**os.environ, "SUITE_RESULTS": str(folder), "PYTHONPATH": str(paths.REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    study = folder.parent / "small.yaml"
    study.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
    return subprocess.Popen([sys.executable, "-m", "suite", "run", str(study), "--checkpoint-minutes", str(minutes)],
                            env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def outcome(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Record, pd.DataFrame | None, pd.DataFrame | None]:
    """The run's record, curves and predictions."""
    monkeypatch.setenv("SUITE_RESULTS", str(folder))
    (run,) = (path.name for path in paths.runs().iterdir() if not path.name.startswith("."))
    record = records.load(run)
    assert record is not None
    return record, record.curves(), record.predictions()


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_training_ends_bit_for_bit_as_one_left_alone(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assets.fetch("minilm")
    assets.fetch("hutto-2014")
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert suite_run(alone, 0).wait(600) == 0

    process = suite_run(killed, 1e-5)
    done = 0
    while done < 5:  # steps of 32
        assert process.poll() is None
        time.sleep(0.01)
        for path in (killed / "checkpoints").glob("[!.]*"):
            try:
                facts = checkpoint._read(path)[0]
            except (OSError, SafetensorError):
                continue  # it was replaced meanwhile
            done = facts["done"]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = (killed / "checkpoints").glob("[!.]*")
    facts = checkpoint._read(left)[0]
    assert 5 <= facts["done"] < 32

    again = suite_run(killed, 5)
    assert again.wait(600) == 0, again.stderr
    assert not list((killed / "checkpoints").iterdir())
    whole, curves, predictions = outcome(alone, monkeypatch)
    parts, other_curves, other_predictions = outcome(killed, monkeypatch)
    assert (whole.resumed, parts.resumed) == ([], [facts["done"]])
    assert parts.timings.train > facts["spent"]["train"] > 0
    assert parts.timings.load > facts["spent"]["load"] > 0
    assert (parts.id, parts.scores, parts.final_loss) == (whole.id, whole.scores, whole.final_loss)
    assert curves is not None
    assert predictions is not None
    pd.testing.assert_frame_equal(other_curves, curves, check_exact=True)
    pd.testing.assert_frame_equal(other_predictions, predictions, check_exact=True)
