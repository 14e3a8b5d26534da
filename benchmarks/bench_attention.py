"""Which of torch's attentions is fastest at the lengths that a training step has: each back end, turn by turn.

    python benchmarks/bench_attention.py                          58, 134 and 191 tokens, the sizes of `base`
    python benchmarks/bench_attention.py --batch-size 8 --precision float32

"default" is what `scaled_dot_product_attention` chooses by itself, "triton" `ops.attention`, which the model takes on
a GPU in 16 bits; queries, keys and values lie in memory as the model's do. A back end that cannot do a shape is named
with the reason. On a GPU the times are the device's, calls back to back; `host_ms` of the JSON is what the host takes
to hand one on.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).parent))
import _options
import _timing

from matpac_fast import ops
from matpac_fast.backend import unavailable
from matpac_fast.config import PRESETS, MatpacConfig
from matpac_fast.files import write_text
from matpac_fast.ops.attention import is_fused
from matpac_fast.train.config import resolve_precision

BACKENDS = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
if _timing.DEVICE.type == "cuda":
    BACKENDS |= {"efficient": SDPBackend.EFFICIENT_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "triton": "triton"}
else:
    BACKENDS |= {"cpp": "cpp"}


@dataclass(frozen=True)
class Part:
    """The attention of one layer of one part of the step."""

    name: str
    layers: int
    tokens: int
    heads: int
    head_width: int
    first_query: int = 0
    backward: bool = True


def parts(config: MatpacConfig) -> list[Part]:
    tokens, visible = config.n_tokens, config.n_visible(config.n_tokens)
    encoder = (config.num_heads, config.width // config.num_heads)
    predictor = (config.predictor_heads, config.predictor_width // config.predictor_heads)
    return [
        Part("student", config.depth, 1 + visible, *encoder),
        Part("teacher", config.depth, 1 + tokens - visible, *encoder, backward=False),
        Part("predictor", config.predictor_depth - 1, 1 + tokens, *predictor),
        Part("predictor's last", 1, 1 + tokens, *predictor, first_query=1 + visible),
    ]


Run = Callable[[], tuple[Tensor, ...]]


def attention(part: Part, batch: int, dtype: torch.dtype, backend: SDPBackend | str | None) -> Run:
    """One layer's attention and, where the part is trained, its gradient."""
    shape = (batch, part.tokens, 3, part.heads, part.head_width)
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape, generator=generator).to(_timing.DEVICE, dtype).requires_grad_(part.backward)
    upstream = torch.ones(batch, part.heads, part.tokens - part.first_query, part.head_width).to(qkv)

    def ours() -> tuple[Tensor, ...]:
        out = ops.attention(qkv)[:, part.first_query :]
        given = upstream.transpose(1, 2)
        return out.detach().transpose(1, 2), *(torch.autograd.grad(out, qkv, given) if part.backward else ())

    def run() -> tuple[Tensor, ...]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with nullcontext() if backend is None else sdpa_kernel(backend):  # pyright: ignore[reportArgumentType]
            out = F.scaled_dot_product_attention(q[:, :, part.first_query :], k, v)
        return out.detach(), *(torch.autograd.grad(out, qkv, upstream) if part.backward else ())

    if isinstance(backend, str):
        fused = is_fused(qkv.device, dtype, part.tokens, part.head_width)
        native = dtype != torch.float16 and unavailable("cpp") is None
        if not (fused if backend == "triton" else native):
            raise RuntimeError(unavailable(backend) or "no kernel for this dtype or shape")
        return ours
    return run


def difference(result: tuple[Tensor, ...], math: tuple[Tensor, ...]) -> float:
    """The largest, relative to what it differs from where that is above 1: a rounding grows with the number."""
    pairs = [(a.float(), b.float()) for a, b in zip(result, math, strict=True)]
    return max(float(((a - b).abs() / b.abs().clamp(min=1)).max()) for a, b in pairs)


def compare(part: Part, batch: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    calls: dict[str, Run] = {}
    results: dict[str, tuple[Tensor, ...]] = {}
    for name, backend in BACKENDS.items():
        said: list[warnings.WarningMessage] = []
        try:
            call = attention(part, batch, dtype, backend)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                results[name] = call()  # and what it compiles
        except RuntimeError as error:
            reason = next((str(w.message) for w in said if "because" in str(w.message)), str(error)).split(" (Trigg")[0]
            print(f"{part.name:<18}{name:<11} not here: {reason.strip()}")
            continue
        calls[name] = call
    for name, result in results.items():
        error = difference(result, results["math"])
        if not error <= (1e-4 if dtype == torch.float32 else 8 * torch.finfo(dtype).eps):
            sys.exit(f"{part.name}: {name} differs from math by {error:.1e}")
    times = _timing.turn_by_turn(calls, lambda turns: turns < rounds)
    for name, own in times.items():
        ratio = own.over(times["default"])
        row = {"part": part.name, "layers": part.layers, "tokens": part.tokens, "backend": name, "speedup": ratio}
        row |= own.row()
        rows.append(row)
        step = f"{row['ms'] * part.layers:>11.2f}"
        print(f"{part.name:<18}{name:<11}{part.tokens:>6}{row['ms']:>10.3f}{step}{ratio:>10.2f}x")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--batch-size", type=_options.count, default=256 if _timing.DEVICE.type == "cuda" else 8)
    parser.add_argument("--precision", choices=("float32", "bf16"), default=resolve_precision("auto", _timing.DEVICE))
    parser.add_argument("--rounds", type=_options.count, default=30)
    parser.add_argument("--json", type=_options.output, help="also write the numbers here")
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    print(f"{options.preset}, batch {options.batch_size}, {options.precision}, torch {torch.__version__}")
    print(f"{'attention of':<18}{'':<11}{'tokens':>6}{'ms':>10}{'ms a step':>11}{'x default':>11}")
    header = {"preset": options.preset, "batch_size": options.batch_size, "precision": options.precision}
    rows = []
    for part in parts(MatpacConfig.preset(options.preset)):
        rows += compare(part, options.batch_size, dtype, options.rounds)
        if options.json:  # what there is, should the rest be cut off
            write_text(options.json, json.dumps({**header, "torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
