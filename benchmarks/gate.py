"""Whether the nightly gate can be trusted: false alarms when nothing has changed, and real faults put into real runs.

    python -m benchmarks.gate             both, as Markdown tables (about ten minutes on one core)
    python -m benchmarks.gate --quick     fewer items and repeats

The first part draws nights from a baseline by known noise. The second trains and scores small runs on MiniLM and
SmolLM2-135M, accepts them as a baseline, then makes them again with one fault at a time in the code that they go
through, and lists which gates were red.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from suite import drift, paths
from suite.drift import Items, Key, Run, Trail
from suite.records import Data, Memory, Pack, Record, Score, Throughput
from suite.specs import BaseRef, Budget, Evaluation, MethodRef, Recipe, RunSpec, TaskRef
from suite.study import Cell, Study
from suite.verdicts import Finding, Margins

# ---- nights drawn from known noise -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noise:
    """What one night adds to a run: the standard deviation of its mean loss, the share of items whose answer flips (as
    often to right as to wrong), of tokens per second and of memory (shares, each run for itself)."""

    loss: float = 0.0
    flips: float = 0.0
    speed: float = 0.0
    memory: float = 0.0


#: Equal code on equal CPUs; a processor with other instructions, at a thousand times what short runs show (this benchmark's
#: last line), since long ones drift apart; a GPU that adds in no fixed order, as Hugging Face's own nights on GSM8K show it
#: (loss .0002, accuracy .5 points of 1,319 items).
NOISES: Mapping[str, Noise] = {
    "equal machine": Noise(speed=0.03, memory=0.02),
    "another processor": Noise(loss=0.0002, flips=0.004, speed=0.05, memory=0.03),
    "GPU that adds in no fixed order": Noise(loss=0.0002, flips=0.035, speed=0.03, memory=0.02),
}


def imagined(rows: int = 9, tasks: int = 3, seeds: int = 2, items: int = 500, seed: int = 0) -> dict[Key, Run]:
    """A baseline of made-up runs: rows by tasks by seeds, with an accuracy of about 0.8 on `items` items each."""
    rng = np.random.default_rng(seed)
    found: dict[Key, Run] = {}
    for task in range(tasks):
        known = Items(ids=tuple(f"task-{task}/{i}" for i in range(items)), expected=("1",) * items)
        hard = rng.normal(size=items)
        for row in range(rows):
            for number in range(seeds):
                spec = RunSpec(base=BaseRef(id="base", revision="1"), task=TaskRef(id=f"task-{task}", version=1),
                               method=MethodRef(id=f"method-{row}", version=1, config={}), budget=Budget(rank=8),
                               recipe=Recipe(learning_rate=1e-3), evaluation=Evaluation(), seed=number)
                losses = 0.69 - 0.08 * np.arange(drift.WINDOWS) + 0.02 * rng.normal(size=drift.WINDOWS)
                right = hard < 0.84 + 0.3 * rng.normal(size=items)
                record = Record(id=spec.id, spec=spec, status="finished",
                                data=Data(fingerprint="f" * 16, train=768, test=items, truncated=0),
                                throughput=Throughput(steps=48, tokens=20_000, padding=0.06, tokens_per_second=1500.0),
                                memory=Memory(resident=10**9, training=9 * 10**8, idle=6 * 10**8),
                                pack=Pack(size=1, position=0))
                trail = Trail(run=spec.id, places=(("table", f"row-{row}"),), first=0.6931, losses=tuple(losses.tolist()),
                              norms={1: 0.7, 10: 0.9}, items=known.digest)
                run = answered(Run(Cell("table", f"row-{row}", spec), record, trail, known), right)
                found[run.key] = run
    return found


def answered(run: Run, right: np.ndarray) -> Run:
    """The run with these answers right or wrong."""
    score = Score(metric="accuracy", value=float(right.mean()), items=len(right), stderr=0.0)
    return replace(run, record=run.record.model_copy(update={"scores": [score]}),
                   trail=run.trail.model_copy(update={"right": np.packbits(right).tobytes().hex()}))


def right(run: Run) -> np.ndarray:
    """Right or wrong of every item."""
    assert run.items is not None
    return run.trail.bits(len(run.items.ids))


def night(before: Mapping[Key, Run], noise: Noise, rng: np.random.Generator) -> dict[Key, Run]:
    """The same runs once more, with noise and no other change."""
    found = {}
    for key, run in before.items():
        bits = right(run).copy()
        flipping = rng.poisson(noise.flips * len(bits))
        for value in rng.integers(0, 2, flipping).astype(bool):  # which way: a fair coin, whatever the accuracy
            where = np.flatnonzero(bits == value)
            if len(where):
                bits[rng.choice(where)] = not value
        made = answered(run, bits)
        losses = tuple(loss + noise.loss * rng.normal() for loss in run.trail.losses if loss is not None)
        norms = {step: norm * (1 + 10 * noise.loss * rng.normal()) for step, norm in run.trail.norms.items() if norm}
        record = made.record.model_copy(update={
            "throughput": run.record.throughput and run.record.throughput.model_copy(update={
                "tokens_per_second": run.record.throughput.tokens_per_second * np.exp(noise.speed * rng.normal())}),
            "memory": run.record.memory and run.record.memory.model_copy(update={
                "training": round((run.record.memory.idle or 0) + 3e8 * np.exp(noise.memory * rng.normal()))})})
        found[key] = replace(made, record=record, trail=made.trail.model_copy(update={"losses": losses, "norms": norms}))
    return found


def false_alarms(noise: Noise, repeats: int = 200, seed: int = 1, **shape: int) -> Counter[str]:
    """Nights that were red in each gate, of `repeats` in which nothing had changed; `any` counts nights."""
    before, rng = imagined(**shape), np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for _ in range(repeats):
        gates = red(drift.judge(before, night(before, noise, rng), {"table": Margins()}))
        counts.update(gates)
        counts["any"] += bool(gates)
    return counts


def red(findings: Sequence[Finding]) -> set[str]:
    """The gates that are red."""
    return {finding.gate for finding in findings if finding.red}


# ---- real faults in real runs ----------------------------------------------------------------------------------------


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute replaced for a while."""
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, old)
        else:
            delattr(owner, name)


