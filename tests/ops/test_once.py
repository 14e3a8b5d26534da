"""What a gradient by hand cannot give: a second derivative is refused; torch.func and forward mode have all."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from matpac_fast import ops, use_backend
from matpac_fast.errors import BackendError


def log_mel() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return ops.log_mel, torch.randn(1, 720) / 10


def masked_patch_embed() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    spec, bias, pos, cls = torch.randn(2, 8, 8), torch.randn(3), torch.randn(1, 5, 3), torch.randn(1, 1, 3)
    ids = ops.mask_shuffle(0, 0, torch.arange(2), 4)
    return lambda weight: ops.masked_patch_embed(spec, weight, bias, pos, cls, ids, 2)[0], torch.randn(3, 1, 4, 4)


def prototype_loss() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    weight, teacher, center = F.normalize(torch.randn(7, 4)), F.normalize(torch.randn(5, 4)), torch.zeros(7)
    return lambda x: ops.prototype_loss(x, weight, teacher, weight, center, 0.1, 0.04)[0], torch.randn(5, 4)


def prediction_loss() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    target = torch.randn(5, 4)
    return lambda x: ops.prediction_loss(x, target)[0], torch.randn(5, 4)


def attention() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    return ops.attention, torch.randn(1, 96, 3, 4, 64)


OPS = pytest.mark.parametrize("make", [log_mel, masked_patch_embed, prototype_loss, prediction_loss])


@OPS
def test_a_second_derivative_is_refused(make):
    torch.manual_seed(0)
    function, x = make()
    x.requires_grad_()
    (plain,) = torch.autograd.grad(function(x).sum(), x)
    (grad,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    assert torch.equal(grad, plain)
    with pytest.raises(RuntimeError, match=r"once differentiable; for second derivatives .*use_backend\('reference'\)"):
        grad.square().sum().backward()
    with use_backend("reference"):
        (grad,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


REFUSED = r"once differentiable; for second derivatives .*use_backend\('reference'\)"


@pytest.mark.parametrize("make", [log_mel, masked_patch_embed, prototype_loss, prediction_loss, attention])
def test_a_second_derivative_by_any_way_is_refused(make, monkeypatch):
    """By those that look for a path to their inputs too, which would leave out what they find none to."""
    torch.manual_seed(0)
    monkeypatch.setattr(importlib.import_module("matpac_fast.ops.attention"), "_LEAST", 0)
    function, x = make()
    x.requires_grad_()
    loss = function(x).square().sum()
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    penalty = loss + grad.square().sum()
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(penalty, x, retain_graph=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.grad(penalty, x, retain_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=REFUSED):
        penalty.backward(inputs=[x])
    with pytest.raises(RuntimeError, match=REFUSED):
        torch.autograd.functional.hvp(lambda x: function(x).square().sum(), x.detach(), torch.ones_like(x))


def test_attention_has_forward_mode_and_hessians():
    torch.manual_seed(0)
    qkv = torch.randn(1, 5, 3, 2, 8, dtype=torch.float64)
    found = torch.func.jvp(ops.attention, (qkv,), (torch.ones_like(qkv),))[1]
    step = 1e-6 * torch.ones_like(qkv)
    want = (ops.attention(qkv + step) - ops.attention(qkv - step)) / 2e-6
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    hessian = torch.func.hessian(lambda x: ops.attention(x).square().sum())(qkv)
    assert hessian.isfinite().all()
    assert hessian.abs().max() > 0.1


@OPS
def test_forward_mode_takes_the_reference(make):
    torch.manual_seed(0)
    function, x = make()
    v = torch.ones_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(function(forward_ad.make_dual(x, v)))
        with use_backend("cpp"), pytest.raises(BackendError, match="'cpp' is forced, and torch.func and forward mode"):
            function(forward_ad.make_dual(x, v))
    want = torch.func.jvp(function, (x,), (v,))
    assert all(map(torch.equal, found, want))


@OPS
def test_torch_func_transforms_the_reference(make):
    torch.manual_seed(0)
    function, x = make()
    both, v = torch.stack([x, x.flip(0)]), torch.ones_like(x)

    def loss(x: Tensor) -> Tensor:
        return function(x).square().sum()

    def all_of_them() -> list[Tensor]:
        grad = torch.func.grad(loss)
        return [torch.vmap(function)(both), torch.vmap(grad)(both), *torch.func.jvp(grad, (x,), (v,))]

    found = all_of_them()
    leaf = x.clone().requires_grad_()
    (plain,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(found[1][0], plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1], function(x.flip(0)), rtol=1e-4, atol=1e-4)
    with use_backend("reference"):
        assert all(map(torch.equal, found, all_of_them()))
    with (
        use_backend("cpp"),
        pytest.raises(BackendError, match=r"'cpp' is forced, and torch\.func and forward mode transform"),
    ):
        torch.vmap(function)(both)
