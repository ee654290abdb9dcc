"""Runs commands as a shell loop would, at most some at once, and watches the memory of all their processes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from suite.errors import UserError

#: Seconds between two looks at whether a process has ended, and at memory.
POLL, SAMPLE = 0.05, 0.25


@dataclass(frozen=True)
class Watched:
    """Wall seconds from the first start to the last end, the time of the first start, and peak resident bytes of the
    whole tree at one moment (pages that processes share count in each)."""

    seconds: float
    began: float
    resident: int


def run(commands: Sequence[Sequence[str]], at_once: int, environment: Mapping[str, str], logs: Path) -> Watched:
    """Run commands in order, `at_once` at a time; what they print goes to files in `logs`.

    Raises `UserError` with the last line of what a command printed when it fails. Interrupted, it ends what it started.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting = list(enumerate(commands))
    running: dict[int, subprocess.Popen[bytes]] = {}
    began, clock, sampled, peak = time.time(), time.perf_counter(), 0.0, 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                number, command = waiting.pop(0)
                with (logs / f"{number}.log").open("wb") as log:
                    running[number] = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL,
                                                       stdout=log, stderr=subprocess.STDOUT)
            time.sleep(POLL)
            if time.perf_counter() - sampled > SAMPLE:
                peak = max(peak, sum(map(_resident, running.values())))
                sampled = time.perf_counter()
            for number, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[number]
                if process.returncode:
                    text = (logs / f"{number}.log").read_text(encoding="utf-8", errors="replace").strip()
                    said = (text.splitlines() or ["it said nothing"])[-1]
                    raise UserError(f"a process of the bench failed with exit code {process.returncode}: {said} "
                                    f"(all it printed is in {logs / f'{number}.log'})")
    finally:
        for process in running.values():
            _end(process)
    return Watched(time.perf_counter() - clock, began, peak)


def _resident(process: subprocess.Popen[bytes]) -> int:
    total = 0
    try:
        own = psutil.Process(process.pid)
        for one in [own, *own.children(recursive=True)]:
            try:
                total += one.memory_info().rss
            except psutil.Error:
                continue  # it ended while we looked
    except psutil.Error:
        pass
    return total


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    try:
        tree = [*psutil.Process(process.pid).children(recursive=True)]
    except psutil.Error:
        tree = []
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for one in tree:
        try:
            one.kill()
        except psutil.Error:
            continue