@contextmanager
def sampling() -> Iterator[None]:
    """`generate` samples, as with a checkpoint's own generation config, though it was asked to be greedy."""
    import torch
    from lm_eval.models.huggingface import HFLM

    asked = HFLM._model_generate
    torch.manual_seed(0)

    def leaking(self: Any, context: Any, max_length: int, stop: list[str], **arguments: Any) -> Any:
        return asked(self, context, max_length, stop, **{**arguments, "do_sample": True, "temperature": 0.6, "top_p": 0.9})

    with changed(HFLM, "_model_generate", leaking):
        yield


@contextmanager
def padding() -> Iterator[None]:
    """Prompts are padded on the right."""
    from lm_eval.models.huggingface import HFLM

    asked = HFLM.tok_batch_encode

    def right_padded(self: Any, strings: list[str], padding_side: str = "left", *rest: Any, **named: Any) -> Any:
        return asked(self, strings, "right", *rest, **named)

    with changed(HFLM, "tok_batch_encode", right_padded):
        yield


@contextmanager
def rate() -> Iterator[None]:
    """Every learning rate is three times what was asked for."""
    from suite import optimiser

    asked = optimiser.schedule
    with changed(optimiser, "schedule", lambda recipe, steps: 3 * asked(recipe, steps)):
        yield


@contextmanager
def sign_of_start() -> Iterator[None]:
    """GoRA starts with an ascent step instead of a descent step."""
    from methods import gora

    with changed(gora, "VARIANTS", {**gora.VARIANTS, "paper": gora.VARIANTS["paper"]._replace(sign=+1)}):
        yield


@contextmanager
def sign_in_evaluation() -> Iterator[None]:
    """Adapters of low rank are subtracted when they are scored, as by a merge of the wrong sign."""
    import torch

    from methods.lora import LowRank

    asked = LowRank.forward

    def flipped(self: Any, x: Any, y: Any) -> Any:
        return asked(self, x, y) if torch.is_grad_enabled() else 2 * y - asked(self, x, y)

    with changed(LowRank, "forward", flipped):
        yield


@contextmanager
def labels() -> Iterator[None]:
    """One test label of a hundred is another."""
    from suite import data, registry

    kind = type(registry.task("movie-sentiment"))
    asked = kind.load

    def load(self: Any, folder: Path | None) -> Any:
        splits = asked(self, folder)
        wrong = set(np.random.default_rng(0).choice(500, 5, replace=False).tolist())  # of the first 500 items
        return replace(splits, test=[replace(item, label=1 - item.label) if i in wrong else item
                                     for i, item in enumerate(splits.test)])

    def forget() -> None:
        data.load.cache_clear()
        data.splits.cache_clear()

    forget()
    try:
        with changed(kind, "load", load):
            yield
    finally:
        forget()


