"""What every method can do, found by trying it on small random models of four architectures.

    trains     it can be built, takes a step, and the step moves it
    merges     a plain model of the base's own classes gives the adapted model's outputs
    exports    stock peft loads it as a LoRA and gives the same outputs
    four-bit   it trains on a base that transformers holds in four bits (bitsandbytes)

Each is true, or the reason why not. `python -m suite.capabilities` (`make capabilities`) writes `capabilities.json`, from
which `suite list methods` reads, and `docs/capabilities.md`.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from suite import bases, export, gradients, objectives, paths, registry
from suite.batches import Batch, Encoded, EncodedSet, collate, training_order
from suite.method import Context, GradientRequest, Method, Shapes, Start, seeded
from suite.packing import Head, Packed
from suite.records import Record
from suite.specs import BaseRef, Evaluation, MethodRef, Recipe, RunSpec, TaskRef
from suite.training import train

FILE = Path(__file__).with_name("capabilities.json")
PAGE = paths.REPOSITORY / "docs" / "capabilities.md"

Answer = bool | str  # true, or why not

#: The questions, and their columns.
QUESTIONS = {"trains": "trains", "merges": "merges", "exports": "LoRA export", "four-bit": "4-bit base"}

#: What a method needs that has no default, or whose default is made for larger models.
CONFIGS: dict[str, dict[str, Any]] = {
    "gora": {"batches": 2, "batch_size": 4},
    "lora-ga": {"batches": 2, "batch_size": 4},
    "lorasc": {"slow_alpha": 0.5},
}

#: Widths are multiples of 64, the block in which bitsandbytes quantises.
_SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.2,
                          "pad_token_id": 0}

#: By name: the kind of base and its config.
ARCHITECTURES: dict[str, tuple[bases.Kind, dict[str, Any]]] = {
    "BERT": ("encoder", {"model_type": "bert", "architectures": ["BertModel"]} | _SIZES),
    "Llama": ("causal", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 2,
                         "head_dim": 16, "bos_token_id": 1, "eos_token_id": 2} | _SIZES),
    "GPT-2": ("causal", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 96, "n_embd": 64,
                         "n_inner": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2,
                         "bos_token_id": 1, "eos_token_id": 2}),
    "T5": ("seq2seq", {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 96, "d_model": 64,
                       "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 16,
                       "is_encoder_decoder": True, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}),
}


@dataclass
class Probe:
    """One small base with its data; `model` is fresh for every probe."""

    base: bases.Base
    model: Any
    shapes: Shapes

    @property
    def encoder(self) -> bool:
        return self.base.kind == "encoder"

    @property
    def data(self) -> EncodedSet:
        draw = seeded("capabilities")
        items = [Encoded(torch.randint(3, 96, (6 + i % 3,), generator=draw).tolist(), 0 if self.encoder else 2, i % 2)
                 for i in range(8)]
        return EncodedSet(items, 0, 0)

    def head(self) -> Head | None:
        return Head(_SIZES["hidden_size"], 2, 1, (self.base.id,)) if self.encoder else None

    def loss(self, model: Any, head: Head | None, batch: Batch) -> Tensor:
        if head is not None:
            return objectives.classification_loss(model, head, batch)
        return objectives.language_loss(model, 1, batch)

    def outputs(self, model: Any) -> Tensor:
        """What a model says at the positions of four items."""
        batch = collate(self.data, [range(4)], torch.device("cpu"))
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        with torch.no_grad():
            if self.encoder:
                return model(**inputs).last_hidden_state[:, -batch.tokens.shape[1]:]
            if self.base.kind == "seq2seq":
                inputs["labels"] = batch.labels
            return model(**inputs).logits[:, -batch.tokens.shape[1]:]

    def batches(self, request: GradientRequest) -> Iterator[Batch]:
        order = training_order(self.data, min(8, request.batch_size), request.batches, request.seed)
        for indices in itertools.islice(order, request.batches):
            yield collate(self.data, [indices], torch.device("cpu"))

    def start(self, method: Method[Any], config: Any, folder: Path) -> Start:
        """The run, `prepare` included; `folder` takes its gradient estimates."""
        head = self.head()
        if head is not None:
            head.requires_grad_(False)

        def estimated(request: GradientRequest) -> Mapping[str, Tensor]:
            place = folder / f"gradients-{request.batches}-{request.batch_size}-{request.seed}"
            if not place.exists():
                losses = (self.loss(self.model, head, batch).sum() for batch in self.batches(request))
                gradients.estimate(self.model, self.shapes.layers, losses, place)
            return gradients.StoredGradients(place)

        context = Context(self.shapes, lambda name: bases.weight_of(self.model.get_submodule(name)), estimated, 0,
                          self.model, self.batches, lambda model, batch: self.loss(model, head, batch))
        return Start(config, 0, method.prepare(config, context).data)

    def trained(self, method: Method[Any], folder: Path) -> Packed:
        """The method's run after two steps. Raises what building or training it raises, and `ValueError` when the steps
        moved nothing or left the loss without a number."""
        config = example(method)
        method.check(config, self.shapes)
        start = self.start(method, config, folder)
        packed = Packed(self.model, method, self.shapes, [start], self.head())
        if method.trains == "nothing":
            return packed
        before = {name: tensor.clone() for name, tensor in packed.state(0).items()}
        spec = RunSpec(base=BaseRef(id=self.base.id, revision="0"), task=TaskRef(id="small", version=1),
                       method=MethodRef(id=method.id, version=method.version, config=config.model_dump(mode="json")),
                       budget=None, recipe=Recipe(learning_rate=1e-2, epochs=1, batch_size=4),
                       evaluation=Evaluation(), seed=0)
        result = train(packed, [spec], self.data, lambda batch: self.loss(packed.model, packed.head, batch),
                       lambda done, total: None)
        if not result.alive[0]:
            raise ValueError("its loss stops being a number")
        if all(torch.equal(tensor, packed.state(0)[name]) for name, tensor in before.items()):
            raise ValueError("a step of training moves nothing")
        return packed


def example(method: Method[Any]) -> Any:
    """A config that fits the small models."""
    config = method.Config.model_validate(CONFIGS.get(method.id, {}))
    return method.resized(config, 2) if method.size == "rank" else config


@cache
def _small(arch: str) -> tuple[bases.Base, Any, Shapes]:
    kind, config = ARCHITECTURES[arch]
    base = bases.Base(id=f"small-{arch}", revision="0", kind=kind, title=arch, config=config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = bases.untrained(base)
    layers = tuple(bases.layer_of(name, module) for name, module in bases.linear_layers(model).items())
    shapes = Shapes(layers, sum(p.numel() for p in model.parameters()), 2 * 65 if kind == "encoder" else 0,
                    lambda: bases.skeleton(base))
    return base, model, shapes


def small(arch: str, four_bit: bool = False) -> Probe:
    """A fresh small base; with its linear layers in four bits where that is asked for."""
    base, model, shapes = _small(arch)
    if not four_bit:
        return Probe(base, copy.deepcopy(model), shapes)
    from transformers import BitsAndBytesConfig

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        options = {"add_pooling_layer": False} if base.kind == "encoder" else {}
        quantised = type(model).from_pretrained(folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4"), **options)
    return Probe(base, quantised.requires_grad_(False).eval(), shapes)


def probe(method: Method[Any], arch: str) -> dict[str, Answer]:
    """The method's answers on one architecture, by question. What does not apply is said in the first, and left out."""
    kind = ARCHITECTURES[arch][0]
    reason = method.skip(kind, "classification" if kind == "encoder" else "generation")
    if reason is not None:
        return {"trains": reason}
    with tempfile.TemporaryDirectory() as name, _quiet():
        folder = Path(name)
        base = small(arch)
        try:
            packed = base.trained(method, folder)
        except Exception as error:  # whatever stops a method is its answer
            return {"trains": _reason(error)}
        answers: dict[str, Answer] = {"trains": True if method.trains != "nothing" else "nothing is trained"}
        if method.trains in ("adapter", "foreign"):
            answers["exports"] = _answer(lambda: _exports(base, packed, folder / "lora", arch))
            answers["merges"] = _answer(lambda: _merges(base, packed))
            answers["four-bit"] = _answer(lambda: small(arch, four_bit=True).trained(method, folder))
    return {question: answers[question] for question in QUESTIONS if question in answers}


