"""The gradient estimate: what it equals, what it leaves behind, how often it is made, its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from suite import gradients, paths, registry
from suite.bases import Base, LoadedBase
from suite.gradients import StoredGradients
from suite.method import GradientRequest, Method
from suite.task import TaskData
from suite.worker import Worker
from tests import tiny

REQUEST = GradientRequest(batches=5, batch_size=4, seed=1)
ARCHITECTURES = [arch for arch in tiny.ARCHITECTURES if tiny.build(arch).shapes.layers]


def linear_weights(base: tiny.Tiny) -> dict[str, torch.nn.Parameter]:
    return {x.name: base.model.get_parameter(f"{x.name}.weight") for x in base.shapes.layers}


def estimated(base: tiny.Tiny, folder: Path) -> StoredGradients:
    gradients.estimate(base.model, base.shapes.layers, base.losses(REQUEST), folder)
    return StoredGradients(folder)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_estimate_is_the_mean_of_plain_gradients(arch: str, tmp_path: Path) -> None:
    found = estimated(tiny.build(arch), tmp_path)
    base = tiny.build(arch)
    weights = linear_weights(base)
    losses = []
    for weight in weights.values():
        weight.requires_grad_(True)
    for loss in base.losses(REQUEST):
        loss.backward()  # plain autograd sums over batches
        losses.append(loss.item())
    assert list(found) == list(weights)
    assert len(losses) == found.index["batches"] == 5
    assert found.loss == pytest.approx(sum(losses) / 5, rel=1e-12)
    for name, weight in weights.items():
        expected = (weight.grad.mT if base.arch == "gpt2" else weight.grad) / 5  # Conv1D stores W transposed
        assert found[name].dtype == torch.float32
        assert float((found[name] - expected).norm() / expected.norm()) < 1e-6


def test_the_base_is_frozen_and_bitwise_unchanged_afterwards(tmp_path: Path) -> None:
    base = tiny.build("bert")
    estimated(base, tmp_path)
    bare = tiny.build("bert").model.state_dict()
    assert all(torch.equal(tensor, bare[name]) for name, tensor in base.model.state_dict().items())
    assert all(not p.requires_grad and p.grad is None for p in base.model.parameters())


def test_the_base_is_frozen_and_free_of_hooks_after_a_failure(tmp_path: Path) -> None:
    base = tiny.build("llama")

    def broken() -> Iterator[Tensor]:
        yield from list(base.losses(REQUEST))[:1]
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        gradients.estimate(base.model, base.shapes.layers, broken(), tmp_path)
    assert all(not p.requires_grad and p.grad is None for p in base.model.parameters())
    assert not (tmp_path / "index.json").exists()
    weight = next(iter(linear_weights(base).values())).requires_grad_(True)
    next(base.losses(REQUEST)).backward()
    assert weight.grad is not None  # a hook that stayed would have taken it


def test_a_stored_gradient_may_be_written_without_harm(tmp_path: Path) -> None:
    found = estimated(tiny.build("bert"), tmp_path)
    name = next(iter(found))
    before = found[name].clone()
    found[name].zero_()
    assert torch.equal(found[name], before)
    assert torch.equal(StoredGradients(tmp_path)[name], before)
    with pytest.raises(KeyError):
        found["no such layer"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUITE_RESULTS", str(tmp_path / "results"))
    return paths.cache() / "gradients"


def test_two_who_ask_at_once_make_it_once(own_cache: Path) -> None:
    base, made, found = tiny.build("bert"), [], []

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        gradients.estimate(base.model, base.shapes.layers, base.losses(REQUEST), folder)

    askers = [threading.Thread(target=lambda: found.append(gradients.cached("k", make))) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(made) == 1
    assert len(found) == 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_failed_estimate_leaves_nothing_and_is_made_again(own_cache: Path) -> None:
    base = tiny.build("bert")

    def broken(folder: Path) -> None:
        (folder / gradients.FILE).write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        gradients.cached("k", broken)
    assert [path.name for path in own_cache.iterdir()] == [".k.lock"]
    made = gradients.cached("k", lambda folder: gradients.estimate(
        base.model, base.shapes.layers, base.losses(REQUEST), folder))
    assert made.index["batches"] == 5


@pytest.fixture
def worker() -> Iterator[Worker]:
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield Worker()
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def test_runs_of_any_seed_rank_and_learning_rate_read_one_estimate(own_cache: Path, worker: Worker) -> None:
    base, method = tiny.build("bert"), registry.method("gora")
    task = registry.task("bigram-shift")
    loaded = LoadedBase(Base("tiny-bert", "0", "encoder", "tiny"), base.model, None, tiny.WIDTH)
    items = TaskData(task, [], [], [], fingerprint="tiny")
    classes = len(task.labels)
    data = tiny.EncodedSet([tiny.Encoded(x.tokens, label=x.label % classes) for x in base.data.items], 0, 0)

    def ask(method: Method[Any] = method, seed: int = 0, learning_rate: float = 1e-3, rank: int = 2,
            max_length: int = 128, **facts: Any) -> Any:
        config = method.Config(**({"rank": rank, "batches": 2, "batch_size": 4} | facts))
        spec = base.spec(method, config, seed, learning_rate, max_length=max_length)
        return worker._prepare(method, config, spec, loaded, items, data, base.shapes).data.gradients.folder

    first = ask()
    assert ask(seed=1) == ask(learning_rate=1.0) == ask(rank=4, gamma=0.0, alpha=3.0) == first
    assert len([path for path in own_cache.iterdir() if path.is_dir()]) == 1
    others = [ask(gradient_seed=1), ask(batches=3), ask(batch_size=2), ask(max_length=64)]
    assert len({first, *others}) == 5


#: A base of 6 layers of 36 MB, each large enough to be given back to the system when freed, and tiny batches.
#: Prints by how many layers resident memory grows at its peak, during each piece of work and after it.
MEASURE = """
import gc, json, tempfile
from pathlib import Path
import torch
from suite import environment, gradients
from suite.method import Layer

