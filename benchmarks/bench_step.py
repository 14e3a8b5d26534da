"""One pre-training step: ours, ours on the reference formulas, and the official code, turn by turn in one run.

    python benchmarks/bench_step.py --preset base --batch-size 8
    MATPAC_OFFICIAL=PATH python benchmarks/bench_step.py    # PATH: a checkout of aurianworld/matpac, to compare with

Every variant starts from the same weights and takes the same spectrograms and masks; before anything is timed their
first losses are compared, and the run fails where they differ. The rounds are interleaved and the ratio is the median
of the rounds' ratios, so that a machine that slows down slows all of them.

Each precision has its turn alone, or the models of both would fill the memory. On a CPU every variant has a process of
its own, as training has: beside two other models in one process a step takes 5 to 8 % longer, for its memory is in
pieces; and `pretrain`, and so ours here, changes how malloc gives memory back, which would speed up the official code
too. The first variant takes its turn in both precisions, and all speed-ups are over it; on a GPU they are over the
first in the same precision. The JSON is written anew after every round, so that what is known is there however the
script ends.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
import _official_training
import _options
import _timing

from matpac_fast import __version__, ops, use_backend
from matpac_fast.config import PRESETS, MatpacConfig
from matpac_fast.files import write_text
from matpac_fast.model import Matpac
from matpac_fast.reference import LogMelConfig
from matpac_fast.train.compiled import compile_blocks
from matpac_fast.train.config import TrainConfig, resolve_precision
from matpac_fast.train.flops import peak_flops, step_flops
from matpac_fast.train.graph import GraphedStep
from matpac_fast.train.memory import freed_memory_kept
from matpac_fast.train.step import make_optimizer, train_step

STEP = 7  # past step 0, which moves no average
Run = Callable[[], float]  # a step, to its loss
Make = Callable[[], Run]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="base")
    parser.add_argument("--batch-size", type=_options.count, default=8)
    parser.add_argument("--rounds", type=_options.count, default=5)
    parser.add_argument("--device", type=_options.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", choices=("float32", "bf16"), help="default: what the device has")
    parser.add_argument("--mcl-heads", type=int, default=0)
    parser.add_argument("--skip-reference", action="store_true", help="leave out ours on the reference formulas")
    parser.add_argument("--compile", action="store_true", help="ours with compiled blocks too, as pretrain --compile")
    parser.add_argument("--cuda-graph", action="store_true", help="each of ours as CUDA graphs too, on a GPU")
    parser.add_argument("--json", type=_options.output, help="also write the numbers here")
    options = parser.parse_args()
    device = options.device
    native = resolve_precision("auto", device)
    precisions = options.precision or (["float32"] if native == "float32" else ["float32", "bf16"])

    config = MatpacConfig.preset(options.preset, mcl_heads=options.mcl_heads)
    groups = [variants(options, precision, precisions, config, device) for precision in precisions]
    base = next(iter(groups[0]))  # the official code where it is at hand, else ours on the reference
    on_gpu = device.type == "cuda"
    if not on_gpu:
        groups = [{base: groups[0][base]} | group for group in groups]

    rows: dict[str, dict[str, Any]] = {}
    losses: dict[str, float] = {}
    header = {"preset": options.preset, "batch_size": options.batch_size, "device": device_name(device)}
    header["speedup_over"] = f"{base.rsplit(' ', 1)[0]}, same precision" if on_gpu and len(groups) > 1 else base
    header |= {"torch": torch.__version__, "matpac_fast": __version__}
    for makers in groups:
        before = rows
        for times, first in measure(makers, options.rounds, on_gpu, losses):
            found = rows_of(times, first, config, options.batch_size, device)
            rows = before | {name: row for name, row in found.items() if name not in before}  # the base as it was first
            if options.json:
                write_text(options.json, json.dumps({**header, "rows": rows}, indent=2) + "\n")
        if on_gpu:  # before the models of the next precision come
            gc.collect()
            torch.cuda.empty_cache()
    report(rows, header, options.rounds)


def variants(
    options: argparse.Namespace, precision: str, precisions: list[str], config: MatpacConfig, device: torch.device
) -> dict[str, Make]:
    """What is to be timed in one precision, in order, each still to be built."""
    found: dict[str, Make] = {}

    def add(name: str, step: Callable[..., Run], *arguments: Any) -> None:
        arguments = config, options.batch_size, device, precision, *arguments
        found[name] = partial(InAProcess, step, *arguments) if device.type == "cpu" else partial(step, *arguments)

    if checkout := os.environ.get("MATPAC_OFFICIAL"):
        add(f"official {precision}", official_step, checkout)
    for backend in ("auto",) if options.skip_reference else ("reference", "auto"):
        add(f"{'ours' if backend == 'auto' else 'ours on the reference'} {precision}", our_step, backend)
    # Nobody trains in float32 on a GPU that has better: it is there to compare with, and compiling takes a minute.
    if device.type == "cuda" and precision == "float32" and len(precisions) > 1:
        return found
    for compiled in [False] + [True] * options.compile:
        for graph in [False] * compiled + [True] * (options.cuda_graph and device.type == "cuda"):
            name = f"ours {precision}{', compiled' * compiled}{', graph' * graph}"
            add(name, our_step, "auto", compiled, graph)
    return found


def measure(
    makers: dict[str, Make], rounds: int, one_by_one: bool, losses: dict[str, float]
) -> Iterator[tuple[dict[str, list[float]], dict[str, float]]]:
    """Seconds of every variant in each round so far, and of its first step, after each round; `losses` are added to.

    One by one, where a round is short beside building and compiling: a variant is built when those before it have been
    timed, and then all that are there go round again. Otherwise only all of them together.
    """
    with contextlib.ExitStack() as stack:  # ends their processes
        runs: dict[str, Run] = {}
        first: dict[str, float] = {}
        for name, make in makers.items():
            runs[name] = run = make()
            if isinstance(run, InAProcess):
                stack.callback(run.close)
            began = time.perf_counter()
            losses[name] = run()  # the first step warms up, and compiles
            first[name] = time.perf_counter() - began
            if name.endswith("graph"):  # recorded on the third
                run(), run()
            tolerance = 1e-4 if "float32" in name else 2e-2
            if not abs(losses[name] / next(iter(losses.values())) - 1) <= tolerance:
                sys.exit(f"the first losses differ: {losses}")
            if len(runs) < len(makers) and not one_by_one:
                continue
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    times[name].append(time.perf_counter() - began)
                    print(f"{name:<32}{1e3 * times[name][-1]:>10.1f} ms", file=sys.stderr)
                yield times, first


def batch(config: MatpacConfig, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops (rows, samples) int16 and their numbers, the same in every process."""
    torch.manual_seed(0)
    wave = torch.randint(-8_000, 8_000, (rows, LogMelConfig().n_samples(config.n_frames)))
    return wave.to(device, torch.int16), torch.arange(rows, device=device)


