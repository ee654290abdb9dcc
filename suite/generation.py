"""Evaluation of text through `lm-eval`: its task file, its filters, its metric, on the model in memory.

Greedy means greedy: every field of the decode policy is set here, a checkpoint's own generation config is put aside for
the time, and what `generate` was really called with is recorded and held against the policy.
"""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

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
    """`evaluate_pack` for a model of one run."""
    (answered,) = evaluate_pack(model, 1, tokenizer, task, items, decode, batch_size)
    return answered


def evaluate_pack(model: Any, runs: int, tokenizer: Any, task: Task, items: Sequence[Item], decode: Decode | None,
                  batch_size: int) -> list[Answered]:
    """Answer every item, by generation or by ranking its choices, and score it by the task's `lm-eval` file, for every
    run of a pack.

    Args:
        model: a Transformers model with `generate`, in evaluation mode, whose batches are run-major.
        items: prompts (`text`) and expected answers (`target`), or `choices` of which `label` is right.
        decode: how to generate; None for tasks whose choices are ranked by their likelihood.
        batch_size: prompts of each run answered together, padded on the left.

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
        language_model = _language_model(model, runs, tokenizer, batch_size)
        found = []
        with _policy(model, tokenizer, decode):
            for run in range(runs):
                language_model.run = run
                found.append(simple_evaluate(model=language_model, tasks=[config], bootstrap_iters=0, log_samples=True,
                                             task_manager=TaskManager(include_defaults=False)))
    name = str(config["task"])
    return [_answered(one["samples"][name], name, task, items, decode, language_model.called) for one in found]


def _answered(samples: list[dict[str, Any]], name: str, task: Task, items: Sequence[Item], decode: Decode | None,
              called: dict[str, Any] | None) -> Answered:
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
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
    assert called is not None
    table["expected"] = [str(item.target).strip() for item in items]
    table["predicted"] = [_text(sample["filtered_resps"]) for sample in samples]
    table["correct"] = [bool(sample[task.metric]) for sample in samples]
    table["prompt"] = [item.text for item in items]
    table["output"] = [_text(sample["resps"]) for sample in samples]
    return Answered(table, _applied(called, decode))


def _arguments(decode: Decode) -> dict[str, Any]:
    """The policy in lm-eval's words. Under greedy decoding it takes no temperature."""
    arguments: dict[str, Any] = {"do_sample": decode.do_sample, "num_beams": decode.num_beams,
                                 "max_gen_toks": decode.max_new_tokens}
    if decode.do_sample:
        arguments |= {"temperature": decode.temperature, "top_p": decode.top_p, "top_k": decode.top_k}
    return arguments


def _language_model(model: Any, runs: int, tokenizer: Any, batch_size: int) -> Any:
    """lm-eval's wrapper of a model in memory, which also notes what `generate` is called with.

    lm-eval asks for one run after the other (`run`). The first time, its requests are answered for the whole pack, one
    batch at a time: the model is called once, on that batch for every run, and lm-eval reads each run's part of what
    came out as if it had called for it.
    """
    from lm_eval.models.huggingface import HFLM

    class OfPack(HFLM):
        called: dict[str, Any] | None = None
        padding = "none"  # on which side prompts were padded, as the masks show it
        run = 0
        _all: list[list[Any]] | None = None  # answers of every run
        _outputs: list[Sequence[Tensor]]  # of every call for the batch at hand, every run's part
        _calls: Iterator[Sequence[Tensor]] | None = None  # the same, while a later run reads them

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return self._together(requests, lambda some: super(OfPack, self).generate_until(some, disable_tqdm))

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            return self._together(requests, lambda some: super(OfPack, self).loglikelihood(some, disable_tqdm))

        def _together(self, requests: list[Any], answer: Callable[[list[Any]], list[Any]]) -> list[Any]:
            if runs == 1:
                return answer(requests)
            if self._all is None:
                order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
                self._all = [[None] * len(requests) for _ in range(runs)]
                for start in range(0, len(order), batch_size):
                    chosen = order[start:start + batch_size]
                    self._outputs = []
                    for run, answers in enumerate(self._all):
                        self._calls = iter(self._outputs) if run else None
                        self.run = run
                        for i, given in zip(chosen, answer([requests[i] for i in chosen]), strict=True):
                            answers[i] = given
                self.run = 0
            return self._all[self.run]

        def _part(self, call: Callable[[], Tensor]) -> Tensor:
            if self._calls is None:
                self._outputs.append(call().chunk(runs))
                return self._outputs[-1][0]
            return next(self._calls)[self.run]

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **arguments: Any) -> Any:
            mask = arguments["attention_mask"]
            for side, edge in (("left", 0), ("right", -1)):
                if not bool(mask[:, edge].all()):
                    self.padding = side
            self.called = {key: value for key, value in arguments.items() if key != "attention_mask"}
            self.called["padding"] = self.padding
            if runs == 1:
                return super()._model_generate(context, max_length, stop, **arguments)
            mask = arguments.pop("attention_mask").repeat(runs, 1)
            return self._part(lambda: super(OfPack, self)._model_generate(
                context.repeat(runs, 1), max_length, stop, attention_mask=mask, **arguments))

        def _model_call(self, inps: Any, attn_mask: Any = None, labels: Any = None) -> Any:
            if runs == 1:
                return super()._model_call(inps, attn_mask, labels)
            return self._part(lambda: super(OfPack, self)._model_call(inps.repeat(runs, 1)))

    return OfPack(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


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
    return {**applied, "repetition_penalty": 1.0, "padding": called["padding"]}


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