def _merges(base: Probe, packed: Packed) -> None:
    expected = base.outputs(packed.model)
    if packed.method.trains == "foreign":
        foreign: Any = packed.model
        if not hasattr(foreign.base_model, "merge_and_unload"):
            raise ValueError("it is no change of weights")
        _same(base.outputs(foreign.merge_and_unload()), expected)
        return
    if not packed.mergeable:
        raise ValueError("it is no change of weights")
    with packed.merged(0) as model:
        _same(base.outputs(model), expected)


def _exports(base: Probe, packed: Packed, folder: Path, arch: str) -> None:
    """Write the ordinary LoRA that it is, or that peft makes of it, and have stock peft load that on a fresh base."""
    from peft import PeftModel, convert_to_lora
    from safetensors.torch import save_file

    expected = base.outputs(packed.model)
    foreign: Any = packed.model
    if packed.method.trains == "foreign" and foreign.active_peft_config.peft_type.value != "LORA":
        if not (hasattr(foreign, "supports_lora_conversion") and foreign.supports_lora_conversion()):
            raise ValueError("peft makes no LoRA of it")
        config, tensors = convert_to_lora(foreign, rank=1.0)  # as many ranks as it takes
        config.save_pretrained(str(folder))
        save_file({f"base_model.model.{name}" if not name.startswith("base_model.") else name: tensor.contiguous()
                   for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    else:
        loaded = bases.LoadedBase(base.base, base.model, None, 64)
        record = cast(Record, type("Run", (), {"id": "small"}))  # only named, where it does not fit
        export.FORMS["peft"](record, packed, loaded, folder)
    _same(base.outputs(PeftModel.from_pretrained(small(arch).model, str(folder))), expected)


def _same(found: Tensor, expected: Tensor) -> None:
    worst = ((found - expected).abs().max() / expected.abs().max()).item()
    if not worst < 5e-4:
        raise ValueError(f"outputs differ by {worst:.1e} of the largest")


def _answer(ask: Callable[[], object]) -> Answer:
    try:
        ask()
    except Exception as error:
        return _reason(error)
    return True


def _reason(error: Exception) -> str:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    said = said.split("cannot be built on this base: ")[-1]
    if "cannot be written like that" in said:
        return "it is no LoRA"
    return said if len(said) <= 160 else f"{said[:157]}..."


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


Table = dict[str, dict[str, dict[str, Answer]]]  # method, architecture, question


@cache
def known() -> Table:
    """The answers that were written last; methods that were added since are not among them."""
    return json.loads(FILE.read_text(encoding="utf-8"))["methods"] if FILE.exists() else {}


def summary(method: str) -> dict[str, str]:
    """A method's answers in a word each: where it trains, and whether the rest holds wherever it trains."""
    found = known().get(method)
    if found is None:
        return dict.fromkeys(QUESTIONS, "?")
    where = [arch for arch, answers in found.items() if answers["trains"] is True]
    words = {"trains": ", ".join(where) or "-"}
    for question in list(QUESTIONS)[1:]:
        said = [found[arch].get(question) for arch in where]
        yes = [arch for arch, answer in zip(where, said, strict=True) if answer is True]
        everywhere = "yes" if yes else "-"
        words[question] = everywhere if len(yes) in (0, len(where)) else ", ".join(yes)
    return words


def write(table: Table) -> None:
    """The data file and the page."""
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    FILE.write_text(json.dumps({"versions": versions, "methods": table}, indent=1, ensure_ascii=False) + "\n",
                    encoding="utf-8")
    known.cache_clear()
    PAGE.write_text(page(table, versions), encoding="utf-8")


def page(table: Table, versions: Mapping[str, str]) -> str:
    """The page as Markdown: one line per method, then every reason."""
    said = ", ".join(f"{name} {number}" for name, number in versions.items())
    lines = ["# What every method can do", "",
             "Written by `make capabilities`: every method was tried on small random models of BERT, Llama, GPT-2 (whose "
             f"layers are `Conv1D`) and T5, on a CPU, with {said}.", "",
             "- **trains**: it can be built, takes a step, and the step moves it",
             "- **merges**: a plain model of the base's classes gives the adapted model's outputs",
             "- **LoRA export**: stock peft loads it as a LoRA, converted where need be, and gives the same outputs",
             "- **4-bit base**: it trains on a base that transformers holds in four bits (bitsandbytes)", "",
             "`yes` holds wherever the method trains; `-` nowhere; else the architectures are named.", "",
             "| method | " + " | ".join(QUESTIONS.values()) + " |", "|---|" + "---|" * len(QUESTIONS)]
    for name in sorted(table):
        lines.append(f"| `{name}` | " + " | ".join(summary(name).values()) + " |")
    lines += ["", "## Why not", ""]
    for name in sorted(table):
        reasons: dict[tuple[str, str], list[str]] = {}
        for arch, answers in table[name].items():
            for question, answer in answers.items():
                if answer is not True:
                    reasons.setdefault((question, str(answer)), []).append(arch)
        lines += [f"- `{name}`, {QUESTIONS[question]} ({', '.join(where)}): {_plain(reason)}"
                  for (question, reason), where in reasons.items()]
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    return text.replace("<", "‹").replace(">", "›").replace("|", "/").replace("\n", " ")


def main(names: Sequence[str] = ()) -> None:
    """Probe every method, or the named ones, keeping what is known of the rest."""
    torch.set_num_threads(1)
    table: Table = {name: known()[name] for name in sorted(known()) if name in registry.methods()} if names else {}
    for name in names or sorted(registry.methods()):
        method = registry.method(name)
        table[name] = {arch: probe(method, arch) for arch in ARCHITECTURES}
        print(f"{name}: trains on {', '.join(a for a in ARCHITECTURES if table[name][a]['trains'] is True) or 'none'}")
    write(dict(sorted(table.items())))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
