"""What a run will cost, before it is begun."""

from __future__ import annotations

import contextlib
import math
import os
import time
from datetime import timedelta
from pathlib import Path

import torch

from .. import ops
from ..audio.corpus import Corpus
from ..config import MatpacConfig
from ..model import Matpac
from ..oom import is_out_of_memory
from .begin import sampler_of
from .config import TrainConfig, resolve_precision
from .flops import step_flops
from .step import make_optimizer, train_step
from .watch import TrainingError
from .weights import load_weights

# Crops that the speed is measured on; more would only take longer on a CPU.
_SAMPLE = {"cpu": 4, "cuda": 256}


def estimate(
    corpus: Corpus,
    model_config: MatpacConfig,
    config: TrainConfig,
    device: torch.device,
    world: int = 1,
    done: int = 0,
    init: str | os.PathLike[str] | None = None,
) -> str:
    """Size, work, memory and time of a run on `world` devices, of which `done` steps are behind it, as text.

    Two steps on noise are timed on a model that is thrown away, on one device, as if more of them shared no work; the
    tensors that a third one keeps for its backward pass are counted. Where the steps do not fit into memory all but
    the time is told. Weights to begin from, `init`, that do not fit the model are refused as `load_weights` does.

    Raises:
        TrainingError: not even two crops fit into the memory of `device`.
    """
    precision = resolve_precision(config.precision, device)
    frames = config.crop_frames or (model_config.n_frames,)
    crops = [model_config.log_mel.n_samples(n) for n in frames]
    sampler = sampler_of(corpus, crops, config)
    flops = sum(step_flops(model_config, n) for n in frames) / len(frames) * config.batch_size
    model = Matpac(model_config)
    if init is not None:
        load_weights(model, init)
    try:
        kept = activation_bytes(model.to(device).train(), max(frames), precision, device)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingError(
            f"the model and two of its crops do not fit into the memory of {device}: choose a smaller preset or a "
            "shorter crop, or --device cpu to have it counted there"
        ) from None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    averaged = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    piece = config.batch_size // world // config.grad_accumulation  # crops at a time on one device
    shards = world if config.shard else 1
    fixed = 4 * (4 * trained + averaged) / shards
    rows = min(piece, _SAMPLE.get(device.type, 4))
    measured = _speed(model, config, precision, device, rows)
    speed = time_needed = f"not known: {rows} crops at a time do not fit into the memory of {device}"
    if measured is not None:  # on the longest crop; shorter ones take less
        crops_per_s = world * measured * step_flops(model_config, max(frames)) * config.batch_size / flops
        place = str(device) if world == 1 else f"{world} processes, were they not to wait for each other,"
        speed = f"about {crops_per_s:.1f} crops/s in {precision} on {place} (two steps timed)"
        seconds = (config.steps - done) * config.batch_size / crops_per_s
        time_needed = f"about {timedelta(seconds=round(seconds))}"
        if done:
            time_needed += f" for the {config.steps - done} steps that are left"
    table = {
        "trained parameters": f"{trained / 1e6:.1f} M",
        "teachers' parameters": f"{averaged / 1e6:.1f} M",
        "weights, gradients, Adam": _mib(fixed),
        "activations": f"{_mib(kept * piece)}, {kept / 2**20:.1f} MiB a crop, {piece} at a time",
        "memory": (
            f"about {_mib(fixed + kept * piece)} on each device, and what its kernels need in passing; "
            + _room(fixed, kept, config, world, free_memory(device))
        ),
        "checkpoint": (
            f"{_mib(4 * (3 * trained + averaged))} on disk, the newest {config.keep_last} stay; as much of the host's "
            "memory until it is written"
        ),
        "work": f"{flops / config.batch_size / 1e9:.1f} GFLOP a crop, {flops / 1e12:.2f} TFLOP a step",
        "clips": f"{sampler.n_clips}, {sampler.n_dropped} shorter than a crop are left out",
        "steps": f"{config.steps}, {len(sampler) / config.batch_size:.1f} an epoch",
        "epochs": f"{sampler.epoch(config.steps):.1f}",
        "speed": speed,
        "time": time_needed,
    }
    width = max(map(len, table))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in table.items())


def activation_bytes(model: Matpac, n_frames: int, precision: str, device: torch.device) -> float:
    """What one crop's forward pass keeps for its backward pass, counted: each storage once, weights not at all.

    Of two sizes of batch the difference, so that what does not grow with the batch, such as weights rounded to bf16,
    is left out.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes = []
    for rows in (1, 2):
        # Kept alive until all are counted, or a freed one's address may be given out twice.
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, torch.Tensor] = kept) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        spec = torch.randn(rows, model.config.n_mels, n_frames, device=device)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            model(spec)
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    model.center_sum.zero_()
    model.center_count.zero_()
    return sizes[1] - sizes[0]


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take: of a GPU, or of the host, which a control group may bound."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = 1024 * float(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):  # none, or "max"
        most, taken = (int(Path("/sys/fs/cgroup", f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, most - taken)
    return free


def _room(fixed: float, kept: float, config: TrainConfig, world: int, free: float) -> str:
    """Whether the step fits, of `fixed` bytes and `kept` for a crop; where it does not, in how many pieces it would."""
    if free == math.inf:
        return "how much is free is not known"
    rows = config.batch_size // world
    pieces = [n for n in range(config.grad_accumulation, rows + 1) if rows % n == 0]
    fitting = next((n for n in pieces if fixed + kept * (rows // n) <= free), None)
    if fitting == config.grad_accumulation:
        return f"{_mib(free)} are free"
    advice = f"--grad-accumulation {fitting} would fit" if fitting else "choose a smaller preset or a shorter crop"
    return f"too much for the {_mib(free)} that are free: {advice}"


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def _speed(model: Matpac, config: TrainConfig, precision: str, device: torch.device, rows: int) -> float | None:
    """Crops a second of a training step in pieces of `rows`, from one after a first that warms up; None where they do
    not fit into memory."""
    n_frames, mel = max(config.crop_frames or (model.config.n_frames,)), model.config.log_mel
    wave = torch.randint(-(2**15), 2**15, (rows, mel.n_samples(n_frames)), dtype=torch.int16).to(device)
    seconds = 0.0
    try:
        optimizer = make_optimizer(model, config)
        for step in range(2):
            start = time.perf_counter()
            spec = ops.log_mel(wave, mel)
            n_tokens = model.config.freq * (n_frames // model.config.patch_size)
            ids_shuffle = ops.mask_shuffle(config.seed, step, torch.arange(rows, device=device), n_tokens)
            train_step(model, optimizer, [(spec, ids_shuffle)], step, config.lr, config.clip_norm, precision)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - start
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return None
        raise
    return rows / seconds
