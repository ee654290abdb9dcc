"""MLflow, filled from records: a view for browsing that can be thrown away and filled again.

One experiment per study, one MLflow run per record. A run carries the hash of the record it shows; a record
whose run has the same hash is left alone, any other is written anew. `docs/mlflow.md` says what stands where.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import filelock
import pandas as pd

from suite import paths, rank_map
from suite.errors import UserError
from suite.records import Record
from suite.specs import digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

    from suite.regression import Regression
    from suite.study import Cell, Study

#: Raised when what is written per record changes, so that older stores are filled anew.
LAYOUT = 1
CURVE_POINTS = 200
TABLE_ROWS = 200
#: Larger adapters (full fine-tuning) stay in the record's folder only.
ADAPTER_LIMIT = 64 * 2**20
#: How long another process may be at it, and a server may take to answer, before that is a problem.
LOCK_SECONDS = 30
ANSWER_SECONDS = "10"
#: Up to so many records are looked for one by one; for more, all runs of the study are fetched.
FEW = 20

_RUN, _SCALE, _CONTENT = "run_id", "scale", "record_hash"
#: What the experiment of a study's verdicts is called, after the study's id.
_VERDICTS = "-verdicts"
_OF_VERDICTS = ("tags.`status`", *(f"metrics.`{name}`" for name in (
    "red", "not_reproduced", "changed", "missing", "better", "underpowered", "reproduced", "unchanged", "not_comparable")))
_PROMOTED = ("learning_rate", "epochs", "batch_size")


@dataclass
class SyncResult:
    """How many MLflow runs were created, left alone and replaced; `problem` is a sentence on what failed."""

    created: int = 0
    unchanged: int = 0
    updated: int = 0
    problem: str | None = None


@dataclass(frozen=True)
class View:
    """A record and the places it has in a study: what one MLflow run shows."""

    study: Study
    scale: str
    cells: tuple[Cell, ...]
    record: Record

    @property
    def label(self) -> str:
        return self.study.rows[self.cells[0].row].label

    @property
    def name(self) -> str:
        """`<row label>/<task>/r8/seed0`: what differs comes first, because MLflow cuts long names short."""
        cell = self.cells[0]
        size = [f"r{cell.rank}"] if cell.rank is not None else []
        usual = self.study.edition(self.scale).tables[cell.table].rates(cell.row)
        validation = cell.spec.evaluation.split == "validation"
        rate = [] if usual == (cell.spec.recipe.learning_rate,) and not validation else \
            [f"lr{cell.spec.recipe.learning_rate:g}"]
        return "/".join([self.label, cell.spec.task.id, *size, *(["validation"] if validation else []), *rate,
                         f"seed{cell.spec.seed}"])

    @property
    def content(self) -> str:
        """Hash of everything the run is made from."""
        places = [(cell.table, cell.row) for cell in self.cells]
        return digest([LAYOUT, self.study.id, self.name, places, self.record.model_dump_json()])[:16]


def store_uri() -> str:
    """Where MLflow keeps runs: `$MLFLOW_TRACKING_URI`, else a SQLite file in the results folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.results().resolve() / 'mlflow.db'}"


def pages(given: str | None = None) -> str | None:
    """Address of the MLflow pages for links: the one given, else the server that `$MLFLOW_TRACKING_URI` names, else None."""
    address = given or os.environ.get("MLFLOW_TRACKING_URI", "")
    return public(address).rstrip("/") if address.startswith(("http://", "https://")) else None


def sync(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record],
         uri: str | None = None) -> SyncResult:
    """Bring the study's experiment in line with the records of `cells`; other runs in it are not touched.

    Never raises for what MLflow or its server does: the sentence stands in `problem`, and the next call goes
    on from there. Two processes may call it at once.
    """
    uri = uri or store_uri()
    result = SyncResult()
    try:
        paths.results().mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(paths.results() / "mlflow.db.lock", timeout=LOCK_SECONDS), _calm():
            _fill(study, scale, _views(study, scale, cells, records), uri, result)
    except filelock.Timeout:
        result.problem = f"MLflow was not updated: another process has been filling it for {LOCK_SECONDS} s"
    except UserError as error:
        result.problem = str(error)
    except Exception as error:
        result.problem = (f"MLflow at {public(uri)} was not updated ({_brief(error)}); the records are safe, "
                          f"and `suite sync {study.id} --scale {scale}` fills it again")
    return result