@contextmanager
def skipping() -> Iterator[None]:
    """The one method of a task skips it, quietly."""
    from suite import registry

    with changed(type(registry.method("head")), "skip", lambda self, base, task: "not today"):
        yield


@contextmanager
def nothing() -> Iterator[None]:
    """No fault."""
    yield


@dataclass(frozen=True)
class Fault:
    """A fault, the runs that are made again under it (`--only` filters), and what it must and may turn red."""

    said: str
    inject: Callable[[], Any]
    only: tuple[str, ...]
    must: frozenset[str]
    may: frozenset[str] = frozenset()


FAULTS: Mapping[str, Fault] = {
    "sampling": Fault("sampling instead of greedy decoding", sampling, ("table=problems",), frozenset({"evaluation"})),
    "padding": Fault("prompts padded on the right", padding, ("table=problems",), frozenset({"setup", "evaluation"})),
    "rate": Fault("learning rates three times too high", rate, ("table=sentiment", "method=rslora"), frozenset({"training"}),
                  frozenset({"evaluation"})),
    "sign-start": Fault("GoRA starts uphill", sign_of_start, ("table=sentiment", "method=gora"), frozenset({"training"}),
                        frozenset({"evaluation"})),
    "sign-evaluation": Fault("adapters subtracted when scored", sign_in_evaluation,
                             ("table=sentiment", "method=rslora,lora-plus"), frozenset({"evaluation"})),
    "labels": Fault("1 % of the test labels changed", labels, ("table=sentiment", "method=head"), frozenset({"setup"})),
    "skipped": Fault("a task skipped, quietly", skipping, ("table=shops",), frozenset({"presence"})),
}


#: Rows of the small study and of the large one.
FEW = ("head", "rslora", "lora-plus", "gora")
MANY = (*FEW, "lora", "full", "dora", "pissa", "gora-init")


def study(train: int = 192, test: int = 200, problems: int = 40, rows: Sequence[str] = FEW) -> Study:
    """A study small enough to be made again for every fault: two tables on MiniLM, one on SmolLM2-135M."""
    recipe = {"learning_rate": 2e-3, "batch_size": 16, "max_length": 48, "warmup_ratio": 0.1}
    return Study.model_validate({
        "id": "gate", "title": "Runs to put faults into", "about": "Small.", "paper": {"title": "None"},
        "rows": {"base": {"method": "untouched", "label": "Untouched base"},
                 "gora": {"method": "gora", "label": "GoRA", "options": {"batches": 4, "batch_size": 16}},
                 "gora-init": {"method": "gora", "label": "GoRA, initialisation only",
                               "options": {"allocation": "uniform", "batches": 4, "batch_size": 16}},
                 **{name: {"method": name, "label": name} for name in (
                     "head", "full", "lora", "rslora", "lora-plus", "dora", "pissa", "lora-fa")}},
        "scales": {"desk": {"about": "Small.", "tables": {
            "sentiment": {"title": "Sentences", "base": "minilm", "tasks": ["movie-sentiment"], "rows": list(rows),
                          "reference": "rslora", "budgets": [{"rank": 8}], "seeds": [0], "train": train, "test": test,
                          "recipe": recipe, "learning_rates": {"head": 1e-2, "lora-plus": 5e-4, "gora": 1e-3,
                                                               "gora-init": 1e-3, "full": 2e-4}},
            "shops": {"title": "Another task", "base": "minilm", "tasks": ["amazon-sentiment"], "rows": ["head"],
                      "reference": "head", "budgets": [{"rank": 8}], "seeds": [0], "train": 32, "test": 40,
                      "recipe": recipe},
            "problems": {"title": "Word problems", "base": "smollm2-135m", "tasks": ["asdiv"], "rows": ["base"],
                         "reference": "base", "budgets": [{"rank": 8}], "seeds": [0], "train": 8, "test": problems,
                         "recipe": recipe | {"max_length": 128},
                         "evaluation": {"batch_size": 20, "decode": {"max_new_tokens": 8}}},
        }}}})


