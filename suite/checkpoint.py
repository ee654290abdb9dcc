"""Checkpoints of a pack in training: what was killed goes on where it was, and ends as if it had not been killed.

A checkpoint is one safetensors file, `results/checkpoints/RUN.safetensors`, named by the first run of its pack and written
whole or not at all. It holds everything that training changes; the rest (base, data and their order, what `prepare` makes)
is made again. It serves exactly the runs of its pack in their order. One that is damaged, of other runs or of other
versions is told in the log and not used. It is removed when the pack has its records.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from suite import paths, records
from suite.errors import UserError
from suite.optimiser import PackedAdamW
from suite.packing import Packed
from suite.specs import ENGINE_VERSION, RunSpec

log = logging.getLogger(__name__)

#: Minutes between two checkpoints of a pack; 0: none are written or read.
VARIABLE, MINUTES = "SUITE_CHECKPOINT_MINUTES", 5.0
#: Raised when the content of a checkpoint changes.
FORMAT = 1


@dataclass
class Loop:
    """Where a training stands after `done` steps.

    Curves `[steps, runs]`: losses, gradient norms, and whether a run still trained when the step began. `real` and all
    computed `positions` of the batches so far; `seconds` of training, all attempts together; `resumed`: the steps after
    which earlier attempts were taken up again.
    """

    losses: Tensor
    norms: Tensor
    lived: Tensor
    done: int = 0
    real: int = 0
    positions: int = 0
    seconds: float = 0.0
    resumed: list[int] = field(default_factory=list)

    @classmethod
    def fresh(cls, steps: int, adamw: PackedAdamW) -> Loop:
        """Before the first step."""
        curve = torch.zeros(steps, adamw.runs, device=adamw.device, dtype=adamw.rates.dtype)
        return cls(curve, torch.zeros_like(curve), torch.zeros_like(curve, dtype=torch.bool))


class Checkpoint:
    """The checkpoint of one pack. `spent`: seconds of the phases of this attempt so far; it is read at every writing."""

    def __init__(self, specs: Sequence[RunSpec], spent: Mapping[str, float], minutes: float | None = None) -> None:
        self.path = path(specs[0].id)
        self.spent = spent
        self.earlier: dict[str, float] = {}  # seconds of the phases of earlier attempts, once taken up again
        self.interval = 60 * (every() if minutes is None else minutes)
        method = specs[0].method
        self.facts: dict[str, Any] = {
            "format": FORMAT, "engine": ENGINE_VERSION, "method": [method.id, method.version],
            "packages": {name: version(name) for name in ("torch", "peft")}, "runs": [spec.id for spec in specs]}
        self._written = time.monotonic()

    def restore(self, packed: Packed, adamw: PackedAdamW, loop: Loop) -> None:
        """Bring a pack that is ready for its first step to where its checkpoint stands, if there is one that fits."""
        if not self.interval or not packed.method.resumes:
            return
        self.facts |= {"device": adamw.device.type, "start": _start(packed)}
        if not self.path.exists():
            return
        try:
            facts, tensors = _read(self.path)
            held = _gather(packed, adamw, loop)
            kept = {key: facts[key] for key in self.facts}
            done, real, positions, resumed, spent = (facts[k] for k in ("done", "real", "positions", "resumed", "spent"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            log.warning("%s is damaged and not used (%s): training begins anew.", self.path, str(error).splitlines()[0])
            return
        if kept != self.facts:
            differ = ", ".join(key for key in self.facts if kept[key] != self.facts[key])
            log.warning("%s is not of these runs as they are made now (%s differ) and not used: training begins anew.",
                        self.path, differ)
            return
        if not _fit(held, tensors):
            log.warning("%s holds tensors of other shapes and is not used: training begins anew.", self.path)
            return
        packed.restore(_part(tensors, "pack"))
        adamw.restore(_part(tensors, "optimiser"))
        for name, curve in _curves(loop).items():
            curve.copy_(tensors[f"curve/{name}"])
        torch.set_rng_state(tensors["random/cpu"].clone())
        if adamw.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"].clone(), adamw.device)
        loop.done, loop.real, loop.positions = done, real, positions
        loop.seconds, loop.resumed = spent["train"], [*resumed, done]
        self.earlier = spent

    def keep(self, packed: Packed, adamw: PackedAdamW, loop: Loop) -> None:
        """Write where the pack stands between two steps, if it is time. A disk that takes no more costs the checkpoint, not
        the run."""
        if not self.interval or not packed.method.resumes or time.monotonic() - self._written < self.interval:
            return
        phases = {*self.earlier, *self.spent} - {"train"}
        spent = {phase: self.earlier.get(phase, 0.0) + self.spent.get(phase, 0.0) for phase in phases}
        facts = self.facts | {"done": loop.done, "real": loop.real, "positions": loop.positions, "resumed": loop.resumed,
                              "spent": spent | {"train": loop.seconds}}
        try:
            _write(self.path, facts, _gather(packed, adamw, loop))
        except (OSError, SafetensorError) as error:
            log.warning("No checkpoint could be written to %s (%s): the run goes on without.", self.path, error)
        self._written = time.monotonic()


def every() -> float:
    """Minutes between two checkpoints, from the environment. Raises `UserError` when that is no number from 0."""
    given = os.environ.get(VARIABLE, str(MINUTES))
    try:
        minutes = float(given)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise UserError(f"{VARIABLE}={given}: give the minutes between two checkpoints, or 0 for none")
    return minutes


def path(run_id: str) -> Path:
    """The checkpoint of the pack whose first run this is."""
    return _folder() / f"{run_id}.safetensors"


def remove(run_ids: Iterable[str]) -> None:
    """Remove what checkpoints there are of packs that begin with one of these runs."""
    for run_id in run_ids:
        path(run_id).unlink(missing_ok=True)
        _scratch(path(run_id)).unlink(missing_ok=True)


def clear() -> None:
    """Remove checkpoints of runs that have ended: their process was killed between writing the records and this."""
    for left in _folder().glob("*.safetensors"):
        if records.is_done(left.stem):
            left.unlink(missing_ok=True)


def _folder() -> Path:
    return paths.results() / "checkpoints"


def _curves(loop: Loop) -> dict[str, Tensor]:
    return {"losses": loop.losses, "norms": loop.norms, "lived": loop.lived}


def _gather(packed: Packed, adamw: PackedAdamW, loop: Loop) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by part and name; they live on and are not copies."""
    found = {f"pack/{name}": tensor for name, tensor in packed.snapshot().items()}
    found |= {f"optimiser/{name}": tensor for name, tensor in adamw.snapshot().items()}
    found |= {f"curve/{name}": tensor for name, tensor in _curves(loop).items()}
    found["random/cpu"] = torch.get_rng_state()
    if adamw.device.type == "cuda":
        found["random/cuda"] = torch.cuda.get_rng_state(adamw.device)
    return found


