"""Puts a pack of runs on one frozen base: every adapted linear layer, and the task head, get a run axis.

Samples of different runs lie one after the other in the batch (run-major), so the base sees one tall batch and only
adapters and heads see runs. No operation of the base mixes samples, hence gradients of different runs stay apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from suite.bases import adaptable, weight_of
from suite.method import Adapter, Layer, Method, Shapes, Start, WholeAdapter, seeded


def wide(dtype: torch.dtype) -> torch.dtype:
    """What is trained, and every loss, is float32, or the base's own type where that is wider."""
    return torch.promote_types(dtype, torch.float32)


class AdaptedLinear(nn.Module):
    """A frozen linear layer with an adapter beside it: `adapter(x, W x) + bias`.

    The adapter's weights are wide, whatever the base's are: bfloat16 does not show a step of training. It computes in its
    own wide type too, unless it is `narrow`.
    """

    def __init__(self, base: nn.Module, adapter: Adapter, runs: int) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.runs = runs
        self.wide = wide(weight_of(base).dtype)

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        per_run = x.reshape(self.runs, -1, x.shape[-1])
        widened = per_run if self.adapter.narrow else per_run.to(self.wide)
        with _kept_narrow(widened, per_run):
            if isinstance(self.adapter, WholeAdapter):
                adapted = self.adapter.whole(widened)
            else:
                y = nn.functional.linear(per_run, weight_of(self.base))
                adapted = self.adapter(widened, y.to(widened.dtype))
        y = adapted.reshape(*x.shape[:-1], adapted.shape[-1]).to(x.dtype)
        return y if self.bias is None else y + self.bias


@contextmanager
def _kept_narrow(widened: Tensor, narrow: Tensor) -> Iterator[None]:
    """What is kept of `widened` for the backward pass is `narrow`, one tensor for all layers that read it; it is widened
    again there, exactly. Without this every adapted layer holds a float32 copy of its input."""
    if widened.dtype == narrow.dtype:
        yield
        return
    storage, dtype, narrow = widened.untyped_storage().data_ptr(), widened.dtype, narrow.detach()

    def keep(tensor: Tensor) -> Tensor | tuple[tuple[int, ...], tuple[int, ...], int]:
        if tensor.untyped_storage().data_ptr() != storage or tensor.dtype != dtype:
            return tensor
        return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())

    def give(kept: Tensor | tuple[tuple[int, ...], tuple[int, ...], int]) -> Tensor:
        # The layout is that of `widened`, so a view of it (a transpose, a column) is the same view of this copy.
        return kept if isinstance(kept, Tensor) else narrow.to(dtype).as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield


class Head(nn.Module):
    """A linear classifier per run on pooled features: `[runs · batch, hidden] -> [runs, batch, classes]`.

    Its start depends on the base and the task alone, not on the run's seed: gradients that are estimated once and
    shared by all seeds flow through this head, and a step along them only makes sense where the run has the same one.
    """

    def __init__(self, hidden: int, classes: int, runs: int, key: Sequence[object]) -> None:
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        draw = (2 * torch.rand(classes, hidden, generator=seeded("head", *key), dtype=torch.float64) - 1) * bound
        self.weight = nn.Parameter(draw.float().expand(runs, -1, -1).clone())
        self.bias = nn.Parameter(torch.zeros(runs, 1, classes))
        self.runs = runs

    def forward(self, pooled: Tensor) -> Tensor:
        per_run = pooled.reshape(self.runs, -1, pooled.shape[-1]).to(self.weight.dtype)
        return torch.baddbmm(self.bias, per_run, self.weight.mT)

    def state(self, run: int) -> dict[str, Tensor]:
        """One run's weight `[classes, hidden]` and bias `[classes]`."""
        return {"weight": self.weight.data[run], "bias": self.bias.data[run, 0]}