torch.set_num_threads(1)
SIZE, LAYERS = 3000, 6
model = torch.nn.Sequential(*[
    torch.nn.utils.skip_init(torch.nn.Linear, SIZE, SIZE, bias=False) for _ in range(LAYERS)])
for parameter in model.requires_grad_(False).parameters():
    parameter.fill_(1 / SIZE)
layers = [Layer(str(i), SIZE, SIZE) for i in range(LAYERS)]

def losses():
    for _ in range(2):
        yield model(torch.ones(2, SIZE)).square().mean()

def estimate():
    gradients.estimate(model, layers, losses(), folder)

def read():
    stored = gradients.StoredGradients(folder)
    assert all(float(stored[x.name].sum()) > 0 for x in layers)
    return stored

def plain():
    model.requires_grad_(True)
    for loss in losses():
        loss.backward()

def growth(work):
    gc.collect()
    with environment.PeakMemory() as before:
        pass
    with environment.PeakMemory() as during:
        kept = work()
    with environment.PeakMemory() as after:
        del kept
    return [(memory.resident - before.resident) / (4 * SIZE * SIZE) for memory in (during, after)]

with tempfile.TemporaryDirectory() as name, torch.enable_grad():
    folder = Path(name)
    print(json.dumps({work.__name__: growth(work) for work in (estimate, read, plain)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is read from Linux's own mark")
def test_the_peak_holds_two_layers_where_a_plain_pass_holds_all() -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True,
                          cwd=paths.REPOSITORY)
    layers = json.loads(done.stdout)
    assert layers["plain"][0] > 6
    assert layers["estimate"][0] < 2.8  # one gradient, its sum, and small change
    assert layers["read"][0] < 1.8
    assert layers["read"][1] < 0.8  # though the stored gradients are still there to be asked
