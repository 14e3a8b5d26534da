"""What a training step takes the host, part by part: CPU time of all its threads, the kernels' own time left out.

    python benchmarks/bench_host.py                                   on a GPU
    python benchmarks/rehearse/run.py python benchmarks/bench_host.py      without one, on a machine with torch for CUDA

A step that is no CUDA graph, as those of several GPUs, can be no faster than this. Kinds of step take turns; of each,
the round that took least. Below: what holds the GPU up between steps, in milliseconds on the clock.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from matpac_fast import Matpac, MatpacConfig, ops, use_backend
from matpac_fast.nn.statistics import effective_rank
from matpac_fast.train import step as steps
from matpac_fast.train.config import TrainConfig
from matpac_fast.train.state import Snapshot

PARTS = ("front end", "forward", "backward", "norm", "EMA", "optimiser")


def one_step(model: Matpac, optimizer: torch.optim.AdamW, batch: int, precision: str) -> Callable[[], list[float]]:
    """A step that returns the seconds of each of PARTS."""
    device, config = torch.device("cuda"), model.config
    wave = torch.zeros(batch, config.log_mel.n_samples(config.n_frames), dtype=torch.int16, device=device)
    index = torch.arange(batch, device=device)

    def run() -> list[float]:
        took, since = [], time.process_time()

        def lap() -> None:
            nonlocal since
            took.append(time.process_time() - since)
            torch.cuda.synchronize()  # which a host that waits for a GPU spends time on
            since = time.process_time()

        spec, ids_shuffle = ops.log_mel(wave, config.log_mel), ops.mask_shuffle(0, 3, index, config.n_tokens)
        lap()
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(spec, ids_shuffle, step=3).loss
        lap()
        loss.backward()
        lap()
        norm = steps._hand_gradients(model, optimizer, steps.ALONE)
        bad = ~norm.isfinite()
        lap()
        model.update_teachers(3, bad)
        lap()
        steps._optimise(optimizer, norm, bad, 3e-4, 3.0)
        optimizer.zero_grad(set_to_none=True)
        lap()
        return took

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", help="size of the model")
    parser.add_argument("--batch-size", type=int, default=256, help="crops")
    parser.add_argument("--rounds", type=int, default=10, help="of one step of each kind")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_host: no GPU here; benchmarks/rehearse/run.py plays one")
    model = Matpac(MatpacConfig.preset(options.preset)).cuda().train()
    kinds = [(source, precision) for precision in ("bf16", "float32") for source in ("auto", "reference")]
    optimizer = steps.make_optimizer(model, TrainConfig())
    run = {precision: one_step(model, optimizer, options.batch_size, precision) for _, precision in kinds}
    best: dict[tuple[str, str], list[float]] = {}
    for i in range(2 + options.rounds):
        for kind in kinds:
            with use_backend(kind[0]):
                took = run[kind[1]]()
            if i >= 2:  # kernels compile, Adam makes its moments
                best[kind] = min(best.get(kind, took), took, key=sum)
    print(f"{options.preset}, batch {options.batch_size}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    print(f"{'CPU ms a step':24}" + "".join(f"{part:>12}" for part in (*PARTS, "together")))
    for (source, precision), parts in best.items():
        name = f"{'ours' if source == 'auto' else 'on the reference'}, {precision}"
        print(f"{name:24}" + "".join(f"{1000 * part:12.1f}" for part in (*parts, sum(parts))))
    print("ms on the clock, first and least")
    for name, call in waits(model, optimizer).items():
        took = [clocked(call) for _ in range(5)]
        print(f"{name:52}{1000 * took[0]:12.1f}{1000 * min(took):12.1f}")


def waits(model: Matpac, optimizer: torch.optim.AdamW) -> dict[str, Callable[[], object]]:
    """What the training waits for at a checkpoint, and would for an effective rank, which it leaves to a thread."""
    latents = torch.randn(4096, model.config.width, dtype=torch.float64, device="cuda")
    gram = latents.T @ latents
    state = {"step": 0}
    return {
        "a checkpoint's copy": lambda: Snapshot.take(model, optimizer, state),
        "its weights alone, into memory that is not pinned": lambda: [t.cpu() for t in model.state_dict().values()],
        "an effective rank by the GPU": lambda: effective_rank(gram),
        "an effective rank by the host": lambda: effective_rank(gram.cpu()),
    }


def clocked(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
