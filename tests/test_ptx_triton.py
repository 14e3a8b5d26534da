"""A Triton kernel on the CPU from its PTX, whole and with what orders its products taken out. All of the kernels' tests
run so too: tests/from_ptx.py."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")

import triton
from ptx import triton_kernels
from ptx.memory import Fault
from ptx.source import parse
from torch.torch_version import TorchVersion

from matpac_fast.kernels import _aot, attention, masked_patch_embed, prototype_loss

pytestmark = pytest.mark.skipif(
    TorchVersion(triton.__version__) < "3.6", reason="its PTX is of another kind: Triton 3.6 or later"
)


def heads(n: int = 58) -> torch.Tensor:
    return torch.randn(1, n, 3, 2, 64, generator=torch.Generator().manual_seed(n)).bfloat16()


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_attention(capability):
    qkv = heads()
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4).unbind(0)
    exact = ((q @ k.mT / 8).softmax(-1) @ v).transpose(1, 2)
    with triton_kernels.emulated(capability):
        out, _ = attention.forward(qkv, need_lse=False)
    assert (out - exact).abs().max() <= 2**-7 * exact.abs().max()


LEFT_OUT = {
    "the fence before products": (90, r"fence\.proxy\.async[^;]*;", "reads shared memory before fence.proxy.async"),
    "waiting for products": (90, r"wgmma\.wait_group[^;]*;", "registers of a product under way are used"),
    "barriers": (90, r"bar\.sync\s+0;", "no barrier lies between"),
    "a fence on Blackwell": (100, r"fence\.proxy\.async[^;]*;", "reads shared memory before fence.proxy.async"),
    "waiting for sums": (100, r"mbarrier\.try_wait[^;]*;\s*@!complete bra\.uni waitLoop;", "a product writes to it"),
    "waiting for loads": (100, r"tcgen05\.wait::ld[^;]*;", "registers are used before they are loaded"),
    "waiting for stores": (100, r"tcgen05\.wait::st[^;]*;", "touched while it is stored to"),
    "what arrives": (100, r"@%p\d+ tcgen05\.commit[^;]*;", "a barrier is waited for that nothing will arrive at"),
}


@pytest.mark.parametrize(("capability", "left_out", "message"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_what_orders_a_product_is_missed(capability, left_out, message, monkeypatch):
    def without(text: str):
        assert re.search(left_out, text)
        return parse(re.sub(left_out, "", text))

    monkeypatch.setattr(triton_kernels, "parse", without)
    triton_kernels._compiled.cache_clear()
    try:
        with triton_kernels.emulated(capability), pytest.raises(Fault, match=message):
            attention.forward(heads(), need_lse=True)
    finally:
        triton_kernels._compiled.cache_clear()


@pytest.mark.parametrize("fenced", [True, False])
def test_nothing_is_copied_asynchronously_where_triton_sets_no_fence(fenced, monkeypatch):
    monkeypatch.setattr(_aot, "_copies_are_fenced", lambda: fenced)
    for options_of in (lambda c: masked_patch_embed._fwd_options(2, 256, c), lambda c: prototype_loss._options(2, c)):
        stages = {capability: options_of(capability)["num_stages"] for capability in (80, 90, 100, 120)}
        assert (stages[90] > 1) == (stages[100] > 1) == fenced
    assert prototype_loss._options(2, 80)["num_stages"] == 3
