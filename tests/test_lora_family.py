"""LoRA-FA, PiSSA, OLoRA, LoRA-GA, DoRA and AdaLoRA against stock peft, torch and their equations, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import preprocess_loraga
from torch import Tensor

from methods.adalora import AdaLoRA, SVDForm
from methods.dora import Decomposed, DoRA
from methods.lora import Factors
from methods.lora_fa import FrozenA, LoRAFA
from methods.lora_ga import LoRAGA
from methods.olora import OLoRA
from methods.pissa import Departing, PiSSA, leading
from suite import registry
from suite.batches import Batch, collate, training_order
from suite.method import GradientRequest, Layer, Shapes, Start
from suite.packing import Packed
from suite.specs import RunSpec
from suite.training import train
from tests import stock, tiny

ARCHS = ["bert", "llama"]
DEPARTING = ["pissa", "olora", "lora-ga"]
EXPORTED = ["lora-fa", *DEPARTING, "adalora"]
FACTS: dict[str, dict[str, Any]] = {"lora-ga": {"batches": 2}}
LAYER = Layer("block.q", 12, 8)


def run(name: str, arch: str, folder: Path, **facts: Any) -> tuple[tiny.Tiny, Any, Start, Packed]:
    """One run attached to a fresh base."""
    base, method = tiny.build(arch), registry.method(name)
    config = method.Config(**({"rank": 3, "alpha": 7.0} | FACTS.get(name, {}) | facts))
    start = base.starts(method, [config], folder)[0]
    return base, method, start, base.pack(method, [start])


def stir(packed: Packed) -> dict[str, Tensor]:
    """Every trained tensor moved at random, in place, so that nothing is zero."""
    draw, state = torch.Generator().manual_seed(3), packed.state(0)
    for tensor in state.values():
        tensor.add_(torch.randn(tensor.shape, generator=draw, dtype=tensor.dtype), alpha=0.1)
    return state


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(found: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=atol)


def onto_rows(A: Tensor) -> Tensor:
    """The orthogonal projection on the rows of A."""
    return torch.linalg.pinv(A) @ A


def gradient_of(base: tiny.Tiny, request: GradientRequest) -> dict[str, Tensor]:
    """The mean gradient of every layer's weight over the request's batches, by plain autograd."""
    weights = {x.name: base.model.get_submodule(x.name).weight.requires_grad_(True) for x in base.shapes.layers}
    loss = torch.stack(list(base.losses(request))).mean()
    found = torch.autograd.grad(loss, list(weights.values()))
    base.model.requires_grad_(False)
    return dict(zip(weights, found, strict=True))


# The same layer in peft, and AdamW steps on it ------------------------------------------------------------------------


def as_lora(packed: Packed, method: Any, start: Start, base: tiny.Tiny) -> tiny.Tiny:
    """The run's present A and B in stock peft: what departs from its start on `W - s B₀ A₀`, as the papers write it."""
    config, state = start.config, {k: v.clone() for k, v in packed.state(0).items()}
    if method.id == "lora-fa":
        state |= {f"{name}.A": cast(FrozenA, a).A[0].clone() for name, a in packed.adapters.items()}
    fields = {"r": config.rank, "lora_alpha": method.scale(config, config.rank) * config.rank,
              "target_modules": [x.name for x in config.targets(base.shapes)], "use_dora": method.id == "dora"}
    theirs = stock.attach(base.arch, fields, state)
    for name, adapter in packed.adapters.items():
        if isinstance(adapter, Departing):
            s = method.scale(config, config.rank)
            theirs.model.get_submodule(name).base_layer.weight.data -= s * (adapter.B0[0] @ adapter.A0[0])
    return theirs


def recipe(base: tiny.Tiny, method: Any, start: Start, epochs: int = 1, weight_decay: float = 0.02) -> RunSpec:
    return base.spec(method, start.config, learning_rate=5e-3, batch_size=3, epochs=epochs, schedule="constant",
                     warmup_ratio=0, clip=None, weight_decay=weight_decay)


