"""Which launch options are fastest on this GPU: every candidate of every Triton kernel, right and timed.

    python benchmarks/tune.py                    all kernels at the sizes of a step of `base`, batch 256
    python benchmarks/tune.py bias_gelu          some of them
    python benchmarks/tune.py --compile-only     fills Triton's cache on all cores first, which timing then finds

A candidate whose result differs from that of the options in the package is left out and named. What wins is to be
written into the kernel's module, and tests/test_compile_ahead.py says whether it spills elsewhere.
"""

# Arguments and options are unpacked.
# pyright: reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import _options
import _timing

from matpac_fast import ops
from matpac_fast.kernels import add_layer_norm, attention, bias_gelu, masked_patch_embed, prediction_loss
from matpac_fast.kernels._aot import capability_of, stages
from matpac_fast.ops import _prototype_launchers

DEVICE, BF16 = _timing.DEVICE, torch.bfloat16
Options = dict[str, int]
Call = Callable[[Options | None], tuple[Tensor, ...]]  # None: the package's own


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(sum(shape))).to(dtype)


def grid(**options: tuple[int, ...]) -> list[Options]:
    """Every combination."""
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


def listed(names: str, *rows: tuple[int, ...]) -> list[Options]:
    """These alone."""
    return [dict(zip(names.split(), row, strict=True)) for row in rows]


def patches(batch: int) -> tuple[Any, ...]:
    ids = ops.mask_shuffle(0, 0, torch.arange(batch, device=DEVICE), 190)
    parameters = (randn(768, 1, 16, 16) / 16, randn(768), randn(1, 191, 768), randn(1, 1, 768))
    return randn(batch, 80, 608), *parameters, ids, 57


def patch_embed_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    arguments = patches(batch)

    def forward(options: Options | None) -> tuple[Tensor, ...]:
        with mock.patch.dict(masked_patch_embed._FWD, {} if options is None else {2: options}):
            return masked_patch_embed.masked_patch_embed(*arguments, BF16)

    def backward(options: Options | None) -> tuple[Tensor, ...]:
        more = dict(options or {"PROGRAMS": masked_patch_embed.BWD_PROGRAMS})
        with (
            mock.patch.object(masked_patch_embed, "BWD_PROGRAMS", more.pop("PROGRAMS")),
            mock.patch.dict(masked_patch_embed._BWD, {2: more} if more else {}),
        ):
            spec, ids = arguments[0], arguments[5]
            return (masked_patch_embed.masked_patch_embed_backward(grad, spec, ids, 57, 16, BF16),)

    grad = randn(batch, 58, 768)
    # Whole patches gathered once; the last ones gather a part of them anew for every block of columns.
    rows = listed(
        "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages",
        (128, 64, 256, 16, 1),
        (128, 32, 256, 16, 2),
        (128, 64, 256, 8, 1),
        (128, 64, 256, 8, 2),
        (64, 64, 256, 8, 1),
        (64, 64, 256, 8, 2),
        (64, 64, 256, 4, 1),
        (64, 64, 256, 4, 2),
        (64, 32, 256, 8, 2),
        (64, 128, 256, 8, 1),
        (64, 128, 32, 4, 3),
        (128, 128, 32, 8, 3),
    )
    capability = capability_of(arguments[0])
    # The launcher would give those of several stages one, where their copies are not fenced.
    yield "masked_patch_embed_fwd", forward, [o for o in rows if stages(o["num_stages"], capability) == o["num_stages"]]
    yield (
        "masked_patch_embed_bwd",
        backward,
        listed(
            "BLOCK_R BLOCK_N BLOCK_K num_warps num_stages PROGRAMS",
            (32, 128, 128, 8, 1, 132),
            (32, 128, 128, 8, 1, 528),
            (32, 128, 128, 8, 2, 264),
            (64, 128, 128, 8, 1, 132),
            (64, 128, 128, 8, 1, 264),
            (32, 64, 256, 8, 1, 132),
            (32, 64, 256, 8, 1, 264),
            (64, 64, 128, 4, 1, 264),
            (64, 64, 128, 8, 1, 264),
            (64, 64, 64, 4, 1, 528),
            (32, 128, 64, 8, 2, 264),
        ),
    )


def gelu_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    for tokens, columns in ((58, 3072), (191, 2048)):
        h, grad = (randn(batch * tokens, columns, dtype=BF16) for _ in range(2))
        bias = randn(columns)
        yield (
            f"bias_gelu_fwd {len(h)} x {columns}",
            lambda o, h=h, bias=bias: (bias_gelu.forward(h, bias, o),),
            grid(BLOCK_R=(2, 4, 8), MAX_WARPS=(2, 4)),
        )
        yield (
            f"bias_gelu_bwd {len(h)} x {columns}",
            lambda o, h=h, grad=grad, bias=bias: bias_gelu.backward(grad, h, bias, o),
            grid(BLOCK_R=(1, 2, 4), MAX_WARPS=(1, 2), ROWS=(32, 64)),
        )


