"""Runs one pack from specs to records, keeping bases, tokenised data and gradients warm between packs."""

from __future__ import annotations

import gc
import itertools
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from torch import Tensor

from suite import bases, checkpoint, data, environment, gradients, limits, metrics, objectives, paths, records, registry
from suite.batches import Batch, EncodedSet, collate, encode, form_of, scoring_order, spelled, training_order
from suite.errors import UserError
from suite.faults import LostLeaseError, StorageError, full, out_of_memory, storage
from suite.generation import evaluate_pack, evaluate_text
from suite.method import Context, GradientRequest, Method, Preparation, Shapes, Start
from suite.packing import Head, Packed
from suite.recompute import recomputed
from suite.records import Data, Memory, Pack, Record, Score, Throughput, Timings, Trainable
from suite.specs import ENGINE_VERSION, RunSpec, TaskRef, digest
from suite.task import Item, Task, TaskData
from suite.training import Trained, train

Progress = Callable[[str, int, int], None]  # phase, steps done, steps in all


@dataclass
class Outcome:
    """What evaluation says of one run."""

    scores: list[Score]
    predictions: pd.DataFrame
    decode: dict[str, Any] | None = None

    @classmethod
    def of(cls, task: Task, items: Sequence[Item], table: pd.DataFrame, decode: dict[str, Any] | None = None) -> Outcome:
        """Scores of the answers to items; the table is told which part each item is of, where the task has parts."""
        if any(item.part for item in items):
            table.insert(1, "part", [item.part for item in items])
        return cls(_scores(task, items, table), table, decode)


@dataclass
class _Assembled:
    """A pack that is ready to train, and what it was made of."""

    loaded: bases.LoadedBase
    items: TaskData
    train_set: EncodedSet
    prepared: list[Preparation]
    packed: Packed


