"""MLflow as a view of records, on a real SQLite store."""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console

from suite import rank_map, records, sweep, tracking, ui
from suite.errors import UserError
from suite.records import Record
from suite.specs import BaseRef, Budget, Evaluation, MethodRef, Recipe, RunSpec, TaskRef
from suite.study import Cell, Study

RECIPE = Recipe(learning_rate=1e-3)
STUDY = Study.model_validate({
    "id": "tiny", "title": "A tiny study", "about": "For tests.", "paper": {"title": "None"},
    "rows": {"lora": {"method": "lora", "label": "LoRA"}, "gora": {"method": "gora", "label": "GoRA"},
             "full": {"method": "full", "label": "Full fine-tuning"}},
    "scales": {"desk": {"about": "", "tables": {"main": {
        "title": "Main table", "base": "minilm", "tasks": ["movies"], "rows": ["full", "lora", "gora"],
        "reference": "lora", "budgets": [{"rank": 8}], "seeds": [0, 1], "recipe": {"learning_rate": 1e-3}}}}},
})
LAYERS = [f"encoder.layer.{block}.{kind}" for block in range(2)
          for kind in ("attention.self.query", "attention.output.dense", "output.dense")]


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def cell(row: str, seed: int = 0, task: str = "movies") -> Cell:
    sized = row != "full"
    config: dict[str, object] = {"rank": 8, "alpha": 16.0} if sized else {}
    if row == "gora":
        config["gamma"] = 0.05
    return Cell("main", row, RunSpec(
        base=BaseRef(id="minilm", revision="1"),
        task=TaskRef(id=task, version=2, train=64, test=50),
        method=MethodRef(id=row, version=1, config=config),
        budget=Budget(rank=8) if sized else None,
        recipe=RECIPE, evaluation=Evaluation(), seed=seed))


def record(of: Cell, status: records.Status = "finished", steps: int = 12, **more: object) -> Record:
    """A record as a run leaves it, saved to its folder."""
    done = status == "finished"
    curves = pd.DataFrame({"step": np.arange(1, steps + 1), "loss": np.linspace(0.7, 0.4, steps),
                           "gradient_norm": np.ones(steps), "learning_rate": np.linspace(1e-3, 0, steps)})
    predictions = pd.DataFrame({"item": ["a", "b"], "expected": ["good", "bad"],
                                "predicted": ["good", "good"], "correct": [True, False]})
    ranks = {"ranks": {name: 4 + i for i, name in enumerate(LAYERS)},
             "importances": dict.fromkeys(LAYERS, 0.5)}
    fields = {
        "id": of.spec.id, "spec": of.spec, "status": status, "reason": "" if done else "out of memory",
        "scores": [records.Score(metric="accuracy", value=0.75, items=50, stderr=0.0612)] if done else [],
        "final_loss": 0.4 if done else None,
        "trainable": records.Trainable(adapter=1000, head=10, total=1010, share=0.01),
        "data": records.Data(fingerprint="ab" * 32, train=64, test=50, truncated=0, majority=0.5),
        "timings": records.Timings(load=1, prepare=2, train=10, evaluate=3, save=0.5),
        "throughput": records.Throughput(steps=steps, tokens=900, padding=0.1, tokens_per_second=90.0),
        "memory": records.Memory(resident=2**30),
        "prepare": ranks if of.row == "gora" else {},
        "environment": {"commit": "c" * 40, "dirty": True},
        "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T03:04:25+00:00",
    }
    adapter = {"A": torch.ones(2, 3)} if done else None
    return records.save(Record(**{**fields, **more}), curves, predictions if done else None, adapter)


def filled(*found: Record) -> dict[str, Record]:
    return {one.id: one for one in found}


def runs() -> list[Run]:
    client = MlflowClient(tracking.store_uri())
    return list(client.search_runs([client.get_experiment_by_name("tiny").experiment_id]))


def counts(result: tracking.SyncResult) -> tuple[int, int, int]:
    assert result.problem is None
    return result.created, result.unchanged, result.updated


