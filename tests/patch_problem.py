"""One problem for masked_patch_embed, run by its tests on the CPU, under Triton's interpreter and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from matpac_fast import reference

Embed = Callable[..., tuple[Tensor, Tensor]]
PARAMETERS = ("weight", "bias", "cls")


def official(
    spec: Tensor, weight: Tensor, bias: Tensor, pos: Tensor, cls: Tensor, ids_shuffle: Tensor, n_visible: int
) -> tuple[Tensor, Tensor]:
    """What the official model does: a convolution, the positions, a gather each and CLS in front."""
    tokens = F.conv2d(spec[:, None], weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2) + pos[:, 1:]
    head = (cls + pos[:, :1]).expand(spec.shape[0], -1, -1)
    parts = []
    for ids in (ids_shuffle[:, :n_visible], ids_shuffle[:, n_visible:]):
        parts.append(torch.cat((head, tokens.gather(1, ids[:, :, None].repeat(1, 1, tokens.shape[-1]))), dim=1))
    return parts[0], parts[1].detach()


class PatchProblem:
    """Inputs and upstream gradients of (batch, freq, time) patches of side `patch`, `width` channels wide."""

    def __init__(
        self,
        batch: int,
        freq: int,
        time: int,
        patch: int,
        width: int,
        n_visible: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ):
        generator = torch.Generator().manual_seed(batch * freq * time + width)

        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)

        n = freq * time
        self.spec = randn(batch, freq * patch, time * patch)
        self.weight, self.bias = randn(width, 1, patch, patch, scale=1 / patch), randn(width)
        self.pos, self.cls = randn(1, 1 + n, width), randn(1, 1, width)
        self.ids = torch.rand(batch, n, generator=generator).argsort(1).to(device)
        self.n_visible = n_visible
        self.upstream = randn(batch, 1 + n_visible, width)

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.spec, self.weight, self.bias, self.pos, self.cls, self.ids

    def run(self, embed: Embed, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Both outputs and the parameters' gradients, computed in `dtype` if given."""
        spec, weight, bias, pos, cls = (t.detach().clone().to(dtype or t.dtype) for t in self.arguments[:-1])
        parameters = (weight.requires_grad_(), bias.requires_grad_(), cls.requires_grad_())
        visible, masked = embed(spec, weight, bias, pos, cls, self.ids, self.n_visible)
        assert not masked.requires_grad
        grads = torch.autograd.grad(visible, parameters, self.upstream.to(visible.dtype))
        return {"visible": visible.detach(), "masked": masked, **dict(zip(PARAMETERS, grads, strict=True))}

    def check(self, embed: Embed, plain: Embed = reference.masked_patch_embed) -> None:
        """No more than twice the error of `plain` in the same dtype, and a few roundings of the largest value."""
        exact = self.run(reference.masked_patch_embed, torch.float64)
        own, got = self.run(plain), self.run(embed)
        for name, value in got.items():
            assert value.dtype == own[name].dtype, name
            assert value.shape == exact[name].shape, name
            if not value.numel():
                continue
            error = (value.double() - exact[name]).abs().max()
            allowed = 2 * (own[name].double() - exact[name]).abs().max()
            # In float64 the oracle is as rough as what it judges.
            rounding = (
                (16 if value.dtype == torch.float64 else 2) * torch.finfo(value.dtype).eps * exact[name].abs().max()
            )
            assert error <= allowed + rounding, f"{name}: error {error:.3g}, allowed {allowed:.3g} + {rounding:.3g}"
