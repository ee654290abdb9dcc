"""One sitting: the ways take turns on the same sweep, repeat after repeat, so that disturbances fall on all of them."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from rich.console import Console

from suite import assets, bases, calibration, data, environment, paths, registry, study, sweep
from suite.bench import processes
from suite.bench.figures import Measured, RunResult, Way, differences
from suite.bench.workload import Run, Workload
from suite.display import duration
from suite.errors import UserError
from suite.records import Record
from suite.specs import Recipe

SCRIPT = paths.REPOSITORY / "benchmarks" / "trainer_baseline.py"
#: Variables that would decide for the processes what they are to decide by themselves.
_NOT_HANDED_ON = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID",
                  "SUITE_RESULTS", "SUITE_REPORTS")

Tell = Callable[[str], None]


@dataclass
class Sitting:
    """What came out: the ways in the order they are shown (this suite last), whether they did the same work, and what
    utilisation is told against (`matrices` N of the base, `peaks` in operations per second by precision)."""

    workload: Workload
    ways: list[Way]
    matrices: int
    peaks: dict[str, float]
    machine: dict[str, Any]
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ours(self) -> Way:
        return self.ways[-1]

    @property
    def plain(self) -> Way:
        return self.ways[0]

    @property
    def tuned(self) -> Way:
        """The quickest of the tuned baselines."""
        return min(self.ways[1:-1], key=lambda way: way.wall.median)

    def peak(self, way: Way) -> float:
        """The peak in the way's precision; the higher one where the way names none of those measured."""
        return self.peaks.get(way.precision, max(self.peaks.values()))

    @property
    def comparable(self) -> bool:
        return not self.differences


def hold(workload: Workload, repeats: int, full: bool, profiles: Path | None, tell: Tell) -> Sitting:
    """Run the workload every way, `repeats` times in turn. `profiles`: a folder for a profile of one run of each.

    Raises `UserError` when the device is not there, a base or data set cannot be had, or a process fails.
    """
    _check(workload)
    bench = _Bench(workload, tell)
    sitting = bench.begin(full)
    for repeat in range(repeats):
        plain, *tuned, ours = sitting.ways
        for way in ([plain, ours, *tuned] if repeat % 2 == 0 else [plain, *tuned, ours]):
            made = bench.suite() if way is ours else bench.baseline(way)
            way.measured.append(made)
            runs = f"{len(made.results)} of {made.total} runs"
            tell(f"repeat {repeat + 1} of {repeats}, {way.label}: {runs} in {duration(made.wall)}")
    sitting.ours.precision = bench.precision
    sitting.differences = differences(sitting.ways[:-1], sitting.ours, workload.tolerance)
    if profiles is not None:
        bench.profile(sitting, profiles)
    return sitting


def _check(workload: Workload) -> None:
    import torch

    if workload.device == "gpu" and not torch.cuda.is_available():
        raise UserError(f"workload {workload.id} needs a GPU and none is here; `suite bench minilm-cpu` runs on a CPU")
    if not SCRIPT.exists():
        raise UserError(f"{SCRIPT} is not there: `suite bench` runs from a checkout of the repository")


def _settled(workload: Workload) -> study.Study:
    """The workload's study with the precision that is quicker here where it leaves that open; measured before anything is
    timed, as a user's first sweep on a machine does."""
    found = workload.study()
    if workload.recipe.get("precision") != "auto":
        return found
    sweep.settle(found, workload.scale, Console(stderr=True, highlight=False))
    precision = calibration.precision(workload.base)
    return workload.model_copy(update={"recipe": {**workload.recipe, "precision": precision}}).study()


