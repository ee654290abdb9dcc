"""What a run leaves behind. Records are the truth; MLflow and the report are views of them.

One folder per run: `record.json` (written last and atomically: a run is done when it stands there), `curves.parquet`
(step, loss, gradient norm, learning rate), `predictions.parquet` (one row per scored item) and, for trained runs,
`adapter.safetensors`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError

from suite import ledger, paths
from suite.errors import UserError
from suite.faults import storage
from suite.specs import RunSpec

Status = Literal["finished", "diverged", "failed", "skipped"]
#: Statuses that need no further attempt. Failed runs are tried again by the next `suite run`.
DONE: frozenset[str] = frozenset({"finished", "diverged", "skipped"})


class Part(BaseModel):
    # What is not finite could be written as JSON but not read again.
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Score(Part):
    """One metric on the scored split: `value` in 0..1 over `items`; `stderr` is the binomial standard error. Of a task
    with parts, the first score is the mean of the parts' and then each part has its own."""

    metric: str
    value: float
    items: int
    stderr: float
    part: str | None = None


class Trainable(Part):
    """Trained scalars: of the adapter, of the task head, and both as a share of the base's parameters."""

    adapter: int
    head: int
    total: int
    share: float


class Data(Part):
    """What the run saw. `majority` is the rate of the most frequent label on the scored split (classification)."""

    fingerprint: str
    train: int
    test: int
    truncated: int
    majority: float | None = None


class Timings(Part):
    """Wall-clock seconds of each phase. `prepare` counts gradient estimation only in the run that computed it."""

    load: float = 0.0
    prepare: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    save: float = 0.0

    @property
    def total(self) -> float:
        return self.load + self.prepare + self.train + self.evaluate + self.save


class Throughput(Part):
    """Training speed. `tokens` are real ones; `padding` is the share of padded positions in what was computed."""

    steps: int
    tokens: int
    padding: float
    tokens_per_second: float


class Memory(Part):
    """Peak bytes of the worker process while this pack ran (`resident`), of that while it trained (`training`), and what
    was resident just before training (`idle`); `device` is the GPU's peak (None on CPU)."""

    resident: int
    device: int | None = None
    training: int | None = None
    idle: int | None = None


class Pack(Part):
    """The pack that this run rode in: its size and this run's place in it."""

    size: int
    position: int


