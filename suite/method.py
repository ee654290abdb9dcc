"""The contract of a method: what it trains, how many scalars, and what it adds to one linear layer.

An adapter is written once, with a leading run axis, and serves a pack of any size. Its parameters are `[runs, ...]`;
its `forward(x, y)` gets the input `x [runs, tokens, in]` and the frozen layer's `y = W x [runs, tokens, out]` before
any bias, and returns the adapted `y`. W itself is never written. An adapter that holds an effective weight gives the
whole output instead (`WholeAdapter`); a method that fits neither (full fine-tuning, a tuner of peft) runs alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from suite.specs import Frozen, PositiveInt


@dataclass(frozen=True)
class Paper:
    """Whom to cite."""

    title: str
    arxiv: str | None = None
    year: int | None = None


@dataclass(frozen=True)
class Layer:
    """One linear layer of a base by name and shape; the weight is `[out_features, in_features]`."""

    name: str
    in_features: int
    out_features: int

    @property
    def kind(self) -> str:
        """The last part of the name: `query`, `q_proj` ..."""
        return self.name.rsplit(".", 1)[-1]


@dataclass(frozen=True)
class Shapes:
    """All that parameter counting needs to know of a base, known without loading its weights.

    `layers`: every linear layer that can be adapted (never the output head). `parameters`: scalars of the whole base.
    `head`: scalars of the task head that every trained run of a classification task has (0: none). `skeleton()` builds
    the whole base without memory (meta tensors), for methods whose count hangs on more than linear layers.
    """

    layers: tuple[Layer, ...]
    parameters: int
    head: int = 0
    skeleton: Callable[[], Any] | None = field(default=None, compare=False, repr=False)


class MethodConfig(Frozen):
    """Hyper-parameters of a method. Defaults are its paper's."""


class AdapterConfig(MethodConfig):
    """Hyper-parameters shared by methods that adapt chosen linear layers.

    `target_modules`: `all-linear`, or names that a layer's name must end with.
    """

    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"

    def targets(self, shapes: Shapes) -> list[Layer]:
        """The adapted layers, in the order of the model. Raises `ValueError` when there are none, or a name
        matches none."""
        if not shapes.layers:
            raise ValueError("this base has no linear layer that could be adapted")
        if self.target_modules == "all-linear":
            return list(shapes.layers)
        for suffix in self.target_modules:
            if not any(_ends_with(layer.name, suffix) for layer in shapes.layers):
                kinds = sorted({layer.kind for layer in shapes.layers})
                raise ValueError(f"target_modules: no linear layer is named {suffix!r}; there are {', '.join(kinds)}")
        return [x for x in shapes.layers if any(_ends_with(x.name, suffix) for suffix in self.target_modules)]


class RankConfig(AdapterConfig):
    """Hyper-parameters of low-rank adapters."""

    rank: PositiveInt = 8
    alpha: float = Field(default=16.0, gt=0)


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


