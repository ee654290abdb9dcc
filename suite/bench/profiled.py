"""The first pack of a study under torch's profiler, in a worker as `suite run` makes it.

    python -m suite.bench.profiled STUDY.yaml SCALE TABLE.txt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from suite import plan, study
from suite.study import Scale
from suite.worker import Worker


def write(path: str, scale: Scale, table: Path) -> None:
    """Run the pack with the suite's defaults and write the operations that took most time."""
    found = study.load(path)
    cells = study.cells(found, scale)
    specs = {spec.id: spec for spec in study.unique(cells)}
    pack = [specs[run] for run in plan.make(found, scale, cells).packs[0]]
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        Worker("cuda" if gpu else "cpu").run(pack)
    averages = profiler.key_averages()
    text = averages.table(sort_by="self_device_time_total" if gpu else "self_cpu_time_total", row_limit=40)
    table.write_text(f"{len(pack)} runs in the pack\n{text}", encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1], sys.argv[2], Path(sys.argv[3]))  # type: ignore[arg-type]
