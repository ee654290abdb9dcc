"""A real Ray cluster on this machine, with nodes that are killed and nodes that join; and what is said without Ray."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from suite import assets, paths
from suite.doctor import check
from suite.errors import UserError
from suite.ray_executor import Ray
from tests.test_end_to_end import STUDY

ROWS = ["head", "lora", "gora"]
#: A killed node is found dead in two seconds; Ray would take its time.
NODE = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_health_check_initial_delay_ms": "500", "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "10000", "RAY_health_check_failure_threshold": "3",
        "RAY_memory_monitor_refresh_ms": "0", "HF_HUB_OFFLINE": "1"}
TABLES = ("curves.parquet", "predictions.parquet", "adapter.safetensors")


def small_study(folder: Path) -> Path:
    study: dict[str, Any] = copy.deepcopy(STUDY)
    study["rows"] = {row: study["rows"][row] for row in ROWS}
    study["scales"]["desk"]["tables"]["main"]["rows"] = ROWS
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(study), encoding="utf-8")
    return path


class Sweep:
    """A `suite run` in a process group of its own, with results in `folder/results`."""

    def __init__(self, folder: Path, *words: str, results: str = "", before: str = "pass") -> None:
        self.folder = folder
        environment = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
        environment |= NODE | {"SUITE_RESULTS": results or str(folder / "results"), "PYTHONPATH": str(paths.REPOSITORY)}
        command = [sys.executable, "-c", f"import sys; {before}; from suite.cli import main; main()", "run",
                   str(small_study(folder)), *words]
        self.process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True, start_new_session=True)

    def finish(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=240)
        return self.process.returncode, out, errors

    def records(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in (self.folder / "results" / "runs").glob("*/record.json")]
        return {record["spec"]["method"]["id"]: record for record in found}

    def left(self) -> list[str]:
        """Half-written runs and leftovers of this executor."""
        results = self.folder / "results"
        return [path.name for path in (*results.glob("*ray-*"), *(results / "runs" / ".drafts").glob("*"))]


def wait_for(what: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "this did not happen in time"
        time.sleep(0.05)
    return found


def busy(process: int) -> list[psutil.Process]:
    """Actors below a process that have a pack in hand."""
    found = []
    for child in psutil.Process(process).children(recursive=True):
        try:
            if child.cmdline()[:1] == ["ray::_Actor.run"]:
                found.append(child)
        except psutil.Error:
            continue
    return found


def same_as_local(sweep: Sweep, local: Sweep, methods: list[str]) -> None:
    """Scores, curves, predictions and adapters, bit for bit."""
    ours, theirs = sweep.records(), local.records()
    for method in methods:
        assert ours[method]["status"] == "finished"
        for key in ("id", "scores", "final_loss", "prepare", "data", "trainable"):
            assert ours[method][key] == theirs[method][key]
        for table in TABLES:
            one, other = [s.folder / "results" / "runs" / ours[method]["id"] / table for s in (sweep, local)]
            assert one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    assets.fetch("minilm")
    assets.fetch("hutto-2014")
    sweep = Sweep(tmp_path_factory.mktemp("local"))
    code, _, errors = sweep.finish()
    assert code == 0, errors
    return sweep


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head that computes nothing. `add_node` adds nodes of one core, with a results folder of their own."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        own = tmp_path_factory.mktemp("node")
        for key, value in (NODE | {"SUITE_RESULTS": str(own), "PYTHONPATH": str(paths.REPOSITORY)}).items():
            patch.setenv(key, value)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node_arguments()})
        made.own = own
        yield made
        made.shutdown()


def add_node(cluster: Any) -> Any:
    """One core more."""
    return cluster.add_node(num_cpus=1, **node_arguments())


def node_arguments() -> dict[str, Any]:
    """With ports that Ray need not find: a node that finds its own gives up when that takes 15 seconds."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    names = ("metrics_agent_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    return {"object_store_memory": 100 * 2**20, "include_dashboard": False, **dict(zip(names, ports, strict=True))}


