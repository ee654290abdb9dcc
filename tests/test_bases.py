"""Bases: shapes from the config alone are the loaded model's; a spoilt folder is refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from suite import bases, registry
from suite.errors import UserError

SMALL = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2}
#: By architecture: kind of base, model and config class, facts of the config, adaptable layers.
ARCHITECTURES: dict[str, tuple[str, str, str, dict[str, Any], int]] = {
    "bert": ("encoder", "BertModel", "BertConfig", SMALL, 12),
    "roberta": ("encoder", "RobertaForMaskedLM", "RobertaConfig", SMALL, 12),
    "llama": ("causal", "LlamaForCausalLM", "LlamaConfig", SMALL | {"num_key_value_heads": 1}, 14),
    "tied": ("causal", "Qwen2ForCausalLM", "Qwen2Config",
             SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True}, 14),
    "t5": ("seq2seq", "T5ForConditionalGeneration", "T5Config",
           {"vocab_size": 48, "d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8}, 32),
}


def save(folder: Path, arch: str = "llama", **options: Any) -> Path:
    """A tiny random model of that architecture with a tokenizer, as `save_pretrained` writes it."""
    _, model_class, config_class, facts, _ = ARCHITECTURES[arch]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**facts))
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder, **options)
    return folder


def edit(folder: Path, **facts: Any) -> None:
    """Change facts of a saved config."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | facts), encoding="utf-8")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shapes_from_the_config_alone_are_those_of_the_loaded_model(arch: str, tmp_path: Path) -> None:
    kind, *_, count = ARCHITECTURES[arch]
    base = bases.get(f"path:{save(tmp_path, arch)}")
    assert base.kind == kind
    told = bases.shapes(base, registry.task("movie-sentiment"))
    loaded = bases.load(base)
    real = [bases.layer_of(name, m) for name, m in bases.linear_layers(loaded.model).items()]
    assert list(told.layers) == real
    assert len(real) == count
    assert told.parameters == sum(p.numel() for p in loaded.model.parameters()) == bases.parameters(base)
    assert told.head == (2 * 17 if kind == "encoder" else 0)
    assert loaded.hidden_size == 16


def test_a_loaded_base_is_frozen_and_can_pad(tmp_path: Path) -> None:
    loaded = bases.load(bases.get(f"path:{save(tmp_path)}"), dtype=torch.bfloat16)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.tokenizer.pad_token == "</s>"


def test_known_bases_have_their_published_sizes() -> None:
    sizes = {name: bases.parameters(base) for name, base in bases.known().items()}
    assert sizes == {
        "minilm": 22_713_216 - 384 * 385,  # without its pooler
        "smollm2-135m": 134_515_008,
        "t5-base": 222_903_552,
        "gemma-2b": 2_506_172_416,
        "llama-2-7b": 6_738_415_616,
        "llama-3.1-8b": 8_030_261_248,
    }
    for base in bases.known().values():
        assert base.asset or len(base.revision) == 40


def test_a_folder_may_be_given_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    assert bases.get("mine").id == "path:mine"
    assert bases.get("mine").revision == bases.get(f"path:{tmp_path}/mine").revision


def test_the_revision_of_a_folder_follows_its_content(tmp_path: Path) -> None:
    one, two = save(tmp_path / "one"), save(tmp_path / "two")
    assert bases.get(f"path:{one}").revision == bases.get(f"path:{two}").revision
    edit(two, max_position_embeddings=64)
    assert bases.get(f"path:{one}").revision != bases.get(f"path:{two}").revision


def test_weights_in_several_files_are_read(tmp_path: Path) -> None:
    base = bases.get(f"path:{save(tmp_path, max_shard_size='4KB')}")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert bases.load(base).hidden_size == 16
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    refused(tmp_path, "cannot be loaded from")


def test_an_unknown_base_is_told_the_known_ones() -> None:
    for name in ("bloom", ""):
        with pytest.raises(UserError, match=f"unknown base '{name}': use minilm, .*, or path:FOLDER"):
            bases.get(name)


def refused(folder: Path, words: str) -> None:
    """Getting, measuring or loading the base of a folder fails with one sentence that holds these words."""
    with pytest.raises(UserError) as told:
        bases.load(bases.get(f"path:{folder}"))
    assert words in str(told.value)
    assert str(told.value).startswith("base path:")
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 500


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def remove(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


def rename(name: str, other: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).rename(folder / other)


def change(**facts: Any) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, **facts)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda folder: folder.rename(folder.with_name("gone")), "there is no folder"),
    "no config": (remove("config.json"), "holds no config.json"),
    "config is text": (write("config.json", "hello"), "config.json is not a model config"),
    "config is a list": (write("config.json", "[]"), "config.json is not a model config"),
    "no model type": (write("config.json", "{}"), "config.json is not a model config"),
    "unknown type": (change(model_type="weird"), "cannot be loaded from"),
    "odd heads": (change(num_attention_heads=3), "not a multiple of the number of attention heads"),
    "pickled": (rename("model.safetensors", "pytorch_model.bin"), "pickled weights are never read"),
    "another name": (rename("model.safetensors", "x.safetensors"), "cannot be loaded from"),
    "cut weights": (cut, "cannot be loaded from"),
    "no tokenizer": (remove("tokenizer.json"), "holds no tokenizer (tokenizer.json,"),
    "broken tokenizer": (write("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
    "weights too small": (change(hidden_size=32), "weights have another shape than its config says"),
    "weights missing": (change(num_hidden_layers=3), "9 of its weights are missing, model.layers.2."),
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_spoilt_folder_is_refused(fault: str, tmp_path: Path) -> None:
    spoil, words = SPOILT[fault]
    spoil(save(tmp_path / "base"))
    refused(tmp_path / "base", words)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = save(tmp_path)
    proof = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(proof)!r}, 'w')\n", encoding="utf-8")
    edit(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    refused(folder, "cannot be loaded from")
    assert not proof.exists()


def test_a_config_that_cannot_be_built_is_said_when_shapes_are_asked_for(tmp_path: Path) -> None:
    edit(save(tmp_path), num_attention_heads="two")
    with pytest.raises(UserError, match=r"transformers cannot build its config \(.*num_attention_heads"):
        bases.shapes(bases.get(f"path:{tmp_path}"), registry.task("movie-sentiment"))


def test_a_gated_base_that_cannot_be_had_says_how(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"llama-3.1-8b: .* at revision d04e592bb4f6 .*HF_TOKEN.*go online"):
        bases.load(bases.get("llama-3.1-8b"))
