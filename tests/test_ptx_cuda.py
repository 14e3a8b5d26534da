"""csrc/cuda as nvcc compiles it, run from its PTX: the kernels, their launches, their barriers."""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ptx.cuda_kernels import CudaKernels
from ptx.memory import Fault
from ptx.report import Report
from torch import Tensor

from matpac_fast import reference
from matpac_fast.reference import LogMelConfig

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc, of CUDA's toolkit, on the PATH")
op_module = importlib.import_module("matpac_fast.ops.log_mel")
TEMPS = (0.1, 0.04)


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> CudaKernels:
    return CudaKernels(tmp_path_factory.mktemp("cuda"), processors=1)


def log_mel(
    cuda: CudaKernels, wave: Tensor, config: LogMelConfig = LogMelConfig(), dtype: torch.dtype = torch.float32, **how
) -> Tensor:
    out = torch.full((wave.shape[0], config.n_mels, config.n_frames(wave.shape[1])), torch.nan, dtype=dtype)
    plan = op_module._plan(config, torch.float32, wave.device, fours=True)
    args = op_module._arguments(wave, out, config, plan)
    # Frames past a clip's last one are computed from what happens to lie there, and not stored.
    cuda("log_mel", args, [wave, out, *plan], strict=False, **how)
    return out


def noise(batch: int, samples: int) -> Tensor:
    return 0.1 * torch.randn(batch, samples, generator=torch.Generator().manual_seed(samples))


