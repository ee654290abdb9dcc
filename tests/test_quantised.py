"""QLoRA and QDoTA: the NF4 of the paper, gradients through it, what is let go, what packs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from methods.dota import decompose, reconstruct
from methods.quantised import NF4, QuantisedLowRank, QuantisedTrain, split
from suite import bases, registry
from suite.method import Layer, Start
from tests import tiny

#: The sixteen values of NF4, appendix E of arXiv 2305.14314.
LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


def matrix(out: int = 32, into: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(out, into, generator=torch.Generator().manual_seed(seed))


def nearest(W: Tensor, block: int) -> Tensor:
    """NF4 from its definition: the level nearest to each scalar over the largest magnitude of its block."""
    filled = torch.nn.functional.pad(W.flatten(), (0, -W.numel() % block))
    blocks = filled.view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    found = LEVELS[((blocks / largest)[..., None] - LEVELS).abs().argmin(-1)] * largest
    return found.flatten()[:W.numel()].view_as(W)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", [(32, 48), (128, 256), (64, 7), (43, 7), (12, 30)])
def test_nf4_is_its_definition_whatever_the_rows(shape: tuple[int, int], block: int) -> None:
    W = matrix(*shape)
    torch.testing.assert_close(NF4(W, block, double=False).dense(torch.float32), nearest(W, block))


def test_double_quantisation_is_near_and_smaller() -> None:
    W = matrix(128, 256)
    plain, double = NF4(W, double=False), NF4(W)
    assert double.bytes() < plain.bytes() < 0.15 * W.nbytes
    lost = (double.dense(W.dtype) - plain.dense(W.dtype)).norm() / W.norm()
    assert 0 < lost < 0.02
    assert double.codes.nbytes == W.numel() // 2


def test_statistics_keep_their_type_when_the_adapter_is_widened() -> None:
    base = NF4(matrix())
    before = base.dense(torch.float64)
    base.to(torch.float64)
    assert torch.equal(base.dense(torch.float64), before)


def test_nf4_forward_and_backward_are_those_of_bitsandbytes() -> None:
    W = matrix(32, 64)
    own, theirs = NF4(W), bnb.nn.Linear4bit(64, 32, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    theirs.weight = bnb.nn.Params4bit(W.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    x = torch.randn(1, 5, 64, requires_grad=True)
    z = x.detach().clone().requires_grad_()
    torch.testing.assert_close(own(x), theirs(z))
    own(x).square().sum().backward()
    theirs(z).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_only_codes_are_held_between_forward_and_backward() -> None:
    base, x = NF4(matrix()), torch.randn(1, 5, 48, requires_grad=True)
    held: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(tuple(t.shape)) or t, lambda t: t):
        y = base(x)
    y.sum().backward()
    assert not any(shape[-2:] in ((32, 48), (48, 32)) for shape in held)
    torch.testing.assert_close(x.grad, base.dense(torch.float32).sum(0).expand_as(x))


def test_qlora_is_lora_on_the_quantised_matrix() -> None:
    method, lora = registry.method("qlora"), registry.method("lora")
    W, place = matrix(), Layer("a", 48, 32)
    starts = [Start(method.Config(rank=rank, alpha=8.0), rank) for rank in (2, 4)]
    made: Any = method.adapter(place, W, starts)
    plain: Any = lora.adapter(place, W, [Start(lora.Config(rank=s.config.rank, alpha=8.0), s.seed) for s in starts])
    assert isinstance(made, QuantisedLowRank)
    for adapter in (made.low_rank, plain):
        adapter.B.data[:, :, :2] = 0.1
    x = torch.randn(2, 5, 48)
    expected = plain(x, x @ NF4(W).dense(W.dtype).mT)
    torch.testing.assert_close(made.whole(x), expected)
    for run in range(2):
        torch.testing.assert_close(x[run] @ made.weight(run).float().mT, expected[run])
        single = made.alone(run)
        assert single.base is made.base
        torch.testing.assert_close(single.whole(x[run:run + 1]), expected[run:run + 1])
    with pytest.raises(TypeError):
        made.delta(0)


def test_qdota_starts_within_the_error_of_quantising_its_residual() -> None:
    W = matrix()
    method = registry.method("qdota")
    made: Any = method.adapter(Layer("a", 48, 32), W, [Start(method.Config(bond=4), 0)])
    assert isinstance(made, QuantisedTrain)
    residual = W - reconstruct([core[None] for core in decompose(W, 4, 3)])[0]
    lost = (NF4(residual).dense(W.dtype) - residual).norm()
    assert float((made.weight(0) - W).norm()) == pytest.approx(float(lost), rel=1e-4)
    x = torch.randn(1, 300, 48)
    torch.testing.assert_close(made.whole(x), x @ made.weight(0).mT)
    torch.testing.assert_close(made.whole(x[:, :1]), x[:, :1] @ made.weight(0).mT, rtol=1e-4, atol=1e-5)


def test_quantising_the_residual_loses_less_than_quantising_what_has_structure() -> None:
    """What MPO(T⁰) holds is held exactly: a matrix that is all structure has nothing left to lose."""
    W = torch.kron(torch.kron(matrix(2, 3), matrix(4, 4, 1)), matrix(4, 4, 2))
    config = registry.method("qdota").Config(bond=1)
    assert split(W, config)[2][0] < 1e-3 * float((NF4(W).dense(W.dtype) - W).norm())


def test_alternation_lowers_the_error_or_stops() -> None:
    config = registry.method("qdota").Config(bond=6)
    for seed in range(3):
        W = matrix(seed=seed)
        residual, cores, errors = split(W, config.model_copy(update={"rounds": 5}))
        assert errors[0] == split(W, config)[2][0]
        assert errors == sorted(set(errors), reverse=True)
        applied = residual.dense(W.dtype) + reconstruct([core[None] for core in cores])[0]
        assert float((applied - W).norm()) == pytest.approx(errors[-1])


@pytest.mark.parametrize("name", ["qlora", "qdota"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_bases_own_weights_are_let_go(name: str, arch: str, tmp_path: Path) -> None:
    method, base = registry.method(name), tiny.build(arch)
    config = method.resized(method.Config(), 2)
    starts = base.starts(method, [config, config], tmp_path)
    before = sum(bases.weight_of(m).numel() for m in bases.linear_layers(base.model).values())
    packed = base.pack(method, starts)
    assert before > 0
    assert method.spoils_base
    assert not packed.mergeable
    assert not any(wrapped.weight.numel() for wrapped in packed._wrapped.values())
    base.train(packed, [base.spec(method, config, seed) for seed in range(2)])
    batch = base.batch(2)
    with torch.no_grad():
        expected = base.outputs(packed.model, batch).chunk(2)
        for run in range(2):
            with packed.alone(run) as model:
                torch.testing.assert_close(base.outputs(model, base.batch()), expected[run])


def test_runs_share_one_quantised_base_and_nothing_else_does() -> None:
    qlora, qdota = registry.method("qlora"), registry.method("qdota")
    assert qlora.structure(qlora.Config(rank=2)) == qlora.structure(qlora.Config(rank=8, alpha=4.0))
    assert qlora.structure(qlora.Config(block=64)) != qlora.structure(qlora.Config(block=128))
    assert qdota.structure(qdota.Config(bond=2)) != qdota.structure(qdota.Config(bond=3))