def norm_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    for tokens, width in ((58, 768), (134, 768), (191, 512)):
        rows = batch * tokens
        x, dx = randn(rows, width), randn(rows, width)
        delta, dnormed = randn(rows, width, dtype=BF16), randn(rows, width, dtype=BF16)
        bias, gamma, beta = (randn(width) for _ in range(3))

        def forward(o: Options | None, x=x, delta=delta, bias=bias, gamma=gamma, beta=beta) -> tuple[Tensor, ...]:
            with mock.patch.dict(add_layer_norm._FWD, {} if o is None else {x.shape[1]: {**o, "num_stages": 1}}):
                return add_layer_norm.forward(x, delta, bias, gamma, beta, 1e-6, BF16)

        new_x, _, stats = forward(None)

        def backward(o: Options | None, new_x=new_x, stats=stats, dx=dx, dn=dnormed, gamma=gamma) -> tuple[Tensor, ...]:
            with mock.patch.dict(add_layer_norm._BWD, {} if o is None else {dx.shape[1]: {**o, "num_stages": 1}}):
                return add_layer_norm.backward(dn, dx, new_x, stats, gamma, BF16)

        yield f"add_layer_norm_fwd {rows} x {width}", forward, grid(ROWS=(1, 2, 4), num_warps=(1, 2, 4))
        programs = tuple(132 * n for n in (4, 6, 8, 10))
        yield (
            f"add_layer_norm_bwd {rows} x {width}",
            backward,
            grid(PROGRAMS=programs, ROWS=(1, 2, 4), num_warps=(2, 4)),
        )


def attention_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    together, apart = 0, 1 << 30  # the queries of a head in one program, and each block of them in its own
    for tokens, heads, width in ((58, 12, 64), (134, 12, 64), (191, 16, 32)):
        qkv = randn(batch, tokens, 3, heads, width, dtype=BF16)

        def forward(o: Options | None, qkv=qkv) -> tuple[Tensor, ...]:
            more = dict(o or {"FWD_HEADS": attention.FWD_HEADS})
            with (
                mock.patch.object(attention, "FWD_HEADS", more.pop("FWD_HEADS")),
                mock.patch.dict(attention._FWD, more),
            ):
                return (attention.forward(qkv, True)[0],)

        yield (
            f"attention_fwd {tokens} x {width}",
            forward,
            [
                *grid(FWD_HEADS=(together, apart), num_warps=(4, 8)),
                *grid(FWD_HEADS=(together,), maxnreg=(96, 128)),
                *grid(FWD_HEADS=(apart,), maxnreg=(64, 72, 96)),
            ],
        )
    for tokens, heads, width in ((58, 12, 64), (191, 16, 32)):
        qkv = randn(batch, tokens, 3, heads, width, dtype=BF16)
        out, sums = attention.forward(qkv, True)

        def backward(o: Options | None, qkv=qkv, out=out, sums=sums) -> tuple[Tensor, ...]:
            key = (qkv.shape[4], -(-qkv.shape[1] // 64))
            with mock.patch.dict(attention._BWD, {} if o is None else {key: o}):
                return (attention.backward(out, qkv, out, sums, need_sums=True)[0],)

        yield (
            f"attention_bwd {tokens} x {width}",
            backward,
            [
                *grid(KEYS=(32, 64), num_warps=(4, 8)),
                *grid(KEYS=(64,), num_warps=(4,), maxnreg=(128, 168)),  # more programs at once, and a few bytes spilt
            ],
        )


def loss_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    prediction, target = randn(batch * 133, 768, dtype=BF16), randn(batch * 133, 768)

    def both(o: Options | None) -> tuple[Tensor, ...]:
        with mock.patch.multiple(prediction_loss, **(o or {})) if o else mock.patch.dict({}):
            loss, stats = prediction_loss.forward(prediction, target, 1, 1e-12)
            return loss, prediction_loss.backward(loss, prediction, target, stats, 1, 1e-12)

    yield "prediction_loss, both ways", both, grid(ROWS=(1, 2, 4, 8), NUM_WARPS=(1, 2, 4, 8))


def prototype_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    """How many rows of logits at a time, launched as in a step, by a CUDA graph: chunks of 16 MiB a side stay in a
    second-level cache of 50 MB between the product that writes them and the kernel that reads them, 1.1 GB a step at
    batch 256 (280 us on an H200), but their products are of 2,048 rows. 2^29 bytes are all rows at once."""
    rows = batch * 133
    features = [randn(rows, 256, dtype=BF16).requires_grad_(side == 0) for side in range(2)]
    weights = [randn(2048, 256, dtype=BF16).requires_grad_(side == 0) for side in range(2)]
    center = randn(2048) / 100
    temps = [torch.tensor(value, device=DEVICE) for value in (0.1, 0.04)]
    stream = torch.cuda.Stream()
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]] = {}

    def step() -> tuple[Tensor, ...]:
        loss, mean = ops.prototype_loss(features[0], weights[0], features[1], weights[1], center, *temps)
        return loss.detach(), mean, *torch.autograd.grad(loss.mean(), (features[0], weights[0]))

    def call(o: Options | None) -> tuple[Tensor, ...]:
        if str(o) not in graphs:
            with mock.patch.dict(_prototype_launchers._CHUNK_BYTES, {"cuda": 2 ** o["LOG2_BYTES"]} if o else {}):
                with torch.cuda.stream(stream):
                    step()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    graphs[str(o)] = graph, step()
        graph, results = graphs[str(o)]
        graph.replay()
        return results

    yield f"prototype_loss {rows} x 2048, both ways", call, grid(LOG2_BYTES=(22, 23, 24, 25, 27, 29))


