"""Losses of tokens: in chunks as at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from methods.lora import LoRA
from suite import objectives, registry
from suite.method import Start
from tests import tiny

TOKENS, WIDTH, VOCABULARY = 11, 6, 20


def drawn(dtype: torch.dtype, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    return head.to(dtype), hidden, torch.randint(VOCABULARY, (TOKENS,), generator=draw)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 10])
def test_chunks_give_the_losses_and_gradients_of_all_tokens_at_once(bias: bool, trained: bool, rows: int,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = drawn(torch.float64, bias)
    head.requires_grad_(trained)
    weights = torch.linspace(0.1, 2, TOKENS, dtype=torch.float64)  # every token counts differently
    wanted = [hidden, *head.parameters()] if trained else [hidden]
    expected = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    expected_gradients = torch.autograd.grad((expected * weights).sum(), wanted)

    seen: list[int] = []
    head.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))
    monkeypatch.setattr(objectives, "CHUNK", rows * VOCABULARY)
    found = objectives.token_losses(head, hidden, targets)
    gradients = torch.autograd.grad((found * weights).sum(), wanted)
    assert max(seen) == rows
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    for mine, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(objectives.token_losses(head, hidden, targets), expected, rtol=1e-14, atol=1e-14)


def test_in_bfloat16_a_chunks_gradient_is_as_near_the_truth_as_that_of_all_tokens_at_once(
        monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden, targets = drawn(torch.bfloat16, bias=False)
    head.requires_grad_(False)
    exact = hidden.detach().double().requires_grad_()
    losses = nn.functional.cross_entropy(exact @ head.weight.double().mT, targets, reduction="none")
    truth = torch.autograd.grad(losses.mean(), exact)[0]
    errors = []
    for rows in (TOKENS, 3):
        monkeypatch.setattr(objectives, "CHUNK", rows * VOCABULARY)
        loss = objectives.token_losses(head, hidden, targets)
        assert loss.dtype == torch.float32
        errors.append(float((torch.autograd.grad(loss.mean(), hidden)[0].double() - truth).norm() / truth.norm()))
    assert errors[0] > 0
    assert errors[1] < 1.5 * errors[0]


def test_a_pack_in_chunks_has_the_loss_and_gradients_of_each_run(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.build("llama")
    starts = [Start(LoRA.Config(rank=rank), seed) for seed, rank in enumerate((2, 3))]
    packed = base.pack(registry.method("lora"), starts)
    for parameter, _ in packed.parameters():
        parameter.data += 0.1
    batch = tiny.collate(base.data, [[0, 1], [2, 3]], tiny.CPU)
    found = []
    for chunk in (objectives.CHUNK, 2 * tiny.VOCABULARY):
        monkeypatch.setattr(objectives, "CHUNK", chunk)
        loss = base.loss_of(packed)(batch)
        gradients = torch.autograd.grad(loss.sum(), [parameter for parameter, _ in packed.parameters()])
        found.append([loss, *gradients])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)
