"""Answers through lm-eval on a model in memory: greedy means greedy, whatever the checkpoint says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from methods.lora import LoRA
from suite import bases, generation, registry
from suite.generation import evaluate_pack, evaluate_text
from suite.method import Shapes, Start
from suite.packing import Packed
from suite.specs import Decode
from suite.task import Item, Source, Splits, Task
from tasks.asdiv import Asdiv

DECODE = Decode(max_new_tokens=4)
WORDS = ["<pad>", "<eos>", "a", "b", "c", *map(str, range(10))]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")


@pytest.fixture
def model() -> Any:
    torch.manual_seed(3)
    facts = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5, "pad_token_id": 0,
             "bos_token_id": None, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**facts)).eval()


ITEMS = [Item(id=f"asdiv/{i}", text=text, target=" 7") for i, text in enumerate(["a b c", "c", "b a", "a a a a b"])]


class Letters(Task):
    """Two choices, ranked."""

    id = "letters"
    title = "Letters"
    kind = "choice"
    metric = "accuracy"
    source = Source()
    sizes = {"train": 0, "validation": 0, "test": 2}  # noqa: RUF012
    mean_tokens = 3

    def load(self, folder: Path | None) -> Splits:
        return Splits([], [], [])

    def lm_eval_config(self, test_file: Path) -> dict[str, object]:
        return {"task": "letters", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(test_file)}},
                "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{label}}", "doc_to_choice": "{{choices}}", "target_delimiter": "",
                "metric_list": [{"metric": "acc"}]}


def greedy(model: Any, tokenizer: Any, text: str) -> str:
    """By hand: the likeliest next token, four times, or until the end token."""
    tokens = tokenizer(text, return_tensors="pt").input_ids
    found: list[int] = []
    for _ in range(4):
        following = int(model(tokens).logits[0, -1].argmax())
        if following == 1:
            break
        found.append(following)
        tokens = torch.cat([tokens, torch.tensor([[following]])], 1)
    return tokenizer.decode(found, skip_special_tokens=True)


@pytest.mark.parametrize("leak", [
    None, {"do_sample": True, "temperature": 5.0}, {"repetition_penalty": 9.0, "num_beams": 3}])
def test_answers_are_the_greedy_ones_whatever_the_checkpoint_says(model: Any, tokenizer: Any, leak: Any) -> None:
    own = GenerationConfig(**(leak or {}), pad_token_id=0, eos_token_id=1)
    model.generation_config = own
    with torch.no_grad():
        found = evaluate_text(model, tokenizer, Asdiv(), ITEMS, DECODE, batch_size=3)
        assert found.predictions["output"].tolist() == [greedy(model, tokenizer, item.text) for item in ITEMS]
    assert found.decode == {**DECODE.model_dump(), "repetition_penalty": 1.0, "padding": "left"}
    assert model.generation_config is own


def test_a_batch_of_unequal_prompts_answers_as_each_alone(model: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        together = evaluate_text(model, tokenizer, Asdiv(), ITEMS, DECODE, batch_size=4).predictions["output"].tolist()
        alone = [evaluate_text(model, tokenizer, Asdiv(), [item], DECODE, 1).predictions["output"][0] for item in ITEMS]
    assert together == alone


def test_another_policy_than_asked_for_is_refused(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_arguments", lambda decode: {"do_sample": True, "num_beams": 1, "max_gen_toks": 4,
                                                                  "temperature": 0.8})
    with pytest.raises(RuntimeError, match="where the policy is"), torch.no_grad():
        evaluate_text(model, tokenizer, Asdiv(), ITEMS[:1], DECODE, 1)


def test_choices_are_ranked_by_their_likelihood(model: Any, tokenizer: Any) -> None:
    items = [Item(id=f"letters/{i}", text=text, choices=(" 3", " 8"), label=1, target=" 8")
             for i, text in enumerate(["a b", "c"])]
    with torch.no_grad():
        found = evaluate_text(model, tokenizer, Letters(), items, None, 2).predictions
        for row, item in zip(found.itertuples(), items, strict=True):
            tokens = tokenizer(item.text, return_tensors="pt").input_ids
            likelihood = model(tokens).logits[0, -1].log_softmax(-1)
            expected = [float(likelihood[WORDS.index("3")]), float(likelihood[WORDS.index("8")])]
            assert row.likelihoods == pytest.approx(expected, abs=1e-5)
            assert row.predicted == expected.index(max(expected))
            assert row.correct == (row.predicted == 1)


CHOICES = [Item(id=f"letters/{i}", text=text, choices=(" 3", " 8 2", " 5 5 1"), label=1)
           for i, text in enumerate(["a b", "c", "b b a c", "a"])]


@pytest.mark.parametrize(("task", "items", "decode"), [(Asdiv(), ITEMS, DECODE), (Letters(), CHOICES, None)])
def test_a_pack_answers_at_once_what_each_of_its_runs_answers_alone(task: Task, items: list[Item], decode: Decode | None,
                                                                    model: Any, tokenizer: Any) -> None:
    layers = tuple(bases.layer_of(name, module) for name, module in model.model.named_modules(prefix="model")
                   if bases.adaptable(module))
    starts = [Start(LoRA.Config(rank=rank), seed) for seed, rank in enumerate((1, 3))]
    packed = Packed(model, registry.method("lora"), Shapes(layers, 0), starts)
    draw = torch.Generator().manual_seed(0)
    for run in range(2):
        for tensor in packed.state(run).values():
            tensor.add_(torch.randn(tensor.shape, generator=draw), alpha=0.3)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        together = evaluate_pack(model, 2, tokenizer, task, items, decode, batch_size=3)
        at_once = len(calls)
        apart = []
        for run in range(2):
            with packed.alone(run) as solo:
                apart.append(evaluate_text(solo, tokenizer, task, items, decode, batch_size=3))
    assert at_once < len(calls) - at_once
    for mine, other in zip(together, apart, strict=True):
        assert mine.decode == other.decode
        if decode is None:
            for row, likelihoods in zip(mine.predictions["likelihoods"], other.predictions["likelihoods"], strict=True):
                assert row == pytest.approx(likelihoods, abs=1e-4)
        columns = [name for name in mine.predictions if name != "likelihoods"]
        pd.testing.assert_frame_equal(mine.predictions[columns], other.predictions[columns])
    column = "likelihoods" if decode is None else "output"
    answers = [str([one if decode else [round(x) for x in one] for one in given.predictions[column]]) for given in together]
    assert len(set(answers)) == 2  # the runs differ, so an answer in the wrong place would show


@pytest.mark.parametrize(("target", "output", "right"), [
    (" 9", "9", True), (" 9", "9 apples", True), (" 9", "The answer is 9.", True), (" 9", "9.0", True),
    (" 1200", "1,200", True), (" 3.5", "$3.50", True), (" 9.80", "9.8", True), (" 9", "-9", False), (" 9", "", False),
    (" 9", "19", False), (" 9", "8 or 9", False), (" 0.5", "0.5", True), (" 10", "1", False)])
def test_the_first_number_is_the_answer(target: str, output: str, right: bool) -> None:
    """The committed task file's own filter and metric, by lm-eval."""
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    config = yaml.safe_load(Path("tasks/lm_eval/asdiv.yaml").read_text(encoding="utf-8"))
    steps = config["filter_list"][0]["filter"]
    assert steps[0]["function"] == "regex"
    found = RegexFilter(steps[0]["regex_pattern"], steps[0]["group_select"]).apply([[output]], [{}])
    metric = config["metric_list"][0]
    score = exact_match_hf_evaluate([next(iter(found))[0]], [target.strip()],
                                    regexes_to_ignore=metric["regexes_to_ignore"])["exact_match"]
    assert bool(score) == right
