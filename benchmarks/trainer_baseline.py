"""One run of a sweep as it is usually made: a process of its own, peft, the Transformers `Trainer`, MLflow.

    python benchmarks/trainer_baseline.py --model DIR --kind encoder --train train.jsonl --test test.jsonl \\
        --out run1 --rank 8 --learning-rate 2e-3 --seed 0 [--tuned] [--precision bfloat16]

An encoder gets a linear classifier over the mean of its last hidden states (lines `{"text": ..., "label": 0}`); a causal
model learns the answer to a prompt (lines `{"text": ..., "target": ...}`). The model is scored on the test lines at the
end, and the adapter is saved. MLflow is found by its own variables (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`).

`--tuned` is what somebody does who wants it fast: batches of items of like length, in training and in evaluation, few
reports, no check of the logged loss that waits for the device. Transformers' default optimiser is the fused AdamW
already. `--precision bfloat16` loads the frozen base in bfloat16 and computes under autocast; adapters stay float32.

What `suite bench` reads stands in OUT/result.json. Nothing of the suite is imported here.
"""

from __future__ import annotations

import time

import psutil

CREATED = psutil.Process().create_time()

import argparse  # noqa: E402  the clock is read before anything heavy is imported
import json  # noqa: E402
import re  # noqa: E402
from contextlib import nullcontext  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import mlflow  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset, load_dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import (  # noqa: E402
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402


class MeanPoolingClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over real tokens, and a linear layer with a bias of zero."""

    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        """Logits `[batch, classes]`, and the mean cross-entropy where labels are given."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.head(((hidden * mask).sum(1) / mask.sum(1)).to(self.head.weight.dtype))
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def tokenised(path: Path, tokenizer: Any, args: argparse.Namespace) -> Dataset:
    """The lines of a file as token ids, with `length`; in a causal model's training lines the prompt carries no loss."""
    lines = load_dataset("json", data_files=str(path), split="train")
    most = args.max_length  # all that the functions see of the run, so that the next run finds their result kept

    def classify(rows: dict[str, list[Any]]) -> dict[str, Any]:
        found = tokenizer(rows["text"], truncation=True, max_length=most)
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": rows["label"],
                "length": [len(ids) for ids in found["input_ids"]]}

    def complete(rows: dict[str, list[Any]]) -> dict[str, Any]:
        made: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "length": []}
        prompts = tokenizer(rows["text"], add_special_tokens=False)["input_ids"]
        targets = tokenizer(rows["target"], add_special_tokens=False)["input_ids"]
        for prompt, target in zip(prompts, targets, strict=True):
            answer = [*target, tokenizer.eos_token_id]
            question = prompt[max(0, len(prompt) + len(answer) - most):]  # a long one loses its beginning
            made["input_ids"].append(question + answer)
            made["attention_mask"].append([1] * len(question + answer))
            made["labels"].append([-100] * len(question) + answer)
            made["length"].append(len(question + answer))
        return made

    return lines.map(classify if args.kind == "encoder" else complete, batched=True, remove_columns=lines.column_names)


def build(args: argparse.Namespace) -> Any:
    """The base with LoRA on all its linear layers, and no dropout anywhere: the suite trains without, so the same work."""
    dtype = getattr(torch, args.precision)
    lora = LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules="all-linear", lora_dropout=0.0, bias="none",
                      task_type="CAUSAL_LM" if args.kind == "causal" else "FEATURE_EXTRACTION")
    if args.kind == "causal":
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype), lora)
    else:
        encoder = AutoModel.from_pretrained(args.model, dtype=dtype, add_pooling_layer=False)
        model = MeanPoolingClassifier(get_peft_model(encoder, lora), args.classes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def arguments(args: argparse.Namespace, steps: int) -> TrainingArguments:
    """Transformers' defaults with the run's recipe; `--tuned` adds what makes them faster."""
    reports = max(1, steps // 8)
    chosen: dict[str, Any] = {"logging_steps": reports}
    if args.tuned:
        chosen = {"logging_steps": 2 * reports, "logging_nan_inf_filter": False, "optim": "adamw_torch_fused",
                  "train_sampling_strategy": "group_by_length", "dataloader_num_workers": 0,
                  "dataloader_pin_memory": torch.cuda.is_available(), "tf32": True if torch.cuda.is_available() else None}
    return TrainingArguments(
        output_dir=str(args.out), run_name=args.out.name, seed=args.seed, data_seed=args.seed,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.eval_batch_size,
        num_train_epochs=args.epochs, learning_rate=args.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=args.warmup_ratio, max_grad_norm=1.0, weight_decay=0.0, save_strategy="no", report_to=["mlflow"],
        use_cpu=not torch.cuda.is_available(), bf16=args.precision == "bfloat16", disable_tqdm=True,
        remove_unused_columns=False, **chosen)


def answers(model: Any, tokenizer: Any, prompts: list[str], args: argparse.Namespace) -> list[str]:
    """Greedy continuations, batch by batch, padded on the left; tuned: prompts of like length together."""
    tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i])) if args.tuned else list(range(len(prompts)))
    outputs = [""] * len(prompts)
    half = args.precision == "bfloat16"
    model.eval()
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16) if half else nullcontext():
        for start in range(0, len(order), args.eval_batch_size):
            chosen = order[start:start + args.eval_batch_size]
            batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True,
                              add_special_tokens=False).to(model.device)
            made = model.generate(**batch, max_new_tokens=args.max_new_tokens, do_sample=False, temperature=None,
                                  top_p=None, top_k=None, repetition_penalty=1.0)
            texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                outputs[i] = text
    return outputs