class Worker:
    """One process's warm state. `threads` is fixed so that sums are added in one order whatever the machine."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True, warn_only=device != "cpu")
        # Filling fresh memory adds nothing but time: nothing reads it before it is written.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.device = torch.device(device)
        # Whether text is scored for a whole pack at once, unmerged, rather than run by run on merged weights. It hangs on
        # the device alone, so that a solo run is scored as in a pack: merging into half precision rounds.
        self.scores_together = self.device.type != "cpu"
        self.environment = environment.snapshot(device=device, threads=threads)
        self._bases: dict[tuple[str, str], bases.LoadedBase] = {}  # by id and precision
        self._encoded: dict[str, EncodedSet] = {}
        self._whole = False  # whether nothing is attached any more to the base of the pack that was tried last
        checkpoint.clear()

    def run(self, specs: Sequence[RunSpec], progress: Progress = lambda phase, done, total: None) -> list[Record]:
        """Run a pack and write its records, but for runs that another process has taken over.

        A pack that runs out of memory is halved, and packs of its kind are cut from then on; a run that does so alone is
        trained on smaller and smaller parts of its batches, and then with activations computed again. A pack that fails
        otherwise is tried run by run. A run that fails alone twice is recorded as failed, with its trace. Raises
        `StorageError` when results cannot be kept.
        """
        return [record for part in limits.cut(specs) for record in self._attempt(part, progress)]

    def _attempt(self, specs: Sequence[RunSpec], progress: Progress, last: bool = False) -> list[Record]:
        self._whole = False
        try:
            return self._run(specs, progress)
        except StorageError:
            raise
        except Exception as error:
            if full(error):
                raise storage(error, paths.results()) from error
            memory, trace = out_of_memory(error), traceback.format_exc()
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if memory:
            environment.return_large_blocks()
        # What is left of the pack is tried on the same base: loaded again it would need new room, and what the old one
        # took may lie in pieces that are too small.
        self._release(keep_base=memory and self._whole)  # out here the error, and all that its frames held, is gone
        checkpoint.remove(spec.id for spec in specs)  # it may be the cause
        if len(specs) > 1:
            half = -(-len(specs) // 2)
            if memory:
                limits.learn(specs[0], half)
                progress("halve", half, len(specs))
            parts = [specs[:half], specs[half:]] if memory else [[spec] for spec in specs]
            return [record for part in parts for record in self.run(part, progress)]
        if memory and (tighter := limits.tighten(specs[0])):
            progress("shrink", tighter.items or 0, specs[0].recipe.batch_size)
            return self._attempt(specs, progress)
        if not last:
            return self._attempt(specs, progress, last=True)
        now = _now()
        return _saved(Record(id=specs[0].id, spec=specs[0], status="failed", reason=reason, environment=self.environment,
                             started=now, finished=now, trace=trace))

    def _run(self, specs: Sequence[RunSpec], progress: Progress) -> list[Record]:
        clock = _Clock()
        first = specs[0]
        method = registry.method(first.method.id)
        task = registry.task(first.task.id)
        base = bases.get(first.base.id)
        reason = method.skip(base.kind, task.kind) or first.unmet
        if reason is not None:
            return [record for spec in specs for record in _saved(
                Record(id=spec.id, spec=spec, status="skipped", reason=reason, started=clock.began, finished=_now(),
                       environment=self.environment))]

        environment.release()  # what earlier packs freed is not this one's
        with environment.PeakMemory(self.device.type) as before:
            made = self._assemble(specs, clock, progress)
        loaded, items, train_set, packed = made.loaded, made.items, made.train_set, made.packed
        try:
            trained = None
            keeper = checkpoint.Checkpoint(specs, clock.seconds)
            environment.release()
            idle = environment.resident()
            fits = self._fits(first)
            with environment.PeakMemory(self.device.type) as during, recomputed(packed.model, fits.recompute):
                if method.trains != "nothing":
                    trained = train(packed, specs, train_set, self._loss(packed, task),
                                    lambda done, total: progress("train", done, total), keeper, fits.items)
            clock.phase("train")
            clock.add(keeper.earlier)
            progress("evaluate", 0, 1)
            with environment.PeakMemory(self.device.type) as after, torch.no_grad():
                outcomes = self._evaluate(packed, loaded, items, specs)
            clock.phase("evaluate")
            states = [self._state(packed, run) for run in range(len(specs))]
        finally:
            packed.detach()
            self._whole = True
            if method.spoils_base:
                self._forget()
        peaks = [before, during, after]
        memory = Memory(resident=max(peak.resident for peak in peaks), training=during.resident, idle=idle,
                        device=max((peak.device for peak in peaks if peak.device is not None), default=None))
        clock.phase("save")

        results = []
        shapes, prepared = packed.shapes, made.prepared
        for run, spec in enumerate(specs):
            adapter = method.trained(packed.starts[run].config, shapes, prepared[run].data)
            head = shapes.head if method.trains != "nothing" else 0
            total = adapter + head
            diverged = trained is not None and not trained.alive[run]
            results.extend(_saved(
                Record(
                    id=spec.id,
                    spec=spec,
                    status="diverged" if diverged else "finished",
                    reason="loss or gradient norm stopped being finite" if diverged else "",
                    scores=outcomes[run].scores,
                    final_loss=_final_loss(trained, run),
                    scored_loss=_scored_loss(outcomes[run].predictions),
                    trainable=Trainable(adapter=adapter, head=head, total=total, share=total / shapes.parameters),
                    data=Data(fingerprint=items.fingerprint, train=len(items.train), test=len(items.test),
                              truncated=train_set.truncated, majority=_majority(items, spec)),
                    timings=clock.shared(len(specs)),
                    throughput=_throughput(trained, run),
                    resumed=trained.resumed if trained else [],
                    memory=memory,
                    pack=Pack(size=len(specs), position=run),
                    decode=outcomes[run].decode,
                    prepare=prepared[run].report,
                    environment=self.environment,
                    started=clock.began,
                    finished=_now(),
                ),
                curves=_curves(trained, run),
                predictions=outcomes[run].predictions,
                adapter=states[run],
            ))
        checkpoint.remove(spec.id for spec in specs)
        return results

    def revive(self, record: Record) -> tuple[Packed, bases.LoadedBase]:
        """A finished run's model as it was when training ended, on its base: made again from its spec, with what it
        trained read from its record. Raises `UserError` when the run kept nothing."""
        path = record.folder / "adapter.safetensors"
        if not path.exists():
            raise UserError(f"run {record.id}: it left no trained weights ({record.status}, method {record.spec.method.id})")
        made = self._assemble([record.spec], _Clock(), lambda phase, done, total: None)
        made.packed.load(0, load_file(path))
        return made.packed, made.loaded

    def _fits(self, spec: RunSpec) -> limits.Limits:
        """What is known to fit; on a GPU of which nothing is known yet, what is expected to."""
        from suite import plan

        known = limits.known(spec)
        if self.device.type != "cuda" or known != limits.Limits():
            return known
        return plan.fitting(spec, plan.local("bench", run=True))[1]

    def _assemble(self, specs: Sequence[RunSpec], clock: _Clock, progress: Progress) -> _Assembled:
        """Base, data and the pack of runs on it, ready to train."""
        first = specs[0]
        method, task = registry.method(first.method.id), registry.task(first.task.id)
        progress("load", 0, 1)
        loaded = self._base(first.base.id, first.recipe.precision)
        items = data.load(first.task)
        train_set = self._encode(loaded, items, first.task, "train", first.recipe.max_length)
        shapes = bases.shapes(loaded.base, task)
        configs = [method.Config.model_validate(spec.method.config) for spec in specs]
        clock.phase("load")
        progress("prepare", 0, 1)
        prepared = [self._prepare(method, config, spec, loaded, items, train_set, shapes)
                    for config, spec in zip(configs, specs, strict=True)]
        starts = [Start(config, spec.seed, preparation.data)
                  for config, spec, preparation in zip(configs, specs, prepared, strict=True)]
        packed = Packed(loaded.model, method, shapes, starts, self._head(loaded, task, len(specs)))
        clock.phase("prepare")
        return _Assembled(loaded, items, train_set, prepared, packed)

    def _base(self, base_id: str, precision: str) -> bases.LoadedBase:
        key = base_id, precision
        if key not in self._bases:
            self._forget()
            self._bases[key] = bases.load(bases.get(base_id), dtype=getattr(torch, precision), device=self.device)
        return self._bases[key]

    def _forget(self) -> None:
        self._bases.clear()
        gc.collect()

    def _release(self, keep_base: bool) -> None:
        """Give back all memory that can be had again. Raises when the device is beyond use: the process has to end."""
        if keep_base:
            gc.collect()
        else:
            self._forget()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        environment.release()

    def _encode(self, loaded: bases.LoadedBase, items: TaskData, ref: TaskRef, split: str, length: int,
                word: str | None = None) -> EncodedSet:
        """A split as the base reads it, or with `word` as the answer to every item."""
        key = digest([loaded.base.id, ref.model_dump(), split, length, word])
        if key not in self._encoded:
            kind = loaded.base.kind
            read = spelled(kind, items.task, getattr(items, split))
            chosen = read if word is None else [replace(item, target=word) for item in read]
            self._encoded[key] = encode(loaded.tokenizer, chosen, length, form_of(kind))
        return self._encoded[key]

    def _head(self, loaded: bases.LoadedBase, task: Task, runs: int) -> Head | None:
        if loaded.base.kind != "encoder" or task.kind != "classification":
            return None
        head = Head(loaded.hidden_size, len(task.labels), runs, (loaded.base.id, task.id, task.version))
        return head.to(self.device, next(loaded.model.parameters()).dtype)

    def _loss(self, packed: Packed, task: Task) -> Callable[[Batch], Tensor]:
        head = packed.head
        if head is not None:
            return lambda batch: objectives.classification_loss(packed.model, head, batch)
        return lambda batch: objectives.language_loss(packed.model, packed.runs, batch)

    def _prepare(self, method: Method[Any], config: Any, spec: RunSpec, loaded: bases.LoadedBase, items: TaskData,
                 train_set: EncodedSet, shapes: Shapes) -> Preparation:
        def stored(request: GradientRequest) -> Mapping[str, Tensor]:
            key = digest([ENGINE_VERSION, spec.base.model_dump(), items.fingerprint, spec.recipe.max_length,
                          spec.recipe.precision, vars(request)])[:16]
            return gradients.cached(key, lambda folder: self._estimate(request, folder, loaded, items, train_set, shapes))

        return method.prepare(config, Context(
            shapes=shapes,
            weight=lambda name: bases.weight_of(loaded.model.get_submodule(name)),
            gradients=stored,
            seed=spec.seed,
            model=loaded.model,
            batches=lambda request: self._batches(request, train_set),
            loss=self._bare_loss(loaded, items.task),
        ))

    def _batches(self, request: GradientRequest, train_set: EncodedSet) -> Iterator[Batch]:
        per_epoch = math.ceil(len(train_set) / request.batch_size)
        order = training_order(train_set, request.batch_size, math.ceil(request.batches / per_epoch),
                               ("gradients", request.seed))
        for indices in itertools.islice(order, request.batches):
            yield collate(train_set, [indices], self.device)

    def _bare_loss(self, loaded: bases.LoadedBase, task: Task) -> Callable[[Any, Batch], Tensor]:
        """The loss of one run on any form of the base, `[1]`, with the task head as every run starts with it."""
        head = self._head(loaded, task, 1)
        if head is not None:
            head.requires_grad_(False)
            return lambda model, batch: objectives.classification_loss(model, head, batch)
        return lambda model, batch: objectives.language_loss(model, 1, batch)

    def _estimate(self, request: GradientRequest, folder: Path, loaded: bases.LoadedBase, items: TaskData,
                  train_set: EncodedSet, shapes: Shapes) -> None:
        loss = self._bare_loss(loaded, items.task)
        losses = (loss(loaded.model, batch).sum() for batch in self._batches(request, train_set))
        gradients.estimate(loaded.model, shapes.layers, losses, folder)

    def _evaluate(self, packed: Packed, loaded: bases.LoadedBase, items: TaskData,
                  specs: Sequence[RunSpec]) -> list[Outcome]:
        evaluation = specs[0].evaluation
        task = items.task
        scored = items.test if evaluation.split == "test" else items.validation
        if task.kind != "classification":
            asked = loaded.tokenizer, task, scored, evaluation.decode, evaluation.batch_size
            if self.scores_together and packed.method.packs:
                answered = evaluate_pack(packed.model, packed.runs, *asked)
            else:
                answered = []
                for run in range(packed.runs):
                    with packed.merged(run) if packed.mergeable else packed.alone(run) as model:
                        answered.append(evaluate_text(model, *asked))
            return [Outcome.of(task, scored, given.predictions, given.decode) for given in answered]

        logits = self._logits(packed, loaded, items, specs[0])
        expected = torch.tensor([item.label for item in scored])
        losses = objectives.item_losses(logits, expected.expand(packed.runs, -1)).float()
        decode = None if packed.head is not None else {"scoring": "the likeliest label word, its end included"}
        outcomes = []
        for run in range(packed.runs):
            table = pd.DataFrame({"item": [item.id for item in scored], "expected": expected.tolist(),
                                  "predicted": logits[run].argmax(-1).tolist()})
            table["correct"] = table["expected"] == table["predicted"]
            table["loss"] = losses[run].numpy()
            outcomes.append(Outcome.of(task, scored, table, decode))
        return outcomes

    def _logits(self, packed: Packed, loaded: bases.LoadedBase, items: TaskData, spec: RunSpec) -> Tensor:
        """Logits of every label for the scored items, `[runs, items, classes]`: the task head's, or for a base of text the
        log-probabilities of the label words as answers to the prompt."""
        labels, split = items.task.labels, spec.evaluation.split
        words = [None] if packed.head is not None else labels
        found = torch.zeros(packed.runs, len(getattr(items, split)), len(labels))
        for place, word in enumerate(words):
            encoded = self._encode(loaded, items, spec.task, split, spec.recipe.max_length, word)
            for indices in scoring_order(encoded, spec.evaluation.batch_size):
                batch = collate(encoded, [indices] * packed.runs, self.device)
                if packed.head is not None:
                    found[:, indices] = objectives.classify(packed.model, packed.head, batch).float().cpu()
                else:
                    scores = objectives.log_likelihoods(packed.model, batch)
                    found[:, indices, place] = scores.view(packed.runs, -1).float().cpu()
        return found

    def _state(self, packed: Packed, run: int) -> dict[str, Tensor] | None:
        """What is worth keeping: adapters and heads. A fully fine-tuned base is as large as the base and is not."""
        if packed.method.trains in ("base", "nothing"):
            return None
        kept = packed.state(run) | packed.constants(run)
        return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in kept.items()}


def _saved(record: Record, **tables: Any) -> list[Record]:
    """The record, saved; nothing when another process has taken the run over: its record counts."""
    try:
        return [records.save(record, **tables)]
    except LostLeaseError:
        return []


class _Clock:
    """Wall-clock phases of a pack."""

    def __init__(self) -> None:
        self.began = _now()
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def phase(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now

    def add(self, earlier: Mapping[str, float]) -> None:
        """Count the phases of earlier attempts too."""
        for name, seconds in earlier.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def shared(self, runs: int) -> Timings:
        """Each run's equal share of the pack's time."""
        return Timings(**{name: seconds / runs for name, seconds in self.seconds.items()})


def _scores(task: Task, items: Sequence[Item], table: pd.DataFrame) -> list[Score]:
    """The task's score, then one for each of its parts. Of a task with parts, the first is the mean of theirs."""
    parts = list(dict.fromkeys(item.part for item in items))
    rows = {part: table[[item.part == part for item in items]] for part in parts}
    each = [_score(task, part, rows[part]) for part in parts]
    if parts == [None]:
        return each
    mean = sum(score.value for score in each) / len(each)
    error = math.sqrt(sum(score.stderr**2 for score in each)) / len(each)
    return [Score(metric=task.metric, value=mean, items=len(items), stderr=error), *each]


