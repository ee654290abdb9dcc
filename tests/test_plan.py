"""The plan of the paper's own scale against numbers worked out by hand; its estimates of memory and time."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from suite import bases, limits, packing, plan, records, registry, study
from suite.batches import Encoded, EncodedSet, collate
from suite.limits import Limits
from suite.method import Shapes, Start
from suite.objectives import CHUNK, language_loss
from suite.packing import Packed
from suite.plan import MACHINES, Estimate, Plan, PlannedRun, estimate, fitting
from suite.records import Record
from suite.specs import RunSpec
from suite.study import Cell, Scale

GORA = study.load("gora")


@pytest.fixture(autouse=True)
def own_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path))


def planned(scale: Scale, *only: str, **options: Any) -> Plan:
    return plan.make(GORA, scale, study.cells(GORA, scale, only), **options)


def one(scale: Scale, *only: str) -> PlannedRun:
    return planned(scale, *only, "seed=0").runs[0]


def spec(scale: Scale, *only: str) -> RunSpec:
    return study.cells(GORA, scale, [*only, "seed=0"])[0].spec


def changed(found: RunSpec, **recipe: Any) -> RunSpec:
    return found.model_copy(update={"recipe": found.recipe.model_copy(update=recipe)})


# Trained parameters of the paper's tables, by hand.  T5-base: 144 layers of 768 x 768 and 48 of 768 x 3072.
# LoRA of rank 8: 8 (144 · 1536 + 48 · 3840) = 3,244,032. GoRA at equal importance has ranks 9 and 6: 144 · 9
# · 1536 + 48 · 6 · 3840 = 3,096,576.  Llama-3.1-8B, q k v o of 32 blocks: q and o are 4096 x 4096, k and v
# 1024 x 4096. in + out: 8192, 5120, 5120, 8192, in all 26,624. Rank 8: 8 · 26,624 · 32 = 6,815,744. GoRA at
# equal importance: the mean of sqrt(in + out) over the four is (2 · 90.51 + 2 · 71.55) / 4 = 81.03, so r = 8
# · 81.03 / 90.51 = 7.16 -> 7 and 8 · 81.03 / 71.55 = 9.06 -> 9, and 32 (2 · 7 · 8192 + 2 · 9 · 5120) =
# 6,619,136; at 32 the ranks are 28.65 -> 29 and 36.24 -> 36, at 128 they are 114.6 -> 115 and 144.95 -> 145.
BY_HAND = [
    ("glue", "full", None, 222_903_552),
    ("glue", "lora", 8, 3_244_032),
    ("glue", "rslora", 8, 3_244_032),
    ("glue", "lora-plus", 8, 3_244_032),
    ("glue", "gora", 8, 3_096_576),
    ("glue", "gora-init", 8, 3_244_032),
    ("gsm8k", "full", None, 8_030_261_248),
    ("gsm8k", "lora", 8, 8 * 26_624 * 32),
    ("gsm8k", "lora", 32, 32 * 26_624 * 32),
    ("gsm8k", "lora", 128, 128 * 26_624 * 32),
    ("gsm8k", "gora", 8, 32 * (2 * 7 * 8192 + 2 * 9 * 5120)),
    ("gsm8k", "gora", 32, 32 * (2 * 29 * 8192 + 2 * 36 * 5120)),
    ("gsm8k", "gora", 128, 32 * (2 * 115 * 8192 + 2 * 145 * 5120)),
]


def test_the_papers_scale_is_planned_from_shapes_alone_and_quickly() -> None:
    bases._shapes.cache_clear()
    began = time.monotonic()
    made = planned("paper")
    assert time.monotonic() - began < 10
    # 5 tasks · 8 rows · 3 seeds, and 3 seeds of full fine-tuning and of 7 rows at 3 ranks
    assert len(made.runs) == 5 * 8 * 3 + 3 * (1 + 7 * 3)
    assert len({run.id for run in made.runs}) == len(made.runs)
    assert all(run.skip is None for run in made.runs)
    found = {(run.table, run.row, run.rank): run.trainable for run in made.runs}
    assert {place: found[place] for *place_, _ in BY_HAND if (place := tuple(place_))} == {
        (table, row, rank): count for table, row, rank, count in BY_HAND
    }


def test_the_papers_recipes_are_those_of_the_notes() -> None:
    glue = spec("paper", "table=glue", "method=gora")
    math = spec("paper", "table=gsm8k", "method=gora", "rank=8")
    recipe, config = glue.recipe, glue.method.config
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs, recipe.max_length) == (1e-4, 32, 1, 128)
    assert (recipe.schedule, recipe.warmup_ratio, recipe.final_lr_ratio) == ("cosine", 0.03, 0)
    assert (recipe.weight_decay, recipe.precision) == (0, "float32")
    assert (config["rank"], config["alpha"], config["rank_min"], config["rank_max"]) == (8, 16, 4, 32)
    assert (config["batches"], config["batch_size"], config["target_modules"]) == (64, 32, "all-linear")
    recipe, config = math.recipe, math.method.config
    assert (recipe.learning_rate, recipe.batch_size, recipe.epochs, recipe.max_length) == (5e-5, 64, 1, 1024)
    assert (recipe.schedule, recipe.warmup_ratio, recipe.final_lr_ratio) == ("cosine", 0.03, 0.1)
    assert (recipe.weight_decay, recipe.precision) == (5e-4, "bfloat16")
    assert (config["gamma"], config["batches"], config["batch_size"]) == (0.08, 64, 32)
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert math.evaluation.decode is not None
    assert not math.evaluation.decode.do_sample


def test_bench_is_the_desk_study_on_all_the_data() -> None:
    desk, bench = GORA.edition("desk").tables, GORA.edition("bench").tables
    assert set(desk) == set(bench)
    for name, table in bench.items():
        same = desk[name]
        assert (table.base, table.tasks, table.reference) == (same.base, same.tasks, same.reference)
        assert table.train is table.test is None
        assert [budget.rank for budget in table.budgets] == [2, 8, 32]
        assert len(table.seeds) == 5
    made = planned("bench")
    assert 600 < made.seconds < 2 * 3600
    assert all(run.fits for run in made.runs)


@pytest.mark.parametrize("scale", ["desk", "bench", "paper"])
def test_seconds_and_bytes_are_finite_and_positive(scale: Scale) -> None:
    for run in planned(scale).runs:
        assert 0 < run.seconds < 1e6
        assert 0 < run.memory < 1e12
        assert 0 <= run.share < 1.001


# Memory of Llama-3.1-8B, by hand, in bytes.  Base in bfloat16: 2 · 8,030,261,248. Full fine-tuning: 16 ·
# 8,030,261,248 = 128.5 GB instead. A block keeps per token the input and output of q, k, v, o (8192 + 5120 +
# 5120 + 8192) and of gate, up, down (3 · 18,432) in two bytes each: 163,840, in 32 blocks 5,242,880; adapters
# keep four inputs of 4096 in four bytes besides, 2,097,152 in all. Logits: 12 · 128,256. The largest batch:
# 64 · min(1024, 2 · 200) = 25,600 tokens.
IDLE, BASE, TOKENS, LOGITS = 1.5e9, 8_030_261_248, 25_600, 12 * CHUNK


def test_memory_of_full_fine_tuning_is_sixteen_bytes_a_scalar_and_activations() -> None:
    run = one("paper", "table=gsm8k", "method=full")
    assert run.memory == pytest.approx(IDLE + 16 * BASE + TOKENS * 5_242_880 + LOGITS)
    assert not run.fits


def test_memory_of_an_adapter_is_the_base_its_state_and_activations() -> None:
    run = one("paper", "table=gsm8k", "method=lora", "rank=8")
    kept = TOKENS * 5_242_880
    whole = estimate(spec("paper", "table=gsm8k", "method=lora", "rank=8"), MACHINES["paper"])
    assert whole.memory == pytest.approx(IDLE + 2 * BASE + 16 * 6_815_744 + kept + LOGITS)
    assert whole.memory > 80e9
    assert (run.at_once, run.recompute, run.fits) == (16, False, True)  # 64 and 32 items are more than 64 GB
    assert run.memory == pytest.approx(IDLE + 2 * BASE + 16 * 6_815_744 + kept / 4 + LOGITS)
    small = changed(spec("paper", "table=gsm8k", "method=lora", "rank=8"), batch_size=4)
    assert estimate(small, MACHINES["paper"]).memory == pytest.approx(
        IDLE + 2 * BASE + 16 * 6_815_744 + kept / 16 + LOGITS
    )
    assert estimate(small, MACHINES["paper"]).memory < 40e9


def test_where_one_item_is_too_much_activations_are_computed_again_in_the_largest_parts_that_fit() -> None:
    found, parts = fitting(spec("paper", "table=gsm8k", "method=lora", "rank=8"), replace(MACHINES["paper"], capacity=25e9))
    # Of 400 tokens all blocks keep 2.1 GB, and 18.0 GB are there besides: more than 20. One block and 32 inputs of 8,192
    # bytes are 425,984 bytes a token: 8 items fit.
    assert parts == Limits(items=8, recompute=True)
    assert found.memory == pytest.approx(IDLE + 2 * BASE + 16 * 6_815_744 + 8 * 400 * 425_984 + LOGITS)
    plain = estimate(spec("paper", "table=gsm8k", "method=lora", "rank=8"), MACHINES["paper"])
    assert found.seconds > 1.2 * plain.seconds
    assert fitting(spec("paper", "table=gsm8k", "method=full"), MACHINES["paper"])[1] == Limits()


def test_memory_of_t5_counts_its_encoder_for_items_and_every_scalar_for_state() -> None:
    full, lora = one("paper", "task=glue-mrpc", "method=full"), one("paper", "task=glue-mrpc", "method=lora")
    kept = 32 * 128 * 12 * 4 * (4 * 1536 + 2 * 3840)  # 2 · 65 tokens are cut to 128
    assert full.memory == pytest.approx(IDLE + 16 * 222_903_552 + kept)
    assert lora.memory == pytest.approx(IDLE + 4 * 222_903_552 + 16 * 3_244_032 + kept)
    assert full.fits
    assert lora.fits


def test_a_head_alone_keeps_no_activations_of_the_base() -> None:
    head, lora = one("desk", "method=head"), one("desk", "method=lora", "table=classification")
    assert head.memory < lora.memory < one("desk", "method=full", "table=classification").memory
    assert head.seconds < lora.seconds


def kept_by_autograd(dtype: torch.dtype, targets: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, int, int]:
    """Bytes per token that autograd keeps of a small Llama under LoRA; the plan's activations and logits."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=896, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1,
    )
    model: Any = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval()
    layers = tuple(bases.layer_of(n, m) for n, m in bases.linear_layers(model).items())
    method = registry.method("lora")
    start = Start(method.Config(target_modules=targets), 0)
    Packed(model, method, Shapes(layers, 0), [start])
    items = [Encoded(torch.randint(3, 500, (96,)).tolist(), target=90) for _ in range(3)]
    batch = collate(EncodedSet(items, 0, 0), [[0, 1, 2]], torch.device("cpu"))
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    narrow = packing._kept_narrow

    def kept_narrow(widened: torch.Tensor, own: torch.Tensor) -> Any:  # what it keeps is seen by no hook around it
        if widened.dtype != own.dtype:
            keep(own)
        return narrow(widened, own)

    monkeypatch.setattr(packing, "_kept_narrow", kept_narrow)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        language_loss(model, 1, batch)
    expected = plan.activations(layers, dtype.itemsize)
    return sum(storage.nbytes() for storage in kept.values()) / (3 * 96), expected, 12 * 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "k_proj", "v_proj", "o_proj")])
