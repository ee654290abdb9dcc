"""A small study on the real MiniLM, from the command line to the report and to a stock peft adapter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from mlflow import MlflowClient

from suite import assets, bases, data, paths, registry
from suite.specs import TaskRef

pytestmark = pytest.mark.slow

STUDY = {
    "id": "small", "title": "A small study", "about": "For tests.", "paper": {"title": "None"},
    "rows": {"head": {"method": "head", "label": "Head only"}, "lora": {"method": "lora", "label": "LoRA"},
             "gora": {"method": "gora", "label": "GoRA", "options": {"batches": 2, "batch_size": 8}},
             "pissa": {"method": "pissa", "label": "PiSSA"},
             "lorasc": {"method": "lorasc", "label": "LoRASC", "options": {"cascades": 2, "slow_alpha": 0.5}},
             "sparta": {"method": "sparta", "label": "SpaRTA"}, "dota": {"method": "dota", "label": "DoTA"},
             "qdota": {"method": "qdota", "label": "QDoTA"}},
    "scales": {"desk": {"about": "Tiny.", "tables": {"main": {
        "title": "Main table", "base": "minilm", "tasks": ["movie-sentiment"],
        "rows": ["head", "lora", "gora", "pissa", "lorasc", "sparta", "dota", "qdota"],
        "reference": "lora", "budgets": [{"rank": 4}], "seeds": [0], "train": 48, "test": 40,
        "recipe": {"learning_rate": 2e-3, "batch_size": 8, "max_length": 48}}}}},
}


class World:
    """A folder with a study file and results of its own, and the command that works on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.study = folder / "small.yaml"
        self.study.write_text(yaml.safe_dump(STUDY), encoding="utf-8")
        self.environment = {**os.environ, "SUITE_RESULTS": str(folder / "results"), "SUITE_REPORTS": str(folder / "out"),
                            "PYTHONPATH": str(paths.REPOSITORY), "HF_HUB_OFFLINE": "1"}
        self.environment.pop("MLFLOW_TRACKING_URI", None)

    def suite(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "suite", *words], env=self.environment, capture_output=True,
                              text=True, check=False, cwd=self.folder)

    def records(self) -> dict[str, dict[str, Any]]:
        found = [json.loads(path.read_text()) for path in (self.folder / "results" / "runs").glob("*/record.json")]
        return {record["spec"]["method"]["id"]: record for record in found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    assets.fetch("minilm")
    assets.fetch("hutto-2014")
    made = World(tmp_path_factory.mktemp("world"))
    done = made.suite("run", str(made.study), "--report")
    assert done.returncode == 0, done.stderr
    assert "Main table" in done.stdout
    assert "Report: " in done.stdout
    assert "8 finished" in done.stderr
    return made


def test_records_hold_what_a_reader_asks(world: World) -> None:
    found = world.records()
    assert set(found) == set(STUDY["rows"])
    for record in found.values():
        assert record["status"] == "finished"
        assert record["scores"][0]["items"] == 40
        assert record["timings"]["train"] > 0
        assert record["throughput"]["tokens_per_second"] > 0
        assert record["memory"]["resident"] >= record["memory"]["training"] > 1e8
        assert record["environment"]["packages"]["torch"].startswith("2.13")
    layers = bases.shapes(bases.get("minilm"), registry.task("movie-sentiment")).layers
    assert found["lora"]["trainable"]["adapter"] == 4 * sum(x.in_features + x.out_features for x in layers)
    ranks = found["gora"]["prepare"]["ranks"]
    assert len(ranks) == 36
    assert set(ranks.values()) <= set(range(2, 17))


def test_mlflow_shows_every_run(world: World) -> None:
    client = MlflowClient(f"sqlite:///{world.folder / 'results' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["method"] for run in runs) == sorted(STUDY["rows"])


def test_the_same_command_again_runs_nothing_and_renders_the_same(world: World) -> None:
    page = world.folder / "out" / "small-desk" / "index.html"
    before = page.read_text(encoding="utf-8")
    done = world.suite("run", str(world.study), "--report")
    assert done.returncode == 0
    assert "Nothing to run: all 8 runs" in done.stderr
    assert page.read_text(encoding="utf-8") == before


def test_the_same_spec_gives_the_same_numbers_bit_for_bit(world: World, tmp_path: Path) -> None:
    again = World(tmp_path)
    assert again.suite("run", str(again.study), "--only", "method=gora", "--workers", "1").returncode == 0
    one, other = world.records()["gora"], again.records()["gora"]
    assert one["id"] == other["id"]
    assert one["scores"] == other["scores"]
    assert one["final_loss"] == other["final_loss"]
    for name in ("curves", "predictions"):
        tables = [pd.read_parquet(w.folder / "results" / "runs" / one["id"] / f"{name}.parquet") for w in (world, again)]
        pd.testing.assert_frame_equal(*tables, check_exact=True)


@pytest.mark.parametrize(("method", "form"), [
    ("lora", "peft"), ("gora", "peft"), ("gora", "merged"), ("pissa", "peft"), ("lorasc", "peft"), ("lorasc", "merged"),
    ("sparta", "sparse"), ("dota", "tensor"), ("qdota", "tensor")])
def test_an_exported_run_gives_the_recorded_answers(world: World, method: str, form: str, tmp_path: Path) -> None:
    """A fresh process without this project: transformers, peft and the exported files alone."""
    record = world.records()[method]
    done = world.suite("export", record["id"], "--format", form, "--out", str(tmp_path / "adapter"))
    assert done.returncode == 0, done.stderr
    predictions = pd.read_parquet(world.folder / "results" / "runs" / record["id"] / "predictions.parquet")
    items = data.load(TaskRef.model_validate(record["spec"]["task"])).test
    (tmp_path / "items.json").write_text(json.dumps([item.text for item in items]), encoding="utf-8")
    script = tmp_path / "stock.py"
    script.write_text(textwrap.dedent("""
        import json, sys
        import torch
        from peft import PeftModel
        from safetensors.torch import load_file
        from transformers import AutoModel, AutoTokenizer

        base, folder, form = sys.argv[1:]
        sys.path.append(folder + "/adapter")
        if form == "peft":
            model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder + "/adapter").eval()
        elif form == "merged":
            model = AutoModel.from_pretrained(folder + "/adapter").eval()
        else:
            model = AutoModel.from_pretrained(base).eval()
            __import__(form + "_form").apply_to(model, f"{folder}/adapter/{form}.safetensors")
        head, tokenizer = load_file(folder + "/adapter/head.safetensors"), AutoTokenizer.from_pretrained(base)
        labels = []
        for text in json.load(open(folder + "/items.json")):
            inputs = tokenizer(text, truncation=True, max_length=48, return_tensors="pt")
            with torch.no_grad():
                pooled = model(**inputs).last_hidden_state.mean(1)
            labels.append(int((pooled @ head["weight"].T + head["bias"]).argmax()))
        print(json.dumps(labels))
    """), encoding="utf-8")
    environment = {key: value for key, value in world.environment.items() if key != "PYTHONPATH"}
    told = subprocess.run([sys.executable, "-P", str(script), str(assets.fetch("minilm")), str(tmp_path), form],
                          capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert json.loads(told.splitlines()[-1]) == predictions["predicted"].tolist()