def _score(task: Task, part: str | None, table: pd.DataFrame) -> Score:
    if task.kind == "classification":
        value = metrics.compute(task.metric, table["predicted"].tolist(), table["expected"].tolist())
    else:
        value = float(table["correct"].mean())
    return Score(metric=task.metric, value=value, items=len(table), part=part,
                 stderr=math.sqrt(value * (1 - value) / len(table)))


def _majority(items: TaskData, spec: RunSpec) -> float | None:
    if items.task.kind == "generation":
        return None
    scored = items.test if spec.evaluation.split == "test" else items.validation
    counts = Counter(item.label for item in scored)
    return max(counts.values()) / len(scored)


def _final_loss(trained: Trained | None, run: int) -> float | None:
    """Mean training loss over the last tenth of the steps (None when it is not finite)."""
    if trained is None:
        return None
    tail = trained.losses[-max(1, len(trained.losses) // 10):, run].double().mean().item()
    return tail if math.isfinite(tail) else None


def _scored_loss(predictions: pd.DataFrame) -> float | None:
    loss = float(predictions["loss"].mean()) if "loss" in predictions else math.nan
    return loss if math.isfinite(loss) else None


def _throughput(trained: Trained | None, run: int) -> Throughput | None:
    if trained is None:
        return None
    return Throughput(steps=len(trained.losses), tokens=trained.tokens[run], padding=trained.padding,
                      tokens_per_second=sum(trained.tokens) / trained.seconds)


def _curves(trained: Trained | None, run: int) -> pd.DataFrame | None:
    if trained is None:
        return None
    return pd.DataFrame({
        "step": range(1, len(trained.losses) + 1),
        "loss": trained.losses[:, run].tolist(),
        "gradient_norm": trained.norms[:, run].tolist(),
        "learning_rate": trained.rates[:, run].tolist(),
    })


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
