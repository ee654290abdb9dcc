"""The `suite` command. Every listing and result has `--json`; a wrong input is one sentence and exit code 2."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from suite.errors import UserError, one_of

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Benchmarks of parameter-efficient fine-tuning: fair sweeps, honest numbers, the papers' tables.")

baseline_app = typer.Typer(no_args_is_help=True, help="Stored numbers of our own that `suite regress --against baseline` "
                                                      "compares with.")
app.add_typer(baseline_app, name="baseline")

#: Exit codes: 0 all well, 1 something failed on the way, 2 wrong input, 130 interrupted.
FAILED, WRONG, INTERRUPTED = 1, 2, 130

StudyName = Annotated[str, typer.Argument(help="A built-in study (`suite list studies`) or the path of a study file.")]
ScaleName = Annotated[str, typer.Option("--scale", help="desk (CPU, minutes), bench (one GPU) or paper.")]
Only = Annotated[list[str] | None, typer.Option(
    "--only", help="Only some runs: key=value[,value] with key table, task, method, rank, budget, rate (learning rate) "
                   "or seed. May be repeated.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Executor = Literal["local", "ray"]
Protocol = Annotated[Literal["paper", "fair"], typer.Option(
    "--protocol", help="paper: the study's own settings. fair: every row's learning rate tuned alike, then fresh seeds.")]
Pack = Annotated[str, typer.Option("--pack", help="Runs trained together over one frozen base: auto, or a number.")]
Against = Literal["published", "baseline"]
Kind = Literal["methods", "tasks", "bases", "studies", "published"]


def main() -> None:
    """Entry point: runs the command and turns `UserError` into one sentence."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except UserError as error:
        print(f"suite: {error}", file=sys.stderr)
        sys.exit(WRONG)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run, and what to do about what it cannot."""
    from suite import doctor as checks

    found = checks.check()
    if as_json:
        _dump([vars(check) for check in found])
    else:
        signs = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "dim")}
        table = Table(show_header=False, box=None, padding=(0, 1))
        for check in found:
            sign, style = signs[check.ok]
            said = Text(check.detail)
            if check.remedy:
                said.append(f" {check.remedy}", style="bold" if check.ok is False else "dim")
            table.add_row(Text(sign, style=style), check.name, said)
        Console().print(table)
    if any(check.ok is False for check in found):
        raise typer.Exit(FAILED)


@app.command("list")
def list_(kind: Annotated[Kind, typer.Argument(help="methods, tasks, bases, studies or published.")],
          about: Annotated[str | None, typer.Option(
              help="Only lines that contain this text; published tables also by their methods and columns.")] = None,
          as_json: AsJson = False) -> None:
    """List what is registered."""
    from suite import listing

    header, rows = listing.LISTINGS[kind]()
    if about is not None:
        rows = listing.about(kind, rows, about)
    if as_json:
        _dump([dict(zip(header, row, strict=True)) for row in rows])
        return
    _table(*listing.brief(kind, header, rows))


@app.command()
def show(kind: Annotated[Literal["published"], typer.Argument(help="published.")],
         name: Annotated[str, typer.Argument(help="Id of a table (`suite list published`) or the path of its file.")],
         as_json: AsJson = False) -> None:
    """Show one published table: every number with how it is known, the protocol and the caveats."""
    from suite import listing, published

    table = published.load(name)
    if as_json:
        _dump(table.model_dump(mode="json"))
        return
    if table.rows:
        _table(*listing.published_cells(table), title=table.id)
    for text in listing.published_facts(table):
        Console(width=_wide(), highlight=False).print(Text(text))


@app.command()
def plan(
    study: StudyName, scale: ScaleName = "desk", only: Only = None,
    base: Annotated[str | None, typer.Option(help="What it would be on another base (`suite list bases`).")] = None,
    budget: Annotated[str | None, typer.Option(
        help="What it would be at another budget: rank=8, 300k, 0.5% or lora@8.")] = None,
    pack: Pack = "auto", protocol: Protocol = "paper", as_json: AsJson = False,
) -> None:
    """Show runs, packs, trained parameters, expected time and memory. Nothing is executed, no weights are loaded."""
    from suite import plan as planning
    from suite import study as studies

    found = studies.load(study)
    if protocol == "fair":
        if base or budget:
            raise UserError("--protocol fair: a fair plan is that of the study file; leave --base and --budget out")
        _plan_fair(found, _scale(scale), only or (), _pack(pack), as_json)
        return
    if base or budget:
        found = studies.supposing(found, scale, base, _budget(budget))
    made = planning.make(found, _scale(scale), studies.cells(found, scale, only or ()), _pack(pack),
                         machine=planning.local(_scale(scale)))
    if as_json:
        _dump(made.as_json())
        return
    for table_id, table in found.edition(scale).tables.items():
        runs = [run for run in made.runs if run.table == table_id]
        if runs:
            header, rows = planning.summary(runs)
            _table(header, rows, title=f"{table.title} (base {table.base})")
    if made.packs:
        _table(*planning.pack_table(made), title=f"Packs for {made.workers} worker{'s' if made.workers > 1 else ''}")
    Console(width=_wide()).print(Text(planning.sentence(made)))


@app.command()
def calibrate(
    study: StudyName, scale: ScaleName = "desk", only: Only = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for each base and batch, unless its first rounds take longer.")]
    = 40.0,
    as_json: AsJson = False,
) -> None:
    """Measure how fast this machine trains packs of each size, for the bases and batches of a study. Plans use it."""
    import torch

    from suite import calibration
    from suite import study as studies

    found = studies.load(study)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = []
    for spec in calibration.representatives(studies.unique(studies.cells(found, _scale(scale), only or ()))):
        made.append(calibration.measure(spec, device, seconds))
        calibration.save(made[-1])
    if as_json:
        _dump([{**vars(one), "workload": vars(one.workload), "knee": one.knee} for one in made])
        return
    rows = [[one.workload.name, size, speed, calibration.gained(one, size), one.knee if size == 1 else "",
             f"{one.flops / 1e9:,.0f}" if size == 1 else ""] for one in made for size, speed in one.speeds.items()]
    _table(["workload", "pack", "tokens/s", "gain of doubling", "knee", "Gflop/s alone"], rows,
           title=f"Packed training on {calibration.machine(device)['name']}")
    for one in made:
        if one.knee > 1 and device == "cpu":
            _say(f"{one.workload.name}: a sweep that is killed may make other packs when it goes on, and scores then agree "
                 "to rounding only; --pack 1 keeps them to the bit.")
        if one.cut:
            _say(f"{one.workload.name}: {seconds:g} s were over while doubling still paid, so the knee may be higher; "
                 "--seconds gives it more time.")


@app.command()
def run(
    study: StudyName, scale: ScaleName = "desk", only: Only = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes (default: one per core, or per GPU).")] = None,
    pack: Pack = "auto",
    executor: Annotated[Executor, typer.Option(help="Processes of this machine, or a Ray cluster.")] = "local",
    ray_address: Annotated[str | None, typer.Option(
        envvar="RAY_ADDRESS", help="HOST:PORT of the cluster's head, or auto (default: a cluster of its own here).")] = None,
    protocol: Protocol = "paper",
    report: Annotated[bool, typer.Option("--report", help="Write the report afterwards.")] = False,
    minutes: Annotated[float, typer.Option(
        "--checkpoint-minutes", min=0, envvar="SUITE_CHECKPOINT_MINUTES",
        help="Minutes between two checkpoints of what is being trained (0: none).")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Run what a study lacks. Finished runs are kept; the same command goes on after an interruption."""
    from suite import study as studies
    from suite import sweep

    found = studies.load(study)
    console = Console(stderr=True, highlight=False)
    sweep.settle(found, _scale(scale), console)
    cells = _cells(found, scale, only, protocol)
    more = (lambda: _cells(found, scale, only, protocol)) if protocol == "fair" else None
    os.environ["SUITE_CHECKPOINT_MINUTES"] = str(minutes)  # for the worker processes
    result = sweep.run(found, _scale(scale), cells, workers, _pack(pack), console, executor, ray_address, more)
    if report and not result.interrupted and not result.stopped:
        _report([(found, scale, tuple(only or ()))], None, None, as_json, protocol)
    elif as_json:
        _dump(result.as_json())
    console.print(Text(result.sentence(found.id, scale, protocol)))
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
    if result.failed or result.stopped:
        raise typer.Exit(FAILED)


