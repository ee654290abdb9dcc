"""MALoRA's unit checks: start, routing, balance, gradients, counts, and what it contains as special cases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import dispatch
from methods.malora import Asymmetric, Mixture, balance, decompose, orthonormal_a
from suite import bases, budget, registry, study
from suite.method import Adapter, Layer, Shapes, Start
from suite.specs import Budget
from tests import tiny

LAYER = Layer("block.up", 24, 20)
SHAPES = Shapes((LAYER, Layer("block.down", 20, 24)), 5000)
MOLORA, MALORA = registry.method("molora"), registry.method("malora")
SIX = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj")


def start(name: str, seed: int = 0, **facts: Any) -> Start:
    return Start(registry.method(name).Config(**facts), seed)


def built(name: str, *starts: Start) -> Any:
    """The adapter of the layer in float64."""
    adapter = registry.method(name).adapter(LAYER, torch.zeros(20, 24), starts)
    assert adapter is not None
    return adapter.double()


def stirred(name: str, **facts: Any) -> Any:
    """An adapter away from its start, so that nothing is zero and experts differ in how much they are liked."""
    adapter = built(name, start(name, **facts))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in adapter.state(0).values():
            tensor.add_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype), alpha=0.3)
    return adapter


def tokens(count: int = 9, seed: int = 2) -> Tensor:
    return torch.randn(1, count, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nothing(x: Tensor) -> Tensor:
    """W x of a layer whose weight is zero."""
    return x.new_zeros(*x.shape[:2], 20)


def outputs(adapter: Adapter, x: Tensor) -> Tensor:
    return adapter(x, nothing(x)).detach()


def by_hand(adapter: Any, x: Tensor, keep: int, renormalise: bool, scale: float) -> Tensor:
    """The equations, token by token and expert by expert."""
    rows = []
    for token in x[0]:
        g = torch.softmax(adapter.W_g[0].detach() @ token, 0)
        best = sorted(range(len(g)), key=lambda t: -float(g[t]))[:keep]
        total = sum(g[t] for t in best) if renormalise else 1.0
        y = torch.zeros(20, dtype=torch.float64)
        for t in best:
            if isinstance(adapter, Asymmetric):
                S = adapter.S[0, 0] if adapter.S.shape[1] == 1 else adapter.S[0, t]
                down = adapter.P[0, t] @ (S @ token)
            else:
                down = adapter.A[0, t] @ token
            y = y + scale * g[t] / total * (adapter.B[0, :, t] @ down)
        rows.append(y)
    return torch.stack(rows)[None].detach()


@pytest.mark.parametrize("facts", [
    {}, {"renormalise": True}, {"top_k": 8}, {"top_k": 1}, {"alpha": 5.0}, {"experts": 3},
])
@pytest.mark.parametrize("name", ["molora", "moasylora", "malora"])
def test_the_output_is_the_equations(name: str, facts: dict[str, Any]) -> None:
    adapter, x = stirred(name, rank=3, **facts), tokens()
    config = registry.method(name).Config(rank=3, **facts)
    inner = config.inner if name == "malora" else 3
    scale = facts["alpha"] / inner if "alpha" in facts else 2.0
    expected = by_hand(adapter, x, config.top_k, config.renormalise, scale)
    torch.testing.assert_close(outputs(adapter, x), expected, rtol=1e-12, atol=1e-12)


def test_experts_with_bases_of_their_own_are_the_equations() -> None:
    adapter, x = stirred("malora", rank=4, shared=False), tokens()
    assert adapter.S.shape == (1, 8, 2, 24)
    assert adapter.P.shape == (1, 8, 6, 2)
    torch.testing.assert_close(outputs(adapter, x), by_hand(adapter, x, 2, False, 2.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["molora", "moasylora", "malora", "asylora"])
def test_the_start_leaves_the_layer_bit_for_bit(name: str) -> None:
    adapter, x = built(name, start(name, rank=4)), tokens()
    y = torch.randn(1, 9, 20, dtype=torch.float64)
    assert torch.equal(adapter(x, y), y)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_basis_and_coefficients_at_the_start(beta: float) -> None:
    K = (2 * torch.rand(8, 16, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1) / 20
    S, P = decompose(K, 16, 6, beta, torch.Generator().manual_seed(1))
    close = {"rtol": 1e-11, "atol": 1e-12}
    for t in range(8):
        torch.testing.assert_close(S[t] @ S[t].mT, beta**2 * torch.eye(16, dtype=torch.float64), **close)
        torch.testing.assert_close(P[t] @ P[t].mT, (K[t] @ K[t].mT)[:6, :6] / beta**2, **close)
    torch.testing.assert_close(P[0] @ S[0], K[0, :6], **close)
    _, other = decompose(K, 16, 6, 1.0, torch.Generator().manual_seed(1))
    torch.testing.assert_close(P * beta, other, **close)  # P S does not depend on beta
    assert float(P.norm(dim=-1).mean()) == pytest.approx(1 / (beta * math.sqrt(3)), rel=0.02)


def test_experts_start_apart() -> None:
    """Equal rows of different experts are no nearer than random ones: mean |cos| is about sqrt(2 / (pi d))."""
    K = 2 * torch.rand(8, 32, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    _, P = decompose(K, 32, 12, 1.0, torch.Generator().manual_seed(1))
    rows = torch.nn.functional.normalize(P, dim=-1)
    cosines = [abs(float(rows[a, i] @ rows[b, i])) for a in range(8) for b in range(a) for i in range(12)]
    assert sum(cosines) / len(cosines) < 1.3 * math.sqrt(2 / (math.pi * 32))
    first = [abs(float(rows[a, 0] @ rows[b, 0])) for a in range(8) for b in range(a)]
    assert sum(first) / len(first) < 0.22


def test_one_basis_is_the_first_experts_and_the_seed_decides() -> None:
    a, b, c = (built("malora", start("malora", seed, rank=4)) for seed in (0, 0, 1))
    assert a.S.shape == (1, 1, 16, 24)
    assert torch.equal(a.S, b.S)
    assert torch.equal(a.P, b.P)
    assert not torch.equal(a.S, c.S)


def test_gradients_at_the_start_are_those_of_b_alone() -> None:
    adapter, x = built("malora", start("malora", rank=4, aux_coefficient=0.0)), tokens()
    (adapter(x, nothing(x)) - 1).square().sum().backward()
    assert adapter.B.grad.any()
    assert not any(getattr(adapter, name).grad.any() for name in ("S", "P", "W_g"))


@pytest.mark.parametrize("beta", [0.5, 3.0])
def test_beta_parts_the_gradients(beta: float) -> None:
    """|dL/dP| grows with beta and |dL/dS| falls with it (eq. 16)."""
    found = []
    for scale in (1.0, beta):
        adapter, x = built("malora", start("malora", rank=4, beta=scale)), tokens()
        with torch.no_grad():
            adapter.B.copy_(torch.randn(adapter.B.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
        (adapter(x, nothing(x)) - 1).square().sum().backward()
        found.append((adapter.P.grad, adapter.S.grad))
    torch.testing.assert_close(found[1][0], beta * found[0][0], rtol=1e-5, atol=1e-6)  # the start is float32
    torch.testing.assert_close(found[1][1], found[0][1] / beta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
def test_exactly_the_kept_gates_are_not_zero(renormalise: bool) -> None:
    adapter = stirred("molora", rank=2, renormalise=renormalise)
    gates = adapter.gates(tokens(200))
    assert torch.equal((gates > 0).sum(-1), torch.full((1, 200), 2))
    sums = gates.sum(-1)
    if renormalise:
        torch.testing.assert_close(sums, torch.ones_like(sums))
    else:
        assert float(sums.detach().max()) < 1


def test_the_order_of_experts_does_not_matter() -> None:
    adapter, x = stirred("malora", rank=3), tokens()
    before, order = outputs(adapter, x), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        adapter.B.copy_(adapter.B[:, :, order])
        adapter.P.copy_(adapter.P[:, order])
        adapter.W_g.copy_(adapter.W_g[:, order])
    torch.testing.assert_close(outputs(adapter, x), before, rtol=1e-12, atol=1e-13)


def test_malora_with_the_stacked_a_as_basis_is_molora() -> None:
    plain, x = stirred("molora", rank=2), tokens()
    selector = torch.eye(16, dtype=torch.float64).unflatten(0, (8, 2))[None]
    asymmetric = built("malora", start("malora", rank=2, subspace=16, expert_rank=2))
    with torch.no_grad():
        asymmetric.S.copy_(plain.A.flatten(1, 2)[:, None])
        asymmetric.P.copy_(selector)
        asymmetric.B.copy_(plain.B)
        asymmetric.W_g.copy_(plain.W_g)
    torch.testing.assert_close(outputs(asymmetric, x), outputs(plain, x), rtol=1e-12, atol=1e-13)


def test_one_expert_is_lora() -> None:
    adapter, x = stirred("malora", rank=4, experts=1, top_k=1, lambda_=1.0), tokens()
    A = adapter.P[0, 0] @ adapter.S[0, 0]
    torch.testing.assert_close(outputs(adapter, x)[0], (2.0 * x[0] @ A.mT @ adapter.B[0, :, 0].mT).detach())


@pytest.mark.parametrize("way", ["grouped", "loop", "gathered"])
@pytest.mark.parametrize("deserted", [False, True])
def test_every_dispatch_gives_the_same_outputs_and_gradients(way: str, deserted: bool) -> None:
    """Also when an expert receives no token."""
    draw = torch.Generator().manual_seed(0)
    x, S, P, B, upstream = (torch.randn(shape, generator=draw, dtype=torch.float64)
                            for shape in ((30, 24), (6, 24), (8, 3, 6), (20, 8, 3), (30, 20)))
    logits = torch.randn(30, 8, generator=draw, dtype=torch.float64)
    if deserted:
        logits[:, 5] = -50
    results = []
    for compute in (dispatch.masked, dispatch.WAYS[way]):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, S, P, B, logits)]
        g = leaves[4].softmax(-1)
        chosen = g.topk(2).indices
        g = g * torch.zeros_like(g).scatter(1, chosen, 1.0)
        out = compute(leaves[0] @ leaves[1].mT, leaves[2], leaves[3], g, chosen)
        out.backward(upstream)
        results.append([out, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-11, atol=1e-12)
    adapter = stirred("malora", rank=3)
    g = adapter.gates(x[None])[0]
    ours = 2 * dispatch.loop(x @ adapter.S[0, 0].mT, adapter.P[0], adapter.B[0], g, g.topk(2).indices)
    torch.testing.assert_close(outputs(adapter, x[None])[0], ours.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("counting", "level"), [("kept", 2.0), ("first", 1.0), ("share", 1.0)])
def test_a_balanced_router_pays_the_least(counting: str, level: float) -> None:
    """Tokens that like each pair of neighbours alike pay c · level; those that all like one pair pay more."""
    adapter = built("molora", start("molora", rank=2, aux_counting=counting, aux_coefficient=0.5))
    with torch.no_grad():
        adapter.W_g.zero_()
        adapter.W_g[0, :, :8] = 0.01 * torch.eye(8, dtype=torch.float64)
    each = torch.zeros(1, 8, 24, dtype=torch.float64)
    for t in range(8):
        each[0, t, t], each[0, t, (t + 1) % 8] = 1.0, 0.5
    adapter(each, nothing(each))
    assert float(adapter.penalty()[0]) == pytest.approx(0.5 * level, rel=1e-12)
    one = 1000 * each[:, :1].expand(1, 8, 24)
    adapter(one, nothing(one))
    assert float(adapter.penalty()[0]) > 1.5 * 0.5 * level


def test_padding_does_not_change_the_balance() -> None:
    adapter, x = stirred("molora", rank=2), tokens(12)
    adapter(x[:, :7], nothing(x[:, :7]))
    expected = adapter.penalty()
    adapter.mask = torch.arange(12)[None] < 7
    adapter(x, nothing(x))
    torch.testing.assert_close(adapter.penalty(), expected, rtol=1e-12, atol=0)
    adapter.mask = None
    adapter(x, nothing(x))
    assert not torch.allclose(adapter.penalty(), expected, rtol=1e-6)


def test_balance_of_a_uniform_router_is_one_times_what_is_counted() -> None:
    g = torch.full((1, 16, 8), 1 / 8, dtype=torch.float64)
    counted = torch.eye(8, dtype=torch.float64).repeat(2, 1)[None]
    assert float(balance(g, counted, torch.ones(1, 16, dtype=torch.float64))) == pytest.approx(1.0)


def test_the_sum_over_routers_is_as_many_means(tmp_path: Path) -> None:
    penalties = []
    for reduction in ("mean", "sum"):
        base = tiny.build("llama")
        config = MOLORA.Config(rank=2, aux_reduction=reduction)
        packed = base.pack(MOLORA, base.starts(MOLORA, [config], tmp_path))
        base.loss_of(packed)(base.batch())
        penalties.append(packed.penalty())
    assert penalties[0] is not None
    assert penalties[1] is not None
    torch.testing.assert_close(penalties[1], len(packed.adapters) * penalties[0])


@pytest.mark.parametrize(("name", "facts", "expected"), [
    ("lora", {"rank": 64}, 143_130_624),
    ("molora", {}, 151_191_552),
    ("molora", {"rank": 12}, 222_756_864),
    ("molora", {"rank": 16}, 294_322_176),
    ("malora", {}, 158_859_264),
    ("malora", {"expand": False, "lambda_": 0.34}, 109_142_016),
    ("malora", {"lambda_": 1.0}, 151_977_984),
    ("malora", {"train_shared": False, "expert_rank": 16}, 166_133_760),
    ("malora", {"train_coefficients": False}, 158_269_440),
    ("malora", {"shared": False}, 158_343_168),
    ("asylora", {"rank": 128}, 157_286_400),
    ("moasylora", {}, 165_347_328),
])
def test_counts_on_llama_2_7b(name: str, facts: dict[str, Any], expected: int) -> None:
    shapes = bases.shapes(bases.get("llama-2-7b"), registry.task("asdiv"))
    assert shapes.parameters == 6_738_415_616
    method = registry.method(name)
    assert method.trainable(method.Config(**facts, target_modules=SIX), shapes) == expected


@pytest.mark.parametrize(("lambda_", "d", "inner"), [(0.25, 16, 14), (0.5, 32, 12), (0.75, 48, 10), (1.0, 64, 8)])
def test_sizes_are_the_papers(lambda_: float, d: int, inner: int) -> None:
    config = MALORA.Config(lambda_=lambda_)
    assert (config.d, config.inner) == (d, inner)
    small = MALORA.Config(expand=False, lambda_=0.34)
    assert (small.d, small.inner) == (22, 8)


@pytest.mark.parametrize("name", ["lora", "asylora", "molora", "moasylora", "malora"])
def test_every_row_can_have_the_budget_of_molora(name: str) -> None:
    shapes = bases.shapes(bases.get("smollm2-135m"), registry.task("asdiv"))
    method = registry.method(name)
    found = budget.fit(method, method.Config(), Budget(like="molora@8"), shapes)
    wanted = MOLORA.trainable(MOLORA.Config(), shapes)
    assert method.trainable(found, shapes) == pytest.approx(wanted, rel=budget.TOLERANCE)
    if name in ("asylora", "moasylora"):  # A is not trained, so the rank about doubles
        relative = {"asylora": 64, "moasylora": 8}[name]
        assert 1.5 * relative < found.rank < 2.6 * relative


@pytest.mark.parametrize(("facts", "trained"), [
    ({}, {"S", "P", "B", "W_g"}), ({"train_shared": False}, {"P", "B", "W_g"}),
    ({"train_coefficients": False}, {"S", "B", "W_g"}),
])
def test_what_is_trained(facts: dict[str, Any], trained: set[str]) -> None:
    adapter = built("malora", start("malora", rank=4, **facts))
    assert {name for name, _ in adapter.named_parameters()} == trained == set(adapter.state(0))
    config = MALORA.Config(rank=4, **facts)
    one = Shapes((LAYER,), 0)
    assert sum(p.numel() for p in adapter.parameters()) == MALORA.trainable(config, one)


def test_frozen_factors_are_buffers_and_other_gradients_stay() -> None:
    free, frozen = stirred("malora", rank=4), stirred("malora", rank=4, train_shared=False)
    x = tokens()
    frozen.load(0, {name: tensor for name, tensor in free.state(0).items() if name != "S"})
    with torch.no_grad():
        free.S.copy_(frozen.S)
    for adapter in (free, frozen):
        (adapter(x, nothing(x)) - 1).square().sum().backward()
    assert frozen.S.grad is None
    torch.testing.assert_close(free.P.grad, frozen.P.grad)


def test_a_mixture_refuses_to_be_merged(tmp_path: Path) -> None:
    base = tiny.build("llama")
    packed = base.pack(MALORA, base.starts(MALORA, [MALORA.Config(rank=2)], tmp_path))
    assert not packed.mergeable
    with pytest.raises(TypeError, match="depends on the token"), packed.merged(0):
        pass


def test_the_same_start_of_all_experts_and_kaiming_routers() -> None:
    adapter = built("molora", start("molora", rank=3, same_start=True, router="kaiming"))
    assert all(torch.equal(adapter.A[0, 0], adapter.A[0, t]) for t in range(8))
    assert float(adapter.W_g.abs().max()) <= 1 / math.sqrt(24)
    assert float(adapter.W_g.abs().max()) > 0.9 / math.sqrt(24)
    plain = built("molora", start("molora", rank=3))
    assert not torch.equal(plain.A[0, 0], plain.A[0, 1])
    assert float(plain.W_g.std()) == pytest.approx(0.02, rel=0.2)


def test_asyloras_orthonormal_a_has_orthonormal_rows() -> None:
    A = orthonormal_a(LAYER, start("asylora", rank=5))
    torch.testing.assert_close(A @ A.mT, torch.eye(5), rtol=0, atol=1e-6)
    adapter = built("asylora", start("asylora", rank=5, start="orthonormal"))
    torch.testing.assert_close(adapter.A[0].float(), A)
    assert {name for name, _ in adapter.named_parameters()} == {"B"}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="top_k 3 is larger than experts 2"):
        MOLORA.Config(experts=2, top_k=3)
    with pytest.raises(ValueError, match=r"block\.up with 24 inputs"):
        MALORA.check(MALORA.Config(rank=8), SHAPES)
    with pytest.raises(ValueError, match=r"block\.down with 20 inputs"):
        MALORA.check(MALORA.Config(rank=6, subspace=22), SHAPES)
    MALORA.check(MALORA.Config(rank=5), SHAPES)


def test_the_mask_is_a_mixtures_only_look_at_padding() -> None:
    adapter: Mixture = stirred("molora", rank=2)
    x = tokens(6)
    before = outputs(adapter, x)
    adapter.mask = torch.arange(6)[None] < 3
    assert torch.equal(outputs(adapter, x), before)


def test_the_study_has_the_papers_sizes_at_its_own_scale_and_equal_budgets_at_desk() -> None:
    malora = study.load("malora")
    paper = {cell.row: registry.method(cell.spec.method.id).Config.model_validate(cell.spec.method.config)
             for cell in study.cells(malora, "paper")}
    assert {row: config.rank for row, config in paper.items()} == {"lora": 64, "asylora": 128, "molora": 8, "moasylora": 16,
                                                                   "malora": 8}
    assert (paper["malora"].d, paper["malora"].inner, paper["malora"].beta, paper["malora"].scale) == (32, 12, 1.25, 2.0)
    for table in malora.scales["desk"].tables:
        counts = []
        for cell in study.cells(malora, "desk", [f"table={table}"]):
            method = registry.method(cell.spec.method.id)
            shapes = bases.shapes(bases.get(cell.spec.base.id), registry.task(cell.spec.task.id))
            counts.append(method.trainable(method.Config.model_validate(cell.spec.method.config), shapes))
        assert max(counts) < 1.05 * min(counts)
