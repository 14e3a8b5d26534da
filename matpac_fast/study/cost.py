"""What an encoder costs at a temporal support, measured in a fresh process: memory, time, operations.

`python -m matpac_fast.study.cost ENCODER DEVICE DTYPE THREADS TS BATCH` is that process; it prints one line of
JSON, behind `_TOLD`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..audio_encoder import AudioEncoder
from ..encoder import list_encoders, load_encoder
from ..errors import ConfigError
from .own_code import class_name, dtype_name, own_code

_SECONDS = 1.0  # of timing, at least
_RUNS = (5, 200)
_TOLD = "matpac_fast cost: "


@dataclass(frozen=True)
class Cost:
    """One encoder at one temporal support and batch size; windows of noise, from waves on the device to embeddings.

    Attributes:
        encoder_id: of `AudioEncoder.id`.
        parameters: numbers in the weights.
        macs: multiply-adds of the matrix products and convolutions for one window, counted as they run; custom
            operators (log-mel, patch embedding) are not seen by the counter.
        batch_ms: median milliseconds for one batch; `batch_ms_low` and `batch_ms_high` are the quartiles over `runs`.
        peak_mib: the most memory held at once: CUDA's allocator; on the CPU the weights and what became resident
            while the batch ran.
        weights_mib: of it, the weights.
        encoder_class, code: of own_code.py, by which an encoder that is being written is told from what it was; "" in a
            table of before they were kept.
    """

    encoder: str
    encoder_id: str
    temporal_support: float
    batch: int
    device: str
    dtype: str
    threads: int
    parameters: int
    macs: int
    batch_ms: float
    batch_ms_low: float
    batch_ms_high: float
    runs: int
    peak_mib: float
    weights_mib: float
    sample_rate: int
    embedding_dim: int
    torch: str
    matpac_fast: str
    encoder_class: str = ""
    code: str = ""

    def times_real_time(self, hop: float | None = None) -> float:
        """Seconds of audio a second. `hop`: seconds from one window to the next; None: as the temporal support."""
        return 1e3 * self.batch * (hop or self.temporal_support) / self.batch_ms

    def macs_per_second(self, hop: float | None = None) -> float:
        """Multiply-adds per second of audio; `hop` as above."""
        return self.macs / (hop or self.temporal_support)


def measure(
    encoder: str, temporal_support: float, batch: int, device: str, dtype: str = "float32", threads: int | None = None
) -> Cost:
    """Measure in a process of its own, where nothing else has touched the memory.

    Raises:
        ConfigError: the process failed; the message is its last line.
    """
    threads = threads or torch.get_num_threads()
    arguments = [encoder, device, dtype, str(threads), repr(temporal_support), str(batch)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "matpac_fast.study.cost", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        told = f"cost of {encoder} at {temporal_support:g} s, in a process of its own: {lines[-1]}"
        if "no encoder" in lines[-1] and encoder.partition(":")[0] in list_encoders():
            told += "; register_encoder names it in one process alone: leave costs out, or give it an entry point"
        raise ConfigError(told)
    told = [line.removeprefix(_TOLD) for line in done.stdout.splitlines() if line.startswith(_TOLD)]
    return Cost(**json.loads(told[-1]))


def main(arguments: list[str]) -> None:
    """The fresh process."""
    name, device, dtype, threads, ts, batch = arguments
    torch.set_num_threads(int(threads))
    cost = measure_here(load_encoder(name, device, dtype=dtype), name, float(ts), int(batch))
    print("\n" + _TOLD + json.dumps(asdict(cost)))  # an encoder's own code may print before and after it


def measure_here(encoder: AudioEncoder, name: str, ts: float, batch: int) -> Cost:
    """Measure in this process, whose earlier work makes memory on the CPU look smaller than it is."""
    device = encoder.device
    n = max(1, round(ts * encoder.sample_rate))
    generator = torch.Generator().manual_seed(0)
    waves = (0.1 * torch.randn(batch, n, generator=generator)).to(device)
    tensors = [*encoder.parameters(), *encoder.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors) / 2**20
    with torch.no_grad():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            _run(encoder, waves)
            peak = torch.cuda.max_memory_allocated(device) / 2**20
        else:
            _run(encoder, waves[:1, : encoder.min_samples])  # what is loaded at first use is no cost of the window
            before = _settle()
            _run(encoder, waves)
            peak = weights + _resident("VmHWM") - before
        times, begun = [], time.perf_counter()
        while len(times) < _RUNS[0] or (time.perf_counter() - begun < _SECONDS and len(times) < _RUNS[1]):
            clock = time.perf_counter()
            _run(encoder, waves)
            times.append(1e3 * (time.perf_counter() - clock))
        macs = count_macs(encoder, waves[:1])
    low, middle, high = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    )
    return Cost(
        encoder=name,
        encoder_id=encoder.id,
        temporal_support=ts,
        batch=batch,
        device=device_name(device),
        dtype=dtype_name(encoder),
        threads=torch.get_num_threads(),
        parameters=sum(p.numel() for p in encoder.parameters()),
        macs=macs,
        batch_ms=middle,
        batch_ms_low=low,
        batch_ms_high=high,
        runs=len(times),
        peak_mib=peak,
        weights_mib=weights,
        sample_rate=encoder.sample_rate,
        embedding_dim=encoder.embedding_dim,
        torch=torch.__version__,
        matpac_fast=__version__,
        encoder_class=class_name(encoder),
        code=own_code(encoder),
    )


def count_macs(encoder: AudioEncoder, waves: torch.Tensor) -> int:
    """Multiply-adds of the matrix products and convolutions for these waves (N, S), counted as they run."""
    return macs_of(lambda: encoder.embed_windows(waves, batch_size=len(waves)))


def macs_of(call: Callable[[], Any]) -> int:
    """`count_macs` of whatever `call` runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    def attention(qkv_shape: tuple[int, ...], *args: object, **options: object) -> int:
        b, n, _, h, d = qkv_shape
        return 4 * b * h * n**2 * d

    # torch's attention as plain products: the counter does not know every fused kernel, nor ours.
    mapping = {torch.ops.matpac_fast.attention: attention}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops() // 2


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _run(encoder: AudioEncoder, waves: torch.Tensor) -> None:
    encoder.embed_windows(waves, batch_size=len(waves)).cpu()


def _resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    raise ConfigError(f"/proc/self/status has no {field}: memory is measured on Linux only; use --no-cost")


def _settle() -> float:
    """Give back what is free, let VmHWM start anew, and return what is resident, MiB."""
    _resident("VmHWM")  # raises where the system does not tell
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's alone
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _resident("VmRSS")


if __name__ == "__main__":
    main(sys.argv[1:])
