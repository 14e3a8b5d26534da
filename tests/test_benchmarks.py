"""What the benchmarks count, and which results the README's tables accept."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import _official_training
import _options
import _timing
import bench_attention
import bench_step
import bench_temporal_support
import floors
import pytest
import report
import torch
from _official_block import Block
from _timing import Case, summary
from torch import nn

from matpac_fast.config import MatpacConfig
from matpac_fast.nn import vit
from matpac_fast.vit_encoder import Encoder


def test_bytes_and_flops_against_counts_by_hand():
    wave, mels = 256 * 160_000 * 4, 256 * 80 * 998 * 4
    assert floors.log_mel(256, 160_000, 80, 998) == (wave + mels, 0)
    assert floors.log_mel(256, 160_000, 80, 998, in_bytes=2, out_bytes=2) == ((wave + mels) // 2, 0)
    assert floors.log_mel(256, 160_000, 80, 998).seconds(3.0e12, 1.0) == pytest.approx(82e-6, rel=0.01)
    assert floors.mask_shuffle(2, 3) == (2 * 8 + 6 * 8, 0)

    embed = floors.masked_patch_embed(256, 80, 608, 768, 57)
    assert embed.flops == pytest.approx(19.1e9, rel=0.01)
    assert embed.bytes == 4 * 256 * (80 * 608 + 192 * 768)
    both = floors.masked_patch_embed(256, 80, 608, 768, 57, backward=True)
    assert both.flops / embed.flops == pytest.approx(1 + 57 / 190)

    # Four products of 34,048 x 2,048 x 256: 0.18 ms at 790 TFLOP/s.
    loss = floors.prototype_loss(34_048, 2048, 256, itemsize=2)
    assert loss.seconds(3.0e12, 790e12) == pytest.approx(4 * 2 * 34_048 * 2048 * 256 / 790e12)

    alone, five = floors.prediction_loss(10, 8), floors.prediction_loss(10, 8, heads=5, backward=True)
    assert alone == (4 * 10 * 8 * 2, 0)
    assert five == (4 * 10 * 8 * (6 + 6 + 5), 0)


@pytest.mark.parametrize("fused", [True, False])
def test_the_official_block_is_ours_in_numbers_and_torch_s_alone_in_what_runs(fused):
    torch.manual_seed(0)
    ours = vit.Block(256, 8, 4)
    official = Block(256, 8, 4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6), fused=fused)
    official.load_state_dict(ours.state_dict())
    x = torch.randn(4, 191, 256)  # enough for each of our kernels

    def ran(block: nn.Module) -> tuple[torch.Tensor, set[str]]:
        with torch.profiler.profile() as profile:
            out = block(x)
            out.sum().backward()
        return out, {event.key for event in profile.key_averages() if event.key.startswith(("matpac_fast", "mkldnn"))}

    expected, kernels = ran(ours)
    assert kernels, "nothing of ours ran, so that this test could not fail"
    out, kernels = ran(official)
    assert not kernels
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_the_official_model_is_made_of_the_whole_configuration(tmp_path):
    """Its own values are others: an MCL temperature that begins at 1 made its loss another one than ours."""
    models = tmp_path / "training_matpac" / "models"
    models.mkdir(parents=True)
    (models / "model.py").write_text(
        "from types import SimpleNamespace as Some\n"
        "def general_config():\n"
        "    return Some(encoder=Some(), decoder=Some(), mcl_heads=Some(), cls_head_cfg=Some())\n"
        "class GeneralModel:\n"
        "    def __init__(self, cfg, task):\n"
        "        self.cfg, self.cls_head_loss = cfg, Some()\n"
        "    def train(self):\n"
        "        return self\n"
    )
    numbers = dict(width=96, depth=3, num_heads=2, predictor_width=48, predictor_depth=5, predictor_heads=6)
    numbers |= dict(mask_ratio=0.6, prototypes=24, head_hidden=40, mcl_heads=7, n_frames=64, max_steps=11)
    numbers |= dict(mcl_temp_start=0.31, mcl_temp_decay=0.32, mcl_temp_end=0.33, student_temp=0.34)
    numbers |= dict(teacher_temp_start=0.35, teacher_temp=0.36, teacher_temp_warmup=13, center_momentum=0.37)
    numbers |= dict(ema_start=0.38, ema_end=0.39, head_ema_start=0.41, head_ema_end=0.42)
    with mock.patch.dict(sys.modules):
        made = _official_training.load(tmp_path, MatpacConfig(classification_weight=1.0, **numbers))
        with pytest.raises(ValueError, match="has no other head_bottleneck than"):
            _official_training.load(tmp_path, MatpacConfig(head_bottleneck=16, **numbers))
    parts = (made.cfg, *(value for value in vars(made.cfg).values() if isinstance(value, type(made.cfg))))
    arrived = [value for part in (*parts, made.cls_head_loss) for value in vars(part).values()]
    assert [name for name, number in numbers.items() if number not in arrived] == []
    assert made.cfg.alpha == 0  # the classification loss alone


def test_the_narrower_limit_is_the_floor():
    work = floors.Work(bytes=100, flops=10)
    assert work.seconds(100.0, 100.0) == 1.0
    assert work.seconds(1000.0, 10.0) == 1.0


def test_a_case_knows_its_floor(monkeypatch):
    monkeypatch.setattr("_timing.bandwidth", lambda: 50.0)
    monkeypatch.setattr("_timing.matrix_rate", lambda dtype: 10.0)
    case = Case("log_mel", "", "cpp", lambda: lambda: None, floors.Work(100, 5))
    assert case.floor() == 2.0


def test_a_summary_has_median_and_quartiles():
    assert summary([0.004, 0.001, 0.002, 0.003, 0.005]) == {"ms": 3.0, "spread_ms": [2.0, 4.0]}
    assert summary([0.002]) == {"ms": 2.0, "spread_ms": [2.0, 2.0]}


class FakeGpu:
    """Clocks of a host and of the device that works off its queue; a call costs each of them its seconds."""

    def __init__(self, monkeypatch, host, device):
        self.now = self.free = 0.0
        self.host, self.device, self.held, self.calls = host, device, [], 0
        monkeypatch.setattr(_timing, "DEVICE", torch.device("cuda"))
        monkeypatch.setattr(_timing, "SAMPLE", 5e-3)
        monkeypatch.setattr(_timing.time, "perf_counter", lambda: self.now)
        for name, fake in (("Event", self.event), ("synchronize", self.wait), ("_sleep", self.hold)):
            monkeypatch.setattr(torch.cuda, name, fake)

    def call(self):
        self.now += self.host
        self.calls += 1
        self.work(self.device)

    def work(self, seconds):
        self.free = max(self.now, self.free) + seconds

    def wait(self):
        self.now = max(self.now, self.free)

    def hold(self, cycles):
        self.held.append(cycles)
        self.work(cycles / _timing.CYCLES)

    def event(self, enable_timing):
        found = SimpleNamespace()
        found.record = lambda: setattr(found, "at", max(self.now, self.free))
        found.elapsed_time = lambda end: 1e3 * (end.at - found.at)
        return found


@pytest.mark.parametrize(("host", "device", "calls"), [(5e-5, 1e-5, 84), (5e-5, 2e-3, 3), (1e-3, 2e-2, 1)])
def test_a_gpu_is_timed_back_to_back_and_its_host_apart(monkeypatch, host, device, calls):
    gpu = FakeGpu(monkeypatch, host, device)
    assert _timing.pace(gpu.call).calls == calls
    found = _timing.turn_by_turn({"a": gpu.call}, lambda turns: turns < 3)["a"]
    assert found.device == pytest.approx([device] * 3)
    assert found.row()["host_ms"] == pytest.approx(1e3 * host)
    assert found.calls == calls
    assert min(gpu.held) > calls * host * 2e9  # the device begins when all is queued


def test_the_variants_of_an_op_take_turns_and_one_that_fails_leaves_the_others_their_rows(monkeypatch, tmp_path):
    gpu = FakeGpu(monkeypatch, 1e-5, 0.0)
    monkeypatch.setattr(_timing, "bandwidth", lambda: 50.0)
    monkeypatch.setattr(_timing, "matrix_rate", lambda dtype: 10.0)
    monkeypatch.setattr(_timing, "peak_extra_mib", lambda call: 1.0)
    order, slowing = [], itertools.count(1)

    def call(name, seconds):
        order.append((name, _timing.backend._forced))
        gpu.device = seconds * (next(slowing) // 4)  # the device slows down as the turns go by
        gpu.call()

    def broken():
        raise RuntimeError("no such kernel")

    makes = {
        "reference": lambda: partial(call, "reference", 0.02),
        "compiled reference": broken,
        "cpp": lambda: partial(call, "cpp", 0.01),
    }
    monkeypatch.setattr(_timing, "launchers", lambda op: ("cpp",))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv(_timing.ROWS, str(tmp_path / "rows.json"))
    (tmp_path / "rows.json").write_text('["of the op before"]')
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda call: call())
    cases = [Case("an op", "", variant, make, floors.Work(100)) for variant, make in makes.items()]
    with pytest.raises(RuntimeError, match="no such kernel"):
        _timing.run(benchmark, cases, 0.1)
    plain, fast = benchmark.extra_info["rows"]
    assert json.loads((tmp_path / "rows.json").read_text()) == ["of the op before", plain, fast]
    assert order[-4:] == [("reference", "auto"), ("cpp", "cpp")] * 2
    assert (plain["variant"], fast["variant"]) == ("reference", "cpp")
    assert fast["over"] == {"reference": pytest.approx(2, rel=0.3)}
    assert (fast["turns"], fast["floor_ms"]) == (5, 2000)
    assert "host, ms |" in "\n".join(report.op_table([plain, fast]))
    assert f"{fast['over']['reference']:.2f}" in "\n".join(_timing.table([fast]))


def test_a_cpu_is_timed_over_some_milliseconds_of_calls(monkeypatch):
    calls, now = [], [0.0]
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 2e-3

    assert _timing.pace(call) == _timing.Pace(20)
    seconds, host = _timing.timed(call, _timing.Pace(3))
    assert (seconds, host, len(calls)) == (pytest.approx(2e-3), None, 4)


def test_attention_may_differ_by_roundings_of_large_numbers():
    math, near = torch.tensor([5.0, 0.5], dtype=torch.bfloat16), torch.tensor([5.03125, 0.5], dtype=torch.bfloat16)
    assert bench_attention.difference((near,), (math,)) == pytest.approx(0.03125 / 5)
    assert bench_attention.difference((math + 0.25,), (math,)) == 0.25  # of the small number


def test_a_precision_that_no_step_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_step.py", "--precision", "fp16", "--preset", "nano", "--rounds", "1"])
    monkeypatch.setattr(bench_step, "batch", lambda *_: pytest.fail("it was taken for float32"))
    with pytest.raises(SystemExit):
        bench_step.main()
    assert "invalid choice: 'fp16'" in capsys.readouterr().err


def step_options(**changes):
    return SimpleNamespace(**{"skip_reference": False, "compile": True, "cuda_graph": True} | changes)


def test_what_a_step_is_compared_with(monkeypatch):
    monkeypatch.delenv("MATPAC_OFFICIAL", raising=False)

    def names(device, precision, precisions):
        return list(bench_step.variants(step_options(batch_size=1), precision, precisions, None, torch.device(device)))

    both = ["float32", "bf16"]
    assert names("cuda", "float32", both) == ["ours on the reference float32", "ours float32"]
    more = ["ours bf16, graph", "ours bf16, compiled", "ours bf16, compiled, graph"]
    assert names("cuda", "bf16", both) == ["ours on the reference bf16", "ours bf16", *more]
    assert names("cuda", "float32", ["float32"])[2:] == [name.replace("bf16", "float32") for name in more]
    assert names("cpu", "float32", both)[2:] == ["ours float32, compiled"]


@pytest.mark.parametrize("one_by_one", [True, False])
def test_variants_take_turns_and_are_known_after_every_round(one_by_one):
    order = []

    def make(name):
        order.append(f"build {name}")
        return lambda: order.append(name) or 1.0

    makers = {name: partial(make, name) for name in ("a float32", "b float32")}
    rounds = [list(times) for times, _ in bench_step.measure(makers, 2, one_by_one, {})]
    a, b = makers
    turns = [a, b, a, b]
    if one_by_one:
        assert order == [f"build {a}", a, a, a, f"build {b}", b, *turns]
        assert rounds == [[a], [a], [a, b], [a, b]]
    else:
        assert order == [f"build {a}", a, f"build {b}", b, *turns]
        assert rounds == [[a, b], [a, b]]


def test_first_losses_that_differ_end_the_run():
    makers = {f"{x} float32": lambda x=x: lambda: x for x in (1.0, 1.01)}
    with pytest.raises(SystemExit, match="the first losses differ"):
        list(bench_step.measure(makers, 1, True, {}))


def test_the_largest_batch_is_of_one_pass_through_the_network(monkeypatch):
    made = bench_temporal_support.make("embed", 624, "tiny", torch.device("cpu"))
    shapes = []

    def forward(encoder, groups, pool, layers):
        shapes.append([tuple(group.shape) for group in groups])
        if len(groups[0]) > 90:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Encoder, "forward_groups", forward)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert bench_temporal_support.largest_that_fits(made.fits, 100.7) == 88
    assert shapes[0] == [(100, 80, 608), (100, 80, 16)]
    assert [found[0][0] for found in shapes] == [100, 97, 94, 91, 88]
    monkeypatch.setattr(Encoder, "forward_groups", lambda *_: (_ for _ in ()).throw(RuntimeError("a fault")))
    with pytest.raises(RuntimeError, match="a fault"):
        bench_temporal_support.largest_that_fits(made.fits, 100)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (_options.count, "0", "expected a whole number from 1"),
        (_options.count, "-3", "expected a whole number from 1"),
        (_options.count, "1.5", "expected a whole number from 1"),
        (_options.positive, "0", "expected a positive number"),
        (_options.positive, "nan", "expected a positive number"),
        (_options.positive, "soon", "expected a positive number"),
        (_options.device, "gpu", "expected auto, cpu, cuda"),
        (_options.there, "{}/none.json", "there is no file"),
        (_options.output, "{}", "is a folder"),
        (_options.output, "{}/file/a.json", "is no folder to write into"),
        (_options.folder, "{}/file", "is no folder to write into"),
        (bench_temporal_support.in_patches, "0.1", "10 frames; expected a multiple of 16"),
        (bench_temporal_support.in_patches, "0.001", "0 frames; expected a multiple of 16"),
    ],
)
def test_an_option_that_cannot_be_is_refused(kind, text, reason, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        kind(text.format(tmp_path))


def test_options_that_can_be(tmp_path):
    assert (_options.count("3"), _options.positive("0.5")) == (3, 0.5)
    assert _options.device("cpu") == torch.device("cpu")
    assert _options.output(str(tmp_path / "new" / "a.json")) == tmp_path / "new" / "a.json"
    assert not list((tmp_path / "new").iterdir())
    assert bench_temporal_support.in_patches("6.08") == 6.08


def test_a_process_that_fails_ends_this_one_with_its_words(capfd):
    assert _timing.answer(sys.executable, "-c", "print(3)") == "3\n"
    with pytest.raises(SystemExit, match="no such encoder"):
        _timing.answer(sys.executable, "-c", "raise SystemExit('no such encoder')")


@pytest.mark.parametrize("minutes", [0.02, 0.25])
def test_a_file_to_embed_is_as_long_as_it_is_called(minutes, tmp_path):
    soundfile = pytest.importorskip("soundfile", reason="needs soundfile: pip install 'matpac_fast[audio]'")
    importlib.import_module("bench_embed_memory").write(tmp_path / "x.flac", minutes)
    assert soundfile.info(tmp_path / "x.flac").frames == round(60 * minutes * 16_000)


REHEARSE = Path(report.__file__).parent / "rehearse" / "run.py"


def test_a_rehearsal_says_which_torch_it_needs(monkeypatch, capsys):
    rehearse = runpy.run_path(str(REHEARSE))
    monkeypatch.setattr(sys, "argv", ["run.py", "true"])
    for built, told in ((None, "without CUDA"), ("12.8", "with CUDA 12.8")):
        monkeypatch.setattr(torch.version, "cuda", built)
        assert rehearse["main"]() == 2
        assert f"is built {told}; it takes one with CUDA 13" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(shutil, "which", lambda *args, **options: None)
    assert rehearse["main"]() == 2
    assert "nvcc is not on the PATH" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_a_rehearsal_plays_what_torch_calls(tmp_path):
    """A library that calls a function we give and one that we do not, in place of libtorch_cuda.so."""
    source, folder = tmp_path / "calls.c", tmp_path / "torch" / "lib"
    source.write_text("int cudaGetDeviceCount(int*), cublasOther(void);\n"
                      "int calls(int* n) { return cudaGetDeviceCount(n) + cublasOther(); }\n")  # fmt: skip
    folder.mkdir(parents=True)
    caller = folder / "libtorch_cuda.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(source), "-o", str(caller)], check=True)
    build = tmp_path / "build"
    build.mkdir()
    library = runpy.run_path(str(REHEARSE))["build"]("nvcc", folder.parent, build)
    program = (
        f"import ctypes; n = ctypes.c_int(); c = ctypes.CDLL({str(caller)!r}); print(c.calls(ctypes.byref(n)), n.value)"
    )
    environment = {**os.environ, "LD_PRELOAD": str(library), "REHEARSE_GPUS": "3"}
    command = [sys.executable, "-c", program, str(caller)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["0", "3"]


def test_kernels_are_counted_from_their_ptx(monkeypatch, capsys):
    pytest.importorskip("triton", reason="needs triton: pip install 'matpac_fast[triton]'")
    emulate = importlib.import_module("emulate")
    monkeypatch.setattr(sys, "argv", ["emulate.py", "mask_shuffle", "--lines", "1"])
    emulate.main()
    kernel, busiest, worst = capsys.readouterr().out.splitlines()[2:]
    assert re.match(r"mask_shuffle +48 +\d,\d{3} +8 +1\.00 ", kernel)  # 16 rows of three blocks each
    assert re.match(r" +mask_shuffle\.py:\d+ +\d,\d{3} .*xor\.b64", busiest)  # the noise
    assert re.match(r" +mask_shuffle\.py:\d+ +global store", worst)  # by rank, which is random
    monkeypatch.setattr(sys, "argv", ["emulate.py", "log_mell"])
    with pytest.raises(SystemExit):
        emulate.main()
    assert "no kernel is named log_mell; there are add_layer_norm, attention," in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["emulate.py", "cuda_log_mel"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        emulate.main()
    assert "nvcc is not on the PATH, for the CUDA kernels" in capsys.readouterr().err