def raylet(node: Any) -> int:
    return dict(node.live_processes())["raylet"].pid


@pytest.mark.slow
def test_nodes_die_and_join_and_the_scores_are_those_of_one_machine(local: Sweep, cluster: Any, tmp_path: Path) -> None:
    """No node sees the driver's results folder, whose path means another place to every process."""
    first, second = add_node(cluster), add_node(cluster)
    sweep = Sweep(tmp_path, "--executor", "ray", "--ray-address", cluster.address, "--json",
                  results="/proc/self/cwd/results")
    wait_for(lambda: busy(raylet(first)))
    cluster.remove_node(first, allow_graceful=False)
    third = add_node(cluster)
    wait_for(lambda: busy(raylet(second)))
    cluster.remove_node(second, allow_graceful=False)
    wait_for(lambda: busy(raylet(third)))
    code, out, errors = sweep.finish()
    assert code == 0, errors
    assert json.loads(out)["made"] == {"finished": 3}
    assert " ".join(errors.split()).count("its Ray actor died; trying it again on another") == 2
    same_as_local(sweep, local, ROWS)
    assert sweep.left() == []
    # Two nodes were killed with their folders; the third took one of these over and removed it when it left.
    assert len(list(cluster.own.glob("ray-*"))) <= 1


@pytest.mark.slow
def test_a_run_whose_actor_dies_three_times_is_recorded_as_failed(cluster: Any, tmp_path: Path) -> None:
    node = add_node(cluster)
    sweep = Sweep(tmp_path, "--executor", "ray", "--ray-address", cluster.address, "--workers", "1", "--only", "method=head")
    for _ in range(3):
        actor = wait_for(lambda: [actor for one in cluster.worker_nodes for actor in busy(raylet(one))])[0]
        actor.kill()
        psutil.wait_procs([actor])
    code, _, errors = sweep.finish()
    assert code == 1
    record = sweep.records()["head"]
    assert record["status"] == "failed"
    assert record["reason"] == "its Ray actor or node died 3 times (killed, perhaps out of memory)"
    assert "worker died" not in errors  # Ray's own words
    assert sweep.left() == []
    assert psutil.pid_exists(raylet(node))  # a cluster that was found is left


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done_and_ends_the_cluster_that_was_started(local: Sweep, tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "--executor", "ray")
    wait_for(lambda: list((tmp_path / "results" / "runs").glob("*/record.json")))
    wait_for(lambda: busy(sweep.process.pid))
    started = psutil.Process(sweep.process.pid).children(recursive=True)
    os.killpg(sweep.process.pid, signal.SIGINT)
    code, _, errors = sweep.finish()
    assert code == 130
    assert f"Stopped: {len(sweep.records())} runs are kept, {3 - len(sweep.records())} are left" in " ".join(errors.split())
    assert "Traceback" not in errors
    done = sorted(sweep.records())
    assert done
    assert len(done) < 3
    same_as_local(sweep, local, done)
    assert sweep.left() == []
    assert psutil.wait_procs(started, timeout=20)[1] == []


def test_without_ray_one_sentence_says_how_to_get_it(tmp_path: Path) -> None:
    code, _, errors = Sweep(tmp_path, "--executor", "ray", before="sys.modules['ray'] = None").finish()
    assert code == 2
    assert errors.splitlines()[-1] == \
        "suite: --executor ray needs Ray, which is not installed; run `pip install 'ray==2.60.*'`"


@pytest.mark.parametrize(("address", "said"), [
    ("127.0.0.1:9", "no Ray cluster answers there (Connection refused); use HOST:PORT as `ray start --head` printed it"),
    ("ray://there", "use HOST:PORT of a cluster's head, or auto"),
])
def test_a_cluster_that_cannot_be_reached_is_one_sentence(address: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        Ray(address, None, 1, print)
    assert str(error.value) == f"--ray-address {address}: {said}"


def test_doctor_knows_ray() -> None:
    [ray] = [found for found in check() if found.name == "ray"]
    assert ray.ok is True
    assert ray.detail.startswith("Ray 2.60.")
