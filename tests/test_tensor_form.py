"""Tensor trains as a file: application to models equals the run, in full precision and over four bits; refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from suite import paths, registry, tensor_form
from tests import tiny


def cores(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def named(layer: str, kind: str, tensors: list[Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.{kind}{k + 1}": tensor for k, tensor in enumerate(tensors)}


T = cores((1, 2, 3, 4), (4, 2, 1, 2), (2, 1, 2, 1))  # a matrix 4 x 6


def test_the_matrix_is_the_sum_over_bonds() -> None:
    expected = torch.einsum("aoib,bpjc,cqkd->opqijk", *T).reshape(4, 6)
    torch.testing.assert_close(tensor_form.matrix(T), expected)
    assert tensor_form.shape_of(T) == (4, 6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_added_is_now_less_then(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 4)).to(dtype)
    before = model[0].weight.detach().clone()
    then = [core / 2 for core in T]
    tensor_form.save(named("0", "core", T) | named("0", "initial", then), ["0"], tmp_path / "x")
    assert tensor_form.apply_to(model, tmp_path / "x") == ["0"]
    expected = before.double() + tensor_form.matrix(T) * (1 - 1 / 8)
    torch.testing.assert_close(model[0].weight, expected.to(dtype))
    assert model[0].weight.requires_grad


@pytest.mark.parametrize(("layers", "words"), [
    (nn.Sequential(nn.Tanh()), "layer 0 is a Tanh, not a linear layer"),
    (nn.Sequential(), "the model has no layer 0"),
    (nn.Sequential(nn.Linear(4, 6)), "layer 0 is 6 x 4, the file's is 4 x 6")])
def test_what_does_not_fit_is_refused(layers: nn.Module, words: str, tmp_path: Path) -> None:
    tensor_form.save(named("0", "core", T), ["0"], tmp_path / "x")
    with pytest.raises(ValueError, match=words):
        tensor_form.apply_to(layers, tmp_path / "x")


def test_cores_that_make_no_matrix_are_not_written(tmp_path: Path) -> None:
    for state, words in (({}, "layer 0: has no cores"), (named("0", "core", T[:2]), "do not make a matrix"),
                         (named("0", "core", [T[0], T[2]]), "do not make a matrix")):
        with pytest.raises(ValueError, match=words):
            tensor_form.save(state, ["0"], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_another_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x")
    with pytest.raises(ValueError, match="is no tensor-train-1 file"):
        tensor_form.apply_to(nn.Linear(1, 1), tmp_path / "x")


@pytest.mark.parametrize(("name", "arch"), [("dota", "bert"), ("dota", "gpt2"), ("tt-random", "llama"), ("qdota", "llama"),
                                            ("qdota", "gpt2")])
def test_a_trained_run_applied_to_a_fresh_base_is_the_run(name: str, arch: str, tmp_path: Path) -> None:
    base, method = tiny.build(arch), registry.method(name)
    starts = base.starts(method, [method.Config(bond=3)], tmp_path)
    packed = base.pack(method, starts)
    base.train(packed, [base.spec(method, start.config, start.seed) for start in starts])
    with torch.no_grad():
        expected = base.outputs(base.model, base.batch())
    nf4 = {"block": 64, "double": True} if method.frees_weights else None
    tensor_form.save(packed.state(0) | packed.constants(0), list(packed.adapters), tmp_path / "x", nf4)
    fresh = tiny.build(arch)
    with torch.no_grad():
        untrained = fresh.outputs(fresh.model, fresh.batch())
        assert set(tensor_form.apply_to(fresh.model, tmp_path / "x")) == set(packed.adapters)
        found = fresh.outputs(fresh.model, fresh.batch())
    tolerance = 1e-5 if nf4 else 1e-9  # four bits stand for float32 numbers
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert (untrained - expected).abs().max() > 100 * tolerance


def test_the_loader_needs_torch_and_safetensors_only(tmp_path: Path) -> None:
    """Copied out of the suite, and with nothing else to import but those two and what they need."""
    tensor_form.save(named("0", "core", T), ["0"], tmp_path / "x")
    source = (paths.REPOSITORY / "suite" / "tensor_form.py").read_text(encoding="utf-8")
    (tmp_path / "alone.py").write_text(source, encoding="utf-8")
    said = "\n".join([
        "import sys, torch", "for name in ('suite', 'transformers', 'peft', 'pydantic'): sys.modules[name] = None",
        "import alone", "print(alone.apply_to(torch.nn.Sequential(torch.nn.Linear(6, 4)), 'x'))"])
    done = subprocess.run([sys.executable, "-c", said], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['0']", done.stderr