def test_a_run_shows_its_record(capfd: pytest.CaptureFixture[str]) -> None:
    place = cell("gora")
    assert counts(tracking.sync(STUDY, "desk", [place], filled(record(place)))) == (1, 0, 0)
    assert capfd.readouterr() == ("", "")
    (run,) = runs()
    client = MlflowClient(tracking.store_uri())
    assert run.info.run_name == "GoRA/movies/r8/seed0"
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 20_000
    assert run.data.params["rank"] == "8"
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.params["method.gamma"] == "0.05"
    assert run.data.params["recipe.schedule"] == "cosine"
    assert run.data.metrics["accuracy"] == run.data.metrics["score"] == 0.75
    assert run.data.metrics["score_stderr"] == run.data.metrics["accuracy_stderr"] == 0.0612
    assert run.data.metrics["majority_rate"] == 0.5
    assert run.data.metrics["seconds_train"] == 10
    assert run.data.metrics["peak_memory_mib"] == 1024
    expected = {"base": "minilm", "task": "movies", "method": "gora", "row": "gora", "table": "main",
                "scale": "desk", "budget": "rank 8", "seed": "0", "status": "finished",
                "run_id": place.spec.id}
    assert expected.items() <= run.data.tags.items()
    assert "75.0 %" in run.data.tags["mlflow.note.content"]
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("movies@v2", "abababababab")
    curve = client.get_metric_history(run.info.run_id, "train/loss")
    assert [point.step for point in curve] == list(range(1, 13))
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "record.json", "predictions.json", "predictions.parquet", "adapter.safetensors", "rank_map.json",
        "rank_map.png"}


def test_parameters_are_named_alike_for_every_method() -> None:
    places = [cell("full"), cell("lora"), cell("gora")]
    tracking.sync(STUDY, "desk", places, filled(*map(record, places)))
    own = ("method.", "rank", "alpha")
    common = [{key for key in run.data.params if not key.startswith(own)} for run in runs()]
    assert common[0] == common[1] == common[2]


def test_a_second_sync_changes_nothing() -> None:
    places = [cell("lora", seed) for seed in (0, 1)]
    made = filled(*map(record, places))
    assert counts(tracking.sync(STUDY, "desk", places, made)) == (2, 0, 0)
    before = {run.info.run_id for run in runs()}
    assert counts(tracking.sync(STUDY, "desk", places, records.load_many(made))) == (0, 2, 0)
    assert {run.info.run_id for run in runs()} == before


def test_failed_then_finished_leaves_one_run(tmp_path: Path) -> None:
    place = cell("lora")
    tracking.sync(STUDY, "desk", [place], filled(record(place, "failed")))
    (run,) = runs()
    assert run.info.status == "FAILED"
    assert run.data.tags["reason"] == "out of memory"
    assert counts(tracking.sync(STUDY, "desk", [place], filled(record(place)))) == (0, 0, 1)
    (run,) = runs()
    assert run.info.status == "FINISHED"
    assert len(list((tmp_path / "results" / "mlartifacts" / "tiny").iterdir())) == 1


def test_half_a_run_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    place = cell("lora")
    made = filled(record(place))
    with monkeypatch.context() as broken:
        broken.setattr(tracking, "_artifacts", lambda *_: 1 / 0)
        assert "division by zero" in (tracking.sync(STUDY, "desk", [place], made).problem or "")
    assert counts(tracking.sync(STUDY, "desk", [place], made)) == (0, 0, 1)
    (run,) = runs()
    assert run.info.status == "FINISHED"


def test_filling_some_cells_leaves_the_others() -> None:
    first, second = cell("lora"), cell("full")
    tracking.sync(STUDY, "desk", [first], filled(record(first)))
    tracking.sync(STUDY, "desk", [second], filled(record(second)))
    assert len(runs()) == 2


def test_diverged_and_skipped_runs_are_there() -> None:
    places = [cell("lora"), cell("gora")]
    made = filled(record(places[0], "diverged", final_loss=None), record(places[1], "skipped"))
    assert tracking.sync(STUDY, "desk", places, made).problem is None
    shown = {run.data.tags["status"]: run.info.status for run in runs()}
    assert shown == {"diverged": "FAILED", "skipped": "KILLED"}


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    place = cell("lora")
    tracking.sync(STUDY, "desk", [place], filled(record(place, steps=5000)))
    curve = MlflowClient(tracking.store_uri()).get_metric_history(runs()[0].info.run_id, "train/loss")
    assert len(curve) == tracking.CURVE_POINTS
    assert (curve[0].step, curve[-1].step) == (1, 5000)