def test_activations_are_near_what_autograd_keeps(dtype: torch.dtype, targets: Any,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    kept, expected, logits = kept_by_autograd(dtype, targets, monkeypatch)
    assert 0.75 * (expected + logits) < kept < 1.15 * (expected + logits)


def test_time_is_that_of_the_operations_where_layers_are_large() -> None:
    found = spec("paper", "table=gsm8k", "method=lora", "rank=8")
    N, P = 6_979_321_856, 6_815_744  # linear layers; adapter
    training = 100_000 * 200 * (4 * N + 6 * P) / 4e14
    launching = 21 * (1 + 512) / 3 * 224 * 3e-4  # 1,319 questions in batches of 64, a pass per new token
    assert estimate(found, MACHINES["paper"]).seconds == pytest.approx(20 + training + launching)


def test_time_is_that_of_launching_where_layers_are_small() -> None:
    found = spec("bench", "table=classification", "task=movie-sentiment", "method=lora", "rank=8")
    steps, scoring = -(-6568 // found.recipe.batch_size), -(-2502 // 64)
    assert estimate(found, MACHINES["bench"]).seconds == pytest.approx(3 + (steps + scoring / 3) * 36 * 3e-4)
    assert estimate(found, MACHINES["desk"]).seconds > estimate(found, MACHINES["bench"]).seconds


def test_a_gradient_estimate_is_paid_for_once() -> None:
    first, *others = planned("paper", "task=glue-mrpc", "method=gora").runs
    assert {run.row for run in others} == {"gora", "gora-ranks", "gora-init", "gora-lora-plus"}
    assert all(run.seconds == pytest.approx(others[0].seconds, rel=1e-3) for run in others)
    # 64 batches of 32 items of 65 tokens through 84.9 M scalars of the encoder; launching 192 layers takes
    # longer
    assert first.seconds - others[0].seconds == pytest.approx(64 * 192 * 3e-4)


def test_a_pack_holds_one_base_and_everything_else_once_per_run() -> None:
    only = ("task=glue-mrpc", "method=lora")
    alone, together = planned("paper", *only), planned("paper", *only, pack_size=3)
    assert [len(pack) for pack in together.packs] == [3]
    common = IDLE + 4 * 222_903_552
    assert together.memory == pytest.approx(common + 3 * (alone.memory - common))
    assert together.seconds - 3 * 20 < (alone.seconds - 3 * 20) / 2  # 20 s to start each; its steps launch once for all


def test_a_plan_takes_at_least_as_long_as_its_longest_pack() -> None:
    only = ("task=glue-mnli", "method=lora")
    alone, many = planned("paper", *only), planned("paper", *only, workers=8)
    assert many.seconds == pytest.approx(alone.seconds / 3)
    assert many.memory == pytest.approx(3 * alone.memory)


def test_what_is_done_is_not_planned_again() -> None:
    only = ("task=movie-sentiment", "method=lora")
    before = planned("desk", *only, workers=1)
    done = spec("desk", *only)
    records.save(Record(id=done.id, spec=done, status="finished"))
    after = planned("desk", *only, workers=1)
    assert {run.id: run.status for run in after.runs}[done.id] == "finished"
    assert len(after.packs) == len(before.packs) - 1
    assert after.seconds < before.seconds
    records.save(Record(id=done.id, spec=done, status="failed"))
    assert len(planned("desk", *only).packs) == len(before.packs)


def test_skipped_runs_cost_nothing_and_say_why() -> None:
    found = spec("desk", "task=asdiv", "method=lora")
    head = found.method.model_copy(update={"id": "head", "config": {}})
    skipped = found.model_copy(update={"method": head, "budget": None})
    assert estimate(skipped, MACHINES["desk"]) == Estimate(0.1, 0.7e9, 0.7e9)
    made = plan.make(GORA, "desk", [Cell("word-problems", "head", skipped)])
    assert made.runs[0].skip == registry.method("head").skip("causal", "generation")


def test_the_summary_says_which_runs_need_more_memory_than_there_is() -> None:
    header, rows = plan.summary(planned("paper", "table=gsm8k", "method=full,lora", "rank=8,None").runs)
    note = header.index("note")
    assert [row[0] for row in rows] == ["Full fine-tuning", "LoRA"]
    assert [row[note] for row in rows] == ["more memory than the machine has", "16 items at a time"]
    assert [row[header.index("GiB")] for row in rows] == ["246", "48"]
    assert rows[1][header.index("trained")] == "6,815,744"
    _, fitting = plan.summary(planned("paper", "task=glue-cola", "method=lora").runs)
    assert fitting[0][note] == ""


def test_the_plan_is_plain_data() -> None:
    import json

    made = planned("desk")
    assert json.loads(json.dumps(made.as_json()))["scale"] == "desk"
    assert plan.sentence(made).endswith(".")
    assert made.machine in plan.sentence(made)


def test_without_the_hub_the_papers_scale_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    from suite import executor, sweep
    from suite.errors import UserError

    def started(*_: Any) -> None:
        raise AssertionError("a run was started")

    monkeypatch.delenv("SUITE_DATASETS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(executor, "run", started)
    cells = study.cells(GORA, "paper")
    with pytest.raises(UserError) as told:
        sweep.run(GORA, "paper", cells, None, 1, Console(quiet=True))
    repositories = str(told.value).split(": not on this machine, and HF_HUB_OFFLINE is set; ")[0]
    assert set(repositories.split(", ")) == {
        "google-t5/t5-base", "meta-llama/Llama-3.1-8B", "nyu-mll/glue",
        "meta-math/MetaMathQA", "openai/gsm8k",
    }
    assert "\n" not in str(told.value)
    assert not any(record for record in records.load_many(cell.spec.id for cell in cells))


def test_a_pack_is_no_larger_than_one_that_ran_out_of_memory_allows() -> None:
    only = ("task=glue-mrpc", "method=lora")
    limits.learn(spec("paper", *only), 2)
    cut = planned("paper", *only, pack_size=3)
    assert sorted(len(pack) for pack in cut.packs) == [1, 2]
    assert cut.kinds[0].limit == "memory"
