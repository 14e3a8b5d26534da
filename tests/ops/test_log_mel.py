"""ops.log_mel in C++, for every instruction set that runs here; the oracle is the reference in float64."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from matpac_fast import ops, reference, use_backend
from matpac_fast.errors import BackendError
from matpac_fast.reference import LogMelConfig
from matpac_fast.zoo.beats import BEATS_LOG_MEL
from matpac_fast.zoo.passt import PASST_LOG_MEL

_C = pytest.importorskip("matpac_fast._C")
# ops.log_mel is the function; this is the module it lives in.
op_module = importlib.import_module("matpac_fast.ops.log_mel")

CONFIG = LogMelConfig()

OTHER_CONFIGS = [
    LogMelConfig(hop=37),  # 400 is no multiple of it
    LogMelConfig(hop=400, n_mels=1),
    LogMelConfig(hop=523, n_mels=23, f_min=0.0),  # samples between the windows
    LogMelConfig(n_mels=128, bank="htk"),  # low filters without a single bin
    LogMelConfig(n_mels=40, bank="kaldi", window="povey", gain=32768.0, mean=15.4, std=13.1),
    LogMelConfig(log_offset=1e-10, mean=0.0, std=1.0),
]


def noise(batch: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(batch, samples, generator=generator, dtype=torch.float64).float()


def tone(samples: int, hz: float = 440.0, amplitude: float = 0.9) -> Tensor:
    return amplitude * torch.sin(2 * math.pi * hz / 16_000 * torch.arange(samples, dtype=torch.float64)).float()[None]


def error(out: Tensor, exact: Tensor) -> float:
    return float((out.double() - exact).abs().max())


@pytest.fixture(autouse=True)
def cpp() -> Iterator[None]:
    with use_backend("cpp"):
        yield


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, instruction_set) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


on_each_isa = pytest.mark.usefixtures("isa")


@on_each_isa
@pytest.mark.parametrize("entry", ["noise", "chirp", "silence", "quiet", "loud", "one_frame", "odd"])
def test_no_further_from_float64_than_the_official_float32(golden, entry):
    arrays = golden("log_mel")
    wave, exact, official = (arrays[f"{entry}/{name}"] for name in ("wave", "exact_fp64", "official_fp32"))
    out = ops.log_mel(wave)
    assert out.dtype == torch.float32
    assert error(out, exact) <= error(official, exact)
    assert error(out, exact) <= 2e-5
    assert error(ops.log_mel(wave.double()), exact) < 1e-11


@on_each_isa
@pytest.mark.parametrize("config", [CONFIG, *OTHER_CONFIGS])
@pytest.mark.parametrize(("batch", "samples"), [(3, 400), (1, 20_000), (2, 10_717)])
def test_against_the_reference(config, batch, samples):
    wave = noise(batch, samples)
    wave[:, samples // 2 :] *= 1e-3
    exact = reference.log_mel(wave.double(), config)
    bound = 2 * error(reference.log_mel(wave, config), exact) + 2e-6 * float(exact.abs().max())
    before = wave.clone()
    out = ops.log_mel(wave, config)
    assert out.shape == exact.shape
    assert out.is_contiguous()
    assert error(out, exact) <= bound
    assert torch.equal(wave, before)
    assert torch.equal(out, ops.log_mel(wave, config))
    torch.testing.assert_close(ops.log_mel(wave.double(), config), exact, rtol=1e-11, atol=1e-11)


@on_each_isa
@pytest.mark.parametrize("hz", [61.3, 443.0, 3_011.0, 7_890.0])
def test_a_loud_tone_over_silence(hz):
    wave = tone(8_000, hz)
    exact = reference.log_mel(wave.double())
    assert error(ops.log_mel(wave), exact) < 1e-6
    assert error(reference.log_mel(wave), exact) > 1e-5  # what a float32 transform makes of it


@on_each_isa
@pytest.mark.parametrize("level", [3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
def test_a_loud_tone_over_noise(level):
    wave = tone(40_000, 61.3) + 10 * level * noise(1, 40_000)
    assert error(ops.log_mel(wave), reference.log_mel(wave.double())) < 1e-4


@on_each_isa
def test_int16_is_the_wave_over_32768():
    wave = (noise(3, 12_345) * 32768).round().clamp(-32768, 32767)
    wave[2] = 32767.0  # full scale, as a constant
    assert torch.equal(ops.log_mel(wave.to(torch.int16)), ops.log_mel(wave / 32768))


@on_each_isa
def test_bfloat16_is_the_rounded_float32():
    wave = noise(2, 3_000)
    assert torch.equal(ops.log_mel(wave, dtype=torch.bfloat16), ops.log_mel(wave).bfloat16())


@on_each_isa
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, 1e15])
def test_constant(value):
    wave = torch.full((1, 1_500), value)
    exact = reference.log_mel(wave.double())
    out = ops.log_mel(wave)
    # What is left of a constant outside the first bins is the transform's rounding, the reference's too.
    assert error(out, exact) <= 2 * error(reference.log_mel(wave), exact) + 5e-7


@on_each_isa
def test_without_an_offset_silence_is_minus_infinity():
    config = LogMelConfig(log_offset=0.0)
    wave = torch.cat([torch.zeros(1, 2_000), noise(1, 2_000), torch.full((1, 2_000), 1e-22)], dim=1)
    exact = reference.log_mel(wave.double(), config)
    out = ops.log_mel(wave, config)
    assert torch.equal(out == -torch.inf, reference.log_mel(wave, config) == -torch.inf)
    loud = slice(14, 22)  # frames of noise only
    assert error(out[:, :, loud], exact[:, :, loud]) < 1e-5


@on_each_isa
def test_nan_and_infinity_stay_in_the_frames_that_hold_them():
    wave = noise(2, 6_000)
    clean = ops.log_mel(wave)
    wave[0, 1_000] = torch.nan
    wave[1, 4_000] = torch.inf
    wave[1, 2_000] = 3e37  # whose power overflows
    out = ops.log_mel(wave)
    start = 160 * torch.arange(out.shape[2])
    holds = torch.stack([(start <= at) & (at < start + 400) for at in (1_000, 4_000, 2_000)])
    assert out[0][:, holds[0]].isnan().all()
    assert not out[1][:, holds[1]].isfinite().any()
    assert torch.equal(out[1][:, holds[2]].isfinite(), reference.log_mel(wave)[1][:, holds[2]].isfinite())
    assert torch.equal(out[0][:, ~holds[0]], clean[0][:, ~holds[0]])
    rest = ~(holds[1] | holds[2])
    assert torch.equal(out[1][:, rest], clean[1][:, rest])


@on_each_isa
def test_same_bits_for_any_batch_position_and_number_of_threads():
    wave = torch.cat([noise(5, 30_000), tone(30_000)])  # the tone's frames are transformed in float64
    wave[1, 9_000:11_000] += tone(2_000)[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = torch.cat([ops.log_mel(row[None]) for row in wave])
        torch.set_num_threads(7)
        together = ops.log_mel(wave)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, together)
    later = ops.log_mel(wave[:, 160 * 13 :])
    assert torch.equal(later, together[:, :, 13:])


def test_tables_that_are_not_cached_last_as_long_as_the_call(monkeypatch):
    # As where several threads make the first call at once, each its own tables, of which the cache keeps one.
    wave = noise(2, 6_000)
    want = ops.log_mel(wave)
    monkeypatch.setattr(op_module, "_plan", op_module._plan.__wrapped__)
    for _ in range(20):
        assert torch.equal(ops.log_mel(wave), want)


def test_strides():
    wave = noise(4, 5_000)
    want = ops.log_mel(wave)
    assert torch.equal(ops.log_mel(wave.T.contiguous().T), want)
    assert torch.equal(ops.log_mel(noise(4, 5_003)[:, 3:]), ops.log_mel(noise(4, 5_003)[:, 3:].clone()))
    assert torch.equal(ops.log_mel(wave[::2]), want[::2])
    assert torch.equal(ops.log_mel(wave[:1].expand(3, -1)), want[:1].expand(3, -1, -1))


@on_each_isa
def test_empty_batch():
    assert ops.log_mel(torch.empty(0, 1_000)).shape == (0, 80, 4)


@on_each_isa
def test_every_output_is_written(monkeypatch):
    # An empty tensor is filled with NaN under this setting.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert ops.log_mel(noise(3, 12_345)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("config", [PASST_LOG_MEL, BEATS_LOG_MEL])
def test_other_front_ends_take_the_reference(config):
    wave = noise(2, 16_000)
    with pytest.raises(BackendError, match="'cpp' is forced and has no kernel"):
        ops.log_mel(wave, config)
    with use_backend("auto"):
        assert torch.equal(ops.log_mel(wave, config), reference.log_mel(wave, config))


def run_emulated(wave: Tensor, config: LogMelConfig, dtype: torch.dtype, blocks: int, backwards: bool) -> Tensor:
    """The CUDA kernel's threads, one after the other on the CPU."""
    out = torch.full((wave.shape[0], config.n_mels, config.n_frames(wave.shape[1])), torch.nan, dtype=dtype)
    plan = op_module._plan(config, torch.float32, wave.device, fours=True)
    _C.log_mel_emulated(op_module._args(wave, out, config, plan), blocks, backwards)
    return out


