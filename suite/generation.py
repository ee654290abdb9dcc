"""Evaluation of text through `lm-eval`: its task file, its filters, its metric, on the model in memory.

Greedy means greedy: every field of the decode policy is set here, a checkpoint's own generation config is put aside for
the time, and what `generate` was really called with is recorded and held against the policy.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from suite import hub
from suite.specs import Decode
from suite.task import Item, Task


@dataclass(frozen=True)
class Answered:
    """`predictions` has one row per item; `decode` is the policy as it was applied."""

    predictions: pd.DataFrame
    decode: dict[str, Any]


def evaluate_text(model: Any, tokenizer: Any, task: Task, items: Sequence[Item], decode: Decode | None,
                  batch_size: int) -> Answered:
    """Answer every item, by generation or by ranking its choices, and score it by the task's `lm-eval` file.

    Args:
        model: a Transformers model with `generate`, in evaluation mode.
        items: prompts (`text`) and expected answers (`target`), or `choices` of which `label` is right.
        decode: how to generate; None for tasks whose choices are ranked by their likelihood.
        batch_size: prompts answered together, padded on the left.

    Raises `RuntimeError` when `generate` was called with another policy than `decode`, or an item has no answer.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as scratch, _calm():
        file = Path(scratch) / "items.jsonl"
        rows = ({"id": item.id, "prompt": item.text, "target": item.target, "choices": item.choices, "label": item.label}
                for item in items)
        file.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
        config = task.lm_eval_config(file)
        if config is None:
            raise RuntimeError(f"task {task.id} has no lm-eval configuration, so it cannot be generated")
        config = {**config, "dataset_kwargs": {**config["dataset_kwargs"], "cache_dir": scratch}}  # type: ignore[dict-item]
        if decode is not None:
            config["generation_kwargs"] = {**config["generation_kwargs"], **_arguments(decode)}  # type: ignore[dict-item]
        language_model = _language_model(model, tokenizer, batch_size)
        with _policy(model, tokenizer, decode):
            found = simple_evaluate(model=language_model, tasks=[config], bootstrap_iters=0, log_samples=True,
                                    task_manager=TaskManager(include_defaults=False))
    assert found is not None
    name = str(config["task"])
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    if [sample["doc"]["id"] for sample in samples] != [item.id for item in items]:
        raise RuntimeError(f"lm-eval scored {len(samples)} items of {name} where {len(items)} were asked for")
    table = pd.DataFrame({"item": [item.id for item in items]})
    if task.kind == "choice":
        likelihoods = [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]
        table["expected"] = [int(item.label or 0) for item in items]
        table["predicted"] = [row.index(max(row)) for row in likelihoods]
        table["correct"] = [bool(sample["acc"]) for sample in samples]
        table["likelihoods"] = likelihoods
        return Answered(table, {"scoring": "the likeliest choice"})
    assert decode is not None
    table["expected"] = [str(item.target).strip() for item in items]
    table["predicted"] = [_text(sample["filtered_resps"]) for sample in samples]
    table["correct"] = [bool(sample[task.metric]) for sample in samples]
    table["prompt"] = [item.text for item in items]
    table["output"] = [_text(sample["resps"]) for sample in samples]
    return Answered(table, _applied(language_model.called, decode))


def _arguments(decode: Decode) -> dict[str, Any]:
    """The policy in lm-eval's words. Under greedy decoding it takes no temperature."""
    arguments: dict[str, Any] = {"do_sample": decode.do_sample, "num_beams": decode.num_beams,
                                 "max_gen_toks": decode.max_new_tokens}
    if decode.do_sample:
        arguments |= {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": decode.top_k}
    return arguments


def _language_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's wrapper of a model in memory, which also notes what `generate` is called with."""
    from lm_eval.models.huggingface import HFLM

    class Noting(HFLM):
        called: dict[str, Any]

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **arguments: Any) -> Any:
            self.called = {key: value for key, value in arguments.items() if key != "attention_mask"}
            return super()._model_generate(context, max_length, stop, **arguments)

    return Noting(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


@contextmanager
def _policy(model: Any, tokenizer: Any, decode: Decode | None) -> Iterator[None]:
    """Put aside the checkpoint's generation config for one made of the policy and the tokenizer's special tokens."""
    from transformers import GenerationConfig

    if decode is None:
        yield
        return
    own = model.generation_config
    sampling = {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": decode.top_k}
    model.generation_config = GenerationConfig(
        do_sample=decode.do_sample, num_beams=decode.num_beams, repetition_penalty=1.0, use_cache=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        **(sampling if decode.do_sample else {}))
    try:
        yield
    finally:
        model.generation_config = own


def _applied(called: dict[str, Any], decode: Decode) -> dict[str, Any]:
    """The whole policy with what `generate` was really given. Raises `RuntimeError` where the two differ."""
    applied = {**decode.model_dump(), **{key: called[key] for key in called if key in Decode.model_fields}}
    if not applied["do_sample"]:
        applied["temperature"] = decode.temperature  # lm-eval's 0 says the same; a greedy search has no temperature
    if applied != decode.model_dump():
        raise RuntimeError(f"generate was called with {called} where the policy is {decode.model_dump()}")
    return {**applied, "repetition_penalty": 1.0}


def _text(responses: Any) -> str:
    while isinstance(responses, list | tuple):
        responses = responses[0]
    return str(responses)


@contextmanager
def _calm() -> Iterator[None]:
    """lm-eval and datasets without chatter and progress bars."""
    import lm_eval  # noqa: F401  its import sets its own level

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with hub.quiet(), redirect_stderr(io.StringIO()):  # lm-eval's own bars cannot be switched off
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
