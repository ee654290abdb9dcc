"""Sparse changes as a file: exact round trips, application to models, refusals that leave the model as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from methods.sparta import SpaRTA
from suite import bases, paths, registry, sparse_form
from suite.sparse_form import SparseDelta
from tests import tiny


def delta(shape: tuple[int, int], indices: list[int], dtype: torch.dtype = torch.float32) -> SparseDelta:
    return SparseDelta(shape, torch.tensor(indices), torch.arange(1.0, len(indices) + 1, dtype=dtype))


def test_indices_come_back_sorted_in_32_bits_with_their_values(tmp_path: Path) -> None:
    sparse_form.save({"a.b": delta((3, 4), [7, 0, 11]), "c": delta((2, 2), [])}, tmp_path / "x")
    found = sparse_form.load(tmp_path / "x")
    assert list(found) == ["a.b", "c"]
    assert found["a.b"].indices.dtype == torch.int32
    assert found["a.b"].indices.tolist() == [0, 7, 11]
    assert found["a.b"].values.tolist() == [2, 1, 3]
    assert found["c"].shape == (2, 2)
    assert not found["c"].indices.numel()


@pytest.mark.parametrize("indices", [[0, 12], [-1, 3], [5, 5]])
def test_indices_outside_or_twice_are_refused(indices: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layer a: indices must lie inside 3 x 4, each once"):
        sparse_form.save({"a": delta((3, 4), indices)}, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_as_many_values_as_indices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layer a: \(2,\) indices for \(3,\) values"):
        sparse_form.save({"a": SparseDelta((3, 4), torch.tensor([0, 1]), torch.zeros(3))}, tmp_path / "x")


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="is no sparse-delta-1 file"):
        sparse_form.load(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_added_in_float32_and_cast_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    before = model[0].weight.detach().clone()
    sparse_form.save({"0": delta((3, 4), [1, 6])}, tmp_path / "x")
    assert sparse_form.apply_to(model, tmp_path / "x") == ["0"]
    expected = before.to(torch.promote_types(dtype, torch.float32))
    expected.view(-1)[[1, 6]] += torch.tensor([1.0, 2.0], dtype=expected.dtype)
    assert torch.equal(model[0].weight, expected.to(dtype))
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(("content", "words"), [
    ({"0": ((3, 4), [1]), "2": ((3, 4), [1])}, "the model has no layer 2"),
    ({"0": ((3, 4), [1]), "1": ((3, 4), [1])}, "layer 1 is a Tanh, not a linear layer"),
    ({"0": ((4, 3), [1])}, "layer 0 is 3 x 4, the file's is 4 x 3")])
def test_what_does_not_fit_leaves_the_model_as_it_was(content: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    before = model[0].weight.detach().clone()
    sparse_form.save({name: delta(*parts) for name, parts in content.items()}, tmp_path / "x")
    with pytest.raises(ValueError, match=words):
        sparse_form.apply_to(model, tmp_path / "x")
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
def test_a_trained_run_applied_to_a_fresh_base_is_the_run(arch: str, tmp_path: Path) -> None:
    """GPT-2 stores its weights transposed, and its c_proj is square, so that shapes alone do not tell."""
    base, method = tiny.build(arch), registry.method("sparta")
    starts = base.starts(method, [SpaRTA.Config(entries=300), SpaRTA.Config(entries=200)], tmp_path)
    packed = base.pack(method, starts)
    base.train(packed, [base.spec(method, start.config, start.seed) for start in starts])
    with torch.no_grad():
        expected = base.outputs(base.model, base.batch(2)).chunk(2)
    shapes = {x.name: (x.out_features, x.in_features) for x in base.shapes.layers}
    for run in (0, 1):
        state: dict[str, Tensor] = packed.state(run) | packed.constants(run)
        sparse_form.save(sparse_form.of_state(state, shapes), tmp_path / "x")
        fresh = tiny.build(arch)
        changed = sparse_form.apply_to(fresh.model, tmp_path / "x")
        assert set(changed) <= {x.name for x in fresh.shapes.layers}
        with torch.no_grad():
            torch.testing.assert_close(fresh.outputs(fresh.model, fresh.batch()), expected[run], rtol=1e-9, atol=1e-10)
        bare = tiny.build(arch).model
        differing = sum(int((bases.weight_of(m) != bases.weight_of(bare.get_submodule(n))).sum())
                        for n, m in bases.linear_layers(fresh.model).items())
        assert differing == starts[run].config.entries


def test_the_loader_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    """Copied out of the suite, and with nothing else to import but those two and what they need."""
    sparse_form.save({"0": delta((3, 4), [1])}, tmp_path / "x")
    source = (paths.REPOSITORY / "suite" / "sparse_form.py").read_text(encoding="utf-8")
    (tmp_path / "alone.py").write_text(source, encoding="utf-8")
    said = "\n".join([
        "import sys, torch", "for name in ('suite', 'transformers', 'peft', 'pydantic'): sys.modules[name] = None",
        "import alone", "print(alone.apply_to(torch.nn.Sequential(torch.nn.Linear(4, 3)), 'x'))"])
    done = subprocess.run([sys.executable, "-c", said], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['0']", done.stderr