def log_regression(study: Study, made: Regression, summary: str, uri: str | None = None) -> str | None:
    """Keep the result of a `suite regress` as a run of the experiment `<study>-verdicts`: what was compared as parameters,
    findings by verdict as metrics, `summary` (Markdown) and the whole result as files.

    Never raises for what MLflow or its server does: returns the sentence that says what failed, or None.
    """
    uri = uri or store_uri()
    try:
        paths.results().mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(paths.results() / "mlflow.db.lock", timeout=LOCK_SECONDS), _calm():
            _log_regression(study, made, summary, uri)
    except filelock.Timeout:
        return f"MLflow does not show this result: another process has been filling it for {LOCK_SECONDS} s"
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"MLflow at {public(uri)} does not show this result ({_brief(error)}); it is kept in the results folder"
    return None


def _log_regression(study: Study, made: Regression, summary: str, uri: str) -> None:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param, RunTag

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT="5", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        found = client.get_experiment_by_name(study.id + _VERDICTS)
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=ANSWER_SECONDS, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"):
        experiment = _experiment(client, study, uri, found, _VERDICTS)
        when = _milliseconds(made.time)
        name = f"{made.scale} against {made.baseline or made.against}"
        run_id = client.create_run(experiment.experiment_id, start_time=when, run_name=name).info.run_id
        chosen = {"scale": made.scale, "against": made.against, "baseline": made.baseline,
                  "only": ", ".join(made.only) or None}
        told = {"status": "red" if made.red else "green", "mlflow.user": "suite", "mlflow.source.type": "LOCAL",
                "mlflow.source.name": f"suite regress {study.id} --scale {made.scale} --against {made.against}",
                "mlflow.note.content": made.sentence}
        if made.commit:
            told |= {"mlflow.source.git.commit": made.commit,
                     "git_commit": made.commit[:12] + (" (changed files)" if made.dirty else "")}
        counted = {verdict.replace(" ", "_"): count for verdict, count in made.counts.items()}
        counted |= {"red": len(made.red), "findings": len(made.findings)}
        client.log_batch(run_id, params=[Param(key, value) for key, value in chosen.items() if value is not None],
                         metrics=[Metric(key, float(value), when, 0) for key, value in counted.items()],
                         tags=[RunTag(key, value) for key, value in told.items()])
        client.log_text(run_id, summary, "verdicts.md")
        client.log_text(run_id, made.model_dump_json(indent=1), "verdicts.json")
        client.set_terminated(run_id, "FAILED" if made.red else "FINISHED", when)


def _views(study: Study, scale: str, cells: Sequence[Cell], records: Mapping[str, Record]) -> list[View]:
    places: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell.spec.id in records:
            places.setdefault(cell.spec.id, []).append(cell)
    return [View(study, scale, tuple(found), records[run_id]) for run_id, found in places.items()]


def _fill(study: Study, scale: str, views: Sequence[View], uri: str, result: SyncResult) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT="5", MLFLOW_HTTP_REQUEST_MAX_RETRIES="0"):
        found = client.get_experiment_by_name(study.id)
    with _environment(MLFLOW_HTTP_REQUEST_TIMEOUT=ANSWER_SECONDS, MLFLOW_HTTP_REQUEST_MAX_RETRIES="1"):
        experiment = _experiment(client, study, uri, found)
        existing = _existing(client, experiment.experiment_id, scale, [view.record.id for view in views])
        for view in views:
            old = existing.get(view.record.id, [])
            current = [run for run in old if run.data.tags.get(_CONTENT) == view.content]
            for run in old:
                if run not in current[:1]:
                    _remove(client, run)
            if current:
                result.unchanged += 1
                continue
            _write(client, experiment.experiment_id, view)
            if old:
                result.updated += 1
            else:
                result.created += 1


def _experiment(client: MlflowClient, study: Study, uri: str, found: Experiment | None, suffix: str = "") -> Experiment:
    """The study's experiment, or that of its verdicts (`suffix`), made or restored when need be."""
    root = artifact_root(uri)
    location = f"{root.as_uri()}/{study.id}{suffix}" if root else None
    if found is None:
        note = f"{study.about.strip()}\n\nPaper: {study.paper.title}"
        note += f" (arXiv {study.paper.arxiv})" if study.paper.arxiv else ""
        tags = {"mlflow.note.content": note, "mlflow.experimentKind": "custom_model_development"}
        views = _view("scores", "Verdicts", _OF_VERDICTS) if suffix else _saved_views()
        made = client.create_experiment(study.id + suffix, location, tags=tags | views)
        return client.get_experiment(made)
    if location and found.artifact_location != location:
        raise UserError(f"{public(uri)} was filled when the results stood in another folder: delete it, and "
                        "the next `suite run` or `suite report` fills it again")
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found