class _Bench:
    """The folder, the data, the environment and the commands of a sitting."""

    def __init__(self, workload: Workload, tell: Tell) -> None:
        self.workload, self.tell = workload, tell
        self.folder = paths.results().resolve() / "bench" / workload.id
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.study = _settled(workload)
        self.cells = study.cells(self.study, workload.scale)
        (self.folder / "study.yaml").write_text(yaml.safe_dump(self.study.model_dump(mode="json", exclude_none=True)),
                                                encoding="utf-8")
        self.base, self.task = bases.get(workload.base), registry.task(workload.task)
        self.precision = "float32"
        self.sample: list[Run] = []
        self.turn = 0
        self.environment = {key: value for key, value in os.environ.items() if key not in _NOT_HANDED_ON}
        path = os.pathsep.join(filter(None, [str(paths.REPOSITORY), os.environ.get("PYTHONPATH", "")]))
        self.environment |= {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
                             "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_CACHE": str(self.folder / "datasets")}
        if workload.device == "cpu":
            self.environment["CUDA_VISIBLE_DEVICES"] = ""

    def begin(self, full: bool) -> Sitting:
        """Everything that is not timed: data, an empty MLflow store, the peak, and one run of the tuned baseline twice
        in each precision, which also warms the caches of the system."""
        workload = self.workload
        self._write_items()
        self._make_store()
        cores = environment.cores()
        at_once = sorted({cores if count == "cores" else int(count) for count in workload.at_once})
        largest = max(at_once)
        count = len(workload.runs) if full else -(-workload.sample // largest) * largest
        self.sample = workload.spread(count)
        peaks = self._peaks()
        tried: dict[str, float] = {}
        for precision in ("float32", "bfloat16") * 2:  # twice in turn: a neighbour's work must not decide
            tried[precision] = min(self._try(precision), tried.get(precision, math.inf))
        best = min(tried, key=lambda precision: tried[precision])
        notes = ["The tuned baseline's precision is the quicker of two (the better of two tries of a run, start-up apart): "
                 + ", ".join(f"{precision} {seconds:.1f} s" for precision, seconds in tried.items()) + "."]
        if len(self.sample) < len(workload.runs):
            notes.append(f"The baselines made {len(self.sample)} of the {len(workload.runs)} runs; their wall time is "
                         "taken to grow with the number of runs, since processes know nothing of each other.")
        ways = [Way("a", "peft and Trainer, a process per run", "float32", 1)]
        ways += [Way("b" if count == 1 else f"b{count}", _tuned(count), best, count) for count in at_once]
        ways.append(Way("c", "this suite", "", 1))
        device = "cuda" if workload.device == "gpu" else "cpu"
        matrices = sum(layer.in_features * layer.out_features for layer in bases.shapes(self.base, self.task).layers)
        if self.base.kind == "causal":
            matrices += int(self.base.config["vocab_size"]) * int(self.base.config["hidden_size"])
        return Sitting(workload, ways, matrices, peaks, environment.snapshot(device, threads=cores), notes=notes)

    def baseline(self, way: Way, runs: Sequence[Run] | None = None, extra: Sequence[str] = ()) -> Measured:
        """The sample (or the given runs), a process each, `way.at_once` at a time."""
        folder = self._next(way.id)
        chosen = self.sample if runs is None else runs
        store = folder / "mlflow.db"
        shutil.copyfile(self.folder / "mlflow.db", store)
        commands = [self._command(way, run, folder / run.name, extra) for run in chosen]
        variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{store}", "MLFLOW_EXPERIMENT_NAME": "sweep"}
        if way.at_once > 1 and self.workload.device == "cpu":
            variables["OMP_NUM_THREADS"] = str(max(1, environment.cores() // way.at_once))
        watched = processes.run(commands, way.at_once, self.environment | variables, folder / "logs")
        told = [json.loads((folder / run.name / "result.json").read_text(encoding="utf-8")) for run in chosen]
        results = tuple(of_trainer(run, one) for run, one in zip(chosen, told, strict=True))
        device = max((one["device_memory"] for one in told if one["device_memory"] is not None), default=None)
        return Measured(watched.seconds, len(self.workload.runs), results, tuple(one["start_up"] for one in told),
                        watched.resident, device, min(way.at_once, len(chosen)))

    def suite(self) -> Measured:
        """The whole sweep by `suite run`, in a results folder of its own, with its MLflow store and without a report."""
        folder = self._next("c")
        command = [sys.executable, "-m", "suite", "run", str(self.folder / "study.yaml"), "--scale", self.workload.scale]
        watched = processes.run([command], 1, self.environment | {"SUITE_RESULTS": str(folder)}, folder / "logs")
        found = []
        for cell in self.cells:
            path = folder / "runs" / cell.spec.id / "record.json"
            found.append(Record.model_validate_json(path.read_text(encoding="utf-8")))
        unfinished = [record for record in found if record.status != "finished"]
        if unfinished:
            raise UserError(f"run {unfinished[0].id} of the suite ended as {unfinished[0].status}: {unfinished[0].reason}")
        self.precision = found[0].spec.recipe.precision
        curves = [_losses(folder / "runs" / record.id) for record in found]
        results = tuple(of_record(Run.of(cell), record, losses)
                        for cell, record, losses in zip(self.cells, found, curves, strict=True))
        first = min(found, key=lambda record: record.started)
        pack = first.pack.size if first.pack else 1
        began = datetime.fromisoformat(first.started).timestamp()
        start_up = max(0.0, began - watched.began) + (first.timings.load + first.timings.prepare) * pack
        device = max((r.memory.device for r in found if r.memory and r.memory.device is not None), default=None)
        return Measured(watched.seconds, len(found), results, (start_up,), watched.resident, device, _lanes(found))

    def profile(self, sitting: Sitting, folder: Path) -> None:
        """A table of torch's profiler for one run of (a) and of the tuned baseline, and for one pack of this suite."""
        folder.mkdir(parents=True, exist_ok=True)
        for way in (sitting.plain, sitting.tuned):
            table = folder / f"profile-{way.id}.txt"
            alone = Way(way.id, way.label, way.precision, 1)
            self.baseline(alone, self.sample[:1], ["--profile", str(table.resolve())])
        command = [sys.executable, "-m", "suite.bench.profiled", str(self.folder / "study.yaml"), self.workload.scale,
                   str((folder / "profile-c.txt").resolve())]
        scratch = self._next("profile")
        processes.run([command], 1, self.environment | {"SUITE_RESULTS": str(scratch)}, scratch / "logs")
        self.tell(f"profiles: {folder}")

    def _command(self, way: Way, run: Run, out: Path, extra: Sequence[str]) -> list[str]:
        workload, recipe = self.workload, Recipe.model_validate({**self.workload.recipe, "learning_rate": run.learning_rate})
        options: dict[str, Any] = {
            "model": assets.fetch(self.base.asset) if self.base.asset else self.base.path or self.base.hub,
            "kind": "causal" if self.base.kind == "causal" else "encoder",
            "train": self.folder / "train.jsonl", "test": self.folder / "test.jsonl", "out": out,
            "rank": run.rank, "alpha": workload.alpha, "learning-rate": run.learning_rate, "seed": run.seed,
            "epochs": recipe.epochs, "batch-size": recipe.batch_size, "max-length": recipe.max_length,
            "eval-batch-size": workload.evaluation.batch_size, "warmup-ratio": recipe.warmup_ratio,
            "precision": way.precision,
        }
        if self.base.kind == "causal":
            decode = workload.evaluation.decode
            options |= {"max-new-tokens": decode.max_new_tokens if decode else 16, **self._scoring()}
        else:
            options["classes"] = len(self.task.labels)
        words = [f"--{key}={value}" for key, values in options.items()
                 for value in (values if isinstance(values, list) else [values])]
        return [sys.executable, str(SCRIPT), *words, *(["--tuned"] if way.id != "a" else []), *extra]

    def _scoring(self) -> Mapping[str, Any]:
        """What of a generated text is the answer, and what does not count in it, from the task's own file."""
        config: Any = self.task.lm_eval_config(self.folder / "test.jsonl")
        patterns = [step["regex_pattern"] for chain in config.get("filter_list", ()) for step in chain["filter"]
                    if step["function"] == "regex"]
        ignored = [pattern for metric in config["metric_list"] for pattern in metric.get("regexes_to_ignore", ())]
        return {**({"pattern": patterns[0]} if patterns else {}), "ignore": ignored}

    def _write_items(self) -> None:
        found = data.load(self.cells[0].spec.task)
        for split in ("train", "test"):
            rows = [{"text": item.text, **({"label": item.label} if self.task.kind == "classification"
                                           else {"target": item.target})} for item in getattr(found, split)]
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            (self.folder / f"{split}.jsonl").write_text(text + "\n", encoding="utf-8")

    def _make_store(self) -> None:
        """An MLflow store with its tables and an experiment, so that no baseline run pays for making them."""
        code = ("import sys; from mlflow import MlflowClient; "
                "MlflowClient(sys.argv[1]).create_experiment('sweep', sys.argv[2])")
        uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        processes.run([[sys.executable, "-c", code, uri, (self.folder / "mlartifacts").as_uri()]], 1, self.environment,
                      self.folder / "logs-store")

    def _peaks(self) -> dict[str, float]:
        device, logs = "cuda" if self.workload.device == "gpu" else "cpu", self.folder / "logs-peak"
        processes.run([[sys.executable, "-m", "suite.bench.peak", device]], 1, self.environment, logs)
        peaks: dict[str, float] = json.loads((logs / "0.log").read_text(encoding="utf-8").strip().splitlines()[-1])
        self.tell("peak in a large matrix product: "
                  + ", ".join(f"{precision} {rate / 1e9:,.0f} GFLOP/s" for precision, rate in peaks.items()))
        return peaks

    def _try(self, precision: str) -> float:
        made = self.baseline(Way("b", "", precision, 1), self.sample[:1])
        seconds = made.results[0].train + made.results[0].evaluate
        self.tell(f"one run of the tuned baseline in {precision}: {seconds:.1f} s and {made.start_up[0]:.1f} s of start-up")
        return seconds

    def _next(self, name: str) -> Path:
        self.turn += 1
        folder = self.folder / f"{self.turn:02}-{name}"
        folder.mkdir()
        return folder


def of_trainer(run: Run, told: Mapping[str, Any]) -> RunResult:
    """A run from the `result.json` of the baseline script: every logged window's mean stands for each of its steps."""
    losses: list[float] = []
    for step, loss in told["windows"]:
        losses += [float(loss)] * (step - len(losses))
    losses += losses[-1:] * (told["steps"] - len(losses))
    return RunResult(run, told["train"], told["evaluate"], told["score"], told["items"], tuple(losses), told["tokens"],
                     told["adapter"], told["trained"], told["test_loss"])


def of_record(run: Run, record: Record, losses: Sequence[float]) -> RunResult:
    """A run from its record."""
    assert record.score is not None
    assert record.throughput is not None
    assert record.trainable is not None
    return RunResult(run, record.timings.train, record.timings.evaluate, record.score.value, record.score.items,
                     tuple(losses), record.throughput.tokens, record.trainable.adapter, record.trainable.total,
                     record.scored_loss)


def _losses(folder: Path) -> list[float]:
    return [float(loss) for loss in pd.read_parquet(folder / "curves.parquet", columns=["loss"])["loss"]]


def _lanes(found: Sequence[Record]) -> float:
    """Packs at work at a time, in the mean: their seconds together over the wall seconds from first to last, which are
    whole in records: so between one and as many as there are packs or cores."""
    ends = [datetime.fromisoformat(record.finished).timestamp() for record in found]
    starts = [datetime.fromisoformat(record.started).timestamp() for record in found]
    wall = max(1.0, max(ends) - min(starts))
    packs = sum(record.pack is None or record.pack.position == 0 for record in found)
    return min(max(1.0, sum(record.timings.total for record in found) / wall), packs, environment.cores())


def _tuned(at_once: int) -> str:
    return f"the same tuned, {'one process' if at_once == 1 else f'{at_once} processes'} at a time"