class Packed:
    """A base with the adapters and heads of a pack attached. `detach()` gives the base back, untouched."""

    def __init__(self, model: nn.Module, method: Method[Any], shapes: Shapes, starts: Sequence[Start],
                 head: Head | None = None, adapters: Mapping[str, Adapter] | None = None) -> None:
        self.model = model if method.trains != "foreign" else starts[0].prepared
        self.method = method
        self.shapes = shapes
        self.starts = list(starts)
        self.runs = len(starts)
        self.head = head
        self.adapters: dict[str, Adapter] = {}
        self._wrapped: dict[str, AdaptedLinear] = {}
        weight = next(model.parameters())
        place = (weight.device, wide(weight.dtype))
        if len({method.structure(start.config) for start in starts}) > 1:
            raise ValueError("the runs of a pack differ in more than a pack can hold (adapted layers, stages ...)")
        targets = method.targets(starts[0].config, shapes)
        made = [(layer, adapters[layer.name] if adapters else method.adapter(layer, self._weight(layer), starts))
                for layer in targets]
        for layer, adapter in made:  # only now that all could be made: a failure leaves the base as it was
            if adapter is not None:
                self._attach(layer, adapter.to(*place))
        if method.frees_weights:
            for wrapped in self._wrapped.values():
                wrapped.base.weight = nn.Parameter(wrapped.weight.new_empty(0, 0), requires_grad=False)
            for rest in model.parameters():  # a weight that is a piece of a mapped file keeps all of the file in memory
                rest.data = rest.data.clone()
        if head is not None:
            head.to(*place)
        if method.trains == "base":
            model.requires_grad_(True)

        for adapter in self.adapters.values():
            adapter.siblings = len(self.adapters)
            adapter.peers = tuple(self.adapters.values())

    def _weight(self, layer: Layer) -> Tensor:
        base = self.model.get_submodule(layer.name)
        if not adaptable(base):
            raise TypeError(f"{layer.name} is a {type(base).__name__}, not a linear layer")
        return weight_of(base).detach()

    def _attach(self, layer: Layer, adapter: Adapter) -> None:
        base = self.model.get_submodule(layer.name)
        wrapped = AdaptedLinear(base, adapter, self.runs)
        _replace(self.model, layer.name, wrapped)
        self.adapters[layer.name] = adapter
        self._wrapped[layer.name] = wrapped

    def detach(self) -> None:
        """Take the adapters off and freeze the base again."""
        for name, wrapped in self._wrapped.items():
            _replace(self.model, name, wrapped.base)
        self._wrapped.clear()
        self.model.requires_grad_(False)

    @property
    def mergeable(self) -> bool:
        """Whether every adapter is a change of W."""
        return all(adapter.mergeable for adapter in self.adapters.values())

    def see(self, mask: Tensor | None) -> None:
        """Tell the adapters which positions of the next batch hold tokens, `[runs · batch, length]` (None: all)."""
        per_run = None if mask is None else mask.reshape(self.runs, -1).bool()
        for adapter in self.adapters.values():
            adapter.mask = per_run

    def penalty(self) -> Tensor | None:
        """Extra loss of each run from the last forward, `[runs]`, averaged over the layers that have one."""
        if self.method.trains == "foreign":
            return self.method.penalty(self.model)
        found = [p for adapter in self.adapters.values() if (p := adapter.penalty()) is not None]
        return torch.stack(found).mean(0) if found else None

    def begin(self, stage: int, stages: int) -> None:
        """A stage of training begins."""
        for adapter in self.adapters.values():
            adapter.begin(stage, stages)

    def stepped(self, step: int, steps: int) -> None:
        """An update has been made; gradients are still at hand."""
        for adapter in self.adapters.values():
            adapter.stepped(step, steps)
        if self.method.trains == "foreign":
            self.method.stepped(self.model, step, steps)

    def end(self) -> None:
        """Training is over."""
        for adapter in self.adapters.values():
            adapter.end()
        if self.method.trains == "foreign":
            self.method.end(self.model)

    def parameters(self) -> Iterator[tuple[nn.Parameter, Tensor | None]]:
        """Every trained tensor with its `[runs]` learning-rate ratio (None: 1)."""
        for adapter in self.adapters.values():
            ratios = adapter.lr_ratios()
            for name, parameter in adapter.named_parameters():
                yield parameter, ratios.get(name)
        if self.method.trains in ("base", "foreign"):
            yield from ((parameter, None) for _, parameter in self._of_model())
        if self.head is not None and self.method.trains != "nothing":
            yield from ((parameter, None) for parameter in self.head.parameters())

    def state(self, run: int) -> dict[str, Tensor]:
        """One run's trained tensors by full name, without padding (the whole base for full fine-tuning)."""
        tensors = {f"{layer}.{name}": tensor for layer, adapter in self.adapters.items()
                   for name, tensor in adapter.state(run).items()}
        if self.method.trains in ("base", "foreign"):
            tensors |= {name: parameter.data for name, parameter in self._of_model()}
        if self.head is not None:
            tensors |= {f"head.{name}": tensor for name, tensor in self.head.state(run).items()}
        return tensors

    def constants(self, run: int) -> dict[str, Tensor]:
        """One run's frozen tensors that are saved beside its trained ones, by full name."""
        return {f"{layer}.{name}": tensor for layer, adapter in self.adapters.items()
                for name, tensor in adapter.constants(run).items()}

    def load(self, run: int, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave for a run of the same config, and of `constants` what is there."""
        for layer, adapter in self.adapters.items():
            names = [*adapter.state(run), *(n for n in adapter.constants(run) if f"{layer}.{n}" in tensors)]
            adapter.load(run, {name: tensors[f"{layer}.{name}"] for name in names})
        with torch.no_grad():
            if self.method.trains in ("base", "foreign"):
                for name, parameter in self._of_model():
                    parameter.copy_(tensors[name])
            if self.head is not None:
                for name, own in self.head.state(run).items():
                    own.copy_(tensors[f"head.{name}"])

    def snapshot(self) -> dict[str, Tensor]:
        """All that training changes in the pack (see `Adapter`), by name, constants included where they are buffers. The
        tensors live on and are not copies."""
        found = {f"adapter/{layer}/{name}": tensor for layer, adapter in self.adapters.items()
                 for name, tensor in adapter.state_dict().items()}
        if self.method.trains in ("base", "foreign"):
            found |= {f"model/{name}": parameter.data for name, parameter in self._of_model()}
        if self.method.trains == "foreign":
            found |= {f"foreign/{name}": tensor for name, tensor in self.method.snapshot(self.model).items()}
        if self.head is not None:
            found |= {f"head/{name}": tensor for name, tensor in self.head.state_dict().items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `snapshot` gave for a pack of the same runs. Parameters keep their place in memory, which the
        optimiser knows; buffers are replaced, since they may have changed their shape."""

        def of(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

        for layer, adapter in self.adapters.items():
            _put_back(adapter, of(f"adapter/{layer}/"))
        own = dict(self._of_model())
        for name, tensor in of("model/").items():
            own[name].copy_(tensor)
        if self.method.trains == "foreign":
            self.method.restore(self.model, of("foreign/"))
        if self.head is not None:
            _put_back(self.head, of("head/"))

    def _of_model(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained of the model itself, by name."""
        return ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)

    @contextmanager
    def alone(self, run: int) -> Iterator[nn.Module]:
        """The model as one run of the pack has it, adapters unmerged."""
        if self.runs == 1:
            yield self.model
            return
        own = {name: adapter.alone(run) for name, adapter in self.adapters.items()} if self.method.frees_weights else None
        for name, wrapped in self._wrapped.items():
            _replace(self.model, name, wrapped.base)
        solo = Packed(self.model, self.method, self.shapes, [self.starts[run]], adapters=own)
        try:
            solo.load(run=0, tensors=self.state(run) | self.constants(run))
            yield self.model
        finally:
            for name, wrapped in self._wrapped.items():
                _replace(self.model, name, wrapped)

    @contextmanager
    def merged(self, run: int) -> Iterator[nn.Module]:
        """The plain base with one run's deltas added to copies of its weights; the base itself is not written."""
        originals = {name: wrapped.base for name, wrapped in self._wrapped.items()}
        try:
            for name, base in originals.items():
                weight = weight_of(base)
                merged = weight.double() + self.adapters[name].delta(run).double()
                plain = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
                plain.weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)
                plain.bias = base.bias  # type: ignore[assignment]
                _replace(self.model, name, plain)
            yield self.model
        finally:
            for name, wrapped in self._wrapped.items():
                _replace(self.model, name, wrapped)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _put_back(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """What `state_dict` gave, buffers of other shapes included."""
    parameters = dict(module.named_parameters())
    place = next(iter(parameters.values())).device
    for name, tensor in tensors.items():
        parent, _, own = name.rpartition(".")
        if name in parameters:
            parameters[name].copy_(tensor)
        elif own == "_extra_state":
            module.get_submodule(parent).set_extra_state(tensor)
        else:  # a clone: what is read from a file may lie at an odd address, where sums come out otherwise
            setattr(module.get_submodule(parent), own, tensor.to(place, copy=True))