def _saved_views() -> dict[str, str]:
    """Two entries for the `Views` menu of the runs page: the scores, and their means over seeds."""
    costs = ["metrics.`trainable_parameters`", "metrics.`seconds_train`", "metrics.`tokens_per_second`"]
    rows = ["metrics.`score`", "metrics.`score_stderr`", "tags.`status`", *costs]
    groups = [{"mode": "tag", "groupByData": key} for key in ("row", "task")]
    grouped = {"aggregateFunction": "average", "groupByKeys": groups}
    return _view("scores", "Scores", rows) | _view("means", "Means over seeds", ["metrics.`score`", *costs], grouped, 2)


def _view(key: str, title: str, shown: Sequence[str], grouped: Any = None, position: int = 1) -> dict[str, str]:
    """The tag that puts an entry into the `Views` menu."""
    name = "attributes.`Run Name`"
    state = {"selectedColumns": list(shown), "columnOrder": [name, *shown], "columnWidths": {name: 300}, "groupBy": grouped}
    content = {"name": title, "createdAt": position, "updatedAt": position, "state": json.dumps(state)}
    return {f"mlflow.sharedViewState.{key}": json.dumps(content)}


def _existing(client: MlflowClient, experiment_id: str, scale: str, run_ids: Sequence[str]) -> dict[str, list[Run]]:
    """Runs of these records at a scale, and perhaps others, by record id; more than one when a fill was cut off."""
    of_scale = f"tags.{_SCALE} = '{scale}'"
    filters = [f"{of_scale} and tags.{_RUN} = '{run_id}'" for run_id in run_ids] if len(run_ids) <= FEW else [of_scale]
    found: dict[str, list[Run]] = {}
    for wanted in filters:
        token = None
        while True:
            page = client.search_runs([experiment_id], wanted, max_results=500, page_token=token)
            for run in page:
                found.setdefault(run.data.tags.get(_RUN, ""), []).append(run)
            token = page.token
            if not token:
                break
    return found


def _remove(client: MlflowClient, run: Run) -> None:
    """Delete a run; its files go too where they stand in a local folder (MLflow itself keeps them)."""
    client.delete_run(run.info.run_id)
    place = urlsplit(run.info.artifact_uri)
    folder = Path(place.path).parent
    if place.scheme == "file" and folder.name == run.info.run_id:
        shutil.rmtree(folder, ignore_errors=True)


def _write(client: MlflowClient, experiment_id: str, view: View) -> None:
    """Write one run. The content hash goes last: a run without it was cut off and is replaced next time."""
    from mlflow.entities import Metric, Param, RunTag

    record = view.record
    start, end = _milliseconds(record.started), _milliseconds(record.finished)
    run = client.create_run(experiment_id, start_time=start, run_name=view.name,
                            tags={_RUN: record.id, _SCALE: view.scale})
    run_id = run.info.run_id
    client.log_batch(run_id,
                     params=[Param(key, _text(value)) for key, value in params(view).items()],
                     tags=[RunTag(key, value) for key, value in tags(view).items()],
                     metrics=[Metric(key, value, end or start, 0) for key, value in metrics(record).items()])
    points = [Metric(*point) for point in _curves(record, start)]
    for first in range(0, len(points), 900):
        client.log_batch(run_id, metrics=points[first:first + 900])
    if record.data is not None:
        client.log_inputs(run_id, [_dataset(record)])
    with tempfile.TemporaryDirectory() as folder:
        shown = _artifacts(view, Path(folder))
        client.log_artifacts(run_id, folder)
    last = {"mlflow.loggedArtifacts": json.dumps(shown), _CONTENT: view.content}
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in last.items()])
    client.set_terminated(run_id, _status(record), end)


def params(view: View) -> dict[str, Any]:
    """What was chosen, named alike for every method; a method's own options are `method.<name>`."""
    spec, cell = view.record.spec, view.cells[0]
    config = dict(spec.method.config)
    rank = config.pop("rank", cell.rank)
    chosen = {
        "base": spec.base.id, "task": spec.task.id, "method": spec.method.id, "row": view.label, "rank": rank,
        "alpha": config.pop("alpha", None), **{key: getattr(spec.recipe, key) for key in _PROMOTED},
        "seed": spec.seed, "train_items": spec.task.train, "test_items": spec.task.test,
        "base_revision": spec.base.revision, "task_version": spec.task.version,
        "method_version": spec.method.version, "engine_version": spec.engine,
    }
    groups = {
        "recipe": spec.recipe.model_dump(mode="json", exclude=set(_PROMOTED)),
        "evaluation": spec.evaluation.model_dump(mode="json", exclude={"decode"}),
        "decode": view.record.decode or {},
        "method": config,
    }
    chosen |= {f"{group}.{key}": value for group, options in groups.items() for key, value in options.items()}
    return {key: value for key, value in chosen.items() if value is not None}