def steps(theirs: tiny.Tiny, spec: RunSpec, trained: Mapping[str, Tensor], adamw: torch.optim.Optimizer | None = None,
          penalty: Callable[[], Tensor] | None = None, after: Callable[[int], Any] = lambda t: None) -> list[Tensor]:
    """Train what is given (a task head with it) by torch's AdamW on the spec's batches; returns the losses."""
    head, facts = theirs.head(), spec.recipe
    heads = [] if head is None else list(head.parameters())
    settings: dict[str, Any] = {"lr": facts.learning_rate, "eps": facts.epsilon, "weight_decay": facts.weight_decay}
    ours = torch.optim.AdamW(heads if adamw else [*trained.values(), *heads], **settings) if heads or not adamw else None
    losses = []
    for t, indices in enumerate(training_order(theirs.data, facts.batch_size, facts.epochs, spec.seed), start=1):
        theirs.model.zero_grad()
        if head is not None:
            head.zero_grad()
        loss = theirs.loss(theirs.model, head, 1)(collate(theirs.data, [indices], tiny.CPU)).sum()
        losses.append(loss.detach())
        (loss if penalty is None else loss + penalty()).backward()
        for optimiser in (ours, adamw):
            if optimiser is not None:
                optimiser.step()
        after(t)
    return losses


def same_training(packed: Packed, base: tiny.Tiny, spec: RunSpec, losses: list[Tensor], trained: Mapping[str, Tensor],
                  atol: float = 1e-11) -> None:
    """Our run from the same start has the same losses and ends at the same tensors."""
    found = base.train(packed, [spec])
    assert len(losses) >= 5
    same(found.losses[:, 0], torch.stack(losses), atol)
    state = {key: tensor for key, tensor in packed.state(0).items() if not key.startswith("head.")}
    assert set(state) == set(trained)
    for key, tensor in state.items():
        same(tensor, trained[key].reshape(tensor.shape), atol)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["lora-fa", "dora", *DEPARTING])
def test_outputs_and_gradients_are_pefts(name: str, arch: str, tmp_path: Path) -> None:
    base, method, start, packed = run(name, arch, tmp_path)
    stir(packed)
    theirs, batch = as_lora(packed, method, start, base), base.batch()
    with torch.no_grad():
        same(base.outputs(base.model, batch), theirs.outputs(theirs.model, batch))
    base.loss_of(packed)(batch).sum().backward()
    theirs.loss(theirs.model, packed.head, 1)(batch).sum().backward()
    expected = stock.parameters(theirs)
    for layer, adapter in packed.adapters.items():
        for key, parameter in adapter.named_parameters():
            assert parameter.grad is not None
            assert parameter.grad.any()
            same(parameter.grad[0], cast(Tensor, expected[f"{layer}.{key}"].grad))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["lora-fa", "dora", *DEPARTING])
def test_five_steps_are_those_of_peft_and_torch(name: str, arch: str, tmp_path: Path) -> None:
    base, method, start, packed = run(name, arch, tmp_path)
    theirs, spec = as_lora(packed, method, start, base), recipe(base, method, start)
    factors = {key: tensor for key, tensor in stock.parameters(theirs).items() if key in packed.state(0)}
    same_training(packed, base, spec, steps(theirs, spec, factors), factors)


