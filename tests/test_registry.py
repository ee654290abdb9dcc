"""Methods and tasks are found by scan and by entry point, and named when they are not."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from suite import registry
from suite.errors import UserError, one_of
from suite.task import Task

PLUGIN = '''
from suite.task import Source, Splits, Task

class Base(Task):
    """Abstract: has no id of its own."""

class Third(Base):
    id = "{id}"
    title = "A third party's task"
    kind = "classification"
    metric = "accuracy"
    source = Source(asset="minilm")
    labels = ("no", "yes")
    sizes = {{"train": 1, "validation": 1, "test": 1}}
    mean_tokens = 1

    def load(self, folder):
        return Splits([], [], [])
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Task]]:
    """Gives the tasks that are known when a plug-in registers one under an id."""

    def known(task_id: str) -> dict[str, Task]:
        (tmp_path / "third_party.py").write_text(PLUGIN.format(id=task_id), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "third_party", raising=False)
        points = [SimpleNamespace(module="third_party")]
        monkeypatch.setattr(
            registry, "entry_points", lambda group: points if group == "peft_suite.tasks" else []
        )
        return registry.tasks.__wrapped__()

    return known


def test_the_built_in_methods_and_tasks_are_found_under_their_ids() -> None:
    assert {"full", "head", "untouched", "lora", "gora"} <= set(registry.methods())
    assert {"movie-sentiment", "amazon-sentiment", "bigram-shift", "asdiv"} <= set(registry.tasks())
    for known in (registry.methods(), registry.tasks()):
        assert all(thing.id == name for name, thing in known.items())


def test_a_plug_in_is_found_by_its_entry_point(plugin: Callable[[str], dict[str, Task]]) -> None:
    found = plugin("third")
    assert set(found) == {*registry.tasks(), "third"}
    assert found["third"].title == "A third party's task"


def test_two_things_under_one_id_are_refused(plugin: Callable[[str], dict[str, Task]]) -> None:
    with pytest.raises(UserError, match="tasks: two classes register the id 'asdiv': Asdiv and Third"):
        plugin("asdiv")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    for ask, known, kind in (
        (registry.method, registry.methods(), "method"),
        (registry.task, registry.tasks(), "task"),
    ):
        with pytest.raises(UserError) as caught:
            ask("nothing")
        assert str(caught.value) == f"unknown {kind} 'nothing': use {one_of(sorted(known))}"


def test_allowed_values_read_as_a_sentence() -> None:
    assert one_of(["a", "b", "c"]) == "a, b or c"
    assert one_of(["a"]) == "a"
    assert one_of([]) == "nothing (none is registered)"
