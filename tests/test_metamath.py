"""MetaMathQA to GSM8K: which problems are trained on, how they read, and how an answer is scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from copies import one_json, parquet

from suite import registry
from suite.errors import UserError
from suite.task import Item, Splits
from tasks.metamath import HELD_OUT, MetaMathGsm8k, prompt, scored, tokens

TYPES = ("GSM_AnsAug", "GSM_Rephrased", "GSM_SV", "GSM_FOBAR", "MATH_AnsAug")
SIZES = {"train": 300, "validation": 4, "test": 3}


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUITE_DATASETS", str(tmp_path / "copies"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "copies"


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> MetaMathGsm8k:
    found = registry.task("metamath-gsm8k")
    assert isinstance(found, MetaMathGsm8k)
    monkeypatch.setattr(MetaMathGsm8k, "sizes", SIZES)
    return found


def problem(number: int) -> dict[str, str]:
    """A row of MetaMathQA. Each of the original questions has two rewordings of each type."""
    original = f"Question {number // 10}?"
    solution = f"Take {number} and add nothing.\n#### {number}\nThe answer is: {number}"
    return {
        "type": TYPES[number % 5],
        "query": f"Query {number}?",
        "original_question": original,
        "response": solution,
    }


def put(folder: Path, task: MetaMathGsm8k, monkeypatch: pytest.MonkeyPatch, rows: Any) -> None:
    one_json(folder / "meta-math" / "MetaMathQA", "MetaMathQA-395K.json", rows)
    answers = ["5 * 2 = <<5*2=10>>10\n#### 10", "It is more.\n#### 1,200", "It fell.\n#### -3"]
    tested = [{"question": f"Test {n}?", "answer": answer} for n, answer in enumerate(answers)]
    solved = [{"question": "Train?", "answer": "#### 1"}]
    parquet(folder / "openai" / "gsm8k", {"main": {"train": solved, "test": tested}})
    monkeypatch.setattr(type(task), "rows", {"train": len(rows), "test": 3})


def load(folder: Path, task: MetaMathGsm8k, monkeypatch: pytest.MonkeyPatch, count: int = 3000) -> Splits:
    put(folder, task, monkeypatch, [problem(number) for number in range(count)])
    return task.load(None)


def numbers(items: Any) -> list[int]:
    """Rows that items come from, in the order of the file."""
    return sorted(int(item.id.rsplit("/", 1)[1]) for item in items)


def test_items_read_as_lora_ga_reads_them(copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = load(copies, task, monkeypatch)
    first = next(item for item in splits.train if item.id == "metamath-gsm8k/train/2")
    assert first.text == "Q: Query 2?\nA: "
    assert first.target == "Take 2 and add nothing.\n#### 2"
    assert [item.target for item in sorted(splits.test, key=lambda item: item.id)] == ["10", "1200", "-3"]
    assert {item.text for item in splits.test} == {f"Q: Test {n}?\nA: " for n in range(3)}


def test_the_first_problems_of_gsm_types_are_taken(
    copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(copies, task, monkeypatch)
    taken = numbers(splits.train)
    assert len(taken) == SIZES["train"]
    assert all(TYPES[number % 5].startswith("GSM") for number in taken)
    eligible = [number for number in range(taken[-1] + 1) if number % 5 != 4]
    held = sorted(set(eligible) - set(taken))
    questions = {number // 10 for number in held}
    assert held == [number for number in eligible if number // 10 in questions]
    assert len(questions) <= 5 * HELD_OUT * (taken[-1] // 10) + 3


def test_no_rewording_of_a_held_out_question_is_trained_on(
    copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = load(copies, task, monkeypatch)
    assert len(splits.validation) == SIZES["validation"]
    assert not {n // 10 for n in numbers(splits.validation)} & {n // 10 for n in numbers(splits.train)}
    for item in splits.validation:
        assert item.target == item.id.rsplit("/", 1)[1]
    assert [item.id for item in task.load(None).train] == [item.id for item in splits.train]
    assert numbers(splits.train) != [int(item.id.rsplit("/", 1)[1]) for item in splits.train]


def test_long_problems_are_left_out(copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [problem(number) for number in range(3000)]
    rows[1]["query"] = "word " * 512
    put(copies, task, monkeypatch, rows)
    assert 1 not in numbers(task.load(None).train)


def test_tokens_are_counted_by_rule() -> None:
    assert tokens("") == 0
    assert tokens("She has 3*4=<<3*4=12>>12 apples.") == 20
    assert tokens("multiplication") == 3
    assert tokens("naïve_Zürich") == 3


def test_declared_sizes_are_the_papers() -> None:
    task = registry.task("metamath-gsm8k")
    assert task.sizes["train"] == 100_000
    assert task.sizes["test"] == 1_319
    assert [source.hub for source in task.sources] == ["meta-math/MetaMathQA", "openai/gsm8k"]
    assert all(source.revision and len(source.revision) == 40 for source in task.sources)


def test_too_few_problems_are_said(copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"MetaMathQA: \d+ items of type GSM for train instead of 300"):
        load(copies, task, monkeypatch, count=200)


def test_a_missing_column_is_named(copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [problem(number) for number in range(20)]
    for row in rows:
        del row["original_question"]
    put(copies, task, monkeypatch, rows)
    with pytest.raises(UserError, match=r"\(train\): there is no column 'original_question'; there are"):
        task.load(None)


def test_a_row_without_text_is_named(copies: Path, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [problem(number) for number in range(20)]
    rows[7]["response"] = None
    put(copies, task, monkeypatch, rows)
    with pytest.raises(UserError, match="row 7 has no response"):
        task.load(None)


def test_an_answer_without_a_number_is_named() -> None:
    with pytest.raises(UserError, match="item x: its answer has no number behind '####'"):
        scored(Item("x", prompt("Why?")), "Because.")


@pytest.fixture(scope="module")
def judged() -> Any:
    """Scores of canned generations, (generated, expected) -> right or wrong, as `lm-eval` gives them."""
    import tempfile

    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    class Canned(LM):
        """Answers each prompt with the text that stands in it."""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [json.loads(request.args[0]) for request in requests]

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    def judge(cases: list[tuple[str, str]]) -> list[bool]:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "items.jsonl"
            rows = [
                json.dumps({"id": str(number), "prompt": json.dumps(text), "target": expected})
                for number, (text, expected) in enumerate(cases)
            ]
            file.write_text("\n".join(rows), encoding="utf-8")
            config: Any = MetaMathGsm8k().lm_eval_config(file)
            config["dataset_kwargs"]["cache_dir"] = scratch
            tasks = TaskManager(include_defaults=False)
            found: Any = simple_evaluate(Canned(), tasks=[config], bootstrap_iters=0, task_manager=tasks)
        samples = sorted(found["samples"][config["task"]], key=lambda sample: sample["doc_id"])
        return [bool(sample["exact_match"]) for sample in samples]

    return judge


def test_an_answer_is_the_number_behind_the_first_mark(judged: Any) -> None:
    right = [
        ("So it is 18.\n#### 18", "18"),
        ("#### 1,200", "1200"),
        ("#### $1,200.00", "1200"),
        ("####-3", "-3"),
        ("#### -$3", "-3"),
        ("#### +7 apples", "7"),
        ("#### 0.50", "0.5"),
        ("#### .5", ".5"),
        ("#### 12.\nQ: next", "12"),
        ("#### 20 #### 30", "20"),
        ("#### 100", "100"),
        ("#### 2.25", "2.25"),
    ]
    wrong = [
        ("#### 1", "1200"),  # what the paper's pattern makes of "1,200"
        ("#### 3", "-3"),
        ("#### 18.5", "18"),
        ("The answer is 18.", "18"),
        ("", "0"),  # no answer is not zero
        ("#### none", "0"),
        ("#### 10", "100"),
        ("18 #### 81", "18"),
    ]
    assert judged([*right, *wrong]) == [True] * len(right) + [False] * len(wrong)