def tags(view: View) -> dict[str, str]:
    """What to filter and group by."""
    record, spec = view.record, view.record.spec
    commit = record.environment.get("commit")
    found = {
        "base": spec.base.id, "task": spec.task.id, "method": spec.method.id,
        "row": ", ".join(dict.fromkeys(cell.row for cell in view.cells)),
        "table": ", ".join(dict.fromkeys(cell.table for cell in view.cells)),
        "budget": f"rank {spec.budget.rank}" if spec.budget else "none",
        "seed": str(spec.seed), "status": record.status,
        "mlflow.user": "suite", "mlflow.source.type": "LOCAL",
        "mlflow.source.name": f"suite run {view.study.id} --scale {view.scale}",
        "mlflow.note.content": note(view),
    }
    if record.reason:
        found["reason"] = record.reason[:500]
    if commit:
        changed = " (changed files)" if record.environment.get("dirty") else ""
        found |= {"mlflow.source.git.commit": commit, "git_commit": commit[:12] + changed}
    return found


def metrics(record: Record) -> dict[str, float]:
    """What was measured, as single numbers; the curves come apart, as `train/...`. Scores on validation data have names of
    their own, so that no column mixes them with test scores."""
    found: dict[str, float | None] = {}
    split = "validation_" if record.spec.evaluation.split == "validation" else ""
    for position, score in enumerate(record.scores):
        names = [f"{split}{score.metric}", f"{split}score"] if position == 0 else [f"{split}{score.metric}"]
        for name in names:
            found |= {name: score.value, f"{name}_stderr": score.stderr}
    found["majority_rate"] = record.data.majority if record.data else None
    found["final_loss"] = record.final_loss
    if record.trainable:
        found |= {"trainable_parameters": record.trainable.total, "trainable_share": record.trainable.share}
    if record.throughput:
        found |= {"tokens_per_second": record.throughput.tokens_per_second, "steps": record.throughput.steps,
                  "padding_share": record.throughput.padding}
    if record.memory:
        found["peak_memory_mib"] = record.memory.resident / 2**20
        found["peak_gpu_memory_mib"] = record.memory.device / 2**20 if record.memory.device else None
    if record.adapter_bytes is not None:
        found["adapter_mib"] = record.adapter_bytes / 2**20
    if record.timings.total > 0:
        found |= {f"seconds_{phase}": value for phase, value in record.timings.model_dump().items()}
        found["seconds_total"] = record.timings.total
    return {key: _rounded(value) for key, value in found.items()
            if value is not None and math.isfinite(value)}


def _rounded(value: float) -> float:
    """Five significant digits, which is what the pages have room for; the record keeps them all."""
    return float(value if value == int(value) else f"{value:.5g}")


def note(view: View) -> str:
    """The run's description in Markdown: what it is, what came out, where its files are."""
    record, spec = view.record, view.record.spec
    size = f", rank {spec.budget.rank}" if spec.budget else ""
    lines = [f"**{view.label}** on `{spec.task.id}`, base `{spec.base.id}`{size}, seed {spec.seed}: "
             f"{record.status}."]
    if record.reason:
        lines.append(f"Reason: {record.reason}")
    if record.score:
        score = record.score
        found = (f"{score.metric.replace('_', ' ').capitalize()} **{100 * score.value:.1f} %** "
                 f"± {100 * score.stderr:.1f} (standard error, {score.items} items)")
        majority = record.data.majority if record.data else None
        lines.append(found + (f"; majority class {100 * majority:.1f} %." if majority is not None else "."))
    if record.trainable and record.trainable.total:
        speed = f" at {record.throughput.tokens_per_second:,.0f} tokens/s" if record.throughput else ""
        lines.append(f"{record.trainable.total:,} trained parameters ({100 * record.trainable.share:.2f} % "
                     f"of the base), {record.timings.train:.0f} s of training{speed}.")
    tables = view.study.edition(view.scale).tables
    titles = [tables[name].title for name in dict.fromkeys(cell.table for cell in view.cells)]
    lines.append(f"Study `{view.study.id}` at scale `{view.scale}`: {'; '.join(titles)}.")
    lines.append(f"Record `{record.id}`: the folder `runs/{record.id}` of the results.")
    size_mib = (record.adapter_bytes or 0) / 2**20
    if size_mib > ADAPTER_LIMIT / 2**20:
        lines.append(f"The trained weights ({size_mib:,.0f} MiB) are kept there only.")
    return "\n\n".join(lines)


