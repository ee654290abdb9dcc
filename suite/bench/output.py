"""What a sitting says: rows for a table, plain data, a Markdown page and a bar chart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from suite.bench.figures import Spread, Way, ratio, same_runs, utilisation
from suite.bench.sitting import Sitting

HEADER = ["way", "precision", "sweep", "a run", "start-up", "times ours", "tokens/s", "training tokens/s", "MFU",
          "MFU training", "memory"]


def rows(sitting: Sitting) -> list[list[str]]:
    """One row per way, under `HEADER`: medians, and lowest to highest of the repeats."""
    return [_row(sitting, way) for way in sitting.ways]


def verdict(sitting: Sitting) -> str:
    """The sitting in one or two sentences; what it may not say when the ways did not do the same work."""
    if not sitting.comparable:
        return "Not comparable: " + "; ".join(sitting.differences) + "."
    plain, tuned = ratio(sitting.plain, sitting.ours), ratio(sitting.tuned, sitting.ours)
    tolerance = sitting.workload.tolerance
    return (f"This suite took {sitting.ours.wall.median:.0f} s for the sweep; (a) took {_times(plain)} times as long, "
            f"the best of (b), {sitting.tuned.label}, {_times(tuned)} times. Same updates, tokens, parameters and items; "
            f"losses and scores agree within {tolerance.loss:.0%} and {tolerance.score:g} points.")


def as_json(sitting: Sitting) -> dict[str, Any]:
    """All that was measured, and what was worked out from it, as plain data."""
    return {
        "workload": sitting.workload.model_dump(mode="json"), "machine": sitting.machine,
        "comparable": sitting.comparable, "differences": sitting.differences, "verdict": verdict(sitting),
        "notes": sitting.notes, "matrices": sitting.matrices, "peak_operations_per_second": sitting.peaks,
        "best_tuned": sitting.tuned.id, "ways": [_way(sitting, way) for way in sitting.ways],
    }


def write(sitting: Sitting, folder: Path) -> Path:
    """Write `bench.json`, `bench.md` and `bench.png` into a folder; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(json.dumps(as_json(sitting), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    _chart(sitting, folder / "bench.png")
    page = folder / "bench.md"
    page.write_text(markdown(sitting), encoding="utf-8")
    return page


def markdown(sitting: Sitting) -> str:
    """The page: what ran, the table, the losses and scores, how to read it."""
    workload, machine = sitting.workload, sitting.machine["hardware"]
    place = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    packages = sitting.machine["packages"]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft", "mlflow"))
    repeats = len(sitting.ours.measured)
    peaks = ", ".join(f"{rate / 1e9:,.0f} GFLOP/s in {name}" for name, rate in sitting.peaks.items())
    agreement = []
    for way in sitting.ways[:-1]:
        theirs, own = same_runs(way, sitting.ours)
        agreement.append([way.id, str(len(way.measured[0].results)), f"{theirs['loss']:.4f}", f"{own['loss']:.4f}",
                          f"{theirs['score']:.1%}", f"{own['score']:.1%}"])
    return "\n".join([
        f"# {workload.title}", "",
        f"{place}; {versions}; {repeats} repeat{'s' if repeats > 1 else ''} in turn. {verdict(sitting)}", "",
        *_table(HEADER, rows(sitting)), "",
        "Medians, with the lowest and highest of the repeats. *sweep*: wall time of all runs, cold, from process start to "
        "the end of tracking. *tokens/s*: real training tokens over that time, no padding. *training*: over the seconds of "
        "training alone. *start-up*: until a process trains. *memory*: highest resident bytes of all processes together, "
        "sampled; on a GPU also what torch had allocated in one process.", "",
        f"MFU: 4N + 6P operations per real token (N = {sitting.matrices:,}, P = adapter scalars) over what a large matrix "
        f"product reached here in the way's precision: {peaks}.", "",
        "Final loss: of the trained model on the test items; where there is none, of the last quarter of the steps.", "",
        *_table(["way", "runs", "final loss", "ours", "score", "ours"], agreement), "",
        *(line for note in sitting.notes for line in (note, "")),
        "![bars](bench.png)", "",
    ])


def _row(sitting: Sitting, way: Way) -> list[str]:
    peak = sitting.peak(way)
    whole, training = way.tokens_per_second(), way.training_tokens_per_second()
    memory = f"{way.resident / 2**30:.2f} GiB"
    if way.device is not None:
        memory += f", GPU {way.device / 2**30:.2f} GiB"
    return [f"({way.id}) {way.label}", way.precision, _seconds(way.wall), f"{way.per_run:.1f} s", f"{way.start_up:.1f} s",
            "1" if way is sitting.ours else _times(ratio(way, sitting.ours)), f"{whole.median:,.0f}",
            f"{training.median:,.0f}", f"{utilisation(whole.median, sitting.matrices, way.adapter, peak):.1%}",
            f"{utilisation(training.median, sitting.matrices, way.adapter, peak):.1%}", memory]


def _way(sitting: Sitting, way: Way) -> dict[str, Any]:
    peak = sitting.peak(way)
    whole, training = way.tokens_per_second(), way.training_tokens_per_second()
    return {
        "id": way.id, "label": way.label, "precision": way.precision, "at_once": way.at_once,
        "sweep_seconds": vars(way.wall), "seconds_per_run": way.per_run, "start_up_seconds": way.start_up,
        "times_ours": vars(ratio(way, sitting.ours)), "tokens_per_second": vars(whole),
        "training_tokens_per_second": vars(training),
        "mfu": utilisation(whole.median, sitting.matrices, way.adapter, peak),
        "mfu_training": utilisation(training.median, sitting.matrices, way.adapter, peak),
        "resident_bytes": way.resident, "device_bytes": way.device,
        "repeats": [{
            "wall_seconds": one.wall, "runs_made": len(one.results), "runs": one.total, "start_up_seconds": one.start_up,
            "lanes": one.lanes, "resident_bytes": one.resident, "device_bytes": one.device,
            "results": [{"run": r.run.name, "train_seconds": r.train, "evaluate_seconds": r.evaluate, "score": r.score,
                         "items": r.items, "final_loss": r.loss, "steps": r.steps, "tokens": r.tokens, "adapter": r.adapter,
                         "trained": r.trained} for r in one.results],
        } for one in way.measured],
    }


def _chart(sitting: Sitting, path: Path) -> None:
    """Bars of the sweep's wall time, split into start-up and the rest, with the range of the repeats."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from reports.figures import INK, MUTED, PALETTE, drawing, style

    with style():
        figure = drawing(7.2, 1.1 + 0.42 * len(sitting.ways))
        axis = figure.add_axes((0.4, 0.3, 0.52, 0.56))
        for y, way in enumerate(sitting.ways):
            # Processes start one after the other, or in lanes: of the sweep, this much is start-up.
            first = way.measured[0]
            each = way.start_up * (first.total / first.lanes if way is not sitting.ours else 1)
            start, wall = min(each, way.wall.median), way.wall
            axis.barh(y, start, color=MUTED, height=0.6, label="start-up" if y == 0 else None)
            axis.barh(y, wall.median - start, left=start, color=PALETTE[4], height=0.6,
                      label="training, evaluation, tracking" if y == 0 else None)
            axis.errorbar(wall.median, y, xerr=[[wall.median - wall.low], [wall.high - wall.median]], color=INK, capsize=3,
                          linewidth=1)
            axis.text(wall.high, y, f"  {wall.median:.0f} s", va="center")
        axis.set_yticks(range(len(sitting.ways)), [f"({way.id}) {way.label}" for way in sitting.ways])
        axis.invert_yaxis()
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.12)
        axis.set_xlabel("seconds for the whole sweep" + ("" if sitting.comparable else " (not comparable)"))
        figure.legend(loc="upper right", ncols=2)
        figure.set_dpi(160)
        FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _table(header: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *body)]


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.0f} s ({spread.low:.0f} to {spread.high:.0f})"


def _times(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.low:.1f} to {spread.high:.1f})"