def linear_gelu_cases(batch: int) -> Iterator[tuple[str, Call, list[Options]]]:
    """Whether products that inductor writes, with the GELU at their end, beat cuBLAS and a kernel for the GELU: a
    GELU by itself reads and writes what a teacher's product has just written, 1.4 ms a step on an H200."""
    for tokens, width in ((134, 768), (191, 512)):
        x, bias = randn(batch * tokens, width, dtype=BF16), randn(4 * width)
        weight = randn(4 * width, width, dtype=BF16) / 28
        compiled = torch.compile(
            lambda x, weight, bias: F.gelu(F.linear(x, weight).float() + bias).to(BF16),
            mode="max-autotune-no-cudagraphs",
            dynamic=False,
        )

        @torch.no_grad()
        def call(o: Options | None, x=x, weight=weight, bias=bias, compiled=compiled) -> tuple[Tensor, ...]:
            if o is None:
                return (bias_gelu.forward(F.linear(x, weight), bias),)
            return (compiled(x, weight, bias),)

        yield f"linear and GELU {len(x)} x {width}", call, [{"max_autotune": 1}]


CASES = {
    "masked_patch_embed": patch_embed_cases,
    "bias_gelu": gelu_cases,
    "add_layer_norm": norm_cases,
    "attention": attention_cases,
    "prediction_loss": loss_cases,
    "prototype_loss": prototype_cases,
    "linear_gelu": linear_gelu_cases,
}
COMPILED_HERE = ("prototype_loss", "linear_gelu")  # nothing to compile, or by inductor for the sizes that are timed


def compile_one(job: tuple[str, int, int]) -> None:
    """In a process of a pool: the candidate by its place, on a small batch."""
    op, case, candidate = job
    for i, (_, call, candidates) in enumerate(CASES[op](2)):
        if i == case:
            try:
                call(candidates[candidate])
            except Exception as error:  # what does not compile or launch is told when it is its turn
                print(f"{op}: {candidates[candidate]}: {error!r:.200}", file=sys.stderr)


def best(name: str, call: Call, candidates: list[Options]) -> None:
    want = call(None)
    rows: list[tuple[float, str]] = []
    for options in (None, *candidates):
        try:
            result = call(options)
            error = max(
                float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(result, want, strict=True)
            )
            if not error < 2e-3:
                print(f"  differs by {error:.1e}: {options}")
                continue
            at = _timing.pace(lambda options=options: call(options))
            seconds = min(_timing.timed(lambda options=options: call(options), at)[0] for _ in range(5))
            rows.append((seconds, "as it is" if options is None else str(options)))
        except Exception as error:
            print(f"  failed: {options}: {error!r:.100}")
    print(name)
    own = next(seconds for seconds, text in rows if text == "as it is")
    for seconds, text in sorted(rows)[:5]:
        print(f"  {1e6 * seconds:>8.1f} us {own / seconds:>6.2f}x  {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(CASES)}")
    parser.add_argument("--batch-size", type=_options.count, default=256)
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.ops) - set(CASES):
        parser.error(f"no op {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if DEVICE.type != "cuda":
        parser.error("launch options are of a GPU, and torch finds none")
    chosen = options.ops or list(CASES)
    if options.compile_only:
        jobs = [
            (op, case, i)
            for op in chosen
            if op not in COMPILED_HERE
            for case, (_, _, candidates) in enumerate(CASES[op](2))
            for i in range(len(candidates))
        ]
        with multiprocessing.get_context("spawn").Pool(min(12, os.cpu_count() or 1)) as pool:
            pool.map(compile_one, jobs, chunksize=4)
        return
    for op in chosen:
        for name, call, candidates in CASES[op](options.batch_size):
            best(name, call, candidates)


if __name__ == "__main__":
    main()
