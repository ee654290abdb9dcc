"""What a person sees while runs go on: done, running, failed, time left. Goes to standard error.

In a terminal a live panel; elsewhere (a log file, CI) one line per run that ended.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from suite.executor import Event
from suite.records import Record, Status
from suite.specs import RunSpec

_STYLE = {"finished": "green", "skipped": "dim", "diverged": "yellow", "failed": "red"}


class Display:
    """A listener of executor events.

    Args:
        todo: the runs that this call is to make.
        done: how many of the study's runs were there before.
        labels: what to call a run, by id.
        expected: planned seconds of each run, by id; they set the proportions, the clock sets the pace.
    """

    def __init__(self, console: Console, todo: Sequence[RunSpec], done: int, labels: Mapping[str, str],
                 expected: Mapping[str, float]) -> None:
        self.console, self.labels, self.expected = console, labels, expected
        self.before = done
        self.left = {spec.id for spec in todo}
        self.total = len(todo)
        self.ended: dict[str, Status] = {}  # no records: they would fill the memory of a long sweep
        self.at_work: dict[int, Event] = {}
        self.worked = 0.0  # planned seconds of what has ended
        self.began = time.monotonic()
        self._live = Live(get_renderable=self._panel, console=console, refresh_per_second=4, transient=True,
                          redirect_stdout=False)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        if event.phase == "halve":
            name = self.labels.get(event.run, event.run)
            self.console.print(f"{name}: out of memory with {event.total} runs at a time, at most {event.done} from now on",
                               style="yellow")
        elif event.kind == "progress":
            self.at_work[event.worker] = event
        elif event.kind == "elsewhere":
            self.console.print(f"{self.labels.get(event.run, event.run)}: another `suite run` is at it", style="dim")
        elif event.kind == "notice":
            self.at_work.pop(event.worker, None)
            what = f"{self.labels.get(event.run, event.run)}: {event.phase}" if event.run else event.phase
            self.console.print(Text(what, style="yellow"))
        elif event.record is not None:
            self._end(event.worker, event.record)

    def more(self, todo: Sequence[RunSpec]) -> None:
        """Count further runs that this call is to make."""
        self.left |= {spec.id for spec in todo}
        self.total += len(todo)

    def failed(self) -> int:
        """How many runs of this call failed."""
        return sum(status == "failed" for status in self.ended.values())

    def seconds_left(self) -> float | None:
        """Expected seconds until all is done; None until the pace is known."""
        if not self.worked:
            return None
        pace = (time.monotonic() - self.began) / self.worked
        return pace * sum(self.expected.get(run, 0.0) for run in self.left)

    def _end(self, worker: int, record: Record) -> None:
        self.ended[record.id] = record.status
        self.left.discard(record.id)
        self.at_work.pop(worker, None)
        self.worked += self.expected.get(record.id, 0.0)
        self.console.print(self._line(record))

    def _line(self, record: Record) -> Text:
        place = f"[{self.before + len(self.ended)}/{self.before + self.total}] "
        text = Text(place, style="dim").append(self.labels.get(record.id, record.id), style="default")
        text.append(f": {record.status}", style=_STYLE[record.status])
        if record.score is not None:
            text.append(f", {record.score.metric.replace('_', ' ')} {100 * record.score.value:.1f} %")
        if record.timings.total:
            text.append(f" in {duration(record.timings.total)}", style="dim")
        if record.reason:
            text.append(f" ({record.reason})", style="dim")
        left = self.seconds_left()
        if not self.console.is_terminal and left:
            text.append(f"; about {duration(left)} left", style="dim")
        return text

    def _panel(self) -> Group:
        left = self.seconds_left()
        failed = self.failed()
        head = Text(f"{self.before + len(self.ended)} of {self.before + self.total} done, "
                    f"{len(self.at_work)} running, ")
        head.append(f"{failed} failed", style="red" if failed else "default")
        head.append(f", {duration(time.monotonic() - self.began)} so far, ")
        head.append("time left not known yet" if left is None else f"about {duration(left)} left")
        bars = Table.grid(padding=(0, 1))
        for worker in sorted(self.at_work):
            event = self.at_work[worker]
            bar = ProgressBar(total=max(1, event.total), completed=event.done, width=24,
                              pulse=event.total <= 1 and event.done == 0)
            bars.add_row(bar, Text(event.phase, style="dim"), Text(self.labels.get(event.run, event.run)))
        return Group(head, bars)


def duration(seconds: float) -> str:
    """8 s, 3 min 20 s, 1 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