@pytest.mark.parametrize("arch", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("name", EXPORTED)
def test_the_exported_lora_is_the_trained_run_on_the_untouched_base(name: str, arch: str, tmp_path: Path) -> None:
    base, method, start, packed = run(name, arch, tmp_path)
    stir(packed)
    factors = {}
    for layer, adapter in packed.adapters.items():
        found = adapter.factors(0)
        assert found is not None
        factors |= {f"{layer}.A": found[0], f"{layer}.B": found[1]}
    theirs = stock.attach(arch, method.peft_config(start.config, base.shapes, start.prepared), factors)
    with torch.no_grad():
        same(base.outputs(base.model, base.batch()), theirs.outputs(theirs.model, base.batch()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["lora-fa", "dora", "adalora", *DEPARTING])
def test_the_start_is_the_base_to_the_last_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, method = tiny.build("llama", dtype), registry.method(name)
    starts = base.starts(method, [method.Config(rank=3, **FACTS.get(name, {}))], tmp_path)
    with torch.no_grad():
        expected = base.outputs(base.model, base.batch())
        base.pack(method, starts)
        assert torch.equal(base.outputs(base.model, base.batch()), expected)


# LoRA-FA --------------------------------------------------------------------------------------------------------------


def one_layer(projected: bool, A: Tensor, B: Tensor, scale: float) -> tuple[FrozenA, Tensor, Tensor]:
    """A layer with a gradient: the adapter, the gradient of B, and that of W."""
    adapter = FrozenA([Factors(A, B, scale)], [projected]).double()
    x, weights = randn(1, 5, A.shape[1], seed=1), randn(1, 5, B.shape[0], seed=2)
    (adapter(x, torch.zeros(1, 5, B.shape[0], dtype=torch.float64)) * weights).sum().backward()
    assert adapter.B.grad is not None
    return adapter, adapter.B.grad[0], weights[0].mT @ x[0]


def test_lora_fa_trains_b_alone_and_a_stays_as_the_seed_gives_it(tmp_path: Path) -> None:
    base, method, start, packed = run("lora-fa", "llama", tmp_path)
    base.train(packed, [recipe(base, method, start)])
    layer = base.shapes.layers[0]
    adapter = cast(FrozenA, packed.adapters[layer.name])
    assert torch.equal(adapter.A[0], registry.method("lora").start(layer, start).A.double())  # type: ignore[attr-defined]
    assert list(packed.state(0)) == [f"{x.name}.B" for x in base.shapes.layers]
    assert method.trainable(LoRAFA.Config(rank=5), Shapes((LAYER,), 0)) == 5 * 8


def test_the_plain_gradient_of_lora_fa_is_loras() -> None:
    A, B = randn(3, 12), randn(8, 3)
    _, gradient, G = one_layer(False, A, B, 2.5)
    same(gradient, 2.5 * G @ A.mT)


def test_the_corrected_gradient_of_lora_fa_makes_the_step_a_projection() -> None:
    A, B, s = randn(3, 12), randn(8, 3), 2.5
    _, gradient, G = one_layer(True, A, B, s)
    same(s * gradient @ A, G @ onto_rows(A))
    same(s * gradient @ A @ onto_rows(A), s * gradient @ A)
    Q = torch.linalg.qr(A.mT).Q.mT  # orthonormal rows
    _, plain, _ = one_layer(False, Q, B, s)
    _, corrected, _ = one_layer(True, Q, B, s)
    same(corrected, plain / s**2)


def test_lora_fa_keeps_no_activation_of_the_inputs_width() -> None:
    kept: list[torch.Size] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    for name, expected in (("lora-fa", False), ("lora", True)):
        adapter = registry.method(name).adapter(LAYER, torch.zeros(8, 12), [Start(LoRAFA.Config(rank=3), 0)])
        assert adapter is not None
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            adapter(torch.ones(1, 7, 12), torch.ones(1, 7, 8)).sum()
        assert kept
        assert (torch.Size([1, 7, 12]) in kept) is expected


@pytest.mark.parametrize("arch", ARCHS)
def test_corrected_lora_fa_takes_the_steps_of_pefts_optimiser(arch: str, tmp_path: Path) -> None:
    base, method, start, packed = run("lora-fa", arch, tmp_path, projected=True)
    spec = recipe(base, method, start, weight_decay=0)
    theirs, names = tiny.build(arch), [x.name for x in base.shapes.layers]
    wrapped = get_peft_model(theirs.model, LoraConfig(r=3, lora_alpha=7, target_modules=names))
    optimiser = create_lorafa_optimizer(wrapped, r=3, lora_alpha=7, lr=5e-3)
    factors = stock.parameters(theirs)
    for name in names:
        factors.pop(f"{name}.A").data.copy_(cast(FrozenA, packed.adapters[name]).A[0])

    def as_adamw(t: int) -> None:
        """peft's optimiser adds epsilon before it corrects the bias of the second moment, torch's after it."""
        optimiser.param_groups[0]["eps"] = spec.recipe.epsilon * (1 - spec.recipe.beta2 ** (t + 1)) ** 0.5

    as_adamw(0)
    losses = steps(theirs, spec, factors, optimiser, after=as_adamw)
    same_training(packed, base, spec, losses, factors, atol=1e-7)  # peft adds 1e-8 to the diagonal of A Aᵀ


# PiSSA, OLoRA and LoRA-GA: away from where they began -----------------------------------------------------------------


def weight_of(base: tiny.Tiny, name: str) -> Tensor:
    return base.model.get_submodule(name).weight


def departing(packed: Packed) -> dict[str, Departing]:
    return {name: cast(Departing, adapter) for name, adapter in packed.adapters.items()}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_the_start_is_that_of_pefts_own_initialisation(name: str, arch: str, tmp_path: Path) -> None:
    base, _, _, packed = run(name, arch, tmp_path)
    theirs = tiny.build(arch, torch.float32)  # peft decomposes nothing wider
    get_peft_model(theirs.model, LoraConfig(r=3, lora_alpha=7, init_lora_weights=cast(Any, name),
                                            target_modules=[x.name for x in base.shapes.layers]))
    for layer, adapter in departing(packed).items():
        found = theirs.model.get_submodule(layer)
        A, B = found.lora_A["default"].weight.double(), found.lora_B["default"].weight.double()
        torch.testing.assert_close(adapter.B0[0] @ adapter.A0[0], B @ A, rtol=1e-4, atol=1e-5)
        W = weight_of(tiny.build(arch), layer)
        torch.testing.assert_close(W - 7 / 3 * adapter.B0[0] @ adapter.A0[0], found.base_layer.weight.double(),
                                   rtol=1e-4, atol=1e-5)


def test_pissas_residual_is_w_without_its_largest_singular_values(tmp_path: Path) -> None:
    base, _, _, packed = run("pissa", "llama", tmp_path)
    for layer, adapter in departing(packed).items():
        W = weight_of(tiny.build("llama"), layer)
        S = torch.linalg.svdvals(W)
        residual = W - 7 / 3 * adapter.B0[0] @ adapter.A0[0]
        same(torch.linalg.svdvals(residual), torch.cat([S[3:], S.new_zeros(3)]))
        same(torch.linalg.svdvals(7 / 3 * adapter.B0[0] @ adapter.A0[0])[:3], S[:3])
        same((adapter.A0[0] @ adapter.A0[0].mT), torch.diag(S[:3] / (7 / 3)))  # half of the magnitude in each
        same((adapter.B0[0].mT @ adapter.B0[0]), torch.diag(S[:3] / (7 / 3)))
    assert base.shapes.layers


def test_pissa_of_full_rank_begins_as_w() -> None:
    W = randn(8, 12)
    adapter = registry.method("pissa").adapter(LAYER, W, [Start(PiSSA.Config(rank=8), 0)])
    assert isinstance(adapter, Departing)
    assert float(adapter.scale) == 1.0
    same(adapter.B0[0] @ adapter.A0[0], W)


def test_signs_of_singular_vectors_do_not_matter(tmp_path: Path) -> None:
    deltas = []
    for sign in (1.0, -1.0):
        base, method, start, packed = run("pissa", "llama", tmp_path)
        with torch.no_grad():
            for adapter in departing(packed).values():
                for tensor in (adapter.A[:, 1], adapter.A0[:, 1], adapter.B[..., 1], adapter.B0[..., 1]):
                    tensor.mul_(sign)
        base.train(packed, [recipe(base, method, start)])
        deltas.append([adapter.delta(0) for adapter in packed.adapters.values()])
    for one, other in zip(*deltas, strict=True):
        assert one.any()
        same(one, other)


def test_a_randomised_decomposition_is_near_the_exact_one_and_the_same_for_every_seed() -> None:
    W = randn(60, 40) + 4 * randn(60, 5, seed=1) @ randn(5, 40, seed=2)
    layer, method = Layer("block.q", 40, 60), registry.method("pissa")

    def start(iterations: int | None, seed: int) -> Departing:
        config = PiSSA.Config(rank=4, iterations=iterations)
        return cast(Departing, method.adapter(layer, W, [Start(config, seed)]))

    exact, randomised = start(None, 0), start(16, 0)
    torch.testing.assert_close(randomised.B0[0] @ randomised.A0[0], exact.B0[0] @ exact.A0[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(start(16, 5).A0, randomised.A0)
    assert torch.equal(start(None, 5).A0, exact.A0)
    U, S, Vh = leading(W, 4, 16, layer)
    same(U.mT @ U, torch.eye(4).double())
    same(Vh @ Vh.mT, torch.eye(4).double())
    torch.testing.assert_close(S, torch.linalg.svdvals(W)[:4])


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_olora_begins_on_the_first_columns_of_w(shape: tuple[int, int]) -> None:
    W, layer = randn(*shape), Layer("block.q", shape[1], shape[0])
    adapter = registry.method("olora").adapter(layer, W, [Start(OLoRA.Config(rank=3, alpha=3), 0)])
    assert isinstance(adapter, Departing)
    A, B = adapter.A0[0], adapter.B0[0]
    same(B.mT @ B, torch.eye(3).double())
    same((B @ A)[:, :3], W[:, :3])
    assert not (B @ A)[:, 3:].allclose(W[:, 3:])
    assert torch.equal(A, A.triu())
    Q, R = torch.linalg.qr(W)
    same(B @ A, Q[:, :3] @ R[:3])


# LoRA-GA --------------------------------------------------------------------------------------------------------------

EXACT = {"iterations": None, "batches": 1, "batch_size": 5}
REQUEST = LoRAGA.Config(**EXACT).request


def test_lora_gas_factors_are_orthogonal_of_length_root_m_over_gamma(tmp_path: Path) -> None:
    for gamma, iterations in ((16.0, 4), (64.0, None)):
        _, _, _, packed = run("lora-ga", "llama", tmp_path, gamma=gamma, iterations=iterations)
        for adapter in departing(packed).values():
            A, B = adapter.A0[0], adapter.B0[0]
            expected = B.shape[0] ** 0.5 / gamma * torch.eye(3, dtype=torch.float64)
            same(A @ A.mT, expected)
            same(B.mT @ B, expected)


@pytest.mark.parametrize("arch", ARCHS)
def test_lora_gas_factors_take_disjoint_singular_vectors_of_the_gradient(arch: str, tmp_path: Path) -> None:
    base, _, start, packed = run("lora-ga", arch, tmp_path, **EXACT)
    for name, adapter in departing(packed).items():
        G = start.prepared[name].double()
        A, B = adapter.A0[0], adapter.B0[0]
        U, _, Vh = torch.linalg.svd(G)
        same(B.mT @ G @ A.mT / G.norm(), torch.zeros(3, 3).double())
        same(onto_rows(A), onto_rows(Vh[:3]))
        same(onto_rows(B.mT), onto_rows(U[:, 3:6].mT))
    assert base.shapes.layers


@pytest.mark.parametrize("arch", ARCHS)
def test_the_first_gradients_of_lora_ga_cover_2r_directions(arch: str, tmp_path: Path) -> None:
    base, method, start, packed = run("lora-ga", arch, tmp_path, **EXACT)
    batch = next(base.batches(REQUEST))
    base.loss_of(packed)(batch).sum().backward()
    s = method.scale(start.config, 3)
    assert s == pytest.approx(7 / 3**0.5)
    for name, G in gradient_of(tiny.build(arch), REQUEST).items():
        adapter = departing(packed)[name]
        A, B = adapter.A0[0], adapter.B0[0]
        of_A, of_B = cast(Tensor, adapter.A.grad)[0], cast(Tensor, adapter.B.grad)[0]
        size = float(G.norm())
        torch.testing.assert_close(of_B, s * G @ A.mT, rtol=1e-6, atol=1e-7 * size)
        torch.testing.assert_close(of_A, s * B.mT @ G, rtol=1e-6, atol=1e-7 * size)
        U, S, Vh = torch.linalg.svd(G)
        if S[5] < 1e-3 * S[0]:  # the directions of a gradient of smaller rank are anyone's
            continue
        near = 1e-3  # the stored gradient is in float32
        same(onto_rows(of_B.mT), onto_rows(U[:, :3].mT), near)
        same(onto_rows(of_A), onto_rows(Vh[3:6]), near)
        step = of_B @ A + B @ of_A
        assert int(torch.linalg.matrix_rank(step, rtol=1e-6)) == 6
        same(onto_rows(step.mT), onto_rows(U[:, :6].mT), near)


def test_lora_ga_needs_two_singular_vectors_per_rank() -> None:
    shapes = Shapes((LAYER, Layer("block.k", 8, 7)), 500)
    registry.method("lora-ga").check(LoRAGA.Config(rank=3), shapes)
    with pytest.raises(ValueError, match=r"rank 4: .* of layer block\.k \(7 x 8\); use at most 3"):
        registry.method("lora-ga").check(LoRAGA.Config(rank=4), shapes)


@pytest.mark.parametrize("scale", ["stable", "unit", "gd", "weightS"])
@pytest.mark.parametrize(("directions", "of_A", "of_B"), [
    ("ArB2r", [0, 1], [2, 3]), ("A2rBr", [2, 3], [0, 1]), ("ArBr", [1, 3], [0, 2])])
def test_lora_gas_options(directions: str, of_A: list[int], of_B: list[int], scale: str) -> None:
    W, G = randn(8, 12), randn(8, 12, seed=1)
    config = LoRAGA.Config(rank=2, alpha=4, iterations=None, directions=directions, scale=scale)
    adapter = registry.method("lora-ga").adapter(LAYER, W, [Start(config, 0, {"block.q": G})])
    assert isinstance(adapter, Departing)
    s = 4 / 2**0.5
    c = {"stable": 8**0.25 / 4, "unit": 1.0, "gd": 1 / s,
         "weightS": float((torch.linalg.svdvals(W)[:2] / s).sqrt().mean())}[scale]
    U, _, Vh = torch.linalg.svd(G)
    same(adapter.A0[0].abs(), c * Vh[of_A].abs())
    same(adapter.B0[0].abs(), c * U[:, of_B].abs())


@pytest.mark.parametrize("directions", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_takes_the_directions_that_peft_takes(directions: str, tmp_path: Path) -> None:
    """peft scales them otherwise: B, and B alone, by singular values."""
    base, _, _, packed = run("lora-ga", "llama", tmp_path, **EXACT, directions=directions)
    theirs = tiny.build("llama")
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, init_lora_weights=cast(Any, "lora_ga"),
                        target_modules=[x.name for x in base.shapes.layers],
                        lora_ga_config=LoraGAConfig(direction=cast(Any, directions), scale="stable"))

    def train_step() -> None:
        sum(theirs.losses(REQUEST), torch.zeros(())).backward()

    preprocess_loraga(theirs.model, config, train_step)
    get_peft_model(theirs.model, config)
    for name, adapter in departing(packed).items():
        found = theirs.model.get_submodule(name)
        A, B = found.lora_A["default"].weight.double(), found.lora_B["default"].weight.double()
        same(onto_rows(adapter.A0[0]), onto_rows(A), atol=1e-3)
        same(onto_rows(adapter.B0[0].mT), onto_rows(B.mT), atol=1e-3)


# DoRA -----------------------------------------------------------------------------------------------------------------


def test_doras_norms_are_those_of_the_dense_matrix_in_a_padded_pack() -> None:
    W = randn(8, 12)
    factors = [Factors(randn(r, 12, seed=r), randn(8, r, seed=9 + r), 0.5 * r) for r in (2, 4)]
    adapter = Decomposed(factors, W).double()
    for norms, f in zip(adapter.norms(), factors, strict=True):
        same(norms, (W + f.scale * f.B @ f.A).norm(dim=1))


def test_dora_by_its_equation_and_no_gradient_through_the_norm() -> None:
    W, f = randn(8, 12), Factors(randn(3, 12, seed=1), randn(8, 3, seed=2), 1.5)
    adapter = Decomposed([f], W).double()
    x, weights = randn(1, 5, 12, seed=3), randn(5, 8, seed=4)
    y = x @ W.mT
    same(adapter.magnitude[0], W.norm(dim=1))
    (adapter(x, y)[0] * weights).sum().backward()

    A, B, mu = f.A.clone().requires_grad_(), f.B.clone().requires_grad_(), W.norm(dim=1).requires_grad_()
    direction = W + f.scale * B @ A
    V = mu[:, None] * direction / direction.norm(dim=1, keepdim=True).detach()
    same(adapter(x, y)[0], x[0] @ V.mT)
    same(adapter.delta(0), V - W)
    (x[0] @ V.mT * weights).sum().backward()
    for found, expected in ((adapter.A, A), (adapter.B, B), (adapter.magnitude, mu)):
        same(cast(Tensor, found.grad)[0], cast(Tensor, expected.grad))

    before = adapter(x, y)
    adapter.magnitude.data *= 3
    same(adapter(x, y), 3 * before)


def test_dora_leaves_a_row_of_zeros_as_it_is() -> None:
    W = randn(8, 12)
    W[5] = 0
    adapter = registry.method("dora").adapter(LAYER, W, [Start(DoRA.Config(rank=3), 0)])
    assert adapter is not None
    x = randn(1, 5, 12, seed=3)
    found = adapter.double()(x, x @ W.mT)
    assert torch.equal(found, x @ W.mT)
    found.square().sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in adapter.parameters())  # type: ignore[union-attr]


def test_dora_counts_a_length_per_output_and_scales_by_two() -> None:
    method = registry.method("dora")
    assert method.trainable(DoRA.Config(rank=3), Shapes((LAYER,), 0)) == 3 * (12 + 8) + 8
    adapter = method.adapter(LAYER, randn(8, 12), [Start(DoRA.Config(rank=3), 0)])
    assert isinstance(adapter, Decomposed)
    assert float(adapter.scale) == 2.0


# AdaLoRA --------------------------------------------------------------------------------------------------------------

ADA = {"rank": 4, "alpha": 8.0, "target": 2.0, "gamma": 0.3}
OURS = {"lora_A": "Q", "lora_B": "P", "lora_E": "values"}


def adalora_of_peft(packed: Packed, base: tiny.Tiny, config: AdaLoRA.Config, total: int) -> tuple[tiny.Tiny, Any]:
    """peft's AdaLoRA with the same start; it divides alpha by rank + 1e-5."""
    theirs = tiny.build(base.arch)
    fields = AdaLoraConfig(init_r=config.rank, target_r=round(config.final_rank), tinit=config.first(total),
                           tfinal=total - config.last(total), deltaT=config.every(total), beta1=config.beta1,
                           beta2=config.beta2, orth_reg_weight=config.gamma or 0.5, total_step=total, lora_dropout=0.0,
                           lora_alpha=cast(Any, config.alpha / config.rank * (config.rank + 1e-5)),
                           target_modules=[x.name for x in base.shapes.layers])
    wrapped = get_peft_model(theirs.model, fields)
    state = packed.state(0)
    with torch.no_grad():
        for key, tensor in triples(theirs).items():
            tensor.copy_(state[key].reshape(tensor.shape))
    return theirs, wrapped


def triples(theirs: tiny.Tiny) -> dict[str, Tensor]:
    """peft's P, Q and lambda by our names."""
    found = {}
    for name, parameter in theirs.model.named_parameters():
        layer, _, kind = name.removesuffix(".default").rpartition(".")
        if kind in OURS:
            found[f"{layer}.{OURS[kind]}"] = parameter
    return found


def test_adaloras_outputs_gradients_and_penalty_are_pefts(tmp_path: Path) -> None:
    base, _, start, packed = run("adalora", "llama", tmp_path, **ADA)
    stir(packed)
    theirs, wrapped = adalora_of_peft(packed, base, start.config, 10)
    batch = base.batch()
    with torch.no_grad():
        same(base.outputs(base.model, batch), theirs.outputs(theirs.model, batch))
    base.loss_of(packed)(batch).sum().backward()
    theirs.loss(theirs.model, None, 1)(batch).sum().backward()
    for key, tensor in triples(theirs).items():
        layer, _, name = key.rpartition(".")
        found = cast(Tensor, packed.adapters[layer].get_parameter(name).grad)[0]
        same(found, cast(Tensor, tensor.grad).reshape(found.shape))
    penalty, nothing = packed.penalty(), SimpleNamespace(loss=torch.zeros((), dtype=torch.float64))
    assert penalty is not None
    theirs.model.forward = lambda: nothing  # peft adds its penalty to the loss of the model's output
    same(penalty[0], wrapped.base_model().loss)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("interval", "gamma"), [(None, 0.3), (3, 0.0)])
def test_adaloras_steps_and_cuts_are_pefts(interval: int | None, gamma: float, arch: str, tmp_path: Path) -> None:
    base, method, start, packed = run("adalora", arch, tmp_path, **ADA | {"interval": interval, "gamma": gamma})
    spec, total = recipe(base, method, start, epochs=3), 15
    theirs, wrapped = adalora_of_peft(packed, base, start.config, total)
    trained = triples(theirs)

    def penalty() -> Tensor:
        grams = [p.mT @ p for key, p in trained.items() if key.endswith(".P")]
        grams += [q @ q.mT for key, q in trained.items() if key.endswith(".Q")]
        return gamma * torch.stack([(gram - torch.eye(len(gram)).double()).norm() for gram in grams]).mean()

    losses = steps(theirs, spec, trained, penalty=penalty, after=wrapped.base_model.update_and_allocate)
    assert len(losses) == total
    same_training(packed, base, spec, losses, trained, atol=1e-10)
    values = torch.cat([tensor for key, tensor in packed.state(0).items() if key.endswith(".values")])
    assert int((values != 0).sum()) == 2 * len(base.shapes.layers)


def test_adalora_without_cuts_and_penalty_is_an_svd_form_lora(tmp_path: Path) -> None:
    base, method, start, packed = run("adalora", "llama", tmp_path, **ADA | {"target": 4.0, "gamma": 0.0})
    theirs, _ = adalora_of_peft(packed, base, start.config, 5)
    spec, trained = recipe(base, method, start), triples(theirs)
    same_training(packed, base, spec, steps(theirs, spec, trained), trained)


@pytest.mark.parametrize("total", [1, 2, 7, 20, 1000])
def test_adaloras_budget_falls_from_all_to_the_target(total: int) -> None:
    config = AdaLoRA.Config(rank=12, target=8)
    first, last = config.first(total), config.last(total)
    shares = [config.remaining(t, total) for t in range(total + 1)]
    assert shares[first] == 1
    assert shares[last] == 0
    assert all(a >= b for a, b in itertools.pairwise(shares))
    middle = (first + last) / 2
    if middle.is_integer():
        assert shares[int(middle)] == pytest.approx(1 / 8)
    assert first <= total / 10
    assert total - last <= 0.3 * total


def test_every_cut_keeps_the_budget_of_its_run_and_the_last_one_stays(tmp_path: Path) -> None:
    base, method = tiny.build("llama"), registry.method("adalora")
    configs = [AdaLoRA.Config(rank=4, target=1.5), AdaLoRA.Config(rank=6), AdaLoRA.Config(rank=3, target=3)]
    starts = base.starts(method, configs, tmp_path)
    packed = base.pack(method, starts)
    layers, total, seen = len(base.shapes.layers), 20, []
    stepped = packed.stepped

    def watch(step: int, steps: int) -> None:
        assert steps == total
        stepped(step, steps)
        seen.append(torch.stack([cast(SVDForm, adapter).values.detach() != 0 for adapter in packed.adapters.values()]))

    packed.stepped = watch  # type: ignore[method-assign]
    base.train(packed, [base.spec(method, c, seed=i, batch_size=3, epochs=4) for i, c in enumerate(configs)])
    schedule = configs[0]
    for t, alive in enumerate(seen, start=1):
        for at, config in enumerate(configs):
            start, end = layers * config.rank, round(layers * config.final_rank)
            budget = int(end + (start - end) * schedule.remaining(t, total))
            assert int(alive[:, at].sum()) == budget
            assert not alive[:, at, config.rank:].any()
        if t > schedule.last(total):
            assert torch.equal(alive, seen[schedule.last(total) - 1])
    assert not torch.equal(seen[5], seen[-1])
    assert len({int(n) for n in seen[-1][:, 0].sum(-1)}) > 1  # the budget has moved between layers


def test_a_stopped_run_of_adalora_is_not_cut_and_its_neighbour_is(tmp_path: Path) -> None:
    base, method = tiny.build("llama"), registry.method("adalora")
    configs = [AdaLoRA.Config(rank=4), AdaLoRA.Config(rank=4)]
    packed = base.pack(method, base.starts(method, configs, tmp_path))
    with torch.no_grad():
        for adapter in packed.adapters.values():
            cast(SVDForm, adapter).values.fill_(0.5)
    loss_of = base.loss_of(packed)

    def spoilt(batch: Batch) -> Tensor:
        return loss_of(batch) * torch.tensor([torch.nan, 1.0], dtype=torch.float64)

    trained = train(packed, [base.spec(method, c, seed=i) for i, c in enumerate(configs)], base.data, spoilt,
                    lambda done, total: None)
    assert trained.alive == [False, True]
    values = torch.stack([cast(SVDForm, adapter).values for adapter in packed.adapters.values()])
    assert (values[:, 0] == 0.5).all()
    assert not values[:, 1].all()


def test_adalora_counts_what_it_begins_with_and_refuses_a_schedule_that_cannot_be() -> None:
    method = registry.method("adalora")
    assert method.trainable(AdaLoRA.Config(rank=12), Shapes((LAYER,), 0)) == 12 * (12 + 8 + 1)
    assert AdaLoRA.Config().final_rank == 8
    with pytest.raises(ValueError, match="target 5 is larger than rank 4"):
        AdaLoRA.Config(rank=4, target=5)
    with pytest.raises(ValueError, match="leave no step"):
        AdaLoRA.Config(warm_share=0.6, final_share=0.4)