def evaluate(trainer: Trainer, tokenizer: Any, test: Dataset, args: argparse.Namespace) -> tuple[float, float | None]:
    """Accuracy of a classifier and its mean cross-entropy over the test items; share of answers whose first match of the
    pattern is the target, and None, for a causal model."""
    if args.kind == "encoder":
        found = trainer.evaluate()
        return float(found["eval_accuracy"]), float(found["eval_loss"])
    lines = [json.loads(line) for line in args.test.read_text(encoding="utf-8").splitlines()]
    matches = [re.search(args.pattern, text) for text in answers(trainer.model, tokenizer, [x["text"] for x in lines], args)]
    score = sum(one is not None and plain(one[0], args.ignore) == plain(line["target"], args.ignore)
                for one, line in zip(matches, lines, strict=True)) / len(lines)
    mlflow.log_metric("exact_match", score)
    return score, None


def plain(text: str, ignored: list[str]) -> str:
    """An answer without what does not count in it."""
    for pattern in ignored:
        text = re.sub(pattern, "", text.strip())
    return text.strip()


def accuracy(predicted: Any) -> dict[str, float]:
    """Share of items whose highest logit is at the label."""
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


def main() -> None:
    """Train, score, save and write OUT/result.json."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train = tokenised(args.train, tokenizer, args)
    steps = args.epochs * -(-len(train) // args.batch_size)
    test = tokenised(args.test, tokenizer, args)
    if args.tuned:
        test = test.sort("length", reverse=True)
    model = build(args)
    columns = ["input_ids", "attention_mask", "labels"]
    tokens = args.epochs * sum(train["length"])
    collator = DataCollatorForSeq2Seq(tokenizer) if args.kind == "causal" else DataCollatorWithPadding(tokenizer)
    # The sampler of like lengths reads `length`, which no model takes: it goes where the batch is made.
    def collate(rows: list[dict[str, Any]]) -> Any:
        return collator([{key: row[key] for key in columns} for row in rows])

    trainer = Trainer(model=model, args=arguments(args, steps), train_dataset=train, eval_dataset=test,
                      data_collator=collate, processing_class=tokenizer,
                      compute_metrics=accuracy if args.kind == "encoder" else None)
    marks = [time.time()]
    # A run of one's own around both: the callback would end its run with training and log the score to another.
    with mlflow.start_run(run_name=args.out.name):
        with profiled(args.profile):
            outcome = trainer.train()
        marks.append(time.time())
        score, test_loss = evaluate(trainer, tokenizer, test, args)
        marks.append(time.time())
        inner = model if args.kind == "causal" else model.encoder
        inner.save_pretrained(args.out / "adapter")
        if args.kind == "encoder":
            torch.save(model.head.state_dict(), args.out / "adapter" / "head.pt")
    windows = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    adapter = sum(p.numel() for p in inner.parameters() if p.requires_grad)
    written = {
        "start_up": marks[0] - CREATED, "train": marks[1] - marks[0], "evaluate": marks[2] - marks[1], "score": score,
        "test_loss": test_loss,
        "items": len(test), "windows": windows, "train_loss": outcome.training_loss, "steps": outcome.global_step,
        "tokens": tokens, "adapter": adapter, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "threads": torch.get_num_threads(),
        "device_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }
    (args.out / "result.json").write_text(json.dumps(written, indent=1), encoding="utf-8")


def profiled(path: Path | None) -> Any:
    """A context that writes what took the time inside it, by operation; nothing when no path is given."""
    if path is None:
        return nullcontext()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)

    def write(profile: torch.profiler.profile) -> None:
        key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        path.write_text(profile.key_averages().table(sort_by=key, row_limit=40), encoding="utf-8")

    return torch.profiler.profile(activities=activities, on_trace_ready=write)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name in ("model", "train", "test", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kind", choices=["encoder", "causal"], required=True)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--alpha", type=float, default=16.0)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--eval-batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--warmup-ratio", type=float, default=0.0)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--pattern", default=r".+", help="what of a generated text is the answer")
    parser.add_argument("--ignore", action="append", default=[], help="what does not count in an answer; may be repeated")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tuned", action="store_true")
    parser.add_argument("--profile", type=Path, help="write a table of torch.profiler here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