CONFIGS = [
    LogMelConfig(),
    LogMelConfig(hop=80, n_mels=128, bank="htk"),
    LogMelConfig(hop=353, n_mels=17),
    LogMelConfig(n_mels=65, bank="kaldi", window="povey", gain=32768.0, mean=15.4, std=13.1),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("samples", [400, 7_777, 13_000])
def test_log_mel(cuda, config, samples):
    wave = noise(2, samples)
    exact = reference.log_mel(wave.double(), config)
    bound = 2 * float((reference.log_mel(wave, config) - exact).abs().max()) + 2e-6 * float(exact.abs().max())
    out = log_mel(cuda, wave, config)
    assert float((out - exact).abs().max()) <= bound
    assert torch.equal(log_mel(cuda, wave, config, torch.bfloat16), out.bfloat16())
    whole = (wave * 32768).round().to(torch.int16)
    assert torch.equal(log_mel(cuda, whole, config), log_mel(cuda, whole / 32768, config))


def test_log_mel_of_views_and_of_what_is_no_number(cuda):
    wide = noise(2, 9_000)
    wave = wide[:, 1_001:8_000]
    assert torch.equal(log_mel(cuda, wave), log_mel(cuda, wave.contiguous()))
    wave = wave.clone()
    wave[0, 3_000] = torch.nan
    out, clean = log_mel(cuda, wave), log_mel(cuda, wave.nan_to_num())
    holds = torch.tensor([160 * t <= 3_000 < 160 * t + 400 for t in range(out.shape[2])])
    assert out[0][:, holds].isnan().all()
    assert torch.equal(out[0][:, ~holds], clean[0][:, ~holds])
    assert torch.equal(out[1], clean[1])


def test_log_mel_leaves_no_bank_waiting(cuda):
    """Shared memory takes no turn more than its bytes need, but where a block fills its tables."""
    reports: list[Report] = []
    log_mel(cuda, noise(1, 160 * 32 * 8 + 240), on_report=reports.append)
    (report,) = reports
    kinds = report.by_kind()
    assert kinds["shared load"].taken == kinds["shared load"].least
    assert kinds["shared store"].taken <= 1.01 * kinds["shared store"].least
    assert kinds["global store"].taken == kinds["global store"].least


def prototype_loss(
    cuda: CudaKernels, student: Tensor, teacher: Tensor, center: Tensor, narrow: torch.dtype | None = None
):
    """loss, column_sum, delta of the forward pass and delta of the backward pass, in `narrow` where it is given."""
    (n, k), dtype = student.shape, student.dtype
    blocks, code = 3, int(dtype == torch.float64)
    loss, stats = student.new_full((n,), torch.nan), student.new_full((n, 4), torch.nan)
    delta, again = (torch.full((n, k), torch.nan, dtype=narrow or dtype) for _ in range(2))
    columns, column_sum = student.new_full((blocks, k), torch.nan), torch.zeros(k, dtype=torch.float64)
    scales = math.log2(math.e) / torch.tensor(TEMPS, dtype=torch.float64)
    delta_code = {None: code, torch.bfloat16: 3, torch.float16: 4}[narrow]

    def args(loss: int, delta: Tensor, column_sum: int) -> tuple[int, ...]:
        pointers = (student.data_ptr(), teacher.data_ptr(), center.data_ptr())
        results = (loss, stats.data_ptr(), delta.data_ptr(), delta_code, column_sum)
        return (*pointers, code, n, k, scales.data_ptr(), *results)

    tensors = [student, teacher, center, loss, stats, delta, again, columns, column_sum, scales]
    forward = args(loss.data_ptr(), delta, column_sum.data_ptr())
    cuda("prototype_loss_forward", (*forward, columns.data_ptr(), blocks), tensors)
    cuda("prototype_loss_delta", args(0, again, 0), tensors)
    return {"loss": loss, "column_sum": column_sum, "delta": delta, "again": again}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("k", [1, 6, 1024, 1027, 2048, 4100, 8192, 8195])
def test_prototype_loss(cuda, k, dtype):
    logits = torch.randn(2, 7, k, dtype=dtype, generator=torch.Generator().manual_seed(k))
    center = torch.randn(k, dtype=dtype, generator=torch.Generator().manual_seed(1))
    out = prototype_loss(cuda, *logits, center)
    p = torch.softmax((logits[1].double() - center.double()) / TEMPS[1], 1)
    log_q = torch.log_softmax(logits[0].double() / TEMPS[0], 1)
    exact = {"loss": -(p * log_q).sum(1), "column_sum": p.sum(0), "delta": log_q.exp() - p}
    exact["again"] = exact["delta"]
    eps = torch.finfo(dtype).eps
    for name, value in out.items():
        torch.testing.assert_close(value.double(), exact[name], rtol=200 * eps, atol=100 * eps)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_prototype_loss_gives_the_gradient_of_16_bits(cuda, narrow):
    student, teacher = torch.randn(2, 5, 2048, generator=torch.Generator().manual_seed(0))
    center = torch.zeros(2048)
    wide, out = (prototype_loss(cuda, student, teacher, center, dtype) for dtype in (None, narrow))
    for name in ("delta", "again"):
        assert torch.equal(out[name], wide[name].to(narrow))


@pytest.mark.parametrize("capability", [80, 100, 120])
def test_every_architecture_gives_the_same(cuda, tmp_path, capability):
    """Each gets instructions of its own."""
    other, wave = CudaKernels(tmp_path, capability, processors=1), noise(1, 160 * 32 * 2 + 240)
    assert torch.equal(log_mel(other, wave), log_mel(cuda, wave))
    student, teacher = torch.randn(2, 3, 2048, generator=torch.Generator().manual_seed(0))
    mine, theirs = (prototype_loss(kernels, student, teacher, torch.zeros(2048)) for kernels in (other, cuda))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_runtime_that_is_there_already_is_left_alone(tmp_path):
    """As a torch built with CUDA loads one, for all that comes later: on a machine without a GPU it would refuse, and
    on one with a GPU it would launch."""
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int cudaGetDevice(int* device) { return 35; }  // the driver is too old\n")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)  # which nvcc calls, too
    code = (
        "import ctypes, pathlib, sys; ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL); import emulate; "
        "emulate.cuda_log_mel(emulate.CudaKernels(pathlib.Path(sys.argv[2])), lambda report: print(report.blocks))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, library, tmp_path / "kernels"],
        cwd=Path(__file__).parents[1] / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert found.stdout.split() == ["2"], found.stderr


@pytest.mark.parametrize("name", ["log_mel", "prototype_loss"])
def test_no_barrier_is_too_many_and_none_is_missing(cuda, name):
    """With any one of its barriers taken out, a kernel is found to race."""
    wave = noise(1, 160 * 32 * 3 + 240)
    student, teacher = torch.randn(2, 7, 2048, generator=torch.Generator().manual_seed(0))
    run = {
        "log_mel": lambda kernels: log_mel(kernels, wave),
        "prototype_loss": lambda kernels: prototype_loss(kernels, student, teacher, torch.zeros(2048)),
    }[name]
    without = cuda.without_barriers(name)
    assert len(without) >= 2
    for kernels in without:
        with pytest.raises(Fault, match="no barrier lies between"):
            run(kernels)


def test_a_fault_names_its_instruction_and_its_line(cuda):
    wave = noise(1, 7_777)
    config, out = LogMelConfig(), torch.empty(1, 80, 47)
    plan = op_module._plan(config, torch.float32, wave.device, fours=True)
    args = op_module._arguments(wave, out, config, plan)
    with pytest.raises(Fault, match=r"(?s)nobody's.*in .*log_mel_kernel.*ld\.global\.f32.*\(log_mel_block\.h:\d+\)"):
        cuda("log_mel", args, [wave[:, :7_000].clone(), out, *plan], strict=False)


def test_what_the_launch_refuses_is_told(cuda):
    with pytest.raises(RuntimeError, match="the hop is a window of 400 samples at most"):
        log_mel(cuda, noise(1, 2_000), LogMelConfig(hop=523))
