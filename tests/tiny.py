"""Tiny random models of real transformers classes, in float64, with tokenised data.

They show a method's arithmetic in milliseconds and need no assets. `build(arch)` gives a fresh, frozen model
with its shapes and data; `Tiny` has what a test of a method needs: starts, specs, packs, the loss, and a
context whose gradients are estimated in earnest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from suite import bases, gradients, objectives
from suite.batches import Batch, Encoded, EncodedSet, collate, training_order
from suite.method import Context, GradientRequest, Method, Shapes, Start
from suite.packing import Head, Packed
from suite.specs import BaseRef, Budget, Decode, Evaluation, MethodRef, Recipe, RunSpec, TaskRef, digest
from suite.training import Trained, train

VOCABULARY, WIDTH, CLASSES, ITEMS = 48, 16, 3, 14
_PAD = 0
CPU = torch.device("cpu")

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": _PAD, "bos_token_id": 1, "eos_token_id": 2,
}

#: By architecture: what kind of base it is, its model class, its config class and the config's facts.
_ARCHITECTURES: dict[str, tuple[bases.Kind, str, str, dict[str, Any]]] = {
    "bert": ("encoder", "BertModel", "BertConfig", {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
        "pad_token_id": _PAD}),
    "llama": ("causal", "LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "qwen2": ("causal", "Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "gemma": ("causal", "GemmaForCausalLM", "GemmaConfig", _LLAMA | {"tie_word_embeddings": True}),
    "gpt2": ("causal", "GPT2LMHeadModel", "GPT2Config", {
        "vocab_size": VOCABULARY, "n_embd": WIDTH, "n_inner": 24, "n_layer": 2, "n_head": 2,
        "n_positions": 64, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}),
    "t5": ("seq2seq", "T5ForConditionalGeneration", "T5Config", {
        "vocab_size": VOCABULARY, "d_model": WIDTH, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 2, "d_kv": 8, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": _PAD,
        "pad_token_id": _PAD, "eos_token_id": 2}),
}

ARCHITECTURES = tuple(_ARCHITECTURES)


@dataclass
class Tiny:
    """A frozen base, its shapes and its training data: classification for encoders, else generation."""

    arch: str
    kind: bases.Kind
    model: Any
    shapes: Shapes
    data: EncodedSet

    @property
    def task_kind(self) -> str:
        return "classification" if self.kind == "encoder" else "generation"

    def head(self, runs: int = 1) -> Head | None:
        """The task head of a pack, as every run starts with it."""
        return Head(WIDTH, CLASSES, runs, (self.arch, "tiny", 1)).double() if self.kind == "encoder" else None

    def starts(self, method: Method[Any], configs: Sequence[Any], folder: Path) -> list[Start]:
        """What runs of seeds 0, 1, 2 ... bring to a pack, `prepare` included; `folder` keeps gradients."""
        context = self.context(folder)
        return [Start(config, seed, method.prepare(config, context).data)
                for seed, config in enumerate(configs)]

    def context(self, folder: Path, seed: int = 0) -> Context:
        """What `prepare` sees, with true gradients that are kept in `folder`."""

        def stored(request: GradientRequest) -> Mapping[str, Tensor]:
            place = folder / digest([self.arch, vars(request)])[:16]
            if not (place / "index.json").exists():
                gradients.estimate(self.model, self.shapes.layers, self.losses(request), place)
            return gradients.StoredGradients(place)

        head = self.head()
        weight = lambda name: bases.weight_of(self.model.get_submodule(name))  # noqa: E731
        return Context(self.shapes, weight, stored, seed, self.model, self.batches,
                       lambda model, batch: self.loss(model, head, 1)(batch))

    def batches(self, request: GradientRequest) -> Iterator[Batch]:
        """The training batches of a request."""
        epochs = math.ceil(request.batches * request.batch_size / len(self.data)) + 1
        order = training_order(self.data, request.batch_size, epochs, ("gradients", request.seed))
        for indices in itertools.islice(order, request.batches):
            yield collate(self.data, [indices], CPU)

    def losses(self, request: GradientRequest) -> Iterator[Tensor]:
        """One loss per batch of the request, on the bare base, made lazily."""
        loss = self.loss(self.model, self.head(), 1)
        return (loss(batch).sum() for batch in self.batches(request))

    def pack(self, method: Method[Any], starts: Sequence[Start]) -> Packed:
        return Packed(self.model, method, self.shapes, starts, self.head(len(starts)))

    def loss(self, model: Any, head: Head | None, runs: int) -> Callable[[Batch], Tensor]:
        """One loss per run for a batch."""
        if head is not None:
            return lambda batch: objectives.classification_loss(model, head, batch)
        return lambda batch: objectives.language_loss(model, runs, batch)

    def loss_of(self, packed: Packed) -> Callable[[Batch], Tensor]:
        return self.loss(packed.model, packed.head, packed.runs)

    def spec(self, method: Method[Any], config: Any, seed: int = 0, learning_rate: float = 1e-3,
             **recipe: Any) -> RunSpec:
        """Eight steps. Adam's epsilon is large: a small one blows rounding errors of tiny gradients up."""
        facts = {"epochs": 2, "batch_size": 4, "weight_decay": 0.01, "epsilon": 1e-4} | recipe
        return RunSpec(
            base=BaseRef(id=f"tiny-{self.arch}", revision="0"), task=TaskRef(id="tiny", version=1),
            method=MethodRef(id=method.id, version=method.version, config=config.model_dump(mode="json")),
            budget=Budget(rank=config.rank) if "rank" in type(config).model_fields else None,
            recipe=Recipe(learning_rate=learning_rate, **facts),
            evaluation=Evaluation(decode=None if self.kind == "encoder" else Decode()), seed=seed)

    def train(self, packed: Packed, specs: Sequence[RunSpec]) -> Trained:
        return train(packed, specs, self.data, self.loss_of(packed), lambda done, total: None)

    def batch(self, runs: int = 1, items: Sequence[int] = (0, 1, 2, 3, 4)) -> Batch:
        """The same items for every run."""
        return collate(self.data, [items] * runs, CPU)

    def outputs(self, model: Any, batch: Batch) -> Tensor:
        """Hidden states of an encoder, else logits, `[rows, length, ...]`."""
        inputs: dict[str, Tensor] = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        if self.kind == "encoder":
            return model(**inputs).last_hidden_state
        if self.kind == "seq2seq":
            inputs["labels"] = batch.labels
        return model(**inputs).logits