@app.command()
def status(study: StudyName, scale: ScaleName = "desk", only: Only = None, protocol: Protocol = "paper",
           as_json: AsJson = False) -> None:
    """Say what has been run, what is being run, and what went wrong."""
    from suite import fair, sweep
    from suite import study as studies

    found = studies.load(study)
    state = sweep.status(found, _cells(found, scale, only, protocol))
    progress = fair.progress(found, _scale(scale)) if protocol == "fair" else None
    if as_json:
        runs = [vars(one) for one in state]
        _dump(runs if progress is None else {"rows": [vars(one) for one in progress], "runs": runs})
        return
    header, rows = sweep.summary(state)
    _table(header, rows, title=f"Study {found.id} at {scale}{', fair protocol' if progress else ''}")
    if progress is not None:
        _table(*fair.progress_table(found, progress), title="Tuning")
    for one in state:
        if one.heartbeat is not None:
            Console(width=_wide()).print(Text(f"{one.run} {one.name}: last heartbeat {one.heartbeat:.0f} s ago"))
        if one.status == "failed":
            Console(width=_wide()).print(Text(f"{one.run} {one.name}: {one.reason}", style="red"))


@app.command()
def sync(study: StudyName, scale: ScaleName = "desk", only: Only = None, protocol: Protocol = "paper",
         as_json: AsJson = False) -> None:
    """Bring MLflow in line with the records, after it could not be reached. Nothing is doubled."""
    from suite import records, tracking
    from suite import study as studies

    found = studies.load(study)
    cells = _cells(found, scale, only, protocol)
    synced = tracking.sync(found, scale, cells, records.OnDisk(cell.spec.id for cell in cells))
    if as_json:
        _dump(vars(synced))
    else:
        print(f"{synced.created} runs created, {synced.updated} replaced, {synced.unchanged} were there already.")
    if synced.problem:
        print(f"suite: {synced.problem}", file=sys.stderr)
        raise typer.Exit(FAILED)