def our_step(
    config: MatpacConfig,
    crops: int,
    device: torch.device,
    precision: str,
    backend: str = "auto",
    compiled: bool = False,
    graph: bool = False,
) -> Run:
    """From int16 crops on the device to new weights, as the training loop does it."""
    model = Matpac(config).to(device).train()
    if compiled:
        # Of this run alone, or the first step would be that of another day.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp())
        compile_blocks(model)
    wave, index = batch(config, crops, device)
    optimizer = make_optimizer(model, TrainConfig())
    graphed = GraphedStep(model, optimizer, 3.0, precision) if graph else None

    def run() -> float:
        with use_backend(backend):
            pieces = [(ops.log_mel(wave), ops.mask_shuffle(0, STEP, index, config.n_tokens))]
            if graphed:
                step = graphed(pieces, STEP, 3e-4)
            else:
                step = train_step(model, optimizer, pieces, STEP, 3e-4, 3.0, precision)
        return float(step.loss)  # waits for the device

    return run


def official_step(config: MatpacConfig, crops: int, device: torch.device, precision: str, checkout: str) -> Run:
    """From log-mels, which the official code reads from disk, to new weights, with torch's AdamW as it comes."""
    model: Any = _official_training.load(Path(checkout), config).to(device)
    model.load_state_dict(Matpac(config).official_state_dict())
    wave, index = batch(config, crops, device)
    spec, ids_shuffle = ops.log_mel(wave), ops.mask_shuffle(0, STEP, index, config.n_tokens)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-4, (0.9, 0.95), 1e-6, 0.05)
    n_visible = int(ids_shuffle.shape[1] * (1 - model.cfg.mask_ratio))
    model._random_mask_fn = lambda shape, ratio, device: (ids_shuffle, n_visible)
    model.set_num_updates(STEP)

    def run() -> float:
        optimizer.zero_grad()
        with torch.autocast(spec.device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses = model(source=spec)["losses"]
        loss = 0.5 * losses["loss_pred"].mean() + 0.5 * losses["loss_cls"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 3.0)
        optimizer.step()
        if spec.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return run


class InAProcess:
    """A step in a process of its own, which does one and says its loss whenever it is called."""

    def __init__(self, step: Callable[..., Run], *arguments: Any):
        self._here, there = multiprocessing.Pipe()
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_answer, args=(there, step, *arguments), daemon=True)
        self._process.start()
        there.close()  # so that the end of either process is the end of the other's wait
        self._here.recv()  # imported and built

    def __call__(self) -> float:
        self._here.send("step")
        return self._here.recv()

    def close(self) -> None:
        """The end of the process, and of its memory."""
        self._here.close()
        self._process.join()


def _answer(pipe: Connection, step: Callable[..., Run], *arguments: Any) -> None:
    run = step(*arguments)
    pipe.send("ready")
    kept = freed_memory_kept(torch.device("cpu")) if step is our_step else contextlib.nullcontext()
    with kept, contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(run())


def rows_of(
    times: dict[str, list[float]], first: dict[str, float], config: MatpacConfig, crops: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Of variants that took turns; speed-ups are over the first of them."""
    base, rows = next(iter(times.values())), {}
    for name, seconds in times.items():
        rate = crops / statistics.median(seconds)
        rows[name] = {
            **_timing.summary(seconds),
            "first_ms": 1e3 * first[name],
            "crops_per_s": rate,
            "gflop_per_s": rate * step_flops(config) / 1e9,
            "speedup": statistics.median(b / s for b, s in zip(base, seconds, strict=True)),
        }
        if peak := peak_flops(device, "bf16" if "bf16" in name else "float32"):
            rows[name]["mfu"] = rate * step_flops(config) / peak
    return rows


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def report(rows: dict[str, dict[str, Any]], header: dict[str, Any], rounds: int) -> None:
    print(f"{header['preset']}, batch {header['batch_size']}, {header['device']}, ", end="")
    print(f"torch {header['torch']}, {rounds} rounds")
    print(f"{'':<32}{'ms':>10}{'crops/s':>10}{'GFLOP/s':>10}{'speed-up':>10}{'the first':>11}")
    for name, row in rows.items():
        print(f"{name:<32}{row['ms']:>10.1f}{row['crops_per_s']:>10.2f}{row['gflop_per_s']:>10.0f}", end="")
        print(f"{row['speedup']:>9.2f}x{row['first_ms'] / 1e3:>9.1f} s")
    print(f"speed-up over: {header['speedup_over']}")


if __name__ == "__main__":
    main()