def test_a_large_adapter_stays_with_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "ADAPTER_LIMIT", 50)
    place = cell("full")
    tracking.sync(STUDY, "desk", [place], filled(record(place)))
    (run,) = runs()
    files = {file.path for file in MlflowClient(tracking.store_uri()).list_artifacts(run.info.run_id)}
    assert "adapter.safetensors" not in files
    assert "are kept there only" in run.data.tags["mlflow.note.content"]


def _sync_here(results: str, barrier: object) -> None:
    import os

    os.environ["SUITE_RESULTS"] = results
    places = [cell("lora", seed) for seed in range(4)]
    made = records.load_many([place.spec.id for place in places])
    barrier.wait()  # type: ignore[attr-defined]
    assert tracking.sync(STUDY, "desk", places, made).problem is None


def test_two_processes_at_once_double_nothing(tmp_path: Path) -> None:
    places = [cell("lora", seed) for seed in range(4)]
    for place in places:
        record(place)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    here = (str(tmp_path / "results"), barrier)
    workers = [context.Process(target=_sync_here, args=here) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(run.data.tags["run_id"] for run in runs()) == sorted(place.spec.id for place in places)


def test_a_server_that_is_not_there_is_one_quick_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    place = cell("lora")
    begin = time.monotonic()
    uri = "http://someone:secret@127.0.0.1:9"
    result = tracking.sync(STUDY, "desk", [place], filled(record(place)), uri)
    assert time.monotonic() - begin < 10
    assert result.problem is not None
    assert "127.0.0.1:9" in result.problem
    assert "secret" not in result.problem
    assert "\n" not in result.problem
    assert capfd.readouterr().err == ""
    assert records.load(place.spec.id) is not None


def test_a_server_that_never_answers_is_given_up() -> None:
    place = cell("lora")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        result = tracking.sync(STUDY, "desk", [place], filled(record(place)), uri=address)
    assert time.monotonic() - begin < 10
    assert "does not answer" in (result.problem or "")


def test_a_sweep_without_mlflow_says_it_once_and_is_not_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end one after another; the server takes connections and never answers."""
    said = io.StringIO()
    places = [cell("lora", seed) for seed in range(3)]
    monkeypatch.setattr(sweep._Tracker, "PAUSE", 0.1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with sweep._Tracker(STUDY, "desk", places, Console(file=said, width=1000)) as tracker:
            for place in places:
                begin = time.monotonic()
                tracker.wake(record(place).id)
                assert time.monotonic() - begin < 5
                time.sleep(1)
            begin = time.monotonic()
        assert time.monotonic() - begin < 30
    assert said.getvalue().count("\n") == 1
    assert "the server does not answer" in said.getvalue()
    assert "`suite sync tiny --scale desk` fills it again" in said.getvalue()


def test_a_few_new_records_are_found_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [cell("lora", seed) for seed in range(4)]
    made = filled(*map(record, places))
    monkeypatch.setattr(tracking, "FEW", 2)
    assert counts(tracking.sync(STUDY, "desk", places, made)) == (4, 0, 0)
    few = filled(made[places[0].spec.id], record(places[1], "failed"))
    assert counts(tracking.sync(STUDY, "desk", places, few)) == (0, 1, 1)
    assert len(runs()) == 4


def test_moved_results_are_told() -> None:
    place = cell("lora")
    made = filled(record(place))
    tracking.sync(STUDY, "desk", [place], made)
    results = records.paths.results()
    results.rename(results.parent / "moved")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUITE_RESULTS", str(results.parent / "moved"))
        result = tracking.sync(STUDY, "desk", [place], made)
    assert "another folder" in (result.problem or "")
    assert "delete it" in (result.problem or "")


def test_a_broken_store_is_a_sentence(tmp_path: Path) -> None:
    place = cell("lora")
    made = filled(record(place))
    (tmp_path / "results" / "mlflow.db").write_bytes(b"no database" * 1000)
    result = tracking.sync(STUDY, "desk", [place], made)
    assert "not a database" in (result.problem or "")


def test_a_rank_map_has_blocks_by_kinds() -> None:
    table = rank_map.grid({name: i for i, name in enumerate(LAYERS)})
    assert list(table.columns) == ["attention.query", "attention.output", "output"]
    assert list(table.index) == ["0", "1"]
    assert table.loc["1", "attention.output"] == 4
    both = rank_map.grid({f"{stack}.block.0.layer.0.SelfAttention.q": 1 for stack in ("encoder", "decoder")})
    assert list(both.index) == ["encoder 0", "decoder 0"]
    assert list(rank_map.grid({"pooler.dense": 3}).index) == ["-"]


def test_the_pages_are_for_this_machine_only() -> None:
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0.*127\.0\.0\.1"):
        ui.serve(host="0.0.0.0")


def test_a_port_in_use_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert ui.free_port(port) != port


@pytest.mark.slow
def test_the_pages_open_take_runs_and_end(capfd: pytest.CaptureFixture[str]) -> None:
    place, other = cell("lora"), cell("gora")
    tracking.sync(STUDY, "desk", [place], filled(record(place)))
    port = ui.free_port(5600)
    command = [sys.executable, "-c", f"from suite.ui import serve; raise SystemExit(serve({port}))"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=records.paths.REPOSITORY) as pages:
        assert pages.stdout is not None
        lines = [pages.stdout.readline() for _ in range(3)]
        assert "study tiny" in lines[1]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
            assert b"MLflow" in page.read()
        result = tracking.sync(STUDY, "desk", [other], filled(record(other)), f"http://127.0.0.1:{port}")
        assert counts(result) == (1, 0, 0)
        assert capfd.readouterr() == ("", "")
        pages.terminate()
        assert pages.wait(timeout=20) == 0
    assert ui.free_port(port) == port


class Server:
    """A real MLflow server on a store of its own, in a process group of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.log = open(folder / "server.log", "ab")  # noqa: SIM115  open as long as the server
        self.process = subprocess.Popen(
            ui.command(f"sqlite:///{folder / 'served.db'}", port), stdout=self.log, stderr=self.log, cwd=folder,
            start_new_session=True, env={**os.environ, **ui._quiet()})
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.2)

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
            self.log.close()