class Laboratory:
    """A study whose runs were made and accepted as a baseline, and that can be made again under a fault.

    Works in a folder of its own; `environment` says where the suite finds it.
    """

    def __init__(self, folder: Path, of: Study) -> None:
        from suite import baseline, records
        from suite import study as studies
        from suite.worker import Worker

        self.folder, self.study, self.worker = folder, of, Worker()
        self.cells = studies.cells(of, "desk")
        with self.environment("clean"):
            self._make(self.cells)
            known = records.load_many(cell.spec.id for cell in self.cells)
            failed = [record.reason for record in known.values() if record.status != "finished"]
            assert not failed, failed
            baseline.accept(of, "desk", "here", "the runs that faults are held against")

    @contextmanager
    def environment(self, name: str) -> Iterator[Path]:
        """The suite works in a results folder of its own."""
        names = {"SUITE_RESULTS": str(self.folder / name), "SUITE_MEASURED": str(self.folder / "measured")}
        before = {key: os.environ.get(key) for key in names}
        os.environ.update(names)
        try:
            yield self.folder / name
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value

    def _make(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            self.worker.run([cell.spec])

    def trial(self, name: str, inject: Callable[[], Any], only: Sequence[str]) -> list[Finding]:
        """Findings after the chosen runs were made again under a fault; the others are what they were."""
        import shutil

        from suite import baseline, records
        from suite.study import select

        with self.environment(name) as results:
            again = select(self.cells, only)
            shutil.copytree(self.folder / "clean" / "runs", results / "runs")
            for cell in again:
                shutil.rmtree(records.folder(cell.spec.id))
            with inject():
                self._make(again)
            known = records.load_many(cell.spec.id for cell in self.cells)
            return baseline.compare(self.study, "desk", self.cells, known)

    def elsewhere(self, name: str, variables: Mapping[str, str]) -> list[Finding]:
        """Findings after all runs were made again by a process with other environment variables."""
        from suite import baseline, records

        with self.environment(name):
            subprocess.run([sys.executable, "-m", "benchmarks.gate", "--remake", self.study.model_dump_json()], check=True,
                           env={**os.environ, **variables}, cwd=paths.REPOSITORY, capture_output=True)
            known = records.load_many(cell.spec.id for cell in self.cells)
            return baseline.compare(self.study, "desk", self.cells, known)


def main() -> None:
    """Both parts, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer items and repeats")
    parser.add_argument("--remake", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.remake:
        from suite import study as studies
        from suite.worker import Worker

        worker = Worker()
        for cell in studies.cells(Study.model_validate_json(asked.remake), "desk"):
            worker.run([cell.spec])
        return

    repeats = 200 if asked.quick else 1000
    print(f"Nights of 54 runs (9 rows, 3 tasks of 500 items, 2 seeds) in which nothing changed, {repeats} each:\n")
    print("| noise | loss SD | flips | red nights | red in a gate |\n|---|---|---|---|---|")
    for name, noise in NOISES.items():
        counts = false_alarms(noise, repeats)
        gates = ", ".join(f"{gate} {count}" for gate, count in counts.items() if gate != "any" and count) or "none"
        print(f"| {name} | {noise.loss:g} | {100 * noise.flips:g} % | {counts['any']} | {gates} |", flush=True)

    few = study() if asked.quick else study(384, 500, 100, MANY)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        made = Laboratory(Path(folder), few)
        print(f"\nReal faults in {len(made.cells)} real runs:\n")
        print("| fault | red gates | what the first red finding of each says |\n|---|---|---|")
        for name, fault in {"none": Fault("none, made again", nothing, ("table=sentiment",), frozenset()), **FAULTS}.items():
            only = fault.only[:1] if name == "labels" else fault.only  # all rows, so that the pooled gate has its say
            _print(fault.said, made.trial(name, fault.inject, only))
        for said, variables in {
                "none, without AVX2 and AVX-512": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
                                                   "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}}.items():
            findings = made.elsewhere("elsewhere", variables)
            _print(said, findings)
            moved = [abs(float(finding.numbers["moved"] or 0)) for finding in findings if finding.gate == "training"]
            norms = [float(finding.numbers["norm"] or 0) for finding in findings if finding.gate == "training"]
            scored = [finding.numbers for finding in findings if finding.gate == "evaluation"]
            flips, answers = (sum(int(one[key] or 0) for one in scored for key in keys)
                              for keys in (("lost", "gained"), ("answers",)))
            read = [int(one["read_otherwise"] or 0) for one in scored]
            print(f"\nThere the loss of a window moved by at most {max(moved):.2g} and a gradient norm by "
                  f"{100 * max(norms):.2g} %; {flips} of {answers:,} answers flipped, {sum(read)} generated ones read "
                  "otherwise.")
        print(f"\n{time.monotonic() - began:.0f} s in all.")


def _print(said: str, findings: Sequence[Finding]) -> None:
    first: dict[str, str] = {}
    for finding in findings:
        if finding.red:
            first.setdefault(finding.gate, finding.said)
    print(f"| {said} | {', '.join(first) or 'none'} | {'<br>'.join(first.values())} |", flush=True)


if __name__ == "__main__":
    main()
