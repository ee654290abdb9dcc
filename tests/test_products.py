"""Products of adapters: as autograd has them, but for the rounding."""

import pytest
import torch

from suite.products import project


@pytest.mark.parametrize("added", [False, True])
def test_a_product_of_one_type_is_the_plain_one_to_the_bit(added: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, W, onto = (torch.randn(size, generator=draw) for size in ((2, 7, 12), (2, 3, 12), (2, 7, 3)))
    plain = torch.baddbmm(onto, x, W.mT) if added else torch.bmm(x, W.mT)
    assert torch.equal(project(x, W, onto if added else None), plain)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 3), (3, 64)])
def test_a_product_of_a_narrow_input_is_narrow_and_the_gradient_of_its_weight_is_wide(inputs: int, outputs: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 50, inputs, generator=draw).bfloat16().requires_grad_()
    W = torch.randn(1, outputs, inputs, generator=draw).requires_grad_()
    onto = torch.randn(1, 50, outputs, generator=draw).bfloat16().requires_grad_()
    z = project(x, W, onto)
    upstream = torch.randn(z.shape, generator=draw).bfloat16()
    of_x, of_W, of_onto = torch.autograd.grad(z, [x, W, onto], upstream)
    assert (z.dtype, of_x.dtype, of_W.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert torch.equal(of_onto, upstream)
    for mine, exact in ((z, onto.double() + x.double() @ W.double().mT), (of_x, upstream.double() @ W.double()),
                        (of_W, upstream.double().mT @ x.double())):
        assert (mine.double() - exact).norm() < 0.01 * exact.norm()


def test_a_frozen_weight_gets_no_gradient_and_takes_no_product() -> None:
    x = torch.randn(1, 4, 6).bfloat16().requires_grad_()
    W = torch.randn(1, 2, 6)
    project(x, W).sum().backward()
    assert x.grad is not None
    assert W.grad is None