@pytest.mark.slow
def test_a_server_that_hangs_or_is_killed_is_filled_later_and_nothing_is_doubled(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def patient() -> tracking.SyncResult:
        """A fill that is to succeed, however busy this machine is."""
        with monkeypatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "100")
            return tracking.sync(STUDY, "desk", places, made, uri)

    places = [cell("lora", seed) for seed in range(6)]
    made = filled(*map(record, places[:1]))
    port = ui.free_port(5700)
    uri = f"http://127.0.0.1:{port}"
    server = Server(tmp_path, port)
    try:
        assert counts(patient()) == (1, 0, 0)
        made |= filled(*map(record, places[1:]))
        server.signal(signal.SIGSTOP)
        begin = time.monotonic()
        assert "the server does not answer" in (tracking.sync(STUDY, "desk", places, made, uri).problem or "")
        assert time.monotonic() - begin < 30
        server.signal(signal.SIGCONT)

        killer = threading.Timer(0.7, lambda: server.signal(signal.SIGKILL))
        killer.start()
        patient()
        killer.join()
        assert "the server does not answer" in (tracking.sync(STUDY, "desk", places, made, uri).problem or "")

        server = Server(tmp_path, port)
        last = patient()
        assert last.problem is None
        assert last.created + last.unchanged + last.updated == 6
        client = MlflowClient(uri)
        shown = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
        assert sorted(run.data.tags["run_id"] for run in shown) == sorted(made)
        assert {run.info.status for run in shown} == {"FINISHED"}
        assert counts(patient()) == (0, 6, 0)
    finally:
        if server.process.poll() is None:
            server.signal(signal.SIGKILL)
