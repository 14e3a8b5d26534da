"""What each kernel does, counted without a GPU: its PTX run instruction by instruction on the model's shapes.

    python benchmarks/emulate.py                          every kernel, for sm_90
    python benchmarks/emulate.py attention --lines 5      and the source lines that take most
    python benchmarks/emulate.py --capability 100

A block's instructions, each counted once a warp; sectors of 32 bytes that its loads and stores of global memory touch,
and the turns that shared memory's banks take, each over the least that as many bytes could take: 1.00 is a coalesced
access, or one without a bank conflict. `--lines` names the lines with the most instructions and which these are, and
those that take most above the least. A race, a barrier missing, or an access to what is nobody's ends it with the
instruction's name. Triton is needed, and nvcc on the PATH for the CUDA kernels.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _options import count
from ptx.cuda_kernels import CudaKernels
from ptx.report import Report

from matpac_fast.reference import LogMelConfig

KINDS = ("global load", "global store", "shared load", "shared store")
BF16 = torch.bfloat16
Show = Callable[[Report], None]


def triton(name: str) -> Any:
    return importlib.import_module(f"matpac_fast.kernels.{name}")


def add_layer_norm() -> None:
    kernels, x, delta, gradient = triton("add_layer_norm"), *torch.randn(3, 64, 768)
    bias, gamma, beta = torch.randn(3, 768)
    new_x, _, stats = kernels.forward(x, delta.to(BF16), bias, gamma, beta, 1e-6, BF16)
    kernels.backward(gradient.to(BF16), x, new_x, stats, gamma, BF16)


def attention() -> None:
    """Student, teacher, which has no gradient, and predictor: one clip."""
    kernels = triton("attention")
    for tokens, heads, width, learns in ((58, 12, 64, True), (134, 12, 64, False), (191, 16, 32, True)):
        qkv = torch.randn(1, tokens, 3, heads, width).to(BF16)
        out, lse = kernels.forward(qkv, need_lse=learns)
        if learns:
            kernels.backward(torch.randn_like(out), qkv, out, lse, need_sums=True)


def bias_gelu() -> None:
    kernels, h, bias = triton("bias_gelu"), torch.randn(256, 3072).to(BF16), torch.randn(3072)
    kernels.forward(h, bias)
    kernels.backward(torch.randn(256, 3072).to(BF16), h, bias)


def column_sums() -> None:
    """Of 792 programs of add_layer_norm."""
    triton("column_sums").column_sums(torch.randn(792, 3, 768))


def log_mel() -> None:
    triton("log_mel").log_mel(0.1 * torch.randn(1, 97_520), LogMelConfig(), torch.float32)


def mask_shuffle() -> None:
    triton("mask_shuffle").mask_shuffle(1 << 40, torch.arange(16), 190)


def masked_patch_embed() -> None:
    kernels, batch, n = triton("masked_patch_embed"), 4, 190
    spec, ids = torch.randn(batch, 80, 608).to(BF16), torch.stack([torch.randperm(n) for _ in range(batch)])
    weight, position, bias, cls = torch.randn(768, 1, 16, 16), torch.randn(1 + n, 768), *torch.randn(2, 768)
    kernels.masked_patch_embed(spec, weight, bias, position, cls, ids, 57, BF16)
    kernels.masked_patch_embed_backward(torch.randn(batch, 58, 768).to(BF16), spec, ids, 57, 16, BF16)


def prediction_loss() -> None:
    kernels, prediction, target = triton("prediction_loss"), torch.randn(64, 768).to(BF16), torch.randn(64, 768)
    _, stats = kernels.forward(prediction, target, 1, 1e-8)
    kernels.backward(torch.randn(64), prediction, target, stats, 1, 1e-8)


SCALES = math.log2(math.e) / torch.tensor([0.1, 0.04], dtype=torch.float64)  # log2(e) / temperature


def prototype_loss() -> None:
    kernels, n, k, width = triton("prototype_loss"), 128, 2048, 256
    features = torch.randn(2, n, width).to(BF16)
    weights = torch.nn.functional.normalize(torch.randn(2, k, width), dim=-1).to(BF16)
    sides = (features[0], weights[0], features[1], weights[1], torch.zeros(k), SCALES)
    stats = torch.empty(n, 4)
    kernels.forward(*sides, torch.empty(n), stats, torch.zeros(k, dtype=torch.float64))
    kernels.delta(*sides, stats, torch.empty(n, k, dtype=BF16))


def cuda_log_mel(cuda: CudaKernels, show: Show) -> None:
    op, config = importlib.import_module("matpac_fast.ops.log_mel"), LogMelConfig()
    wave = 0.1 * torch.randn(1, 160 * 32 * 8 + 240)  # eight tiles, all in one block
    out, plan = torch.empty(1, config.n_mels, 256), op._plan(config, torch.float32, wave.device, fours=True)
    args = op._arguments(wave, out, config, plan)
    cuda("log_mel", args, [wave, out, *plan], strict=False, on_report=show)


def cuda_prototype_loss(cuda: CudaKernels, show: Show) -> None:
    n, k = 24, 2048
    student, teacher, delta = torch.randn(3, n, k)
    center, loss, stats, columns = torch.zeros(k), torch.empty(n), torch.empty(n, 4), torch.empty(4, k)
    column_sum = torch.zeros(k, dtype=torch.float64)
    tensors = [student, teacher, center, SCALES, loss, stats, delta, column_sum, columns]
    sides, results = [each.data_ptr() for each in tensors[:3]], [each.data_ptr() for each in tensors[4:7]]
    args = (*sides, 0, n, k, SCALES.data_ptr(), *results, 0, column_sum.data_ptr())
    cuda("prototype_loss_forward", (*args, columns.data_ptr(), 4), tensors, on_report=show)
    cuda("prototype_loss_delta", args, tensors, on_report=show)


TRITON = (
    add_layer_norm, attention, bias_gelu, column_sums, log_mel, mask_shuffle, masked_patch_embed, prediction_loss,
    prototype_loss,
)  # fmt: skip
CUDA = (cuda_log_mel, cuda_prototype_loss)


def name_of(report: Report) -> str:
    """Of a CUDA kernel what its mangled name has of it."""
    name = report.kernel.name
    for plain in ("registers", "passes", "delta", "columns"):
        if f"prototype_loss_{plain}_kernel" in name and name.startswith("_Z"):
            return f"CUDA prototype_loss {plain}"
    return "CUDA log_mel" if name.startswith("_Z") else name.removesuffix("_kernel")


def shower(lines: int) -> Show:
    def show(report: Report) -> None:
        cells = []
        for kind in KINDS:
            traffic = report.by_kind().get(kind)
            each = 0 if traffic is None else traffic.taken / report.blocks
            cells.append(f"{each:>9,.0f} {traffic.taken / traffic.least:>5.2f}" if traffic else f"{'':15}")
        print(
            f"{name_of(report):30}{report.blocks:>7,}{report.warps / report.blocks:>12,.0f}  {''.join(cells)}",
            flush=True,
        )
        for source, instructions, kinds in report.busiest(lines):
            print(f"    {source:26}{instructions / report.blocks:>12,.0f}  {kinds}")
        for source, kind, traffic in report.worst(lines):
            print(f"    {source:30} {kind:13} {traffic.taken:>12,} for {traffic.least:,}")

    return show


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.__name__ for case in (*TRITON, *CUDA)]
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--capability", type=int, default=90, choices=(80, 90, 100, 120), help="90 is sm_90")
    parser.add_argument("--lines", type=count, default=0, help="source lines of each kernel")
    options = parser.parse_args()
    if unknown := sorted(set(options.kernels) - set(names)):
        parser.error(f"no kernel is named {unknown[0]}; there are {', '.join(names)}")
    wanted = set(options.kernels or names)
    cuda = {case.__name__ for case in CUDA}
    if shutil.which("nvcc") is None and wanted & cuda:
        told = "nvcc is not on the PATH, for the CUDA kernels: install CUDA's toolkit, or put its bin folder there"
        if options.kernels:
            parser.error(told)
        print(told, file=sys.stderr)
        wanted -= cuda
    if importlib.util.find_spec("triton") is None and wanted - cuda:
        parser.error("Triton is not installed: pip install 'matpac_fast[triton]'")
    show = shower(options.lines)
    print(f"sm_{options.capability}; sectors and turns a block, and over the least")
    print(f"{'kernel':30}{'blocks':>7}{'instructions':>12}  " + "".join(f"{kind:>15}" for kind in KINDS))
    if wanted - cuda:
        from ptx.triton_kernels import emulated

        with emulated(options.capability, show):
            for case in TRITON:
                if case.__name__ in wanted:
                    case()
    if wanted & cuda:
        with tempfile.TemporaryDirectory() as folder:
            kernels = CudaKernels(Path(folder), options.capability)
            for case in CUDA:
                if case.__name__ in wanted:
                    case(kernels, show)


if __name__ == "__main__":
    main()