class Adapter(nn.Module, ABC):
    """The trained part of one linear layer, for all runs of a pack.

    Parameters are trained; what is frozen is a buffer or a plain attribute. `mergeable` is False where the output is no
    linear map of x (a router that looks at the token), so that there is no `delta`.

    A run that was killed goes on from a checkpoint, which holds parameters and buffers (which may change their shape). What
    else changes from step to step, `get_extra_state` gives as one tensor and `set_extra_state` takes back. A buffer that is
    not persistent is left out: it must be the same whenever the adapter is made.
    """

    mergeable: ClassVar[bool] = True
    #: Takes x and y in the base's own type and makes its products in it, from wider weights (`products.project`). False:
    #: x and y come in the type of the weights.
    narrow: ClassVar[bool] = False
    siblings: int = 1  # adapted layers of the model, this one included
    peers: Sequence[Adapter] = ()  # the adapters of all adapted layers, in the order of the model, this one included
    mask: Tensor | None = None  # `[runs, tokens]`, true where the batch at hand holds a token and no padding

    @abstractmethod
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Adapt `y = W x`. `x [runs, tokens, in]`, `y [runs, tokens, out]`; returns `[runs, tokens, out]`."""

    @abstractmethod
    def delta(self, run: int) -> Tensor:
        """What merging adds to W for one run: `[out, in]`, float32 or wider."""

    def factors(self, run: int) -> tuple[Tensor, Tensor] | None:
        """A `[rank, in]` and B `[out, rank]` with `delta = B A`, any scale folded into B: the ordinary LoRA (of `alpha` =
        rank) that is exported in place of `state` where the two differ. None where `state` is it, or there is none."""
        return None

    @abstractmethod
    def state(self, run: int) -> dict[str, Tensor]:
        """One run's trained tensors without padding, by short name, for saving."""

    def constants(self, run: int) -> dict[str, Tensor]:
        """One run's frozen tensors that seed and base do not safely give again, by short name: saved beside `state`."""
        return {}

    def alone(self, run: int) -> Adapter:
        """An adapter for one run that shares what is frozen, for `load` to fill. Called where `Method.frees_weights`."""
        raise NotImplementedError

    def load(self, run: int, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, and of `constants` what is there."""
        with torch.no_grad():
            for name, tensor in self.state(run).items():
                tensor.copy_(state[name])
            for name, tensor in self.constants(run).items():
                if name in state:
                    tensor.copy_(state[name])

    def lr_ratios(self) -> Mapping[str, Tensor]:
        """Per parameter name a `[runs]` factor on the learning rate, where it is not 1 (LoRA+)."""
        return {}

    def penalty(self) -> Tensor | None:
        """What the last forward adds to the loss of each run, `[runs]`; the layers' penalties are averaged."""
        return None

    def begin(self, stage: int, stages: int) -> None:
        """Called before the first step of every stage (`Method.stages`); the optimiser starts afresh then."""

    def stepped(self, step: int, steps: int) -> None:
        """Called after the update of step `step` (from 0) of `steps`, with the gradients still at hand."""

    def end(self) -> None:
        """Called when training is over, before anything is scored or saved."""

    def real(self, x: Tensor) -> Tensor:
        """1 where `x [runs, tokens, in]` holds a real token and 0 where it holds padding, `[runs, tokens]`."""
        if self.mask is None or self.mask.shape != x.shape[:2]:  # a decoder's tokens are not the encoder's
            return x.new_ones(x.shape[:2])
        return self.mask.to(x.dtype)


class WholeAdapter(Adapter):
    """An adapter that gives the layer's whole output, so that W x is not computed: an effective weight, or a base weight
    that is held in another form (quantised)."""

    @abstractmethod
    def whole(self, x: Tensor) -> Tensor:
        """The adapted output before any bias: `[runs, tokens, in]` to `[runs, tokens, out]`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.whole(x)


@dataclass
class Start:
    """What one run brings to `Method.adapter`: its config, what `prepare` made, and the seed of its draws."""

    config: Any
    seed: int
    prepared: Any = None

    def generator(self, layer: Layer) -> torch.Generator:
        """A CPU generator that depends on the run's seed and the layer's name alone, so that a draw is the same in
        every pack, and the same for every method that draws the same shape."""
        return seeded(self.seed, layer.name)


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator seeded by a hash of `parts`."""
    import hashlib

    value = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(value)


@dataclass(frozen=True)
class GradientRequest:
    """Mean gradient of the loss over `batches` training batches of `batch_size` items, drawn with `seed`."""

    batches: int
    batch_size: int
    seed: int = 0


@dataclass
class Context:
    """What `prepare` may look at.

    `weight(name)` is the frozen weight of a layer, `[out, in]`. `gradients(request)` gives the mean loss gradient of
    every linear layer's weight; the estimate is cached on disk by base, data and request, whoever asks. `batches(request)`
    are the training batches behind it (one run each), and `loss(model, batch)` the loss of one, `[1]`: for methods
    that look at activations, or build their own model around `model`, the bare frozen base.
    """

    shapes: Shapes
    weight: Callable[[str], Tensor]
    gradients: Callable[[GradientRequest], Mapping[str, Tensor]]
    seed: int
    model: Any
    batches: Callable[[GradientRequest], Iterator[Any]]
    loss: Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Preparation:
    """What `prepare` hands on: `data` goes to `adapter`, `report` (JSON) goes into the record and the report."""

    data: Any = None
    report: dict[str, Any] = field(default_factory=dict)


C = TypeVar("C", bound=MethodConfig)


class Method(ABC, Generic[C]):
    """A way of adapting a base. Subclasses are found by `suite.registry`, one object per method."""

    id: ClassVar[str]
    version: ClassVar[int] = 1  # raised when the method's numbers change for the same config
    label: ClassVar[str]
    paper: ClassVar[Paper]
    Config: ClassVar[type[Any]]
    packs: ClassVar[bool] = True  # False: runs alone
    #: What is trained beside the task head: adapters, nothing (`head`), the base itself, the model that `prepare` made
    #: around the base (`foreign`); `nothing`: not even the head.
    trains: ClassVar[Literal["adapter", "head", "base", "foreign", "nothing"]] = "adapter"
    size: ClassVar[str | None] = None  # the config's field that a budget sets, a whole number (None: there is none)
    bytes_per_scalar: ClassVar[int] = 16  # held per trained scalar: value, gradient and two moments in float32
    spoils_base: ClassVar[bool] = False  # True: the base in memory cannot serve another run afterwards
    #: True: the adapters hold W in another form (quantised), and the base's own weights are let go. Spoils the base.
    frees_weights: ClassVar[bool] = False
    #: False: training holds something that a checkpoint does not, so that a killed run begins anew.
    resumes: ClassVar[bool] = True

    @abstractmethod
    def trainable(self, config: C, shapes: Shapes) -> int:
        """Exact number of adapter scalars that the run trains, from shapes alone (the task head not counted).

        For a method whose sizes depend on data: the count before data is seen; `trained` gives the exact one.
        """

    def trained(self, config: C, shapes: Shapes, prepared: Any) -> int:
        """Exact number of adapter scalars once `prepare` has run."""
        return self.trainable(config, shapes)

    def resized(self, config: C, size: int) -> C:
        """The config with its size set to a whole number."""
        assert self.size is not None
        return type(config).model_validate(config.model_dump() | {self.size: size})

    def solve(self, config: C, shapes: Shapes, parameters: int) -> C:
        """The config whose `trainable` count is nearest to `parameters`: a search over `size`, in which it grows."""
        from suite.budget import nearest

        return self.resized(config, nearest(lambda size: self.trainable(self.resized(config, size), shapes), parameters))

    def structure(self, config: C) -> Hashable:
        """What must be equal for runs to share a pack."""
        return config.target_modules if isinstance(config, AdapterConfig) else None

    def stages(self, config: C, epochs: int) -> int:
        """Into how many equal parts training is cut; each restarts optimiser and schedule (cascades)."""
        return 1

    def check(self, config: C, shapes: Shapes) -> None:
        """Raise `ValueError` with one sentence when the config cannot be built on these shapes."""

    def skip(self, base_kind: str, task_kind: str) -> str | None:
        """Why this method does not apply to a base and task, or None. A skip is a recorded outcome."""
        return None

    def prepare(self, config: C, context: Context) -> Preparation:
        """Whatever depends on data or weights and happens once, before training."""
        return Preparation()

    def adapter(self, layer: Layer, weight: Tensor, starts: Sequence[Start]) -> Adapter | None:
        """The adapter of one layer, with frozen weight `[out, in]`, for the runs of a pack (None: it is left alone).

        Only called for layers that the config targets. Every run of the pack has the same `structure`.
        """
        return None

    def penalty(self, model: Any) -> Tensor | None:
        """What a foreign model adds to the loss of its run, `[1]`."""
        return None

    def stepped(self, model: Any, step: int, steps: int) -> None:
        """Called after every update of a foreign model, with the gradients still at hand."""

    def snapshot(self, model: Any) -> dict[str, Tensor]:
        """What training changes in a foreign model beside its trained tensors, for a checkpoint."""
        return {}

    def restore(self, model: Any, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `snapshot` gave."""

    def end(self, model: Any) -> None:
        """Called when a foreign model has been trained, before anything is scored or saved."""

    def targets(self, config: C, shapes: Shapes) -> list[Layer]:
        """The layers this config adapts."""
        return config.targets(shapes) if isinstance(config, AdapterConfig) else []

    def peft_config(self, config: C, shapes: Shapes, prepared: Any) -> dict[str, Any] | None:
        """Fields of the equivalent stock `peft.LoraConfig`, or None when there is no equivalent."""
        return None