def _curves(record: Record, start: int) -> Iterator[tuple[str, float, int, int]]:
    """Points of the training curves: key, value, time, step. Thinned when long; without non-finite values."""
    curves = record.curves()
    if curves is None or curves.empty:
        return
    count = min(len(curves), CURVE_POINTS)
    kept = sorted({round(i * (len(curves) - 1) / max(1, count - 1)) for i in range(count)})
    begin = start + 1000 * (record.timings.load + record.timings.prepare)
    for position in kept:
        row = curves.iloc[position]
        time = int(begin + 1000 * record.timings.train * (position + 1) / len(curves))
        for column in ("loss", "gradient_norm", "learning_rate"):
            value = row.get(column)
            if value is not None and math.isfinite(value):
                yield f"train/{column}", float(value), time, int(row["step"])


def _dataset(record: Record) -> Any:
    """The data as an entry of the run: name, fingerprint and sizes, not the items."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    assert record.data is not None
    task = record.spec.task
    about = {"task": task.id, "version": task.version, "fingerprint": record.data.fingerprint}
    sizes = {"train": record.data.train, "test": record.data.test}
    return DatasetInput(
        Dataset(name=f"{task.id}@v{task.version}", digest=record.data.fingerprint[:12] or "unknown",
                source_type="code", source=json.dumps({"tags": about}), profile=json.dumps(sizes)),
        [InputTag("mlflow.data.context", "train and test")])


def _artifacts(view: View, folder: Path) -> list[dict[str, str]]:
    """Put the run's files into `folder`; returns MLflow's list of those that are tables."""
    record, shown = view.record, []
    (folder / "record.json").write_text(record.model_dump_json(indent=1), encoding="utf-8")
    for name in ("predictions.parquet", "adapter.safetensors"):
        source = record.folder / name
        if source.exists() and source.stat().st_size <= ADAPTER_LIMIT:
            shutil.copyfile(source, folder / name)
    predictions = record.predictions()
    if predictions is not None:
        first = [column for column in ("item", "predicted", "expected") if column in predictions]
        rest = [column for column in predictions if column not in first]
        _table(predictions.loc[:, [*first, *rest]].head(TABLE_ROWS), folder / "predictions.json")
        shown.append({"path": "predictions.json", "type": "table"})
    ranks = record.prepare.get("ranks")
    if ranks:
        importances = record.prepare.get("importances") or {}
        layers = [{"layer": name, "rank": rank, "importance": importances.get(name)}
                  for name, rank in ranks.items()]
        (folder / "rank_map.json").write_text(json.dumps(layers, indent=1), encoding="utf-8")
        title = f"Rank of each layer: {view.label}, {record.spec.task.id}, seed {record.spec.seed}"
        rank_map.draw(ranks, title).savefig(folder / "rank_map.png", dpi=110)
    return shown


def _table(rows: pd.DataFrame, path: Path) -> None:
    """A table as MLflow's pages show it: column names and rows."""
    content = json.loads(rows.to_json(orient="split", index=False))
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _status(record: Record) -> str:
    return {"finished": "FINISHED", "skipped": "KILLED"}.get(record.status, "FAILED")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _milliseconds(moment: str) -> int:
    """A record's ISO time as MLflow counts time; now when the record has none."""
    when = datetime.fromisoformat(moment) if moment else datetime.now().astimezone()
    return int(1000 * when.timestamp())


def artifact_root(uri: str) -> Path | None:
    """The folder of artifacts beside a SQLite store; None for servers, which have their own."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts"


def public(uri: str) -> str:
    """The address without a password."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _brief(error: Exception) -> str:
    """The first line of an error, shortened; a refused or silent server in plain words."""
    text = f"{error} {error.__cause__ or ''} {error.__context__ or ''}"
    if any(sign in text for sign in ("Connection refused", "Max retries", "timed out", "NameResolution")):
        return "the server does not answer"
    line = (str(error).splitlines() or [""])[0].strip() or type(error).__name__
    return line if len(line) <= 200 else line[:200] + " ..."


@contextmanager
def _calm() -> Iterator[None]:
    """MLflow without telemetry, log chatter and progress bars."""
    with _environment(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_LOGGING_LEVEL="ERROR",
                      MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false",
                      MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true"):
        loggers = [logging.getLogger(name) for name in ("mlflow", "alembic", "urllib3")]
        levels = [logger.level for logger in loggers]
        import mlflow  # noqa: F401  its import sets its own levels

        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables set for a while, unless the user has set them."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