class Record(Part):
    """Everything one run left behind, but for the tables that stand beside it as parquet. `final_loss` is that of
    training, `scored_loss` the mean cross-entropy over the scored items (classification); None when not finite.
    `resumed`: for every time that the run went on from a checkpoint, the step after which it did; timings count what was
    done before."""

    id: str
    spec: RunSpec
    status: Status
    reason: str = ""
    scores: list[Score] = []
    final_loss: float | None = None
    scored_loss: float | None = None
    trainable: Trainable | None = None
    data: Data | None = None
    timings: Timings = Timings()
    throughput: Throughput | None = None
    resumed: list[int] = []
    memory: Memory | None = None
    pack: Pack | None = None
    adapter_bytes: int | None = None
    decode: dict[str, Any] | None = None
    prepare: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    started: str = ""
    finished: str = ""
    trace: str = ""

    @property
    def score(self) -> Score | None:
        """The task's main score."""
        return self.scores[0] if self.scores else None

    @property
    def folder(self) -> Path:
        return folder(self.id)

    def curves(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        """Columns step, loss, gradient_norm, learning_rate, or those asked for; None when the run has none.

        Raises `OSError` or `ValueError` when the file is damaged.
        """
        return _table(self.folder / "curves.parquet", columns)

    def predictions(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        """Columns item, expected, predicted, correct (and loss for classification, prompt and output for generation), or
        those asked for that are there; None when absent.

        Raises `OSError` or `ValueError` when the file is damaged.
        """
        return _table(self.folder / "predictions.parquet", columns)


def folder(run_id: str) -> Path:
    """The folder of a run."""
    return paths.runs() / run_id


@contextmanager
def writing(run_id: str) -> Iterator[Path]:
    """A temporary folder for a run's files that becomes the run's folder, whole or not at all.

    Whoever writes holds the run's lease, so other temporary folders of the run are those of killed processes.
    Raises `LostLeaseError` when another process has taken the run over, `StorageError` when the files cannot be written.
    """
    ledger.check(run_id)
    try:
        drafts().mkdir(parents=True, exist_ok=True)
        clear(run_id)
        scratch = Path(tempfile.mkdtemp(prefix=f"{run_id}-", dir=drafts()))
    except OSError as error:
        raise storage(error, paths.runs()) from error
    try:
        yield scratch
        ledger.check(run_id)
        target, before = folder(run_id), scratch.with_name(f"{scratch.name}-before")
        if target.exists():
            os.replace(target, before)  # in one step: no reader sees a record whose tables are gone
        os.replace(scratch, target)
    except (OSError, SafetensorError) as error:
        raise storage(error, paths.runs()) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(scratch.with_name(f"{scratch.name}-before"), ignore_errors=True)


def clear(run_id: str) -> None:
    """Remove what a killed process left half-written of a run. Whoever calls holds the run's lease."""
    for leftover in drafts().glob(f"{run_id}-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def drafts() -> Path:
    """Where folders are written before they become a run's: apart, so that looking for leftovers does not list all runs."""
    return paths.runs() / ".drafts"


def write(run_id: str, files: Mapping[str, bytes]) -> None:
    """Write a run's folder atomically from files that were made elsewhere. Raises what `writing` raises."""
    with writing(run_id) as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)


def save(record: Record, curves: pd.DataFrame | None = None, predictions: pd.DataFrame | None = None,
         adapter: dict[str, Any] | None = None) -> Record:
    """Write a run's folder atomically; returns the record with `adapter_bytes` filled. Raises what `writing` raises."""
    from safetensors.torch import save_file

    with writing(record.id) as scratch:
        if curves is not None:
            curves.to_parquet(scratch / "curves.parquet", index=False)
        if predictions is not None:
            predictions.to_parquet(scratch / "predictions.parquet", index=False)
        if adapter is not None:
            save_file(adapter, scratch / "adapter.safetensors")
            size = (scratch / "adapter.safetensors").stat().st_size
            record = record.model_copy(update={"adapter_bytes": size})
        (scratch / "record.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")
    return record


def load(run_id: str) -> Record | None:
    """The record of a run, or None. Raises `UserError` when the file is there but is not a record."""
    path = folder(run_id) / "record.json"
    try:
        return Record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = f"{key}: {first['msg']}" if key else first["msg"]
    except (OSError, UnicodeDecodeError) as error:
        problem = str(error)
    raise UserError(f"{path} is not a record of this version of the suite ({problem}); "
                    "delete its folder to run it again")


def load_many(run_ids: Iterable[str]) -> dict[str, Record]:
    """The records that exist among `run_ids`."""
    return dict(each(run_ids))


def each(run_ids: Iterable[str]) -> Iterator[tuple[str, Record]]:
    """The records that exist among `run_ids`, one at a time, so that a large study need not fit into memory."""
    for run_id in run_ids:
        record = load(run_id)
        if record is not None:
            yield run_id, record


def is_done(run_id: str) -> bool:
    """Whether a run needs no further attempt."""
    record = load(run_id)
    return record is not None and record.status in DONE


def _table(path: Path, columns: Sequence[str] | None) -> pd.DataFrame | None:
    """A parquet file, read without the search for a data set of many files that `pd.read_parquet` begins with."""
    from pyarrow.parquet import ParquetFile

    if not path.exists():
        return None
    with ParquetFile(path, memory_map=False) as file:
        return file.read(columns=None if columns is None else list(columns), use_threads=False).to_pandas()