@app.command()
def report(
    study: Annotated[str | None, typer.Argument(help="A built-in study, or the path of a study file.")] = None,
    scale: ScaleName = "desk", only: Only = None, protocol: Protocol = "paper",
    every: Annotated[bool, typer.Option("--all", help="Every study and scale that this machine has records of.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the site (default: reports/out).")] = None,
    mlflow_ui: Annotated[str | None, typer.Option(
        "--mlflow-ui", envvar="SUITE_MLFLOW_UI", help="Address of the MLflow pages that the site links to.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the site of what has been run: pages, Markdown, CSV, LaTeX and figures. Missing runs are drawn missing."""
    from suite import study as studies

    if (study is None) != every or (every and only):
        raise UserError("suite report: name a study, or use --all alone (a study takes --scale and --only)")
    if study is not None:
        found = studies.load(study)
        _report([(found, _scale(scale), tuple(only or ()))], out, mlflow_ui, as_json, protocol)
        return
    from reports import site

    known = [(one, scale, ()) for one, scale in site.recorded()]
    if not known:
        raise UserError("suite report --all: there are no records yet; `suite run gora` makes some")
    _report(known, out, mlflow_ui, as_json)


@app.command()
def regress(
    study: StudyName,
    against: Annotated[Against, typer.Option(help="published: the papers' tables; baseline: a stored snapshot of our own.")],
    scale: ScaleName = "desk", only: Only = None,
    name: Annotated[str | None, typer.Option(help="Which baseline (default: the only one, or this machine's).")] = None,
    confirm: Annotated[bool, typer.Option(
        "--confirm", help="Run what has changed with two fresh seeds, and let only what they confirm fail.")] = False,
    fail_on: Annotated[list[str] | None, typer.Option(
        "--fail-on", help="Fail for this verdict as well: better or underpowered. May be repeated.")] = None,
    markdown: Annotated[Path | None, typer.Option(
        help="Write a summary for a CI job page; added to the file when it is $GITHUB_STEP_SUMMARY.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML.")] = None,
    mlflow: Annotated[bool, typer.Option("--mlflow", help="Keep the result as a run in MLflow.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say whether what was run agrees with published tables or a baseline. Exit code 1 when something does not."""
    from suite import records, regression, tracking, verdict_output
    from suite import study as studies

    for verdict in fail_on or ():
        if verdict not in regression.OPTIONAL:
            raise UserError(f"--fail-on {verdict}: use {one_of(regression.OPTIONAL)}")
    if against == "published" and (name is not None or confirm):
        raise UserError(f"{'--confirm' if confirm else '--name'} is for --against baseline")
    found = studies.load(study)
    cells = studies.cells(found, _scale(scale), only or ())
    known = records.load_many(cell.spec.id for cell in cells)
    made = regression.run(found, _scale(scale), cells, known, against, only or (), fail_on or (), name, confirm,
                          Console(stderr=True, highlight=False))
    summary = verdict_output.markdown(found, made)
    if markdown is not None:
        _write("--markdown", markdown, summary, add=str(markdown) == os.environ.get("GITHUB_STEP_SUMMARY"))
    if junit is not None:
        _write("--junit", junit, verdict_output.junit(found, made))
    if mlflow and (problem := tracking.log_regression(found, made, summary)):
        print(f"suite: {problem}", file=sys.stderr)
    if as_json:
        _dump(made.model_dump(mode="json") | {"red": len(made.red), "counts": made.counts})
    else:
        console = Console(width=_wide(), highlight=False)
        for part in verdict_output.terminal(found, made):
            console.print(part, soft_wrap=isinstance(part, Text))
    if made.red:
        raise typer.Exit(FAILED)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Id of a run, or its beginning.")],
    form: Annotated[str, typer.Option(
        "--format", help="peft (an adapter), merged (a checkpoint), sparse, tensor (each with a loader) or own.")] = "peft",
    out: Annotated[Path | None, typer.Option(help="Folder to write into (default: RUN-FORMAT here).")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's trained weights in a form that others load without this project."""
    from suite import export as exporting

    record, folder = exporting.export(run, form, out)
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        _dump({"run": record.id, "folder": str(folder), "files": files})
    else:
        print(f"{folder}: {', '.join(files)}")


@baseline_app.command("accept")
def baseline_accept(
    study: StudyName,
    name: Annotated[str, typer.Option(help="The class of machine it was measured on, in one word: two-cores, h100 ...")],
    reason: Annotated[str, typer.Option(help="Why these numbers are right; kept in the log.")],
    scale: ScaleName = "desk",
    spare: Annotated[bool, typer.Option(
        "--spare", help="Run and keep two further seeds, for `suite regress --confirm`.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a study's records the baseline of a class of machine, under results/measured/, to be committed."""
    from suite import baseline
    from suite import study as studies

    folder = baseline.accept(studies.load(study), _scale(scale), name, reason, spare, Console(stderr=True, highlight=False))
    if as_json:
        _dump({"folder": str(folder), "accepted": baseline.read(folder).log[-1].model_dump()})
    else:
        print(folder)


@baseline_app.command("list")
def baseline_list(as_json: AsJson = False) -> None:
    """List the baselines: what they hold, when and why they were accepted."""
    from suite import baseline

    header, rows = baseline.summary()
    if as_json:
        _dump([dict(zip(header, row, strict=True)) for row in rows])
    else:
        _table(header, rows)


@baseline_app.command("show")
def baseline_show(
    study: StudyName, scale: ScaleName = "desk",
    name: Annotated[str | None, typer.Option(help="Which one, if there are several.")] = None, as_json: AsJson = False,
) -> None:
    """Show a baseline's means and its log."""
    from suite import baseline
    from suite import study as studies

    found = baseline.find(studies.load(study).id, _scale(scale), name)
    if as_json:
        _dump([line.model_dump() for line in found.log])
        return
    _table(*baseline.shown(found), title=f"Baseline {found.study}-{found.scale}-{found.name}")
    for line in found.log:
        code = f"commit {(line.commit or 'unknown')[:12]}{' with changes' if line.dirty else ''}"
        Console(width=_wide(), highlight=False).print(Text(f"{line.time}, {code}, {line.runs} runs: {line.reason}"))


@app.command()
def nightly(
    scale: ScaleName = "desk",
    only: Annotated[list[str] | None, typer.Option(
        "--study", help="Only this study, or study file. May be repeated.")] = None,
) -> None:
    """Measure every study of a scale anew, hold it against baselines and published tables, and build the report.

    Exit code 1 when a comparison is red or a step failed.
    """
    from suite import nightly as nights

    console = Console(stderr=True, highlight=False)
    made = nights.run(_scale(scale), only or nights.names(_scale(scale)), lambda text: console.rule(text))
    print(f"{'Green' if made.green else 'Red'}: {made.folder / 'summary.md'}")
    if not made.green:
        raise typer.Exit(FAILED)


@app.command()
def bench(
    workload: Annotated[str | None, typer.Argument(help="A workload, or the path of a file (none: list them).")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How many times every way takes its turn.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="Let the baselines make every run, not a sample.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Write a profile of one run of each way.")] = False,
    save: Annotated[str | None, typer.Option(help="Keep the figures under results/measured/ by this name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Time a sweep three ways in one sitting: a process per run with peft and Trainer, that tuned, and this suite."""
    from suite import paths
    from suite.bench import output, sitting
    from suite.bench import workload as workloads

    if workload is None:
        found = [workloads.load(name) for name in workloads.names()]
        if as_json:
            _dump([one.model_dump(mode="json") for one in found])
        else:
            _table(["id", "device", "runs", "title"], [[one.id, one.device, len(one.runs), one.title] for one in found])
        return
    if save is not None and not save.replace("-", "").replace("_", "").isalnum():
        raise UserError(f"--save {save}: use one word of letters, digits, - and _")
    console = Console(stderr=True, highlight=False)
    chosen = workloads.load(workload)
    folder = paths.reports() / f"bench-{chosen.id}"
    held = sitting.hold(chosen, repeats, full, folder if profile else None, lambda text: console.print(Text(text)))
    page = output.write(held, folder)
    if save is not None:
        output.write(held, paths.REPOSITORY / "results" / "measured" / f"bench-{chosen.id}-{save}")
    if as_json:
        _dump(output.as_json(held))
    else:
        _table(output.HEADER, output.rows(held), title=chosen.title)
        for text in (output.verdict(held), *held.notes, f"Page: {page}"):
            Console(width=_wide()).print(Text(text))
    if not held.comparable:
        raise typer.Exit(FAILED)


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
       host: Annotated[str, typer.Option(help="127.0.0.1 or localhost.")] = "127.0.0.1") -> None:
    """Open the MLflow pages on this machine."""
    from suite import ui as pages

    raise typer.Exit(pages.serve(port, host))


def _plan_fair(study: Any, scale: Any, only: Sequence[str], pack: int | None, as_json: bool) -> None:
    """What the fair protocol would do: its first rates, and runs and time with and without further ones."""
    from suite import fair
    from suite import plan as planning

    machine = planning.local(scale)
    now = planning.make(study, scale, fair.cells(study, scale, only), pack, machine=machine)
    least, most = (planning.make(study, scale, cells, pack, machine=machine) for cells in fair.expected(study, scale, only))
    if as_json:
        _dump({"now": now.as_json(), "least": least.as_json(), "most": most.as_json()})
        return
    for table_id, table in fair.tested(study, scale).edition(scale).tables.items():
        tuning = {cell.spec.id for cell in fair.cells(study, scale, only) if cell.spec.evaluation.split == "validation"}
        runs = [run for run in now.runs if run.table == table_id and run.id in tuning]
        if runs:
            _table(*planning.summary(runs), title=f"{table.title} (base {table.base}): tuning")
    if now.packs:
        _table(*planning.pack_table(now), title=f"First packs, for {now.workers} worker{'s' if now.workers > 1 else ''}")
    for text in fair.sentences(study, scale, now, least, most):
        Console(width=_wide()).print(Text(text))


def _report(asked: Sequence[tuple[Any, str, tuple[str, ...]]], out: Path | None, mlflow_ui: str | None,
            as_json: bool, protocol: str = "paper") -> None:
    """Write the site with new pages of the studies, scales and filters `asked` for. The page is the same for both protocols;
    the terminal gets that which is asked for."""
    from reports import fair as fair_pages
    from reports import site, study_page
    from suite import paths, tracking

    folder = out or paths.reports()
    chapters = [study_page.chapter(study, scale, only if protocol == "paper" else ()) for study, scale, only in asked]
    written = site.build(chapters, folder, site.others(folder, chapters), tracking.pages(mlflow_ui))
    if as_json:
        found = [study_page.as_json(one) | {"report": str(folder / one.path)} for one in chapters]
        _dump(found[0] if len(found) == 1 else found)
        return
    console = Console(width=_wide(), highlight=False)
    for one in chapters if len(chapters) == 1 else ():
        tables = fair_pages.terminal_tables(one.study, one.scale) if protocol == "fair" else ()
        for table in tables or study_page.terminal_tables(one.tables):
            console.print(table)
    console.print(Text(f"Report: {written.page}"), Text("MLflow: `make ui` (or `suite ui`) opens the pages"), sep="\n",
                  soft_wrap=True)


def _write(option: str, path: Path, content: str, add: bool = False) -> None:
    try:
        with path.open("a" if add else "w", encoding="utf-8") as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({error.strerror or error})") from None


def _cells(study: Any, scale: str, only: Sequence[str] | None, protocol: str) -> list[Any]:
    """The runs of a study under a protocol; of the fair one those that are known to be needed so far."""
    from suite import fair
    from suite import study as studies

    return (fair.cells if protocol == "fair" else studies.cells)(study, _scale(scale), only or ())


def _budget(text: str | None) -> Any:
    from suite.specs import Budget

    try:
        return Budget.read(text) if text else None
    except ValueError:
        raise UserError(f"--budget {text}: write rank=8, 300k, 0.5% or lora@8") from None


def _pack(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise UserError(f"--pack {text}: use auto, or a number from 1")


def _scale(name: str) -> Any:
    """The name, checked. A study may lack a scale; that is told when its edition is asked for."""
    from suite.study import SCALES

    if name not in SCALES:
        raise UserError(f"--scale {name}: use {one_of(SCALES)}")
    return name


def _table(header: Sequence[str], rows: Sequence[Sequence[object]], title: str | None = None) -> None:
    from rich import box

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(header):
        numeric = all(isinstance(row[position], int | float) or row[position] in ("", "—") for row in rows) and rows
        table.add_column(name, justify="right" if numeric else "left", no_wrap=position == 0)
    for row in rows:
        table.add_row(*(_shown(value) for value in row))
    Console(width=_wide(), highlight=False).print(table)


def _say(text: str) -> None:
    Console(width=_wide()).print(Text(text))


def _shown(value: object) -> Text:
    if isinstance(value, dict):
        return Text(", ".join(f"{count} {name}" for name, count in value.items()))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Text(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return Text(f"{value:,}" if isinstance(value, int) else f"{value:g}")


def _wide() -> int | None:
    """A terminal's own width; a file or pipe gets lines long enough that nothing is cut."""
    return None if sys.stdout.isatty() else 160


def _dump(content: Any) -> None:
    print(json.dumps(content, indent=1, ensure_ascii=False, default=str))