@pytest.mark.parametrize("config", [config for config in (CONFIG, *OTHER_CONFIGS) if config.hop <= 400])
def test_the_cuda_kernel_block_by_block(config):
    wave = torch.cat([noise(2, 7_777), tone(7_777, 443.0, amplitude=1e-3)])
    exact = reference.log_mel(wave.double(), config)
    bound = 2 * error(reference.log_mel(wave, config), exact) + 2e-6 * float(exact.abs().max())
    out = run_emulated(wave, config, torch.float32, blocks=2, backwards=False)
    assert error(out, exact) <= bound
    # No barrier is missing: the order of the threads and the division among blocks leave the bits alone.
    assert torch.equal(out, run_emulated(wave, config, torch.float32, blocks=5, backwards=True))
    assert torch.equal(out.bfloat16(), run_emulated(wave, config, torch.bfloat16, blocks=3, backwards=False))
    whole = (wave * 32768).round().to(torch.int16)
    assert torch.equal(
        run_emulated(whole, config, torch.float32, 1, False),
        run_emulated(whole / 32768, config, torch.float32, 1, True),
    )


@pytest.mark.parametrize("hop", [1, 31, 32, 33, 159, 161, 320, 353])
def test_the_cuda_kernel_reads_a_tile_of_any_hop(hop):
    config, wave = LogMelConfig(hop=hop), noise(2, 40 * hop + 437)
    out = run_emulated(wave, config, torch.float32, blocks=2, backwards=False)
    torch.testing.assert_close(out, reference.log_mel(wave.double(), config).float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cuda_kernel_stores_any_number_of_frames(dtype):
    for frames in (1, 2, 3, 4, 30, 31, 32, 33, 34, 35, 36, 67):  # by ones, twos and fours, in whole tiles and in rests
        wave = noise(2, CONFIG.n_samples(frames))
        out = run_emulated(wave, CONFIG, dtype, blocks=2, backwards=False)
        rtol = 0 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(out, reference.log_mel(wave.double()).to(dtype), rtol=rtol, atol=1e-5)


def test_the_cuda_kernels_table_is_the_bank():
    for n_mels in (4, 7, 80, 128):
        config = LogMelConfig(n_mels=n_mels)
        with torch.device("meta"):  # as torch.set_default_device("cuda"), which changes nothing
            _, bands, bins, _ = op_module._plan.__wrapped__(config, torch.float32, torch.device("cpu"), fours=True)
        bank = torch.zeros(n_mels, 13 * 16)
        for row, (fours, first) in zip(bank, bands.tolist(), strict=True):
            weights, places = bins[first : first + fours].split(4, dim=1)
            row[places.flatten().long()] = weights.contiguous().view(torch.float32).flatten()
        assert torch.equal(bank[:, _C.log_mel_places()], reference.mel_bank(config).float())
        for four in bands[:, 0].split(4):  # of one warp
            assert (four == four[0]).all()


def shared_bytes(hop: int) -> int:
    """Of the CUDA kernel, as csrc/log_mel_block.h lays its memory out: table, spectrum, samples or powers."""
    samples = (32 + 399 // hop) * (hop | 1)
    return 16 * 13 * 16 + 4 * (16 * 25 * 32 + max(samples, 13 * 16 * 32))


def test_the_cuda_kernel_fits_into_the_shared_memory_of_every_gpu(monkeypatch):
    least = 101_376  # bytes of sm_86, 89 and 120
    assert max(shared_bytes(hop) for hop in range(1, op_module._CUDA_HOP + 1)) <= least
    assert shared_bytes(op_module._CUDA_HOP + 1) > least
    # What does not fit goes to Triton where that is.
    missing = {"cuda": None, "triton": None}
    monkeypatch.setattr(op_module, "choose", lambda *_: "cuda")
    monkeypatch.setattr(op_module.backend, "_forced", "auto")
    monkeypatch.setattr(op_module.backend, "unavailable", missing.__getitem__)
    wave = noise(1, 1_000)
    assert op_module._choose(wave, LogMelConfig(hop=353)) == "cuda"
    assert op_module._choose(wave, LogMelConfig(hop=354)) == "triton"
    assert op_module._choose(wave, LogMelConfig(hop=354, n_mels=129)) == "reference"
    missing["triton"] = "not installed"
    assert op_module._choose(wave, LogMelConfig(hop=354)) == "reference"
    monkeypatch.setattr(op_module.backend, "_forced", "cuda")
    with pytest.raises(BackendError, match="'cuda' is forced .* hops of at most 353 samples, not 354"):
        op_module._choose(wave, LogMelConfig(hop=354))


def test_the_cuda_kernel_on_what_is_not_finite():
    wave = noise(1, 6_000)
    clean = run_emulated(wave, CONFIG, torch.float32, 1, False)
    wave[0, 1_000] = torch.nan
    out = run_emulated(wave, CONFIG, torch.float32, 1, False)
    start = 160 * torch.arange(out.shape[2])
    holds = (start <= 1_000) & (start + 400 > 1_000)
    assert out[0][:, holds].isnan().all()
    assert torch.equal(out[0][:, ~holds], clean[0][:, ~holds])
    assert run_emulated(wave, CONFIG, torch.bfloat16, 1, False)[0][:, holds].isnan().all()
    silent = LogMelConfig(log_offset=0.0)
    assert (run_emulated(torch.zeros(1, 400), silent, torch.float32, 1, False) == -torch.inf).all()


def test_gradient_is_that_of_the_reference():
    x = noise(2, 1_000).requires_grad_()
    upstream = torch.randn(2, 80, 4, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(ops.log_mel(x), x, upstream)
    (expected,) = torch.autograd.grad(reference.log_mel(x), x, upstream)
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("config", [CONFIG, BEATS_LOG_MEL, PASST_LOG_MEL], ids=["kernel", "beats", "passt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_does_not_reach_inside(config, dtype):
    wave = noise(2, 3_000)
    with use_backend("auto"):
        want = ops.log_mel(wave, config)
        with torch.autocast("cpu", dtype):
            assert torch.equal(ops.log_mel(wave, config), want)


def test_nor_does_it_reach_the_gradient():
    x, found = noise(2, 1_000).requires_grad_(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found += torch.autograd.grad(ops.log_mel(x).sum(), x)
    assert torch.equal(*found)


@on_each_isa
def test_gradcheck():
    wave = noise(1, 450).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.log_mel(x, LogMelConfig(n_mels=4)), wave, fast_mode=True)


def test_opcheck():
    scalars = (*dataclasses.astuple(CONFIG), torch.float32)
    op = torch.ops.matpac_fast.log_mel.default
    torch.library.opcheck(op, (noise(3, 1_234), *scalars))
    torch.library.opcheck(op, (noise(1_234, 3).T.requires_grad_(), *scalars))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compiles_whole_with_a_dynamic_batch(backend):
    if backend == "reference" and torch.__version__.startswith("2.6"):
        pytest.skip("torch 2.6 cannot trace its FFT with dynamic shapes on the CPU")
    compiled = torch.compile(lambda x: 2 * ops.log_mel(x), fullgraph=True, dynamic=True, backend=aot_eager)
    with use_backend(backend):
        for batch, samples in ((2, 1_000), (5, 1_700)):
            x = noise(batch, samples).requires_grad_()
            out = compiled(x)
            assert torch.equal(out, 2 * ops.log_mel(x))
            upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(batch))
            got = torch.autograd.grad(out, x, upstream)[0]
            torch.testing.assert_close(got, torch.autograd.grad(2 * ops.log_mel(x), x, upstream)[0])


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"\(2, 399\).*400 samples \(25 ms\): pad it"):
        ops.log_mel(noise(2, 399))
    with pytest.raises(ValueError, match="2 dimensions"):
        ops.log_mel(torch.zeros(1_000))
    with pytest.raises(TypeError, match="float16"):
        ops.log_mel(torch.zeros(1, 1_000, dtype=torch.float16))
    with pytest.raises(TypeError, match="expected float32 or bfloat16"):
        ops.log_mel(torch.zeros(1, 1_000), dtype=torch.float64)
    with pytest.raises(TypeError, match="config is a int; expected a LogMelConfig"):
        ops.log_mel(torch.zeros(1, 400), 80)
    with pytest.raises(TypeError, match="Tensor"):
        ops.log_mel([0.0] * 1_000)  # type: ignore[arg-type]


def test_forced_and_missing_raises():
    with pytest.raises(BackendError, match=r"triton|cuda"), use_backend("cuda"):
        ops.log_mel(noise(1, 1_000))


@pytest.mark.parametrize(
    "config", [LogMelConfig(), LogMelConfig(framing="center", preemphasis=0.97), LogMelConfig(hop=7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_no_clips(config, dtype):
    wave = torch.zeros((0, 800), dtype=dtype)
    for backend in ("auto", "reference"):
        with use_backend(backend):
            out = ops.log_mel(wave, config)
        assert (out.shape, out.dtype) == ((0, config.n_mels, config.n_frames(800)), torch.float32)
    wave = torch.zeros((0, 800), requires_grad=True)
    with use_backend("auto"):
        (grad,) = torch.autograd.grad(ops.log_mel(wave, config).sum(), wave)
    assert grad.shape == wave.shape


def test_a_floor_is_one_where_no_kernel_has_it():
    config = LogMelConfig(log_offset=0.0, log_floor=1e-2)
    wave = torch.zeros(1, 1600)
    with use_backend("auto"):
        torch.testing.assert_close(ops.log_mel(wave, config), reference.log_mel(wave, config), rtol=0, atol=0)