def _part(tensors: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{part}/")}


def _fit(held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint has all that is held now in the same types, and what must not change its shape in the same
    shapes: moments, which are shaped like what is trained, and curves."""
    if {n for n in held if not n.startswith("pack/")} != {n for n in tensors if not n.startswith("pack/")}:
        return False
    return all(name in tensors and tensors[name].dtype == tensor.dtype and
               (name.startswith("pack/") or tensors[name].shape == tensor.shape) for name, tensor in held.items())


def _start(packed: Packed) -> str:
    """What must come out alike when a pack is made again: each run's shapes (ranks may follow from data) and, where the
    base itself was changed, to the bit what is trained, since what is frozen is then not part of the checkpoint."""
    shapes = [{name: list(tensor.shape) for name, tensor in packed.state(run).items()} for run in range(packed.runs)]
    return _checksum(json.dumps(shapes), packed.snapshot() if packed.method.spoils_base else {})


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 of a text and of the names and bytes of tensors."""
    found = zlib.crc32(text.encode())
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def _scratch(target: Path) -> Path:
    """Where a checkpoint is written first. Its runs are claimed, so nobody else writes there."""
    return target.with_name(f".{target.name}")


def _write(target: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts)
    scratch = _scratch(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(held, scratch, {"facts": text, "checksum": _checksum(text, held)})
        paths.settle(scratch)
        os.replace(scratch, target)
        paths.settle(target.parent)
    finally:
        scratch.unlink(missing_ok=True)


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Facts and tensors of a checkpoint. Raises `OSError`, `SafetensorError`, `KeyError` or `ValueError` when it is not
    whole."""
    with safe_open(source, framework="pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
    if about is None or _checksum(about["facts"], tensors) != about["checksum"]:
        raise ValueError("its checksum is wrong")
    return json.loads(about["facts"]), tensors