def build(arch: str, dtype: torch.dtype = torch.float64) -> Tiny:
    """A fresh model, the same at every call."""
    kind = _ARCHITECTURES[arch][0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _model(arch)
    if dtype == torch.float64:
        _keep_float64(model)
    model.to(dtype).requires_grad_(False).eval()
    layers = tuple(bases.layer_of(n, m) for n, m in bases.linear_layers(model).items())
    size = sum(p.numel() for p in model.parameters())
    shapes = Shapes(layers, size, CLASSES * (WIDTH + 1) if kind == "encoder" else 0, lambda: _skeleton(arch))
    return Tiny(arch, kind, model, shapes, data(generation=kind != "encoder"))


def _model(arch: str) -> Any:
    _, model_class, config_class, facts = _ARCHITECTURES[arch]
    options = {"add_pooling_layer": False} if arch == "bert" else {}
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**facts), **options)


def _skeleton(arch: str) -> Any:
    with torch.device("meta"):
        return _model(arch).requires_grad_(False).eval()


def data(generation: bool, items: int = ITEMS, seed: int = 0) -> EncodedSet:
    """Random items of 4 to 11 tokens; of a generation item the last one to four carry loss."""
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    made = []
    for i in range(items):
        tokens = [number(3, VOCABULARY - 1) for _ in range(number(4, 11))]
        made.append(Encoded(tokens, number(1, 4)) if generation else Encoded(tokens, label=i % CLASSES))
    return EncodedSet(made, _PAD, truncated=0)


class ExactNorm(nn.Module):
    """Root mean square normalisation in the type of its input."""

    def __init__(self, weight: Tensor, epsilon: float, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.epsilon = epsilon
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * (self.offset + self.weight)


def _keep_float64(model: nn.Module) -> None:
    """transformers' own RMS norms go through float32, which would hide differences below 1e-7."""
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if kind.endswith("RMSNorm") or kind == "T5LayerNorm":
            keys = ("variance_epsilon", "eps")
            epsilon = next(getattr(module, key) for key in keys if hasattr(module, key))
            parent, _, child = name.rpartition(".")
            exact = ExactNorm(module.weight, epsilon, offset=1.0 if kind.startswith("Gemma") else 0.0)
            setattr(model.get_submodule(parent), child, exact)
