"""Opens the MLflow pages on this machine only."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import IO

from suite import paths, tracking
from suite.errors import UserError, one_of

LOOPBACK = ("127.0.0.1", "localhost")
START_SECONDS = 90


def serve(port: int = 5000, host: str = "127.0.0.1") -> int:
    """Serve the MLflow pages of the store until Ctrl-C; returns the exit code. When `port` is in use, another
    is taken.

    Raises `UserError` for a host that other machines can reach, and when the server does not start.
    """
    if host not in LOOPBACK:
        raise UserError(f"--host {host}: the pages have no login, so they are served to this machine only; "
                        f"use {one_of(LOOPBACK)}")
    if not 0 < port < 65536:
        raise UserError(f"--port {port}: use a number from 1 to 65535")
    uri = tracking.store_uri()
    if uri.startswith(("http://", "https://")):
        print(f"MLFLOW_TRACKING_URI is set, so the runs are on a server: {tracking.public(uri)}")
        return 0
    chosen = free_port(port)
    if chosen != port:
        print(f"Port {port} is in use; taking {chosen}.")
    print("Starting the MLflow pages ...", flush=True)
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command(uri, chosen), env={**os.environ, **_quiet()}, stdout=log,
                                  stderr=log, start_new_session=True)
        try:
            with _interrupted_by_termination():
                _wait_until_up(server, chosen, log)
                print("\n".join(_addresses(uri, chosen)) + "\nCtrl-C stops it.", flush=True)
                return server.wait()
        except KeyboardInterrupt:
            print("\nStopped.")
            return 0
        finally:
            _stop(server)


def command(uri: str, port: int) -> list[str]:
    """The command that serves a store. `-P` keeps the working directory off the module path."""
    root = tracking.artifact_root(uri) or paths.results().resolve() / "mlartifacts"
    return [sys.executable, "-P", "-m", "mlflow", "server", "--backend-store-uri", uri,
            "--default-artifact-root", str(root), "--no-serve-artifacts",
            "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]


def free_port(port: int) -> int:
    """`port` if nothing listens there, else the next free one of the twenty after it, else any."""
    for candidate in [*range(port, min(port + 21, 65536)), 0]:
        with socket.socket() as probe:
            if os.name == "posix":
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", candidate))
                return int(probe.getsockname()[1])
    raise UserError("no free port on 127.0.0.1")


def _quiet() -> dict[str, str]:
    return {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_LOGGING_LEVEL": "ERROR",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def _addresses(uri: str, port: int) -> list[str]:
    """The addresses to open: the runs of each study, in MLflow's layout for model training."""
    root, layout = f"http://127.0.0.1:{port}", "workflowType=machine_learning"
    studies = []
    if uri.startswith("sqlite:///"):
        with contextlib.closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as store:
            studies = store.execute("SELECT experiment_id, name FROM experiments "
                                    "WHERE lifecycle_stage = 'active' AND name != 'Default'").fetchall()
    if not studies:
        return [f"MLflow: {root}/#/experiments?{layout}", "No runs yet: `suite run gora` fills these pages."]
    return [f"MLflow, study {name}: {root}/#/experiments/{number}/runs?{layout}&viewStateShareKey=scores"
            for number, name in studies]


def _wait_until_up(server: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            log.seek(0)
            words = log.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise UserError(f"the MLflow server stopped at once (exit code {server.returncode}): {words[-1]}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise UserError(f"the MLflow server did not answer within {START_SECONDS} s")


@contextlib.contextmanager
def _interrupted_by_termination() -> Iterator[None]:
    """Being terminated ends the server as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(server: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which share its process group."""
    if server.poll() is not None:
        return
    if os.name == "posix":
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
    else:
        server.terminate()
    try:
        server.wait(timeout=10)
    except subprocess.TimeoutExpired:
        server.kill()
